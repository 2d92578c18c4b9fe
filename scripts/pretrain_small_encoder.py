"""Makes the weights in `small_encoder/`: a small DINOv2 trained on procedurally drawn pictures alone.

A DINOv2 with random weights, frozen, lets a language model learn colours but not shapes, and the real ones are too
large for a run of minutes on a CPU. So this script draws pictures of one filled shape on a light background and trains
a small DINOv2 to say which shape, which colour and where. No picture of any data set is read while training.

    python -m scripts.pretrain_small_encoder --output DIR            # remake the weights
    python -m scripts.pretrain_small_encoder --output DIR --check-easy-vqa   # only measure those in DIR

Legend of shape suffixes: B pictures, C colour channels, H and W pixels, P patches, D width.
"""

import argparse
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

logger = logging.getLogger(__name__)

IMAGE_SIZE = 64
PATCH_SIZE = 8
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}
# The range of sizes is what counts: an encoder that never saw shapes under 16 px cannot name them later.
SMALLEST, LARGEST = 7.0, 36.0
COLOUR_JITTER = 24.0
DARKEST_BACKGROUND = 224.0
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures and what is on them."""

    pixels_BCHW: Tensor
    """uint8 [B, 3, 64, 64]"""
    shape_B: Tensor
    """int64 [B], index into SHAPES"""
    colour_B: Tensor
    """int64 [B], index into COLOURS"""
    covered_BP: Tensor
    """float32 [B, 64], the part of each patch that the shape covers, 0..1, patches row by row"""


def draw_pictures(count: int, generator: torch.Generator) -> Pictures:
    """`count` pictures of one filled shape each, its kind, colour, size and place drawn from `generator`."""

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *size, generator=generator)

    shape_B = torch.randint(len(SHAPES), (count,), generator=generator)
    colour_B = torch.randint(len(COLOURS), (count,), generator=generator)
    width_B, height_B = _sizes(shape_B, uniform)
    # Up to two pixels of a shape may lie outside of the picture.
    x_B = width_B / 2 - 2 + uniform(0, 1) * (IMAGE_SIZE + 4 - width_B)
    y_B = height_B / 2 - 2 + uniform(0, 1) * (IMAGE_SIZE + 4 - height_B)
    outside_BHW = _signed_distance(shape_B, x_B, y_B, width_B, height_B)
    # Edges from one pixel wide, as anti-aliasing makes them, to none.
    sharpness_B = torch.where(uniform(0, 1) < 0.25, 100.0, uniform(0.7, 2.0))
    inside_BHW = (0.5 - outside_BHW * sharpness_B[:, None, None]).clamp(0, 1)

    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    ink_BC = (palette[colour_B] + uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)).clamp(0, 255)
    paper_BC = uniform(DARKEST_BACKGROUND, 255, 3)
    noise_BCHW = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * uniform(0, 4, 1, 1, 1)
    inside_BCHW = inside_BHW[:, None]
    pixels_BCHW = ink_BC[:, :, None, None] * inside_BCHW + paper_BC[:, :, None, None] * (1 - inside_BCHW) + noise_BCHW
    return Pictures(
        pixels_BCHW=pixels_BCHW.round().clamp(0, 255).to(torch.uint8),
        shape_B=shape_B,
        colour_B=colour_B,
        covered_BP=functional.avg_pool2d(inside_BCHW, PATCH_SIZE).flatten(1),
    )


def _sizes(shape_B: Tensor, uniform) -> tuple[Tensor, Tensor]:
    """Widths and heights in pixels: circles round, triangles a little flatter than wide, rectangles of any ratio."""
    width_B, free_height_B = uniform(SMALLEST, LARGEST), uniform(SMALLEST, LARGEST)
    circle_height_B = width_B * uniform(0.95, 1.05)
    triangle_height_B = width_B * uniform(0.75, 1.1)
    heights_BS = torch.stack([circle_height_B, free_height_B, triangle_height_B], dim=1)
    return width_B, heights_BS.gather(1, shape_B[:, None])[:, 0]


def _signed_distance(shape_B: Tensor, x_B: Tensor, y_B: Tensor, width_B: Tensor, height_B: Tensor) -> Tensor:
    """float32 [B, 64, 64]: about how many pixels a pixel's centre lies outside of the shape, negative inside."""
    centres = torch.arange(IMAGE_SIZE) + 0.5
    dx_BHW = centres[None, None, :] - x_B[:, None, None]
    dy_BHW = centres[None, :, None] - y_B[:, None, None]
    half_width, half_height = width_B[:, None, None] / 2, height_B[:, None, None] / 2
    radius = torch.sqrt((dx_BHW / half_width) ** 2 + (dy_BHW / half_height) ** 2)
    circle_BHW = (radius - 1) * torch.minimum(half_width, half_height)
    rectangle_BHW = torch.maximum(dx_BHW.abs() - half_width, dy_BHW.abs() - half_height)
    # Point upwards: below the two sloping sides and above the base.
    side = torch.sqrt(half_width**2 + (2 * half_height) ** 2)
    slope_BHW = (dx_BHW.abs() * 2 * half_height - (dy_BHW + half_height) * half_width) / side
    triangle_BHW = torch.maximum(slope_BHW, dy_BHW - half_height)
    all_BSHW = torch.stack([circle_BHW, rectangle_BHW, triangle_BHW], dim=1)
    return all_BSHW[torch.arange(len(shape_B)), shape_B]


