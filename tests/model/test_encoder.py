"""The vision tower: what it accepts, what it makes of images, and that the small one sees."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, BitImageProcessor, Dinov2Config, Dinov2Model
from transformers.image_utils import load_image

from scripts import pretrain_small_encoder as pretraining
from vlm_vqa.errors import UserError
from vlm_vqa.model.encoder import SMALL_ENCODER, crop_elongated, load_encoder
from vlm_vqa.model.vlm import build_processor, train_tokenizer
from vlm_vqa.params import Dtype, StoreDtype, VisionParams

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = Path(os.environ.get("VLM_VQA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
SAMPLE_IMAGES = SHARED_DATA / "vqav2-sample" / "images"
SMALL = VisionParams(
    launch="cpu",
    model="small",
    revision=None,
    num_patches=65,
    visual_embed_dim=128,
    batch_size=64,
    compute_dtype=Dtype.FLOAT32,
    store_dtype=StoreDtype.FLOAT32,
)


def changed(**values: object) -> VisionParams:
    return dataclasses.replace(SMALL, **values)


def drawn(count: int, seed: int) -> tuple[list[Image.Image], pretraining.Pictures]:
    pictures = pretraining.draw_pictures(count, torch.Generator().manual_seed(seed))
    arrays = pictures.pixels_BCHW.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays], pictures


@pytest.fixture(scope="module")
def small():
    return load_encoder(SMALL, "cpu")


@pytest.fixture(scope="module")
def base_layout(tmp_path_factory):
    """facebook/dinov2-base's own files in everything but width and depth: 518 px weights, 224 px processor."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(
        image_size=518, patch_size=14, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, layerscale_value=1.0
    )
    Dinov2Model(config).save_pretrained(folder)
    settings = {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 256},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_small_encoder_is_frozen_and_shaped_as_params_say(small):
    features = small.encode(drawn(3, 0)[0])
    assert features.shape == (3, 65, 128) and features.dtype is torch.float32
    assert (small.num_tokens, small.width) == (65, 128)
    # Features on users' disks are valid as long as this is their encoder's name.
    assert small.hash == "f675b9f3f02a6803d4862ae2ef257a23b877dcdc72e09c5b071f34f42c9e6f77"
    assert not small.model.training and not any(weight.requires_grad for weight in small.model.parameters())
    assert sum(file.stat().st_size for file in SMALL_ENCODER.iterdir()) < 4 * 2**20


