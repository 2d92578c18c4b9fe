"""Stage fetch-vqav2 as DVC starts it: a process in a folder with params.yaml."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from vlm_vqa.data import records

REPO = Path(__file__).parents[2]


def official_names(split):
    return {
        "questions": f"v2_OpenEnded_mscoco_{split}2014_questions.json",
        "annotations": f"v2_mscoco_{split}2014_annotations.json",
        "images": f"{split}2014",
        "image_name": f"COCO_{split}2014_{{image_id:012d}}.jpg",
    }


def run_stage(folder, directory):
    params = yaml.safe_load((REPO / "presets/small.yaml").read_text())
    params["data"] = {
        "source": "directory",
        "directory": str(directory),
        "allow_split_overlap": False,
        "official": None,
        "hub": None,
        "max_image_pixels": 50_000_000,
        **{split: official_names(split) for split in records.SPLITS},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "launch").symlink_to(REPO / "launch")
    command = [sys.executable, REPO / "stages" / "fetch_vqav2.py"]
    environment = {**os.environ, "PYTHONPATH": f"{REPO / 'src'}:{REPO}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_stage_writes_records_of_the_folder_in_params(vqav2_folder, tmp_path):
    done = run_stage(tmp_path, vqav2_folder())
    assert done.returncode == 0, done.stderr
    assert "train: 12 questions on 4 images" in done.stderr
    assert records.read_manifest(tmp_path / "data" / "records")["images"] == 6
    assert len(records.load_questions(tmp_path / "data" / "records", "val")) == 6


def test_broken_data_end_with_one_message_and_code_2(vqav2_folder, tmp_path):
    folder = vqav2_folder()
    image = folder / "val2014" / "COCO_val2014_000000001042.jpg"
    image.write_bytes(image.read_bytes()[:200])
    done = run_stage(tmp_path, folder)
    assert done.returncode == 2
    assert "fetch-vqav2: error: the data breaks its contract in 1 places" in done.stderr
    assert str(image) in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data" / "records" / "manifest.json").exists()