def normalise(pixels_BCHW: Tensor) -> Tensor:
    """What the processor makes of 64 x 64 pictures: float32 [B, 3, 64, 64]."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (pixels_BCHW / 255 - mean) / std


class Heads(nn.Module):
    """What the encoder is asked while it learns; thrown away afterwards.

    The language model will read all 65 tokens, so all are asked: the CLS token and the mean of the patch tokens for
    shape and colour, each patch token for shape and colour too, and for how much of its patch is covered.
    """

    def __init__(self, width: int):
        super().__init__()
        self.cls = nn.Linear(width, len(SHAPES) + len(COLOURS))
        self.mean = nn.Linear(width, len(SHAPES) + len(COLOURS))
        self.patch = nn.Linear(width, len(SHAPES) + len(COLOURS))
        self.covered = nn.Linear(width, 1)

    def forward(self, tokens_BTD: Tensor, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """The loss (a scalar) and, bool [B], whether the CLS token names shape and colour rightly."""
        patches_BPD = tokens_BTD[:, 1:]
        cls_logits = self.cls(tokens_BTD[:, 0])
        loss = self._naming(cls_logits, pictures.shape_B, pictures.colour_B)
        loss = loss + self._naming(self.mean(patches_BPD.mean(1)), pictures.shape_B, pictures.colour_B)
        patch_logits = self.patch(patches_BPD).flatten(0, 1)
        loss = loss + 0.5 * self._naming(
            patch_logits, pictures.shape_B.repeat_interleave(PATCHES), pictures.colour_B.repeat_interleave(PATCHES)
        )
        covered_BP = self.covered(patches_BPD)[..., 0]
        loss = loss + functional.binary_cross_entropy_with_logits(covered_BP, pictures.covered_BP)
        shape_logits, colour_logits = cls_logits.split([len(SHAPES), len(COLOURS)], dim=-1)
        right_B = (shape_logits.argmax(-1) == pictures.shape_B) & (colour_logits.argmax(-1) == pictures.colour_B)
        return loss, right_B

    @staticmethod
    def _naming(logits: Tensor, shape: Tensor, colour: Tensor) -> Tensor:
        shape_logits, colour_logits = logits.split([len(SHAPES), len(COLOURS)], dim=-1)
        return functional.cross_entropy(shape_logits, shape) + functional.cross_entropy(colour_logits, colour)


def small_config() -> Dinov2Config:
    """A DINOv2 of 0.56 million parameters that reads 64 x 64 pixels as 1 + 64 tokens of width 128."""
    return Dinov2Config(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        layerscale_value=1.0,
        # No masked patches in this training, and a parameter that is never trained would only be noise.
        use_mask_token=False,
    )


def small_processor() -> BitImageProcessor:
    """The processor that goes with the small encoder: the whole picture, squeezed to 64 x 64."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return BitImageProcessor(
        size=side, crop_size=side, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)
    )


