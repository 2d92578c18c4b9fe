"""Ask an exported model: what HELM's client, the evaluation and `vlm-vqa ask` use."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

from vlm_vqa.errors import UserError, make_again
from vlm_vqa.model.encoder import middle
from vlm_vqa.model.generation import generate
from vlm_vqa.model.layout import TokenLayout
from vlm_vqa.model.vlm import hash_weights, set_attention, trained_state
from vlm_vqa.params import Attention, Mask

FACTS_FILE = "vlm_vqa.json"
"""Beside an export's stock files: mask, instruction, text_length, num_patches and the hash of the trained weights."""


class Answerer:
    """A model that answers questions about images, greedily.

    Attributes:
        weights_hash: hash of the trained weights, the name under which MLflow knows the run.
        mask: "image-prefix" or "prefix-lm".
        instruction: what the model reads before every question.
    """

    def __init__(self, model: PaliGemmaForConditionalGeneration, processor, facts: dict, max_new_tokens: int = 10):
        self.model = model.eval()
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.weights_hash: str = facts["weights_hash"]
        self.mask: str = facts["mask"]
        self.instruction: str = facts["instruction"]
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
        cls, folder: str | Path = "models/export", device: str | None = None, max_new_tokens: int = 10
    ) -> "Answerer":
        """Load an exported folder and check that its weights are the ones it names.

        Raises:
            UserError: there is no export, or its weights are not those that were trained.
        """
        folder = Path(folder)
        try:
            facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{folder}: no {FACTS_FILE} there. Run the export stage first: `dvc repro export`."
            ) from error
        model = PaliGemmaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, trust_remote_code=False
        )
        set_attention(model, Attention.EAGER)
        found = hash_weights(trained_state(model))
        if found != facts["weights_hash"]:
            raise UserError(
                f"{folder}: the weights have hash {found[:12]}, but {FACTS_FILE} names {facts['weights_hash'][:12]}. "
                f"{make_again('export')}"
            )
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            model.to(chosen), AutoProcessor.from_pretrained(folder, trust_remote_code=False), facts, max_new_tokens
        )

    def answer(self, questions: Sequence[str], images: Sequence[Image.Image]) -> list[str]:
        """Answer each question about its image, from pixels."""
        return self.answer_features(questions, self.encode(images))

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Return what the tower makes of images: [B, T, E]."""
        pixels = self.processor.image_processor(
            images=[middle(image.convert("RGB"), self.processor.image_processor) for image in images],
            return_tensors="pt",
        ).pixel_values
        return self.model.model.vision_tower(pixels.to(self.model.device)).last_hidden_state

    def answer_features(
        self, questions: Sequence[str], features: Tensor, images: Sequence[int] | None = None
    ) -> list[str]:
        """Answer Q questions as one batch; answers come without outer blanks.

        Args:
            features: [I, T, E], of the images that the questions are about.
            images: which of the I images each question is about; by default each has its own, in order. Questions of one
                image that stand together share its prefix under image-prefix.
        """
        tokens = [self.layout.tokenize(question) for question in questions]
        features = features.to(self.model.device, torch.float32)
        places = range(len(questions)) if images is None else images
        answers = generate(self.model, self.layout, features, tokens, places, self.max_new_tokens)
        return [self.layout.decode(answer) for answer in answers]