def test_features_do_not_depend_on_the_batch(small):
    images, _ = drawn(8, 1)
    together = small.encode(images)
    assert torch.equal(together, small.encode(images))
    # Another batch size may take other kernels, which add in another order.
    alone = torch.cat([small.encode([image]) for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_encode_is_preprocess_in_any_thread_and_then_the_model(small):
    images, _ = drawn(3, 7)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pixels = pool.submit(small.preprocess, images).result()
    assert (pixels.shape, pixels.dtype, pixels.device.type) == ((3, 3, 64, 64), torch.float32, "cpu")
    assert torch.equal(small.encode_pixels(pixels), small.encode(images))
    by_processor = small.processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, by_processor)


def test_compute_dtype_is_the_features_dtype(small):
    images, _ = drawn(4, 2)
    halved = load_encoder(changed(compute_dtype=Dtype.BFLOAT16), "cpu")
    features = halved.encode(images)
    assert features.dtype is torch.bfloat16
    torch.testing.assert_close(features.float(), small.encode(images), rtol=0.1, atol=0.15)
    assert halved.hash == small.hash, "the hash names the weights as they are stored, not as they are cast"


def test_base_layout_is_read_at_its_processors_size(base_layout):
    encoder = load_encoder(changed(model=str(base_layout), num_patches=257, visual_embed_dim=24), "cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    assert encoder.encode([image]).shape == (1, 257, 24)
    resized = Image.fromarray(np.asarray(image.resize((341, 256), Image.Resampling.BICUBIC))[16:240, 58:282])
    by_hand = pretraining.normalise(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    pixels = encoder.processor([image], return_tensors="pt")["pixel_values"][0]
    # torchvision and Pillow round the resized bytes differently by one step at most.
    assert (pixels - by_hand).abs().max() < 1.01 / 255 / 0.224


def test_real_photographs_of_any_mode_and_size_go_through(small):
    if not SAMPLE_IMAGES.is_dir():
        pytest.skip(f"no VQAv2 sample in {SAMPLE_IMAGES}; set VLM_VQA_SHARED_DATA")
    photographs = [Image.open(path) for path in sorted(SAMPLE_IMAGES.iterdir())]
    odd = [image for image in photographs if image.width % 2 or image.height % 2]
    assert odd, "the sample is to hold photographs of odd sizes"
    # COCO has greyscale files, this sample of it has none.
    other_modes = [photographs[0].convert(mode) for mode in ("L", "P", "RGBA", "CMYK")]
    images = [*photographs[:3], *odd[:3], *other_modes, photographs[0].crop((0, 0, 1, 300))]
    features = small.encode(images)
    assert torch.isfinite(features).all()
    assert torch.equal(features, small.encode([image.convert("RGB") for image in images]))


def test_both_processors_see_real_photographs_as_transformers_does(small, base_layout, shared_data):
    base = load_encoder(changed(model=str(base_layout), num_patches=257, visual_embed_dim=24), "cpu")
    paths = sorted((shared_data / "vqav2-sample" / "images").iterdir())
    assert len(paths) == 75
    images = [load_image(str(path)) for path in paths]
    for encoder, folder in ((small, SMALL_ENCODER), (base, base_layout)):
        inputs = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
        assert torch.equal(encoder.preprocess(images), inputs["pixel_values"])
        with torch.no_grad():
            features = AutoModel.from_pretrained(folder)(inputs["pixel_values"][:8]).last_hidden_state
        assert torch.equal(encoder.encode(images[:8]), features)


@pytest.mark.parametrize(
    ("size", "seen"),
    [((1, 32), (1, 32)), ((64, 2), (64, 2)), ((640, 480), (640, 480)),
     ((1, 5000), (1, 32)), ((5001, 1), (33, 1)), ((3, 5000), (3, 96)), ((2, 50_000), (2, 64))],
)  # fmt: skip
def test_a_long_image_is_cut_to_its_middle_where_its_short_edge_is_magnified(small, base_layout, size, seen):
    base = load_encoder(changed(model=str(base_layout), num_patches=257, visual_embed_dim=24), "cpu")
    image = Image.new("RGB", size)
    assert crop_elongated(image, base.processor).size == seen
    assert crop_elongated(image, small.processor) is image, "it squeezes all images into one size"


def test_what_is_seen_of_a_long_image_is_what_transformers_shows_of_it(base_layout):
    base = load_encoder(changed(model=str(base_layout), num_patches=257, visual_embed_dim=24), "cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 2, 3), dtype=np.uint8))
    assert crop_elongated(image, base.processor).size == (2, 64)
    stock = base.processor([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(base.preprocess([image]), stock)
    # 1 x 5,000 by transformers alone makes an image of 983 MB; so would each of a batch.
    columns = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (5000, 1, 3), dtype=np.uint8))] * 3
    assert torch.isfinite(base.encode(columns)).all()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"num_patches": 64}, "vision.num_patches is 64, .*Set vision.num_patches: 65"),
        ({"visual_embed_dim": 768}, "vision.visual_embed_dim is 768, .*Set vision.visual_embed_dim: 128"),
        ({"model": "./nowhere"}, "vision.model './nowhere': no such folder"),
    ],
)
def test_a_wrong_key_is_named(values, key):
    with pytest.raises(UserError, match=key):
        load_encoder(changed(**values), "cpu")


def damage_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))


def damage_processor_type(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**settings, "image_processor_type": "ViTImageProcessor"})
    )


def damage_processor_size(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"] = settings["crop_size"] = {"height": 60, "width": 64}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def damage_missing_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def damage_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def damage_pickled_weights(folder: Path) -> None:
    torch.save(Dinov2Model.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def damage_lacking_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, "'vit' model; only 'dinov2'"),
        (damage_processor_type, "'ViTImageProcessor'"),
        (damage_processor_size, "multiples of the patch size 8"),
        (damage_missing_processor, "preprocessor_config.json cannot be read"),
        (damage_truncated_weights, "safetensors cannot be read"),
        (damage_pickled_weights, "safetensors cannot be read"),
        (damage_lacking_weights, "lacks the weights .*layer"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, damage, message):
    folder = copy_of(SMALL_ENCODER, tmp_path / "encoder")
    damage(folder)
    with pytest.raises(UserError, match=f"vision.model .*{message}"):
        load_encoder(changed(model=str(folder)), "cpu")


def test_hash_covers_weights_config_and_processor_and_nothing_else(small, tmp_path):
    folder = copy_of(SMALL_ENCODER, tmp_path / "encoder")
    assert load_encoder(changed(model=str(folder)), "cpu").hash == small.hash, "where it lies does not matter"
    hashes = {small.hash}

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 2}))
    hashes.add(load_encoder(changed(model=str(folder)), "cpu").hash)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-5}))
    hashes.add(load_encoder(changed(model=str(folder)), "cpu").hash)

    model = Dinov2Model.from_pretrained(folder)
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-3
    model.save_pretrained(folder)
    hashes.add(load_encoder(changed(model=str(folder)), "cpu").hash)
    assert len(hashes) == 4


