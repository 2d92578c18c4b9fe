"""The export's processor: the stock class whose tokens and mask are those of the training, with a chat template.

`LlavaProcessor`, for causal, gives no token types: every token sees those before it. It writes one image token a patch and
one more where the tower has a CLS token. `PaliGemmaProcessor` gives token types, all 0, so that the prompt is one block, as
trained under prefix-lm alone, and puts `<bos>` and the last newline into the text itself.
"""

import json
import re
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image
from transformers import LlavaProcessor, PaliGemmaProcessor

from vlm_vqa.model.encoder import TOWERS
from vlm_vqa.model.layout import Row, TokenLayout, clean
from vlm_vqa.params import Mask

TEMPLATE = Path(__file__).parent / "chat_template.jinja"
IMAGE_TOKEN = "<image>"


def export_processor(
    processor: PaliGemmaProcessor, mask: Mask, instruction: str, vision_config: Any
) -> PaliGemmaProcessor | LlavaProcessor:
    """Return the stock processor that a model of this mask is exported with; image processor and tokenizer are shared.

    Args:
        processor: as `build_processor` gives it.
        vision_config: the tower's.
    """
    images, tokenizer = processor.image_processor, processor.tokenizer
    template = chat_template(tokenizer, mask, instruction)
    if mask is not Mask.CAUSAL:
        return PaliGemmaProcessor(images, tokenizer, chat_template=template)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision_config.patch_size,
        # All of the tower's tokens are image tokens; by "default", Llava would leave out the first.
        vision_feature_select_strategy="full",
        num_additional_image_tokens=TOWERS[vision_config.model_type].cls,
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )


def chat_template(tokenizer, mask: Mask, instruction: str) -> str:
    """Return the Jinja template that writes a chat of one question about one picture in the trained layout."""
    # The other processor writes `<bos>` and the last newline itself.
    begin, end = (tokenizer.bos_token, "\n") if mask is Mask.CAUSAL else ("", "")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        instruction=_literal(clean(instruction)),
        tokens=_literal(list(dict.fromkeys(map(_beginning, _tokens(tokenizer))))),
        begin=_literal(IMAGE_TOKEN + begin),
        end=_literal(end),
    )


def unlike_trained(processor: PaliGemmaProcessor | LlavaProcessor, layout: TokenLayout) -> str | None:
    """Return why plain use of the export does not compute what was trained, or None where it does."""
    if layout.mask is Mask.IMAGE_PREFIX:
        return "prompt.mask is image-prefix, which no stock processor expresses"
    for token in _tokens(processor.tokenizer):
        if token in clean(layout.instruction):
            return f"prompt.instruction holds {token}, text to the training, a sign of its own to a stock tokenizer"
    question = "What is in the picture?"
    content = [{"type": "image", "image": Image.new("RGB", (64, 64))}, {"type": "text", "text": question}]
    chat: Any = [{"role": "user", "content": content}]
    found: Any = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    if found["input_ids"][0] != layout.collate([Row(0, (layout.tokenize(question),))])["input_ids"][0].tolist():
        return "its processor makes other tokens of a question than training read"
    return None


def _tokens(tokenizer) -> list[str]:
    """Return what the tokenizer reads as one token wherever it stands in a text, white space left out."""
    added = (str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()))
    return [token for token in added if not token.isspace()]


def _beginning(token: str) -> str:
    """Return what is looked for in place of `<loc0000>` to `<loc1023>` and their like: `<loc0` and `<loc1`."""
    return re.sub(r"^(<[a-z]+\d)\d*>$", r"\1", token)


def _literal(value: Any) -> str:
    """Return a value as Jinja reads it; beyond ASCII as it is, for Jinja knows no surrogate pairs."""
    return json.dumps(value, ensure_ascii=False)
