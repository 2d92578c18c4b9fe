"""The exported folder: plain transformers opens it and answers as the trained model, by the card's own words."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests.tiny_model import tiny_base, write_adapter, write_trained
from vlm_vqa.errors import UserError
from vlm_vqa.inference.card import PACKAGES, card
from vlm_vqa.inference.export import read_training, write_base, write_export
from vlm_vqa.inference.predictor import FACTS_FILE, Predictor
from vlm_vqa.model.layout import Row, visible
from vlm_vqa.model.vlm import hash_weights, save_trained, text_hidden, text_logits, trained_state
from vlm_vqa.params import (
    Dtype,
    ExportParams,
    Keep,
    LoraParams,
    Mask,
    ModelParams,
    Start,
    ValidateOn,
    ValidationParams,
)
from vlm_vqa.sealed import read_folder

QUESTIONS = ["What color is the shape?", "Is there a dog?", "How many red dogs are there?"]
DATA = {"source": "directory", "notes": ["a note"], "splits": {"train": {"questions": 3, "images": 2}}}


@pytest.fixture
def trained(tiny, tmp_path):
    """Return a function that writes a trained folder for a mask: (folder, encoder, params)."""
    return lambda mask: write_trained(tiny, tmp_path / f"trained-{mask}", mask)


RESULTS = {"steps": 1, "kept_step": 1, "kept_because": "the last step"}


def export(tiny, trained, mask, target):
    folder, encoder, params = trained(mask)
    write_export(target, folder, encoder, params, read_training(folder), RESULTS, DATA)


def picture(path):
    values = np.random.default_rng(0).integers(0, 255, (31, 45), dtype=np.uint8)
    Image.fromarray(values).save(path)


def snippet(folder):
    """Return the card's own code."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    return code


SCRIPT = """
import json, runpy, sys, torch
answers, logits = [], []
for file in sys.argv[1:]:
    names = runpy.run_path(file)
    answers.append(names["answer"])
    with torch.no_grad():
        logits.append(names["model"](**names["inputs"]).logits[0, -1].tolist())
assert "vlm_vqa" not in sys.modules
print(json.dumps([answers, logits]))
"""


def pasted(folder, path, question):
    """Return the card's code as a user has it in his file: pasted, with his own values in its first three lines."""
    first, second, third, *rest = snippet(folder).splitlines()
    assert [line.split(" = ")[0] for line in (first, second, third)] == ["folder", "path", "question"]
    mine = [f"folder = {str(folder)!r}", f"path = {str(path)!r}", f"question = {question!r}"]
    return "\n".join([*mine, *rest])


ASK = """
import sys
from vlm_vqa.cli import main
code = main()
unused = {"bitsandbytes", "datasets", "deepspeed", "mlflow", "peft", "pyarrow", "torch._dynamo"} & set(sys.modules)
assert code == 0 and not unused, unused
"""


