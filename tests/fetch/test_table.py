"""Source `table`: the same records from every kind of table, texts as they stand, refusals by name."""

import csv
import gzip
import json
from dataclasses import replace

import datasets
import pytest
from PIL import Image

from vlm_vqa.data import records
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.sources import table as source
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import BadRecords, Columns, Doubtful, Source, TableParams

COLUMNS = ("image", "question", "answer")


@pytest.fixture
def made(tmp_path, directory_params):
    """Rows of six pictures, three of them val's, and what writes, fetches and reads them."""

    class Made:
        folder = tmp_path / "my-data"
        rows = {
            split: [
                {"image": f"IMG_{first + place}.JPG", "question": question, "answer": answer}
                for place in range(3)
                for question, answer in (
                    ("Is it open?", "yes"),
                    ("Which?", "NA"),
                    ("How many?", "01"),
                    ("What?", "null"),
                )
            ]
            for split, first in (("train", 0), ("val", 3))
        }

        def write(self, ending="csv", rows=None, split=None):
            for name in [split] if split else records.SPLITS:
                write_table(self.folder / f"{name}.{ending}", (rows or self.rows)[name] if not split else rows)
            return self

        def fetch(self, ending="csv", into="records", **changes):
            data = {key: changes.pop(key) for key in [*changes] if key in ("bad_records", "most_dropped", "doubtful")}
            names = {
                "train": f"train{ending and '.'}{ending}",
                "val": f"val{ending and '.'}{ending}",
                "images": "images",
            }
            params = TableParams(**{**names, **changes})
            return fetch(directory_params(self.folder, source=Source.TABLE, table=params, **data), tmp_path / into)

        def questions(self, split="train", into="records"):
            return list(records.load_questions(tmp_path / into, split))

    made = Made()
    (made.folder / "images").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (20, 20), (40 * number, 9, 9)).save(made.folder / "images" / f"IMG_{number}.JPG", "JPEG")
    return made


def write_table(path, rows):
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
        return
    if name.endswith(("csv", "tsv")):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "\n".join(map(json.dumps, rows)) + "\n" if name.endswith("jsonl") else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))


def test_a_csv_becomes_records_with_its_texts_as_they_stand(made):
    manifest = made.write().fetch()
    assert manifest["source"] == "table" and manifest["images"] == 6
    first = made.questions()[0]
    assert [row["multiple_choice_answer"] for row in made.questions()[:4]] == ["yes", "NA", "01", "null"]
    assert first["answers"] == ["yes"] and first["answer_confidences"] == []
    assert first["original_image_id"] == "IMG_0.JPG" and first["original_question_id"] is None
    assert [row["answer_type"] for row in made.questions()[:4]] == ["yes/no", "other", "number", "other"]
    assert [row["question_type"] for row in made.questions()[:4]] == ["is it", "which", "how many", "what"]
    train = manifest["splits"]["train"]
    assert train["answers_per_question"] == {"1": 12} and train["dropped"] == 0
    assert train["inputs"]["table"]["name"] == "train.csv"


@pytest.mark.parametrize("ending", ["tsv", "jsonl", "json", "parquet", "csv.gz", "jsonl.gz"])
def test_every_kind_of_table_gives_the_same_records(made, ending):
    assert made.write().fetch()["data_hash"] == made.write(ending).fetch(ending, "others")["data_hash"]
