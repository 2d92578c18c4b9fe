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


def with_pictures(made, rows):
    """Rows whose pictures stand in them, under the names that they have in the folder."""
    return [
        {**row, "image": {"bytes": (made.folder / "images" / row["image"]).read_bytes(), "path": row["image"]}}
        for row in rows
    ]


def test_pictures_in_the_table_and_a_folder_of_parquet_give_the_same_records(made, tmp_path):
    expected = made.write().fetch()["data_hash"]
    features = datasets.Features({**dict.fromkeys(COLUMNS, datasets.Value("string")), "image": datasets.Image()})
    for split in records.SPLITS:
        (made.folder / split).mkdir()
        for part in range(2):
            rows = with_pictures(made, made.rows[split][part::2] if not part else made.rows[split][1::2])
            made_of = datasets.Dataset.from_list(rows, features=features)
            made_of.to_parquet(made.folder / split / f"{part}.parquet")
    manifest = made.fetch("", "bytes", images=None)
    assert [row["question"] for row in made.questions(into="bytes")[:2]] == ["Is it open?", "How many?"]
    assert {row["image_id"] for row in made.questions(into="bytes")} == {row["image_id"] for row in made.questions()}
    assert list(manifest["splits"]["train"]["inputs"]) == ["0.parquet", "1.parquet"]
    for split in records.SPLITS:
        datasets.Dataset.from_list(with_pictures(made, made.rows[split]), features=features).to_parquet(
            made.folder / f"{split}.parquet"
        )
        datasets.Dataset.from_list(with_pictures(made, made.rows[split]), features=features).save_to_disk(
            made.folder / f"{split}-disk"
        )
    assert made.fetch("parquet", "one", images=None)["data_hash"] == expected
    shared = made.fetch("parquet", "shared", images=None, val=None, val_share=0.5)
    assert (shared["images"], shared["splits"]["val"]["images"]) == (3, 2)
    disk = made.fetch(into="disk", train="train-disk", val="val-disk", images=None)
    assert disk["data_hash"] == expected
    assert not list(tmp_path.glob("*.pictures")), "what was spilled is gone"


def test_names_of_pictures_that_others_have_too_are_made_anew(made):
    rows = with_pictures(made, made.rows["train"])
    for row in rows:
        row["image"]["path"] = "image.jpg"
    made.write("parquet", rows, "train").write("parquet", with_pictures(made, made.rows["val"]), "val")
    assert made.fetch("parquet", images=None)["images"] == 6


def test_one_answer_gives_the_rows_of_vqav2s_layout_with_it_ten_times(made, tmp_path, directory_params):
    made.write()
    made.fetch()
    for split in records.SPLITS:
        numbered = [(1000 * number + place, row) for number, row in enumerate(made.questions(split)) for place in [0]]
        questions = [{key: row[key] for key in ("question_id", "image_id", "question")} for _, row in numbered]
        annotations = [
            {
                **{key: row[key] for key in ("question_id", "image_id", "question_type", "answer_type")},
                "multiple_choice_answer": row["multiple_choice_answer"],
                "answers": [{"answer": row["answers"][0], "answer_confidence": "yes"}] * 10,
            }
            for _, row in numbered
        ]
        (made.folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json").write_text(
            json.dumps({"questions": questions})
        )
        (made.folder / f"v2_mscoco_{split}2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
        for row in made.questions(split):
            name = f"{split}2014/COCO_{split}2014_{row['image_id']}.jpg"
            (made.folder / name).parent.mkdir(exist_ok=True)
            (made.folder / name).write_bytes((made.folder / "images" / row["original_image_id"]).read_bytes())
    params = directory_params(made.folder)
    changed = {
        split: replace(getattr(params, split), image_name=f"COCO_{split}2014_{{image_id}}.jpg")
        for split in records.SPLITS
    }
    fetch(replace(params, **changed), tmp_path / "official")
    same = [
        key for key in records.question_features() if key not in ("answers", "answer_confidences", "original_image_id")
    ]
    for split in records.SPLITS:
        one, ten = made.questions(split), made.questions(split, "official")
        assert [[row[key] for key in same] for row in one] == [[row[key] for key in same] for row in ten]
        assert all(row["answers"] * 10 == other["answers"] for row, other in zip(one, ten, strict=True))


# --- texts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", ["NA", "None", "null", "yes", "01", "1.50", "2020-01-02", "a, b", 'say "x"', "l1\nl2"]
)
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_an_answer_stays_the_text_that_it_is(made, answer, ending):
    for rows in made.rows.values():
        rows[0]["answer"] = answer
    made.write(ending).fetch(ending)
    assert made.questions()[0]["answers"] == [answer]


