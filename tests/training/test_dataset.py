"""From records to rows."""

import datasets
import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.params import TooLong
from vlm_vqa.training.dataset import QuestionDataset
from vlm_vqa.training.windows import PlannedRow


def records(answer="yes"):
    return datasets.Dataset.from_dict(
        {"question_id": [7, 8], "image_id": [1, 1], "question": ["Is it red?", "Is it?"],
         "multiple_choice_answer": ["yes", answer]}
    )  # fmt: skip


def test_a_record_too_long_is_an_error_or_a_counted_drop(tiny):
    layout = tiny.layout("image-prefix")
    layout.text_length = layout.text_tokens(layout.tokenize("Is it red?", "yes"))
    assert QuestionDataset(records(), layout, TooLong.ERROR).dropped == 0
    with pytest.raises(UserError, match="question_id 8: .*prompt.text_length"):
        QuestionDataset(records("a long answer of many words"), layout, TooLong.ERROR)
    kept = QuestionDataset(records("a long answer of many words"), layout, TooLong.DROP)
    assert (len(kept), kept.dropped) == (1, 1)


def test_a_planned_row_becomes_its_image_and_questions(tiny):
    data = QuestionDataset(records(), tiny.layout("image-prefix"), TooLong.ERROR)
    row = data[PlannedRow(1, (1, 0))]
    assert row.image_id == 1 and row.questions == (data.tokens[1], data.tokens[0])
    # What a question adds to a row's length is what the sampler counts.
    rows = [data[PlannedRow(1, (0,))], data[PlannedRow(1, (0, 1))]]
    one, both = (tiny.layout("image-prefix").collate([row])["input_ids"].shape[1] for row in rows)
    assert both - one == data.text_lengths[1]
