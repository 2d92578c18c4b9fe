"""The frozen vision tower: a DINOv2 or a SigLIP, and the image processor that belongs to it.

Legend of shape suffixes: N images, T tokens an image (a DINOv2's CLS first, then patches row by row), D width, C channels,
H and W pixels.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import hash_json
from vlm_vqa.hf_hub import download_snapshot
from vlm_vqa.model import checkpoint
from vlm_vqa.model.checkpoint import name_of, quiet, reading
from vlm_vqa.params import CHECKPOINT, ModelParams, VisionParams, is_local

SMALL_ENCODER = Path(__file__).parent / "small_encoder"
# Which release wrote a config, from where it was read and for what the tower is used say nothing about what it computes.
_INCIDENTAL_CONFIG = ("_name_or_path", "transformers_version", "dtype", "architectures", "projection_dim")
TOWERS_ALONE = ModelParams()
_IN_CHECKPOINT = {r"^(model\.)?vision_tower\.": ""}
"""How a whole model's names of the tower's weights become the tower's own."""

MOST_ELONGATED = 32  # longer edge over shorter edge up to which an image is seen as it is; see `crop_elongated`


Config = Dinov2Config | SiglipVisionConfig
Processor = BitImageProcessor | SiglipImageProcessor
Model = Dinov2Model | SiglipVisionModel


class Tower(NamedTuple):
    """The stock classes of one kind of tower."""

    config: type[Config]
    processor: type[Processor]
    model: type[Model]
    cls: int  # tokens beside those of the patches


TOWERS = {
    "dinov2": Tower(Dinov2Config, BitImageProcessor, Dinov2Model, cls=1),
    "siglip_vision_model": Tower(SiglipVisionConfig, SiglipImageProcessor, SiglipVisionModel, cls=0),
}
"""By the `model_type` of their configurations."""