@pytest.mark.parametrize(
    ("cell", "answers", "sure"),
    [
        ("red", ["red"], []),
        (["red", "blue", "red"], ["red", "blue", "red"], []),
        ('["red", "", "red"]', ["red", "", "red"], []),
        ("['red', 'blue']", ["red", "blue"], []),
        ("[red]", ["[red]"], []),
        (7, ["7"], []),
        ([1, 2.5], ["1", "2.5"], []),
        ([{"answer": "red", "answer_confidence": "yes", "answer_id": 1}], ["red"], ["yes"]),
        ([{"answer": "red"}, {"answer": "blue", "answer_confidence": "no"}], ["red", "blue"], ["", "no"]),
        ({"answer": ["red", "blue"], "answer_confidence": ["yes", "no"]}, ["red", "blue"], ["yes", "no"]),
    ],
)
def test_answers_in_all_their_shapes(cell, answers, sure):
    assert source.read_cell(cell) == (tuple(answers), tuple(sure))


def test_the_taught_answer_is_the_main_one_else_the_most_common_the_earlier_first(made):
    for rows in made.rows.values():
        rows[0]["answer"], rows[1]["answer"], rows[2]["answer"] = '["b", "a", "", "", ""]', '["a", "b", "b"]', '["x"]'
        for number, row in enumerate(rows):
            row["main_answer"] = "  " if number != 2 else "main"
    manifest = made.write().fetch()
    assert [row["multiple_choice_answer"] for row in made.questions()[:3]] == ["b", "b", "main"]
    assert manifest["splits"]["train"]["unsaid_answers"] == 1
    with pytest.raises(UserError, match=r"main answer that nobody gave: 2.*data.doubtful: count(.|\n)*row 3: 'main'"):
        made.fetch(doubtful=Doubtful.REFUSE)


def test_a_byte_order_mark_and_semicolons_are_read(made):
    expected = made.write().fetch()["data_hash"]
    for split in records.SPLITS:
        path = made.folder / f"{split}.csv"
        path.write_text(path.read_text().replace(",", ";"), encoding="utf-8-sig")
    assert made.fetch()["data_hash"] == expected


# --- layouts in the wild ------------------------------------------------------------------------------------------------


def wild(made, make, ending="json"):
    for split, rows in made.rows.items():
        (made.folder / f"{split}.{ending}").write_text(json.dumps(make(rows)))


def test_textvqa_is_an_object_with_one_list(made):
    wild(made, lambda rows: {"dataset_type": "x", "data": [{"image_id": one["image"][:-4], "question": one["question"],
         "answers": [one["answer"]] * 10, "image_classes": ["a"]} for one in rows]})  # fmt: skip
    assert made.fetch("json")["splits"]["val"]["answers_per_question"] == {"10": 12}
    assert made.questions()[0]["original_image_id"] == "IMG_0"


def test_gqa_is_an_object_of_objects_by_id(made):
    wild(made, lambda rows: {f"0{number}": {"imageId": one["image"][:-4], "question": one["question"],
         "answer": one["answer"], "fullAnswer": "It is."} for number, one in enumerate(rows)})  # fmt: skip
    made.fetch("json")
    assert made.questions()[1]["original_question_id"] == "01"
    assert made.questions("val")[1]["original_question_id"] == "01"
    assert not {row["question_id"] for row in made.questions()} & {row["question_id"] for row in made.questions("val")}


