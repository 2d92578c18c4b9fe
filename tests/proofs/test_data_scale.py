"""The proof of the data path, on a handful of questions: its archives are in order, and it runs the real stage."""

import json
import zipfile

import pytest

from proofs import data_scale
from vlm_vqa.data import records
from vlm_vqa.hashing import write_json

COUNTS = {"train": (90, 30), "val": (60, 20)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of the archives, folder of the records, seconds, GiB)."""
    archives, work = tmp_path_factory.mktemp("archives"), tmp_path_factory.mktemp("work")
    write_json(work / "checksums.json", data_scale.make_archives(archives, COUNTS))
    with data_scale.served(archives) as url:
        seconds, _, gib = data_scale.run_stage(work, data_scale.official(url), work / "checksums.json")
    return archives, work / "data" / "records", seconds, gib


def test_the_stage_takes_all_that_was_made_up(run):
    _, made, seconds, gib = run
    splits = records.read_manifest(made)["splits"]
    assert {split: (one["questions"], one["images"]) for split, one in splits.items()} == COUNTS
    assert seconds > 0 and 0.05 < gib < 2


def test_helm_picks_the_questions_that_we_pick(run):
    archives, made, *_ = run
    picked = data_scale.helm_picks(archives / "v2_Questions_Val_mscoco.zip", 25)
    assert picked == data_scale.our_picks(made, 25) and len(set(picked)) == 25
    ids = records.load_questions(made, "val")["question_id"]
    assert picked != ids[:25] and set(picked) < set(ids)


def test_the_same_archives_come_again(run, tmp_path):
    archives, *_ = run
    data_scale.make_archives(tmp_path, COUNTS)
    for path in archives.glob("*.zip"):
        with zipfile.ZipFile(path) as one, zipfile.ZipFile(tmp_path / path.name) as two:
            assert {name: one.read(name) for name in one.namelist()} == {
                name: two.read(name) for name in two.namelist()
            }


def test_json_lines_beside_the_official_layout(tmp_path, monkeypatch):
    """As it is called; what so few questions take says nothing."""
    monkeypatch.setattr(data_scale.measure, "RESULTS", tmp_path)
    monkeypatch.setattr(data_scale, "MOST_RATIO", 100)
    data_scale.main(["--layout", "jsonl", "--share", "0.0002", "--images", "20"])
    result = json.loads((tmp_path / "data_scale.json").read_text())
    assert [claim["met"] for claim in result["claims"]] == [True] * 4 and result["claims"][3]["ratio"] == 1
    assert result["details"]["counts"] == {"train": [89, 20], "val": [43, 20]}