@dataclass(frozen=True)
class Encoder:
    """A vision tower that is ready to look at images; made by `load_encoder`."""

    model: Model  # frozen, in evaluation mode, in the compute dtype
    processor: Processor
    """Always the torchvision one: plain `AutoProcessor` also takes it where torchvision is installed, so an export
    sees with the same eyes. The PIL one rounds differently."""
    hash: str  # names weights (as float32), config and processor settings; features of equal hash and dtypes are equal
    num_tokens: int  # T: one token a patch, and a DINOv2's CLS, at the size that the processor gives images

    @property
    def width(self) -> int:
        """D: the width of a token."""
        return self.model.config.hidden_size

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Look at images of any size and mode: preprocess and `encode_pixels`."""
        return self.encode_pixels(self.preprocess(images))

    def preprocess(self, images: Iterable[Image.Image]) -> Tensor:
        """Bring images of any size and mode to what the model reads; may run in any thread.

        They are taken one by one, so an iterable that decodes them holds one of them in memory at a time. Returned is
        [N, C, H, W] float32 on the CPU.
        """
        crops = (crop_elongated(image, self.processor) for image in images)
        seen = (self.processor(crop, do_convert_rgb=True, return_tensors="pt") for crop in crops)
        return torch.cat([one["pixel_values"] for one in seen])

    def encode_pixels(self, pixels_NCHW: Tensor) -> Tensor:
        """Return the last hidden state after the final layer norm, [N, T, D] in the compute dtype, on the model's device.

        On a GPU it may still be under way.
        """
        with torch.no_grad():
            # The model casts them itself; a cast here would come before the copy, into memory that is not pinned.
            features_NTD = self.model(pixels_NCHW.to(self.model.device, non_blocking=True)).last_hidden_state
        assert features_NTD.shape == (len(pixels_NCHW), self.num_tokens, self.width), features_NTD.shape
        return features_NTD


def crop_elongated(image: Image.Image, processor: Processor) -> Image.Image:
    """Return an image that is no longer than `MOST_ELONGATED` times its width, or the other way round.

    DINOv2's processor brings the shorter edge to 256 pixels and then cuts out the centre: of 1 x 5,000 pixels it would first
    make 256 x 1,280,000, a gigabyte. So the longer edge of such an image is cut down to its middle beforehand, which the
    centre lies well within. A processor that squeezes all images into one size needs no bound.
    """
    longest = MOST_ELONGATED * min(image.size)
    if not processor.size.shortest_edge or max(image.size) <= longest:  # ty: ignore[missing-attribute] - a SizeDict
        return image
    width, height = image.size
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, width - left, height - top))


def load_encoder(
    vision: VisionParams, device: torch.device | str | None = None, start: ModelParams = TOWERS_ALONE
) -> Encoder:
    """Load the vision tower that `params.yaml` names, in `vision.compute_dtype`; `device` None is the first GPU, or the CPU.

    `vision.model` is `small` (the encoder in this package), a local folder, a hub id with `vision.revision`, or
    `checkpoint`: the tower of the whole model that `start` names. Weights come from safetensors only and no remote code is
    run. UserError as `read_settings`, or if it cannot be found or lacks weights.
    """
    folder, name, whole = _folder(vision, start), _name(vision, start), vision.model == CHECKPOINT
    config, processor, num_tokens = read_settings(vision, start, folder)
    if whole:
        checkpoint.check_weights(start, folder, checkpoint.read_config(start, folder))
    how: dict[str, Any] = {"config": config, "key_mapping": _IN_CHECKPOINT if whole else None, "dtype": torch.float32}
    how |= {"use_safetensors": True, "output_loading_info": True}
    kind: Any = TOWERS[config.model_type].model
    with reading(name, "its *.safetensors"), quiet():
        model, loaded = kind.from_pretrained(folder, trust_remote_code=False, **how)
    # transformers fills gaps with random numbers and a warning.
    if lacking := sorted(loaded["missing_keys"]):
        raise UserError(f"{name} lacks the weights {lacking[:5]}. Get a whole copy of it.")
    made_of = {
        "weights": _hash_weights(model),
        "config": {key: value for key, value in model.config.to_dict().items() if key not in _INCIDENTAL_CONFIG},
        "processor": {key: value for key, value in processor_settings(processor).items() if key != "image_seq_length"},
    }
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device, getattr(torch, vision.compute_dtype.value)).eval().requires_grad_(False)
    return Encoder(model=model, processor=processor, hash=hash_json(made_of), num_tokens=num_tokens)


def read_settings(vision: VisionParams, start: ModelParams, folder: Path) -> tuple[Config, Processor, int]:
    """Return the configuration of the tower in `folder`, its image processor, and how many tokens it makes of an image.

    UserError if it is no DINOv2 or SigLIP with the processor of its kind, or its tokens are not as `vision` says.
    """
    name = _name(vision, start)
    with reading(name, "config.json"):
        values, _ = Dinov2Config.get_config_dict(folder)
        if vision.model == CHECKPOINT:
            checkpoint.read_config(start, folder)
            values = values["vision_config"]
        elif values.get("model_type") == "siglip":
            # With the tower for texts beside it.
            values = {**values["vision_config"], "model_type": "siglip_vision_model"}
        # A config of another class would load with a warning and give an encoder of defaults.
        if (kind := values.get("model_type")) not in TOWERS:
            raise UserError(
                f"{name} is a {kind!r} model; only 'dinov2' (such as facebook/dinov2-base) and 'siglip' "
                "(such as google/siglip-so400m-patch14-224) are supported."
            )
        config = TOWERS[kind].config.from_dict(values)
    checkpoint.without_head(config)
    with reading(name, "preprocessor_config.json"):
        wanted = TOWERS[kind].processor
        values, _ = wanted.get_image_processor_dict(folder)
        found = values.get("image_processor_type") or values.get("feature_extractor_type")
        if found not in (wanted.__name__, f"{wanted.__name__}Fast"):
            raise UserError(
                f"{name} comes with the image processor {found!r}; a {kind} needs {wanted.__name__!r}. Mend its "
                "preprocessor_config.json or choose another model."
            )
        processor = wanted.from_dict(values)
    num_tokens = _count_tokens(name, config, processor)
    for key, found in (("num_patches", num_tokens), ("visual_embed_dim", config.hidden_size)):
        if (said := getattr(vision, key)) != found:
            asks = f"vision.{key} is {said}, but the encoder of {name} makes {found}"
            raise UserError(f"{asks}. Set vision.{key}: {found}.")
    return config, processor, num_tokens


def _name(vision: VisionParams, start: ModelParams) -> str:
    """Return which key names the tower, and what it says, for messages."""
    return name_of(start) if vision.model == CHECKPOINT else f"vision.model {vision.model!r}"


def _folder(vision: VisionParams, start: ModelParams) -> Path:
    """Return where the encoder lies; from the hub, it is downloaded first."""
    if vision.model == CHECKPOINT:
        return checkpoint.folder_of(start)
    if vision.model == "small":
        return SMALL_ENCODER
    if is_local(vision.model):
        folder = Path(vision.model).expanduser()
        if not folder.is_dir():
            raise UserError(f"vision.model {vision.model!r}: no such folder. Mend the path, or name a hub id or small.")
        return folder
    assert vision.revision is not None, "load_params asks for it where the model is from the hub"
    return download_snapshot("vision.model", vision.model, vision.revision)


def _count_tokens(name: str, config: Config, processor: Processor) -> int:
    """One token a patch, at the size to which the processor brings every image, and a DINOv2's CLS."""
    cuts = isinstance(processor, BitImageProcessor) and processor.do_center_crop
    size: Any = processor.crop_size if cuts else processor.size
    patch: Any = config.patch_size
    height, width = size.height, size.width
    if not height or not width or height % patch or width % patch:
        raise UserError(
            f"{name}: its preprocessor_config.json brings images to {dict(size)}, which is not "
            f"a fixed height and width in multiples of the patch size {patch}. Set crop_size, do_center_crop or size."
        )
    if isinstance(config, SiglipVisionConfig) and not height == width == config.image_size:
        brings = f"{name}: its preprocessor_config.json brings images to {height} x {width} pixels"
        raise UserError(f"{brings}, but a SigLIP sees one size, {config.image_size} by its config.json. Set size.")
    return TOWERS[config.model_type].cls + (height // patch) * (width // patch)


def processor_settings(processor: Processor) -> dict[str, Any]:
    """Return what a processor does, as JSON values: its class, its backend, sizes, resampling, mean and deviation."""
    return {**json.loads(processor.to_json_string()), "backend": processor.backend}


def _hash_weights(model: Model) -> str:
    """One hash over names, shapes and float32 values, however the files were cut."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