def test_export_processor_opens_again_with_the_same_pixels(small, tmp_path):
    export = build_processor(small.processor, train_tokenizer(["a"], 300), small.num_tokens)
    export.image_processor.save_pretrained(tmp_path)
    again = BitImageProcessor.from_pretrained(tmp_path)
    assert again.image_seq_length == 65 and small.processor.image_seq_length is None
    images, _ = drawn(2, 3)
    pixels = [processor(images, return_tensors="pt")["pixel_values"] for processor in (small.processor, again)]
    assert torch.equal(*pixels)


def test_training_pictures_look_as_the_processor_makes_them(small):
    images, pictures = drawn(4, 4)
    through_processor = small.processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(through_processor, pretraining.normalise(pictures.pixels_BCHW))


def test_drawn_pictures_are_what_their_labels_say():
    _, pictures = drawn(512, 5)
    assert all(
        torch.equal(*both) for both in zip(vars(pictures).values(), vars(drawn(512, 5)[1]).values(), strict=True)
    )
    assert set(pictures.shape_B.tolist()) == set(range(3)) and set(pictures.colour_B.tolist()) == set(range(8))
    palette = torch.tensor(list(pretraining.COLOURS.values()))
    covered_B = pictures.covered_BP.sum(1) * pretraining.PATCH_SIZE**2
    assert covered_B.min() > 15 and covered_B.max() < 37 * 37
    # A patch that the shape fills is of the named colour; one that it leaves free is light.
    patches = pictures.pixels_BCHW.unfold(2, 8, 8).unfold(3, 8, 8).float().mean((-1, -2)).flatten(2).transpose(1, 2)
    full, free = pictures.covered_BP > 0.999, pictures.covered_BP < 0.001
    assert full.any() and patches[free].min() > 215
    wanted = palette[pictures.colour_B][:, None].expand_as(patches)
    assert (patches[full] - wanted[full]).abs().max() < pretraining.COLOUR_JITTER + 8


def test_small_encoder_names_fresh_pictures_and_a_random_one_does_not(small):
    _, pictures = drawn(256, 6)
    truth = torch.stack([pictures.shape_B, pictures.colour_B], dim=1)
    named = pretraining.name_pictures(small.model, pictures.pixels_BCHW, fitted_on=768)
    shapes, colours = (named == truth).float().mean(0).tolist()
    assert shapes > 0.95 and colours > 0.95
    torch.manual_seed(0)
    blind = pretraining.name_pictures(Dinov2Model(pretraining.small_config()).eval(), pictures.pixels_BCHW, 768)
    assert (blind[:, 0] == pictures.shape_B).float().mean() < shapes - 0.1


def test_pretraining_is_remade_byte_for_byte(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        encoder = pretraining.pretrain(seed=0, steps=3, batch_size=8)
        encoder.save_pretrained(folder)
        pretraining.small_processor().save_pretrained(folder)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    other = pretraining.pretrain(seed=1, steps=3, batch_size=8)
    same = zip(other.parameters(), encoder.parameters(), strict=True)
    assert not all(torch.equal(one, two) for one, two in same)
    # The shipped config and processor are this script's, only the weights take all 1,500 steps.
    for name in ("config.json", "preprocessor_config.json"):
        assert (folders[0] / name).read_bytes() == (SMALL_ENCODER / name).read_bytes()


def test_card_names_the_shipped_weights():
    card = (SMALL_ENCODER / "README.md").read_text()
    digest = hashlib.sha256((SMALL_ENCODER / "model.safetensors").read_bytes()).hexdigest()
    assert re.search(rf"\b{digest}\b", card), f"the card is to name the weights' SHA-256 {digest}"
