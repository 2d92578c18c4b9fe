"""The frozen vision tower: a DINOv2 and the image processor that belongs to it.

Legend of shape suffixes: N images, T tokens an image (CLS first, then patches row by row), D width, C channels, H and W
pixels.
"""

import hashlib
import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import hash_json
from vlm_vqa.hf_hub import download_snapshot
from vlm_vqa.params import VisionParams, is_local

SMALL_ENCODER = Path(__file__).parent / "small_encoder"
# Which release wrote a config and from where it was read say nothing about what the encoder computes.
_INCIDENTAL_CONFIG = ("_name_or_path", "transformers_version", "dtype", "architectures")

MOST_ELONGATED = 32
"""Longer edge over shorter edge up to which an image is seen as it is; see `crop_elongated`."""


@dataclass(frozen=True)
class Encoder:
    """A DINOv2 that is ready to look at images; made by `load_encoder`."""

    model: Dinov2Model
    """Frozen, in evaluation mode, in the compute dtype."""
    processor: BitImageProcessor
    """Always the torchvision one: plain `AutoProcessor` also takes it where torchvision is installed, so an export
    sees with the same eyes. The PIL one rounds differently."""
    hash: str
    """Names weights (as float32), config and processor settings; features of equal hash and dtypes are equal."""
    num_tokens: int
    """T: CLS and one token a patch, at the size that the processor gives images."""

    @property
    def width(self) -> int:
        """D: the width of a token."""
        return self.model.config.hidden_size

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Look at images of any size and mode: preprocess and `encode_pixels`."""
        return self.encode_pixels(self.preprocess(images))

    def preprocess(self, images: Iterable[Image.Image]) -> Tensor:
        """Bring images of any size and mode to what the model reads; may run in any thread.

        They are taken one by one, so an iterable that decodes them holds one of them in memory at a time.

        Returns:
            [N, C, H, W] float32 on the CPU, in pinned memory where the model is on a GPU.
        """
        crops = (crop_elongated(image, self.processor) for image in images)
        seen = (self.processor(crop, do_convert_rgb=True, return_tensors="pt") for crop in crops)
        pixels_NCHW = torch.cat([one["pixel_values"] for one in seen])
        return pixels_NCHW.pin_memory() if self.model.device.type == "cuda" else pixels_NCHW

    def encode_pixels(self, pixels_NCHW: Tensor) -> Tensor:
        """Look at what `preprocess` returned; on a GPU the result may still be under way.

        Returns:
            [N, T, D] in the compute dtype, on the model's device: the last hidden state after the final layer norm.
        """
        with torch.no_grad():
            # The model casts them itself; a cast here would come before the copy, into memory that is not pinned.
            features_NTD = self.model(pixels_NCHW.to(self.model.device, non_blocking=True)).last_hidden_state
        assert features_NTD.shape == (len(pixels_NCHW), self.num_tokens, self.width), features_NTD.shape
        return features_NTD


def crop_elongated(image: Image.Image, processor: BitImageProcessor) -> Image.Image:
    """Return an image that is no longer than `MOST_ELONGATED` times its width, or the other way round.

    DINOv2's processor brings the shorter edge to 256 pixels and then cuts out the centre: of 1 x 5,000 pixels it would first
    make 256 x 1,280,000, a gigabyte. So the longer edge of such an image is cut down to its middle beforehand, which the
    centre lies well within. A processor that squeezes all images into one size has no such bound, and needs none.
    """
    longest = MOST_ELONGATED * min(image.size)
    if not processor.size.shortest_edge or max(image.size) <= longest:  # ty: ignore[missing-attribute] - a SizeDict
        return image
    width, height = image.size
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, width - left, height - top))


def load_encoder(vision: VisionParams, device: torch.device | str | None = None) -> Encoder:
    """Load the vision tower that `params.yaml` names.

    `vision.model` is `small` (the encoder in this package), a local folder, or a hub id with `vision.revision`. Weights
    come from safetensors only and no remote code is run; they are read as float32 and then cast to
    `vision.compute_dtype`. `device` None is the first GPU, or the CPU where there is none.

    Raises:
        UserError: it cannot be found or is no complete DINOv2 with a `BitImageProcessor`, or its tokens are not
            `vision.num_patches` of width `vision.visual_embed_dim`.
    """
    folder = _folder(vision)
    config = _load_config(vision, folder)
    processor = _load_processor(vision, folder)
    num_tokens = _count_tokens(vision, config, processor)
    for key, found in (("num_patches", num_tokens), ("visual_embed_dim", config.hidden_size)):
        if (said := getattr(vision, key)) != found:
            raise UserError(
                f"vision.{key} is {said}, but the encoder {vision.model!r} makes {found}. Set vision.{key}: {found}."
            )
    model = _load_model(vision, folder)
    encoder_hash = hash_json(
        {
            "weights": _hash_weights(model),
            "config": {k: v for k, v in model.config.to_dict().items() if k not in _INCIDENTAL_CONFIG},
            "processor": processor_settings(processor),
        }
    )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, getattr(torch, vision.compute_dtype.value)).eval().requires_grad_(False)
    return Encoder(model=model, processor=processor, hash=encoder_hash, num_tokens=num_tokens)


def _folder(vision: VisionParams) -> Path:
    """Return where the encoder lies; from the hub, it is downloaded first."""
    if vision.model == "small":
        return SMALL_ENCODER
    if is_local(vision.model):
        folder = Path(vision.model).expanduser()
        if not folder.is_dir():
            raise UserError(f"vision.model {vision.model!r}: no such folder. Mend the path, or name a hub id or small.")
        return folder
    assert vision.revision is not None, "load_params asks for it where the model is from the hub"
    return download_snapshot("vision", vision.model, vision.revision)


def _load_config(vision: VisionParams, folder: Path) -> Dinov2Config:
    with _reading(vision, "config.json"):
        values, _ = Dinov2Config.get_config_dict(folder)
    # A config of another class would load with a warning and give an encoder of defaults.
    if values.get("model_type") != "dinov2":
        raise UserError(
            f"vision.model {vision.model!r} is a {values.get('model_type')!r} model; only 'dinov2' is supported "
            "(such as facebook/dinov2-base)."
        )
    return Dinov2Config.from_dict(values)


def _load_processor(vision: VisionParams, folder: Path) -> BitImageProcessor:
    with _reading(vision, "preprocessor_config.json"):
        values, _ = BitImageProcessor.get_image_processor_dict(folder)
        kind = values.get("image_processor_type") or values.get("feature_extractor_type")
        if kind not in ("BitImageProcessor", "BitImageProcessorFast"):
            raise UserError(
                f"vision.model {vision.model!r} comes with the image processor {kind!r}; a DINOv2 needs "
                "'BitImageProcessor'. Mend its preprocessor_config.json or choose another model."
            )
        return BitImageProcessor.from_dict(values)


def _load_model(vision: VisionParams, folder: Path) -> Dinov2Model:
    with _reading(vision, "model.safetensors"):
        model, found = Dinov2Model.from_pretrained(  # ty: ignore[not-iterable] - a pair with output_loading_info
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    # transformers fills gaps with random numbers and a warning.
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise UserError(f"vision.model {vision.model!r} lacks the weights {lacking[:5]}. Get a whole copy of it.")
    return model


@contextmanager
def _reading(vision: VisionParams, file: str) -> Generator[None]:
    """Say which file of the tower it is that cannot be read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged weights raise safetensors' own and several built-in errors
        raise UserError(
            f"vision.model {vision.model!r}: {file} cannot be read ({str(error).strip()}). "
            "The folder or commit must hold intact config.json, model.safetensors, preprocessor_config.json."
        ) from error


def _count_tokens(vision: VisionParams, config: Dinov2Config, processor: BitImageProcessor) -> int:
    """CLS and one token a patch, at the size to which the processor brings every image."""
    size: Any = processor.crop_size if processor.do_center_crop else processor.size
    height, width = size.height, size.width
    patch = config.patch_size
    if not height or not width or height % patch or width % patch:
        raise UserError(
            f"vision.model {vision.model!r}: its preprocessor_config.json brings images to {dict(size)}, which is not "
            f"a fixed height and width in multiples of the patch size {patch}. Set crop_size, do_center_crop or size."
        )
    return 1 + (height // patch) * (width // patch)


def processor_settings(processor: BitImageProcessor) -> dict[str, Any]:
    """Return what a processor does, as JSON values: its class, its backend, sizes, resampling, mean and deviation."""
    return {**json.loads(processor.to_json_string()), "backend": processor.backend}


def _hash_weights(model: Dinov2Model) -> str:
    """One hash over names, shapes and float32 values, however the files were cut."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