def by_the_card(folder, path):
    """Run the card's code from files in a fresh interpreter that sees neither the project nor its environment variables."""
    files = [path.with_name(f"{number}.py") for number in range(len(QUESTIONS))]
    for file, question in zip(files, QUESTIONS, strict=True):
        file.write_text(pasted(folder, path, question))
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, *files],
        cwd=path.parent, capture_output=True, text=True, timeout=300,
        env={"HOME": os.environ["HOME"], "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    answers, logits = json.loads(last)
    assert printed == answers
    return answers, logits


@pytest.mark.slow
@pytest.mark.parametrize("mask", [mask.value for mask in Mask])
def test_plain_transformers_gives_the_trained_models_logits_and_answers(tiny, trained, mask, tmp_path):
    folder = tmp_path / "export"
    export(tiny, trained, mask, folder)
    picture(tmp_path / "grey.png")
    answers, logits = by_the_card(folder, tmp_path / "grey.png")

    # By our own command too, which loads the libraries in a way of its own and says nothing beside the answers.
    asked = subprocess.run(
        [sys.executable, "-c", ASK, "ask", "--model", str(folder), str(tmp_path / "grey.png"), *QUESTIONS, "--json"],
        env={**os.environ, "PYTHONPATH": "src"}, capture_output=True, text=True,
    )  # fmt: skip
    assert [json.loads(line)["answer"] for line in asked.stdout.splitlines()] == answers and asked.stderr == ""

    ours = Predictor.from_export(folder, device="cpu")
    image = Image.open(tmp_path / "grey.png")
    assert ours.answer(QUESTIONS, [image] * 3) == answers
    assert len(set(answers)) > 1, "all answers alike: the test would see nothing"
    layout = tiny.layout(mask)
    features = ours.encode([image])
    for question, expected in zip(QUESTIONS, logits, strict=True):
        batch = layout.collate([Row(0, (layout.tokenize(question),))])
        allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
        tiny.training.eval()
        with torch.no_grad():
            hidden = text_hidden(tiny.training, features, batch["input_ids"], batch["position_ids"], allowed)
            found = text_logits(tiny.training, hidden)[0, -1]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_the_card_says_first_whether_plain_use_is_right_and_sets_token_types_where_it_is_not(tiny, trained, tmp_path):
    for mask, right in (("image-prefix", False), ("prefix-lm", True), ("causal", True)):
        export(tiny, trained, mask, tmp_path / mask)
        use = (tmp_path / mask / "README.md").read_text().split("## Use\n\n")[1]
        assert use.startswith("Whatever opens this folder" if right else "**Only the code below computes")
        assert snippet(tmp_path / mask).count("token_type_ids") == (0 if right else 1)


def test_the_card_pins_what_is_installed_and_is_the_same_in_every_wheel_of_a_version(trained, monkeypatch):
    _, _, params = trained("image-prefix")
    text = card(params, {}, {}, DATA)
    assert f"pip install {' '.join(f'{name}=={metadata.version(name)}' for name in PACKAGES)}\n" in text
    least = re.search(r'require_version\("transformers>=(.*)"\)', text)[1]
    assert f"**transformers {least} is the oldest" in text
    # 5.22 opens the export and leaves out the soft cap of the logits; here the parity test above would fail.
    assert Version(least) <= Version(metadata.version("transformers"))

    real = metadata.version
    monkeypatch.setattr("vlm_vqa.inference.card.version", lambda name: f"{real(name)}+cpu")
    assert card(params, {}, {}, DATA) == text


def test_the_card_says_where_the_weights_come_from(trained):
    _, _, params = trained("prefix-lm")
    text = card(params, {}, {}, DATA)
    assert (
        "Gemma 2, from random weights too," in text
        and "drawn pictures with labels for shape and colour: those that easy-VQA asks about." in text
    )
    assert "data above alone" not in text
    vision = dataclasses.replace(params.vision, model="facebook/dinov2-base")
    language = dataclasses.replace(params.language, model="google/gemma-2-2b-it")
    text = card(dataclasses.replace(params, vision=vision, language=language), {}, {}, DATA)
    assert "Gemma 2, from its authors' weights," in text and "`facebook/dinov2-base` as its authors" in text
    assert "drawn pictures" not in text and "random weights too" not in text
    start = ModelParams(start=Start.CHECKPOINT, checkpoint="google/paligemma-3b-pt-224", revision="a" * 40)
    text = card(dataclasses.replace(params, model=start), {}, {}, DATA, ("SigLIP", "Gemma"))
    assert f"SigLIP (of `google/paligemma-3b-pt-224`, revision {'a' * 40}) sees the image" in text
    assert "The projector, from the checkpoint's weights, and Gemma, from the checkpoint's too, were trained" in text
    assert "DINOv2" not in text and "random weights" not in text


def test_an_export_is_the_same_bytes_twice(tiny, trained, tmp_path):
    for name in ("one", "two"):
        export(tiny, trained, "image-prefix", tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"README.md", FACTS_FILE, "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_an_export_brings_its_adapter_which_gives_its_logits_on_the_base_by_the_cards_words(
    tiny, trained, tmp_path, monkeypatch
):
    folder, encoder, params = trained("image-prefix")
    lora = LoraParams(rank=2, alpha=3.0, dropout=0.1, targets=("q_proj", "v_proj"))
    params = dataclasses.replace(params, train=dataclasses.replace(params.train, lora=lora))
    merged = write_adapter(tiny_base(tiny), params, folder / "adapter")
    save_trained(tiny.training.config, merged, folder)
    monkeypatch.chdir(tmp_path)
    before = write_base(tmp_path / "base", tiny.training, encoder, tiny.processor, params)
    with pytest.raises(UserError, match="base is there already"):
        write_base(tmp_path / "base", tiny.training, encoder, tiny.processor, params)
    write_export(tmp_path / "export", folder, encoder, params, {"weights_hash": hash_weights(merged)}, RESULTS, DATA)

    facts = read_folder(tmp_path / "export/adapter/adapter.json", "sealed", "")
    base, exported = (read_folder(tmp_path / name / FACTS_FILE, "sealed", "") for name in ("base", "export"))
    assert facts["base_hash"] == before == base["weights_hash"] and base["step"] == 0
    assert facts["weights_hash"] == exported["weights_hash"]
    (lines,) = re.findall(r"```\n(from peft .*?)```", (tmp_path / "export/README.md").read_text(), flags=re.DOTALL)
    stock = AutoModelForImageTextToText
    names = {"AutoModelForImageTextToText": stock, "folder": "export"}
    exec(lines, names)
    plain = [stock.from_pretrained(name, attn_implementation="eager") for name in ("export", "base")]
    inputs = tiny.processor(images=[Image.new("RGB", (28, 28))], text=["<image>What?"], return_tensors="pt")
    with torch.no_grad():
        ours, start, theirs = (one(**inputs).logits for one in (*plain, names["model"]))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours - start).abs().max() > 0.1


