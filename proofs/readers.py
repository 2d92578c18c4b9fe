"""What a later stage or command makes of each kind of stored file, as one hash: the cheapest use that reads all of it."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.data.records import iter_images, load_questions, read_manifest
from vlm_vqa.evaluation.helm.files import read_table
from vlm_vqa.hashing import hash_files, hash_json
from vlm_vqa.inference.export import read_training, write_export
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.params import load_params
from vlm_vqa.training import checkpoint_files
from vlm_vqa.training.checkpoint_state import Checkpoint

QUESTIONS = ("What color is it?", "How many are there?", "Is it raining?")


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and how they are read."""

    folder: str
    """Below it they lie; messages name it."""
    read: Callable[[Path, Encoder], str]
    """(project, encoder) -> a hash over all that reading gives."""
    unread: tuple[str, ...] = ()


def read_records(root: Path, encoder: Encoder) -> str:
    folder = root / "data/records"
    manifest = read_manifest(folder)
    FeatureStore(root / "data/features", {"data_hash": manifest["data_hash"]})
    questions = [load_questions(folder, split).to_list() for split in ("train", "val")]
    images = [[one.image_id, one.file_name, hashlib.sha256(one.data).hexdigest()] for one in iter_images(folder)]
    return hash_json([manifest, questions, images])


def read_features(root: Path, encoder: Encoder) -> str:
    expected = {"encoder_hash": encoder.hash, "data_hash": read_manifest(root / "data/records")["data_hash"]}
    store = FeatureStore(root / "data/features", expected)
    ids = [one.image_id for one in iter_images(root / "data/records")]
    return hash_json([digest(store.batch(ids)), ids, str(store.dtype), store.tolerance, len(store)])


def read_checkpoint(root: Path, encoder: Encoder) -> str:
    newest = checkpoint_files.latest(root / "checkpoints/flips")
    world = checkpoint_files.world_of(newest) if newest else None
    if newest is None or world is None:
        return hash_json([None])
    found: list[Any] = [newest.name]
    for rank in range(world):
        checkpoint_files.verify(newest, rank, world)
        tensors = checkpoint_files.read_tensors(newest, rank, world)
        found.append({name: digest(tensors.get_tensor(name)) for name in tensors.keys()})
    found += [Checkpoint(newest, 0, world).facts, (newest / "trainer_state.json").read_text()]
    return hash_json(found)


def read_trained(root: Path, encoder: Encoder) -> str:
    folder = root / "models/trained"
    params, manifest, training = (
        load_params(root / "params.yaml"),
        read_manifest(root / "data/records"),
        read_training(folder),
    )
    results = {"steps": 1, "kept_step": 1, "kept_because": "the last step"}
    with tempfile.TemporaryDirectory() as place:
        write_export(Path(place) / "export", folder, encoder, params, training, results, manifest)
        return hash_files((path for path in Path(place).rglob("*") if path.is_file()), place)


def read_export(root: Path, encoder: Encoder) -> str:
    folder = root / "models/export"
    predictor = Predictor.from_export(folder, device="cpu")
    pictures = [
        Image.fromarray(np.random.default_rng(size).integers(0, 256, (size, 60, 3), np.uint8)) for size in (40, 70, 99)
    ]
    answers = [predictor.answer([question], [picture]) for question, picture in zip(QUESTIONS, pictures, strict=True)]
    facts = [predictor.weights_hash, predictor.mask, predictor.instruction, predictor.layout.text_length]
    # As the card says.
    model = AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    )
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    contents = [
        [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        for picture, question in zip(pictures, QUESTIONS, strict=True)
    ]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}] for content in contents],
        tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True},
    )  # fmt: skip
    inputs.pop("labels", None)
    with torch.no_grad():
        logits = model(**inputs).logits
    weights = {name: digest(value) for name, value in predictor.model.state_dict().items()}
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    settings = model.generation_config.to_dict()
    return hash_json([facts, weights, digest(logits), answers, inputs["input_ids"].tolist(), settings, tokenizer])


def read_predictions(root: Path, encoder: Encoder) -> str:
    return hash_json(read_table(root / "reports/predictions.parquet").to_pydict())


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


KINDS = {
    "records": Kind("data/records", read_records, ("report.html",)),
    "features": Kind("data/features", read_features),
    "checkpoint": Kind("checkpoints/flips", read_checkpoint, ("lock",)),
    "trained": Kind("models/trained", read_trained),
    "export": Kind("models/export", read_export, ("README.md",)),
    "predictions": Kind("reports/predictions.parquet", read_predictions),
}