def test_llavas_conversations_become_pairs(made):
    talk = [{"from": "human", "value": "<image>\nIs it open?"}, {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red"}]  # fmt: skip
    wild(
        made,
        lambda rows: [
            {"id": f"c{number}", "image": one["image"], "conversations": talk} for number, one in enumerate(rows)
        ],
    )
    assert made.fetch("json")["splits"]["train"]["questions"] == 24
    rows = made.questions()[:2]
    assert [(row["question"], row["answers"]) for row in rows] == [("Is it open?", ["yes"]), ("Which?", ["red"])]
    assert [row["original_question_id"] for row in rows] == ["c0", "c0#1"]


def test_json_lines_may_be_called_json(made):
    expected = made.write().fetch()["data_hash"]
    for split in records.SPLITS:
        made.write("jsonl", made.rows[split], split)
        (made.folder / f"{split}.jsonl").rename(made.folder / f"{split}.json")
    assert made.fetch("json")["data_hash"] == expected


def test_columns_are_found_by_usual_names_or_named(made):
    expected = made.write().fetch()["data_hash"]
    for rows in made.rows.values():
        rows[:] = [{"Image_Path": one["image"], "QUESTION": one["question"], "truth": one["answer"]} for one in rows]
    assert made.write().fetch(columns=Columns(answers="truth"))["data_hash"] == expected
    with pytest.raises(
        UserError, match="columns that cannot be told: 2.*data.table.columns(.|\n)*no column for the answers; it has"
    ):
        made.fetch()
    with pytest.raises(UserError, match="data.table.columns.answers is 'Truth'; it has Image_Path, QUESTION, truth"):
        made.fetch(columns=Columns(answers="Truth"))
    for rows in made.rows.values():
        rows[:] = [{**one, "answer": "a", "answers": "b"} for one in rows]
    with pytest.raises(UserError, match="answers and answer could all be the answers"):
        made.write().fetch()


# --- ids ----------------------------------------------------------------------------------------------------------------


def numbered(made, question=str, image=None):
    for split, rows in made.rows.items():
        for number, row in enumerate(rows):
            row["question_id"] = question(number)
            if image:
                row["image_id"] = image(split, row["image"])
    return made.write("jsonl")


def test_whole_numbers_stay_and_a_splits_own_numbering_is_no_clash(made):
    numbered(made, int, lambda split, name: int(name[4]) % 3)
    made.fetch("jsonl")
    train, val = made.questions(), made.questions("val")
    assert [row["question_id"] for row in train] == list(range(12)) and train[0]["image_id"] == 0
    assert train[0]["original_question_id"] is None and val[0]["original_question_id"] == "0"
    assert val[0]["original_image_id"] == "0"
    ids = [{row[key] for row in train} & {row[key] for row in val} for key in ("question_id", "image_id")]
    assert ids == [set(), set()]


@pytest.mark.parametrize("one", ["q7", "007", "-1", "1.0", str(2**63), "", " "])
def test_ids_of_which_one_is_no_whole_number_are_made_and_kept_as_they_were(made, one):
    numbered(made, lambda number: one if number == 5 else str(number))
    made.fetch("jsonl")
    rows = made.questions()
    assert rows[4]["question_id"] == source.made_id("4") and rows[4]["original_question_id"] == "4"
    assert rows[5]["original_question_id"] == (one.strip() or None)
    assert all(0 <= row["question_id"] < 2**53 for row in rows)


def test_a_late_id_that_is_no_whole_number_lets_all_be_read_anew(made):
    """Nothing of the first reading is left: no records, no counts, no violations."""
    numbered(made, int, lambda split, name: 10 + int(name[4]))
    made.rows["train"][0]["answer"] = ""
    made.rows["val"][-1] |= {"question_id": "last", "image_id": "007"}
    overlap = {"bad_records": BadRecords.DROP, "most_dropped": 0.1}
    manifest = made.write("jsonl").fetch("jsonl", **overlap)
    assert manifest["splits"]["train"] | {"inputs": 0, "dropped_records": 0} == manifest["splits"]["train"] | {
        "questions": 11, "dropped": 1, "inputs": 0, "dropped_records": 0}  # fmt: skip
    rows = [*made.questions(), *made.questions("val")]
    assert [row["original_question_id"] for row in rows[10:13]] == ["11", "0", "1"]
    assert all(row["question_id"] == source.made_id(row["original_question_id"]) for row in rows[:11])
    assert all(row["image_id"] == source.made_id(row["original_image_id"]) for row in rows)


def test_made_ids_are_the_same_whatever_the_order_of_rows(made):
    made.write().fetch()
    before = {row["question_id"]: row["question"] for row in made.questions()}
    made.rows["train"].reverse()
    made.write().fetch()
    assert {row["question_id"]: row["question"] for row in made.questions()} == before


def test_an_id_given_twice_is_named(made):
    numbered(made, lambda number: "twice" if number < 2 else f"q{number}")
    with pytest.raises(UserError, match=r"duplicate question id: 2(.|\n)*train.jsonl: row 2: question_id 'twice'"):
        made.fetch("jsonl")


def test_an_image_id_that_stands_for_two_pictures_is_named(made):
    numbered(made, int, lambda split, name: 1 if name in ("IMG_0.JPG", "IMG_1.JPG") else int(name[4]))
    with pytest.raises(
        UserError, match=r"one image id, two images: 4(.|\n)*row 5: image_id '1' stands for 'IMG_0.JPG'"
    ):
        made.fetch("jsonl")


def test_pictures_of_one_name_in_a_folder_for_each_split(made):
    for split in records.SPLITS:
        (made.folder / split).mkdir()
        for place, row in enumerate(made.rows[split][::4]):
            (made.folder / "images" / row["image"]).rename(made.folder / split / f"{place}.jpg")
        for number, row in enumerate(made.rows[split]):
            row["image"] = f"{number // 4}.jpg"
    assert made.write().fetch(images="{split}")["images"] == 6
    assert made.questions("val")[0]["original_image_id"] == "0.jpg"


def test_a_pattern_makes_names_of_ids(made):
    for rows in made.rows.values():
        for row in rows:
            row["image"] = row["image"][4]
    made.write().fetch(image_name="IMG_{image_id}.JPG")
    assert made.questions()[0]["image_id"] == 0 and made.questions()[0]["original_image_id"] is None
    made.rows["train"][0]["image"] = "x"
    with pytest.raises(UserError, match="does not fit the name pattern: 1.*(.|\n)*row 1: image is 'x', no id for IMG_"):
        made.write().fetch(image_name="IMG_{image_id}.JPG")


# --- val_share ----------------------------------------------------------------------------------------------------------


def test_a_share_of_the_images_becomes_val(made):
    made.write("csv", made.rows["train"] + made.rows["val"], "train")
    seen = set()
    for seed in range(4):
        manifest = made.fetch(val=None, val_share=0.34, val_seed=seed)
        images = {split: {row["image_id"] for row in made.questions(split)} for split in records.SPLITS}
        assert len(images["val"]) == 2 and len(images["train"]) == 4 and not images["train"] & images["val"]
        assert manifest["origin"] == {"val_share": 0.34, "val_seed": seed} and len(made.questions("val")) == 8
        seen.add(frozenset(images["val"]))
    assert len(seen) > 1
    made.fetch(val=None, val_share=0.001)
    assert len({row["image_id"] for row in made.questions("val")}) == 2, "with fewer there is nothing to compare"
    made.write("csv", made.rows["train"][:8], "train")
    with pytest.raises(
        UserError, match="too few images to share out: 1(.|\n)*train.csv: 2 images, of which 2 would be val"
    ):
        made.fetch(val=None, val_share=0.5)


def test_one_photo_under_two_names_is_never_shared_out_to_both_splits(made):
    """The share that becomes val is of pictures, so a copy goes where the first goes; by names it would be a leak."""
    rows = made.rows["train"] + made.rows["val"]
    names = sorted({row["image"] for row in rows})
    for name in names:
        path = next(made.folder.rglob(name))
        path.with_name(f"copy of {name}").write_bytes(path.read_bytes())
    made.write("csv", rows + [{**row, "image": f"copy of {row['image']}"} for row in rows], "train")
    for seed in range(4):
        manifest = made.fetch(val=None, val_share=0.34, val_seed=seed)
        assert manifest["splits"]["val"]["images"] == 4 and manifest["pictures"]["twins_across"] == 0
        assert manifest["pictures"]["twins"] == {"train": 4, "val": 2}


# --- what is wrong ------------------------------------------------------------------------------------------------------


def damage(made, name, text, encoding="utf-8"):
    (made.folder / name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))


HEAD = "image,question,answer\n"
WRONG = {
    "missing": ("csv", None, "missing file: 1.*\n.*train.csv"),
    "empty": ("csv", "", "file without questions: 1.*\n.*train.csv: no rows"),
    "a head alone": ("csv", HEAD, "file without questions: 1.*\n.*train.csv: no rows"),
    "UTF-16": ("csv", (HEAD + "IMG_0.JPG,Is it?,yes\n").encode("utf-16"), "not UTF-8: 1.*\n.*train.csv: is UTF-16; save"),
    "UTF-16 without its mark": ("csv", (HEAD + "IMG_0.JPG,Is?,yes\n").encode("utf-16-le"), "train.csv: is UTF-16; save"),
    "Latin 1": ("csv", (HEAD + "IMG_0.JPG,Où?,là\n").encode("latin-1"), "train.csv: is not UTF-8 .invalid start byte at"),
    "a cell too many": ("csv", HEAD + "IMG_0.JPG,Is it, now?,yes\n" + "IMG_1.JPG,Is it?,yes\n" * 2,
                        "malformed row: 1.*quotes(.|\n)*train.csv: row 1: line 2: 4 cells, but 3 columns"),
    "a cell too few": ("csv", HEAD + "IMG_1.JPG,Is it?,yes\nIMG_0.JPG\n", "row 2: line 3: 1 cells, but 3 columns"),
    "no picture": ("csv", HEAD + ",Is it?,yes\n", "malformed row: 1(.|\n)*row 1: names no picture"),
    "no question": ("csv", HEAD + "IMG_0.JPG, ,yes\n", "malformed question: 1(.|\n)*row 1: question is ' ', not text"),
    "no answer": ("csv", HEAD + "IMG_0.JPG,Is it?, \n", r"without any answer: 1(.|\n)*row 1: its answers are \[' '\]"),
    "a picture that is not there": ("csv", HEAD + "IMG_99.JPG,Is it?,yes\n", "missing image: 1(.|\n)*IMG_99.JPG"),
    "a line cut": ("jsonl", '{"image": "IMG_0.JPG", "question": "Is it?", "answer": "yes"}\n{"image": "IM',
                   "malformed row: 1(.|\n)*row 2: not JSON .Unterminated"),
    "lines of lists": ("jsonl", "[1]\n[2]\n", "file of another layout: 1(.|\n)*train.jsonl: row 1: .1. is not an object"),
    "an answer that is true": ("jsonl", '{"image": "IMG_0.JPG", "question": "Is it?", "answer": true}',
                               "malformed row: 1(.|\n)*row 1: an answer is True, not text"),
    "half a character": ("jsonl", '{"image": "IMG_0.JPG", "question": "Is it?", "answer": "\\ud83d"}',
                         "an answer is .*not text"),
    "JSON cut": ("json", '[{"image": "IMG_0.JPG", "question": "Is',
                 "unreadable file: 1.*download.*\n.*train.json: not complete"),
    "a comma too many": ("json", '[{"image": "IMG_0.JPG",, "question": "Is it?", "answer": "a"}]',
                         "not valid JSON: 1.*mend the place(.|\n)*train.json: .*line 1 column 24"),
    "a number": ("json", "12345678", "file of another layout: 1(.|\n)*train.json: neither a list of objects nor"),
    "two lists": ("json", '{"a": [{"x": 1}], "b": [{"y": 1}]}', "train.json: neither a list of objects nor"),
    "no conversation": ("json", '[{"image": "IMG_0.JPG", "conversations": ["a", "b"]}]', "row 1: 'a' is no turn of"),
    "Parquet cut": ("parquet", b"PAR1xxxx", "unreadable file: 1.*download(.|\n)*train.parquet"),
    "an unknown ending": ("xlsx", b"PK", "file of another layout: 1(.|\n)*train.xlsx: it is read by its ending"),
    "gzip cut": ("csv.gz", gzip.compress(b"x" * 5000)[:-10], "unreadable file: 1.*download(.|\n)*train.csv.gz"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_alone(made, case, tmp_path):
    ending, text, words = WRONG[case]
    made.write()
    if text is not None:
        damage(made, f"train.{ending}", text)
    else:
        (made.folder / "train.csv").unlink()
    with pytest.raises(UserError, match=words) as caught:
        made.fetch(into="records", train=f"train.{ending}", val="val.csv")
    assert "in 1 places" in str(caught.value) and list((tmp_path / "records").iterdir()) == []


def test_a_folder_that_is_not_there_is_named(made, tmp_path, directory_params):
    params = directory_params(tmp_path / "nowhere", source=Source.TABLE, table=TableParams(train="a", val="b"))
    with pytest.raises(UserError, match="data.directory is .*nowhere.*, which is no folder"):
        fetch(params, tmp_path / "records")


# --- bad records --------------------------------------------------------------------------------------------------------


def test_bad_records_are_dropped_counted_and_listed_up_to_the_ceiling(made, tmp_path):
    made.rows["train"][1]["answer"] = ""
    for row in made.rows["train"][8:]:
        row["image"] = "IMG_77.JPG"
    made.write()
    clean = {"bad_records": BadRecords.DROP, "most_dropped": 0.5}
    manifest = made.fetch(**clean)
    train = manifest["splits"]["train"]
    assert (train["questions"], train["images"], train["dropped"], manifest["images"]) == (7, 2, 5, 5)
    assert "question without any answer: " in train["dropped_records"][0] and "row 2" in train["dropped_records"][0]
    assert "missing image: " in train["dropped_records"][4] and "IMG_77.JPG" in train["dropped_records"][4]
    page = (tmp_path / "records" / records.REPORT).read_text()
    assert "5 bad records were dropped" in page and "IMG_77.JPG" in page
    assert manifest["splits"]["val"]["dropped"] == 0
    made.rows["train"] = [row for row in made.rows["train"] if row["answer"] and row["image"] != "IMG_77.JPG"]
    assert made.write().fetch(into="cleaned")["data_hash"] == manifest["data_hash"]


def test_more_bad_records_than_may_be_are_refused(made):
    for row in made.rows["val"][:3]:
        row["question"] = ""
    with pytest.raises(UserError) as caught:
        made.write().fetch(bad_records=BadRecords.DROP, most_dropped=0.2)
    message = str(caught.value)
    assert "too many bad records: 1. To do: mend them, or raise data.most_dropped" in message
    assert "3 of 12 records of val are bad; data.most_dropped is 0.2" in message and "malformed question: 3" in message
    assert made.fetch(bad_records=BadRecords.DROP, most_dropped=0.25)["splits"]["val"]["dropped"] == 3


def test_a_question_in_both_splits_about_one_picture_is_counted(made, directory_params, tmp_path):
    made.write()
    table = TableParams(train="train.csv", val="train.csv", images="images")
    params = directory_params(made.folder, source=Source.TABLE, table=table)
    with pytest.raises(UserError, match="image in both splits: 3"):
        fetch(params, tmp_path / "records")
    manifest = fetch(replace(params, allow_split_overlap=True), tmp_path / "records")
    assert manifest["splits"]["val"]["asked_in_both"] == 12