def pretrain(seed: int, steps: int, batch_size: int) -> Dinov2Model:
    """Trains the encoder; the same seed, steps, batch size and number of threads give the same weights."""
    torch.manual_seed(seed)
    encoder = Dinov2Model(small_config()).train()
    encoder.set_attn_implementation("eager")  # a tenth faster than sdpa at 65 tokens on a CPU
    heads = Heads(encoder.config.hidden_size)
    weights = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, min(100, steps // 10))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    losses, rights = [], []
    for step in range(1, steps + 1):
        pictures = draw_pictures(batch_size, generator)
        tokens_BTD = encoder(normalise(pictures.pixels_BCHW)).last_hidden_state
        loss, right_B = heads(tokens_BTD, pictures)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        rights.append(right_B.float().mean().item())
        if step % 50 == 0 or step == steps:
            mean_loss, mean_right = (sum(values[-50:]) / len(values[-50:]) for values in (losses, rights))
            logger.info("step %d of %d: loss %.4f, named %.2f %%", step, steps, mean_loss, 100 * mean_right)
    return encoder.eval()


@torch.no_grad()
def name_pictures(encoder: Dinov2Model, pixels_BCHW: Tensor, fitted_on: int = 4096, seed: int = 1) -> Tensor:
    """Names pictures by a linear probe on the encoder: int64 [B, 2], indices of shape and colour.

    The probe (ridge regression on the CLS token beside the mean patch token) is fitted on freshly drawn pictures alone.
    pixels_BCHW: uint8 [B, 3, 64, 64].
    """
    pictures = draw_pictures(fitted_on, torch.Generator().manual_seed(seed))
    features = _probe_features(encoder, pictures.pixels_BCHW)
    one_hot = torch.cat(
        [functional.one_hot(pictures.shape_B, len(SHAPES)), functional.one_hot(pictures.colour_B, len(COLOURS))], dim=1
    ).double()
    gram = features.T @ features + 1e-3 * fitted_on * torch.eye(features.shape[1], dtype=torch.float64)
    probe = torch.linalg.solve(gram, features.T @ one_hot)
    scores = _probe_features(encoder, pixels_BCHW) @ probe
    return torch.stack([scores[:, : len(SHAPES)].argmax(1), scores[:, len(SHAPES) :].argmax(1)], dim=1)


def _probe_features(encoder: Dinov2Model, pixels_BCHW: Tensor) -> Tensor:
    """float64 [B, 2 D + 1]: CLS token, mean patch token, and a one for the probe's bias."""
    rows = []
    for pixels in pixels_BCHW.split(256):
        tokens_BTD = encoder(normalise(pixels)).last_hidden_state.double()
        one = torch.ones(len(pixels), 1, dtype=torch.float64)
        rows.append(torch.cat([tokens_BTD[:, 0], tokens_BTD[:, 1:].mean(1), one], dim=1))
    return torch.cat(rows)


def check_easy_vqa(encoder: Dinov2Model) -> dict[str, float]:
    """How many easy-VQA pictures the probe names rightly, in percent; the pictures serve for this measurement only.

    A picture's shape and colour are known where one of its questions is answered by them.
    """
    import easy_vqa
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    splits = {
        "train": (easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        "test": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    }
    colours = list(COLOURS)
    results = {}
    for split, ((_, answers, image_ids), paths) in splits.items():
        pixels = torch.stack([pil_to_tensor(Image.open(paths[i]).convert("RGB")) for i in sorted(paths)])
        row = {image_id: number for number, image_id in enumerate(sorted(paths))}
        named = name_pictures(encoder, pixels)
        shapes = {row[i]: SHAPES.index(a) for a, i in zip(answers, image_ids, strict=True) if a in SHAPES}
        tints = {row[i]: colours.index(a) for a, i in zip(answers, image_ids, strict=True) if a in colours}
        for kind, column, truth in (("shapes", 0, shapes), ("colours", 1, tints)):
            right = sum(named[number, column].item() == name for number, name in truth.items())
            results[f"{split} {kind} of {len(truth)}"] = round(100 * right / len(truth), 2)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for config, weights and processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--check-easy-vqa",
        action="store_true",
        help="train nothing: measure the encoder in the output folder on easy-VQA's pictures (evaluation only)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not arguments.check_easy_vqa:
        encoder = pretrain(arguments.seed, arguments.steps, arguments.batch_size)
        encoder.save_pretrained(arguments.output)
        small_processor().save_pretrained(arguments.output)
        return
    encoder = Dinov2Model.from_pretrained(arguments.output, dtype=torch.float32, trust_remote_code=False).eval()
    for what, percent in check_easy_vqa(encoder).items():
        print(f"easy-VQA {what}: {percent} %")


if __name__ == "__main__":
    main()