@pytest.mark.parametrize(
    ("validation", "selected_on"),
    [
        ({}, "nothing"),
        ({"questions": 2, "from_": ValidateOn.VAL}, "nothing"),
        ({"questions": 2, "keep": Keep.BEST}, "a dev part of the training images"),
        ({"questions": 2, "keep": Keep.BEST, "from_": ValidateOn.VAL}, "reported questions"),
        ({"questions": 2, "patience": 3, "from_": ValidateOn.VAL}, "reported questions"),
    ],
)
def test_the_export_says_which_step_it_is_and_by_which_questions_it_was_selected(
    tiny, trained, tmp_path, validation, selected_on
):
    changed = {"validation": ValidationParams(**validation)}
    export(
        tiny,
        lambda mask: (*trained(mask)[:2], dataclasses.replace(trained(mask)[2], **changed)),
        "prefix-lm",
        tmp_path / "export",
    )
    found = Predictor.from_export(tmp_path / "export").selection
    assert found == {"step": 1, "step_is": "the last step", "selected_on": selected_on}


def test_an_export_in_bfloat16_and_in_several_files_is_the_trained_weights_rounded(
    tiny, trained, tmp_path, monkeypatch
):
    folder, encoder, params = trained("causal")
    params = dataclasses.replace(params, export=ExportParams(dtype=Dtype.BFLOAT16))
    monkeypatch.setattr("vlm_vqa.inference.export.SHARD", "60KB")
    write_export(tmp_path / "export", folder, encoder, params, read_training(folder), RESULTS, DATA)
    assert len(list((tmp_path / "export").glob("model-*-of-*.safetensors"))) > 1
    assert read_folder(tmp_path / "export" / FACTS_FILE, "sealed", "")["dtype"] == "bfloat16"
    whole = trained_state(tiny.training) | {f"model.vision_tower.{k}": v for k, v in encoder.model.state_dict().items()}
    stored = Predictor.from_export(tmp_path / "export", device="cpu", dtype=torch.bfloat16).model.state_dict()
    for read in (stored, Predictor.from_export(tmp_path / "export", device="cpu").model.state_dict()):
        assert set(read) - {"lm_head.weight"} == set(whole)
        assert all(torch.equal(read[name].float(), value.bfloat16().float()) for name, value in whole.items())
    assert all(value.dtype == torch.bfloat16 for value in stored.values())


def test_a_bare_generate_is_greedy_short_and_ends_at_eos_also_after_another_save(tiny, trained, tmp_path):
    export(tiny, trained, "causal", tmp_path / "export")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    stock.save_pretrained(tmp_path / "again")
    tokenizer = tiny.processor.tokenizer
    for folder in ("export", "again"):
        found = json.loads((tmp_path / folder / "generation_config.json").read_text())
        del found["transformers_version"]
        assert found == {
            "do_sample": False, "max_new_tokens": 10, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        }  # fmt: skip


def test_weights_that_are_not_the_trained_ones_are_refused(tiny, trained, tmp_path):
    folder, encoder, params = trained("image-prefix")
    with pytest.raises(UserError, match="training wrote 000000000000"):
        write_export(tmp_path / "export", folder, encoder, params, {"weights_hash": "0" * 64}, RESULTS, DATA)
    assert not (tmp_path / "export").exists()
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="model.safetensors: damaged.*vlm-vqa repair train"):
        read_training(folder)
    export(tiny, trained, "image-prefix", tmp_path / "export")
    facts = tmp_path / "export" / FACTS_FILE
    facts.write_text(facts.read_text().replace('"weights_hash": "', '"weights_hash": "0'))
    with pytest.raises(UserError, match="vlm-vqa repair export"):
        Predictor.from_export(tmp_path / "export")


WHOLE = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    FACTS_FILE,
)
WAYS = (None, b"", 0.5, bytes(range(256)) * 9, b"[1, 2]", b"null", b"{}", b"[" * 100_000)


def test_a_damaged_export_is_one_named_error(tiny, trained, tmp_path, monkeypatch):
    """Never a traceback, never another model in its place, and nothing is asked of the hub."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    folder = tmp_path / "export"
    export(tiny, trained, "image-prefix", folder)
    for name in WHOLE:
        whole = (folder / name).read_bytes()
        for way in WAYS:
            (folder / name).unlink()
            if way is not None:
                (folder / name).write_bytes(whole[: int(way * len(whole))] if isinstance(way, float) else way)
            with pytest.raises(UserError, match=rf"^{folder}.*{name}.*`(vlm-vqa repair|dvc repro) export") as error:
                Predictor.from_export(folder, device="cpu")
            assert "\n" not in str(error.value), (name, way)
            (folder / name).write_bytes(whole)
    Predictor.from_export(folder, device="cpu")


def test_one_bit_in_any_file_is_named_before_it_is_read(tiny, trained, tmp_path, monkeypatch):
    export(tiny, trained, "image-prefix", tmp_path / "export")
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("read before it was checked")
    )
    for path in sorted((tmp_path / "export").rglob("*")):
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[len(whole) // 2] ^= 4
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"^{path}: .*vlm-vqa repair export"):
            Predictor.from_export(tmp_path / "export", device="cpu")
        path.write_bytes(whole)
