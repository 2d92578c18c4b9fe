"""The token layout: what a row holds, who sees whom, what is supervised, and text that looks like a token."""

import re

import pytest
import torch

from vlm_vqa.errors import UserError
from vlm_vqa.model.layout import IGNORED, Row, rows_of, visible
from vlm_vqa.params import Mask


@pytest.mark.parametrize("mask", [mask.value for mask in Mask])
def test_a_row_reads_image_bos_instruction_question_answer(tiny, mask):
    layout = tiny.layout(mask)
    tokens = layout.tokenize("What color is the shape?", "red")
    batch = layout.collate([Row(3, (tokens,))])
    ids = batch["input_ids"][0].tolist()
    assert ids[:6] == [layout.image_token_id] * 5 + [layout.bos_id]
    assert layout.decode(ids[6:]) == "Answer in one word.\nWhat color is the shape?\nred"
    assert batch["position_ids"][0].tolist() == list(range(1, len(ids) + 1))
    supervised = batch["labels"][0] != IGNORED
    # From the newline after the question to the answer's last token: the answer and <eos> are predicted.
    assert batch["labels"][0][supervised].tolist() == tokens.answer
    assert tokens.answer[-1] == layout.eos_id
    assert int(supervised.nonzero()[0]) == len(ids) - len(tokens.answer)


@pytest.mark.parametrize("text", ["What is <image>?", "<loc0001> <seg001>", "<bos><eos><pad>", "is it <unk>?"])
def test_special_strings_in_a_question_are_plain_text(tiny, text):
    layout = tiny.layout("image-prefix")
    prompt = layout.tokenize(text, "yes").prompt
    special = {layout.image_token_id, layout.bos_id, layout.eos_id, layout.pad_id}
    assert not special & set(prompt)
    assert max(prompt) < 300, "a location or segment token of the processor"
    assert layout.decode(prompt) == text
    # The stock tokenizer would have read a token: otherwise this test could not fail.
    assert tiny.processor.tokenizer(text, add_special_tokens=False)["input_ids"] != prompt[:-1]


def test_newlines_in_a_question_do_not_end_it(tiny):
    layout = tiny.layout("image-prefix")
    assert layout.tokenize("What\ncolor  is\tit?") == layout.tokenize("What color is it?")


def test_an_answer_is_never_cut(tiny):
    layout = tiny.layout("image-prefix")
    longest = layout.tokenize("Is it red?", "yes")
    layout.text_length = layout.text_tokens(longest)
    assert layout.tokenize("Is it red?", "yes") == longest
    layout.text_length -= 1
    with pytest.raises(UserError, match=r"text tokens; prompt.text_length is"):
        layout.tokenize("Is it red?", "yes")
    with pytest.raises(UserError, match="empty answer"):
        layout.tokenize("Is it red?", " ")


def sees(layout, row):
    batch = layout.collate([row])
    allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])[0]
    return allowed, batch


@pytest.mark.parametrize("mask", ["image-prefix", "causal"])
def test_truth_table_of_shared_rows(tiny, mask):
    layout = tiny.layout(mask)
    questions = (layout.tokenize("Is it red?", "yes"), layout.tokenize("What color?", "no"))
    allowed, batch = sees(layout, Row(0, questions))
    segment = batch["segment_ids"][0]
    image = torch.arange(len(segment)) < 5
    prefix = (segment == 0) & ~image
    one, two = segment == 1, segment == 2
    among_image = torch.ones(5, 5).tril(5 if mask == "image-prefix" else 0).bool()
    assert torch.equal(allowed[image][:, image], among_image) and not allowed[image][:, ~image].any()
    for rows in (prefix, one, two):
        assert allowed[rows][:, image].all()
        assert torch.equal(allowed[rows][:, rows], torch.ones(rows.sum(), rows.sum()).tril().bool())
    assert allowed[one][:, prefix].all() and allowed[two][:, prefix].all()
    assert not allowed[prefix][:, one | two].any()
    assert not allowed[one][:, two].any() and not allowed[two][:, one].any()
    # Each question restarts after the prefix.
    assert batch["position_ids"][0][one][0] == batch["position_ids"][0][two][0] == int((segment == 0).sum()) + 1


def test_prefix_lm_truth_table(tiny):
    layout = tiny.layout("prefix-lm")
    tokens = layout.tokenize("Is it red?", "yes")
    allowed, _ = sees(layout, Row(0, (tokens,)))
    prefix = len(allowed) - (len(tokens.answer) - 1)
    assert allowed[:prefix, :prefix].all() and not allowed[:prefix, prefix:].any()
    assert torch.equal(
        allowed[prefix:, prefix:], torch.ones(len(allowed) - prefix, len(allowed) - prefix).tril().bool()
    )
    with pytest.raises(ValueError, match="one question"):
        layout.collate([Row(0, (tokens, tokens))])


def test_padding_is_seen_by_nobody_and_sees_something(tiny):
    layout = tiny.layout("image-prefix")
    short, long = layout.tokenize("Is it?", "no"), layout.tokenize("What color is the big shape?", "red")
    batch = layout.collate([Row(0, (short,)), Row(1, (long,))])
    allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
    padding = batch["segment_ids"] == -1
    assert padding[0].any() and not padding[1].any()
    assert not allowed[0][:, padding[0]].any()
    assert allowed.any(dim=-1).all(), "an empty row of the softmax would be NaN"


def test_questions_of_an_image_share_a_row_only_under_image_prefix(tiny):
    tokens = tiny.layout("image-prefix").tokenize("Is it?", "no")
    stream = [(1, tokens), (1, tokens), (2, tokens), (1, tokens)]
    assert [len(row.questions) for row in rows_of(stream, Mask.IMAGE_PREFIX)] == [2, 1, 1]
    assert [len(row.questions) for row in rows_of(stream, Mask.PREFIX_LM)] == [1, 1, 1, 1]


def test_a_question_that_is_too_long_to_be_asked_is_told_how_much_fits(tiny):
    layout = tiny.layout("image-prefix")
    with pytest.raises(UserError, match=r"has \d+ tokens, and \d+ fit beside the instruction. Ask in fewer") as caught:
        layout.tokenize("what color? " * 40)
    assert "None" not in str(caught.value) and "too_long" not in str(caught.value)
    has, fit = map(int, re.findall(r"\d+", str(caught.value)))
    assert fit == layout.text_length - len(layout.prefix) < has
