"""The real VQAv2 samples beside the project hold the data contract and fit the full-scale presets' `prompt.text_length`.

The tokenizer is a stand-in, `train_tokenizer` of 8,192 tokens on the sample's own texts, each question after the
instruction as the model reads it: nothing is claimed about Gemma's.
"""

from types import SimpleNamespace

import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.contract import Violations
from vlm_vqa.fetch.sources.official_layout import official_split
from vlm_vqa.model.layout import TokenLayout
from vlm_vqa.model.vlm import train_tokenizer
from vlm_vqa.params import SplitFiles, load_params


@pytest.mark.parametrize(
    ("folder", "suffix", "count"), [("vqav2-text", ".json.gz", 29_761), ("vqav2-sample", ".json", 109)]
)
def test_questions_and_all_ten_answers(shared_data, folder, suffix, count):
    violations = Violations()
    files = SplitFiles(f"questions{suffix}", f"annotations{suffix}", ".", "{image_id}.jpg")
    split = official_split(shared_data / folder, "train", files)
    rows = [row.record for row in split.rows(violations)]
    violations.raise_if_any()
    assert len(rows) == count

    prompt = load_params("presets/vqav2.yaml").prompt
    texts = [text for row in rows for text in (row["question"], *row["answers"])]
    tokenizer = train_tokenizer([*[prompt.instruction] * count, *texts], 8192)
    layout = TokenLayout(
        SimpleNamespace(backend_tokenizer=tokenizer.backend_tokenizer, pad_token_id=0, bos_token_id=2, eos_token_id=1),
        mask=prompt.mask,
        instruction=prompt.instruction,
        num_patches=257,
        text_length=prompt.text_length,
        image_token_id=3,
    )
    long = [
        row["question_id"]
        for row in rows
        if not all(fits(layout, row["question"], answer) for answer in set(row["answers"]) if answer.strip())
    ]
    taught = [row["question_id"] for row in rows if not fits(layout, row["question"], row["multiple_choice_answer"])]
    print(
        f"{folder}: of {count} questions {len(taught)} do not fit {prompt.text_length} tokens with the majority's answer, "
        f"{len(long)} with one of the ten"
    )
    # Presets leave those out, and say how many: people's longest answers are sentences.
    assert len(long) <= 0.005 * count and len(taught) <= 0.002 * count


def fits(layout, question, answer):
    try:
        layout.tokenize(question, answer)
    except UserError:
        return False
    return True
