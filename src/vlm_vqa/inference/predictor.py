"""Ask an exported model: what HELM's client, the evaluation, `vlm-vqa ask` and `vlm-vqa demo` use."""

import os
from collections.abc import Iterable, Sequence
from math import exp
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

from vlm_vqa.errors import UserError, make_again
from vlm_vqa.inference.generation import generate, likeliest
from vlm_vqa.model.checkpoint import HEAD
from vlm_vqa.model.encoder import crop_elongated
from vlm_vqa.model.layout import TokenLayout
from vlm_vqa.model.vlm import set_attention
from vlm_vqa.params import Attention, Mask
from vlm_vqa.sealed import read_folder

FACTS_FILE = "vlm_vqa.json"
"""Beside an export's stock files: mask, instruction, text_length, num_patches, the hash of the trained weights, the type in
which they are stored, which step's they are and by what they were selected, and the SHA-256 of every other file."""


class Candidate(NamedTuple):
    """An answer and its probability: the product of its tokens', that of the end among them."""

    answer: str
    probability: float


class Predictor:
    """A model that answers questions about images, greedily.

    Attributes:
        weights_hash: hash of the trained weights, the name under which MLflow knows the run.
        mask: the value of a `Mask`.
        instruction: what the model reads before every question.
        selection: `step` of the training that the weights are of, `step_is`: why, and `selected_on`: by which questions;
            None each where an earlier version exported it.
    """

    def __init__(self, model: PaliGemmaForConditionalGeneration, processor, facts: dict, max_new_tokens: int = 10):
        self.model = model.eval()
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.weights_hash: str = facts["weights_hash"]
        self.mask: str = facts["mask"]
        self.instruction: str = facts["instruction"]
        self.selection = {name: facts.get(name) for name in ("step", "step_is", "selected_on")}
        self.layout = TokenLayout(
            processor.tokenizer,
            mask=Mask(facts["mask"]),
            instruction=facts["instruction"],
            num_patches=facts["num_patches"],
            text_length=facts["text_length"],
            image_token_id=processor.image_token_id,
        )

    @classmethod
    def from_export(
        cls,
        folder: str | Path = "models/export",
        device: str | None = None,
        max_new_tokens: int = 10,
        dtype: torch.dtype = torch.float32,
    ) -> "Predictor":
        """Load an exported folder, every file as it was exported, to compute in `dtype`.

        UserError: there is no export, it is damaged or incomplete, or its weights are not those that were trained.
        """
        folder = Path(folder)
        if not os.path.isfile(folder / FACTS_FILE):
            raise UserError(f"{folder}: no {FACTS_FILE} there. Run the export stage first: `dvc repro export`.")
        # It finds all that is damaged or missing, so that what follows reads what was exported; and it asks no hub.
        facts = read_folder(folder / FACTS_FILE, "the seal of an export", make_again("export"))
        model, found = PaliGemmaForConditionalGeneration.from_pretrained(  # ty: ignore[not-iterable] - a pair with output_loading_info
            folder,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        lacking = sorted(set(found["missing_keys"]) - {HEAD})
        assert not lacking and not found["mismatched_keys"], f"weights that do not fit config.json: {lacking[:3]}"
        set_attention(model, Attention.EAGER)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), processor, facts, max_new_tokens)

    def answer(self, questions: Sequence[str], images: Sequence[Image.Image]) -> list[str]:
        """Answer each question about its image, from pixels."""
        return [given.answer for given in self.answer_features(questions, self.encode(images))]

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Return what the tower makes of images: [B, T, E]."""
        return self.encode_pixels(self.preprocess(images))

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return what the tower makes of what it reads: [B, T, E]."""
        return self.model.model.vision_tower(pixels.to(self.model.device, self.model.dtype)).last_hidden_state

    def preprocess(self, images: Iterable[Image.Image]) -> Tensor:
        """Return what the tower reads of images: [B, 3, H, W]."""
        resize = self.processor.image_processor
        cut = [crop_elongated(image.convert("RGB"), resize) for image in images]
        return resize(images=cut, return_tensors="pt").pixel_values

    @property
    def longest_row(self) -> int:
        """Tokens of the longest question that the model takes, its image and answer among them."""
        return self.layout.num_patches + self.layout.text_length

    def count_tokens(self, question: str) -> int:
        """Count what a question adds to its row."""
        return len(self.layout.tokenize(question).read)

    def grid(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Return how many rows, and of how many tokens, questions of such lengths about one image take."""
        prefix = self.layout.num_patches + len(self.layout.prefix)
        shared = self.layout.mask is not Mask.PREFIX_LM
        return (1, prefix + sum(tokens)) if shared else (len(tokens), prefix + max(tokens))

    def answer_features(
        self, questions: Sequence[str], features: Tensor, images: Sequence[int] | None = None
    ) -> list[Candidate]:
        """Answer Q questions as one batch; answers come without outer blanks, each with its probability.

        Args:
            features: [I, T, E], of the images that the questions are about.
            images: which of the I images each question is about; by default each has its own, in order. Questions of one
                image that stand together share its prefix, but under prefix-lm.
        """
        answers = generate(*self._asked(questions, features, images))
        return [Candidate(self.layout.decode(one.tokens), exp(one.log_probability)) for one in answers]

    def likeliest(
        self, questions: Sequence[str], features: Tensor, images: Sequence[int] | None = None, others: int = 2
    ) -> list[list[Candidate]]:
        """Answer as `answer_features` does, and say how likely each answer and up to two others are.

        The first is the greedy answer, always; the others are `generation.likeliest`'s, the likeliest first, without those
        that read the same as one before them.
        """
        found = []
        for answers in likeliest(*self._asked(questions, features, images)):
            texts: dict[str, float] = {}
            for scored in answers:
                texts.setdefault(self.layout.decode(scored.tokens), exp(scored.log_probability))
            found.append([Candidate(*one) for one in texts.items()][: 1 + others])
        return found

    def _asked(self, questions: Sequence[str], features: Tensor, images: Sequence[int] | None) -> tuple:
        tokens = [self.layout.tokenize(question) for question in questions]
        features = features.to(self.model.device, torch.float32)
        places = range(len(questions)) if images is None else images
        return self.model, self.layout, features, tokens, places, self.max_new_tokens
