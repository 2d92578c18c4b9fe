"""The export's processor: chats become the trained token ids, and what the model was not trained for is refused."""

import jinja2
import pytest
from PIL import Image
from transformers import AutoProcessor, GemmaTokenizer, PaliGemmaConfig, PaliGemmaProcessor

from tests.tiny_model import save_paligemma
from vlm_vqa.inference.processor import export_processor, unlike_trained
from vlm_vqa.model.layout import TokenLayout
from vlm_vqa.model.vlm import build_processor
from vlm_vqa.params import Mask

AWKWARD = '"Say" {{ x }} {% y %} {# z #} 100% \\n é 😀 it\'s\n $end'
KINDS = {"image-prefix": "PaliGemmaProcessor", "prefix-lm": "PaliGemmaProcessor", "causal": "LlavaProcessor"}


def picture():
    return {"type": "image", "image": Image.new("RGB", (40, 30), "red")}


def text(said):
    return {"type": "text", "text": said}


def user(*parts):
    return {"role": "user", "content": list(parts)}


@pytest.fixture
def processor(tiny, tmp_path):
    """Return a function that gives processor, saved and loaded as a user does, and layout of a mask and instruction."""

    def make(mask="causal", instruction="Answer in one word.", base=tiny.processor):
        export_processor(base, Mask(mask), instruction, tiny.encoder_config).save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path)
        layout = TokenLayout(
            loaded.tokenizer, mask=Mask(mask), instruction=instruction, num_patches=tiny.num_patches, text_length=300,
            image_token_id=loaded.image_token_id,
        )  # fmt: skip
        return loaded, layout

    return make


def ids(processor, messages):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]


def trained_ids(layout, question):
    return [layout.image_token_id] * layout.num_patches + layout.prefix + layout.tokenize(question).prompt


@pytest.mark.parametrize("instruction", ["Answer in one word.", AWKWARD, ""], ids=["plain", "awkward", "none"])
@pytest.mark.parametrize("mask", list(KINDS))
def test_a_chat_becomes_the_trained_token_ids(processor, mask, instruction):
    stock, layout = processor(mask, instruction)
    assert type(stock).__name__ == KINDS[mask]
    question = "  How many\n\n red {{ dogs }} — 😀?"
    wanted = trained_ids(layout, question)
    chats = [
        [user(picture(), text(question))],
        [user(text(question), picture())],
        [user(text("  How many"), picture(), text("red {{ dogs }} — 😀?"))],
        # As HELM's client sends it.
        [user(text(instruction), text("\n"), picture(), text(question))],
        [{"role": "system", "content": instruction}, user(picture(), text(question))],
        [{"role": "developer", "content": [text(instruction)]}, user(picture(), text(question))],
        [{"role": "system", "content": " "}, user(picture(), text(question))],
    ]
    assert [ids(stock, chat) for chat in chats] == [wanted] * len(chats)
    assert (unlike_trained(stock, layout) is None) == (mask != "image-prefix")


REFUSED = [
    ([{"role": "system", "content": "Answer in French."}, user(picture(), text("What?"))], "no system message"),
    ([user(picture(), text("What?")), {"role": "assistant", "content": "red"}], "not one of the role assistant"),
    ([user(picture(), text("What?")), {"role": "assistant", "content": "red"}, user(text("Sure?"))], "role assistant"),
    ([user(picture(), text("What?")), user(text("And?"))], "one message of the role user, not 2"),
    ([user(picture(), text("What?")), {"role": "tool", "content": "x"}], "not one of the role tool"),
    ([{"role": "system", "content": "Answer in one word."}], "one message of the role user, not 0"),
    ([{"role": "user", "content": "What?"}], "send one with the question, not 0"),
    ([user(text("What?"))], "send one with the question, not 0"),
    ([user(picture(), picture(), text("What?"))], "send one with the question, not 2"),
    ([user(picture())], "There is no question"),
    ([user(picture(), text(" \n"))], "There is no question"),
    ([user(picture(), text("Answer in one word."))], "There is no question"),
    ([user(picture(), text("What?"), {"type": "video"})], "no video of the role user"),
    ([{"role": "system", "content": [picture()]}, user(text("What?"))], "no image of the role system"),
    *(
        ([user(picture(), text(f"What is {token} here?"))], f"The question holds {token[:5]}")
        for token in ("<image>", "<bos>", "<eos>", "<pad>", "<loc0000>", "<loc1023>", "<seg127>")
    ),
]


@pytest.mark.parametrize("mask", ["causal", "prefix-lm"])
def test_what_the_model_was_not_trained_for_is_refused_in_plain_words(processor, mask):
    stock, layout = processor(mask)
    for chat, message in REFUSED:
        with pytest.raises(jinja2.TemplateError, match=message):
            stock.apply_chat_template(chat)
    chat = [user(picture(), text("What?"))]
    with pytest.raises(jinja2.TemplateError, match="calls no tools"):
        stock.apply_chat_template(chat, tools=[{"type": "function"}])
    for harmless in ("Is it <location> or <b>?", "<", "image> <seg>", "Answer in one words?"):
        assert ids(stock, [user(picture(), text(harmless))]) == trained_ids(layout, harmless)


def test_an_instruction_that_no_stock_tokenizer_reads_as_text_is_found(processor):
    stock, layout = processor("causal", "Look at <image> and <bos>")
    assert "prompt.instruction holds <bos>" in unlike_trained(stock, layout)


def test_other_tokens_than_the_trained_ones_are_found(processor):
    stock, layout = processor("causal")
    stock.tokenizer.add_bos_token = True
    assert "makes other tokens" in unlike_trained(stock, layout)
    stock.tokenizer.add_bos_token = False
    stock.num_additional_image_tokens = 0
    assert "makes other tokens" in unlike_trained(stock, layout)


@pytest.mark.parametrize("mask", ["causal", "prefix-lm"])
def test_gemmas_own_tokenizer_adds_no_second_bos(tiny, processor, mask):
    """As the hub has it, it puts one before every text."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(32, 127)), "\n", "▁"]
    tokenizer = GemmaTokenizer(vocab={token: at for at, token in enumerate(tokens)}, merges=[], add_bos_token=True)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    stock, layout = processor(mask, base=build_processor(tiny.processor.image_processor, tokenizer, tiny.num_patches))
    assert type(stock.tokenizer) is GemmaTokenizer
    assert ids(stock, [user(picture(), text("What is it?"))]) == trained_ids(layout, "What is it?")


def test_a_tower_without_a_cls_token_has_one_image_token_a_patch(tmp_path):
    folder = save_paligemma(tmp_path / "start")
    vision = PaliGemmaConfig.from_pretrained(folder).vision_config
    stock = export_processor(PaliGemmaProcessor.from_pretrained(folder), Mask.CAUSAL, "Say.", vision)
    stock.save_pretrained(tmp_path)
    chat = [user(picture(), text("What?"))]
    found = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(chat, tokenize=True, return_dict=True)
    assert found["input_ids"][0].count(stock.image_token_id) == 4
