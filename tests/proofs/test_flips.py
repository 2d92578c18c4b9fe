"""The proof of flipped bits on a project made by hand in seconds: every kind can be read, and what the verdicts mean."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml

from proofs import fault_cases, flips
from proofs.project import TINY, with_changes
from proofs.readers import KINDS
from vlm_vqa.data.feature_store import Layout
from vlm_vqa.data.records import iter_images, load_questions
from vlm_vqa.evaluation.helm.files import write_table
from vlm_vqa.features.writer import FeatureStoreWriter, Shard
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.params import StoreDtype, parse_params
from vlm_vqa.training import checkpoint_files

ROOT = Path(__file__).parents[2]
DRAWS = 1
SCRIPT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from proofs import flips
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.params import load_params
root = Path(sys.argv[1])
encoder = load_encoder(load_params(root / "params.yaml").vision, device="cpu")
draws = flips.all_draws(root, list(flips.KINDS), int(sys.argv[2]), 0, encoder)
print(json.dumps([asdict(draw) for draw in draws]))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """What the five stages and an interrupted training leave, without running them."""
    root = tmp_path_factory.mktemp("flips")
    values = with_changes(fault_cases.SMALL, {**TINY, "prompt.text_length": 256})
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    params = parse_params(values)
    manifest = fetch(fault_cases.layout(root / "raw", zipped=False), root / "data/records")
    encoder = load_encoder(params.vision, device="cpu")
    ids = [image.image_id for image in iter_images(root / "data/records")]
    layout = Layout(len(ids), 3, 4, StoreDtype.FLOAT32)
    made_by = {"encoder_hash": encoder.hash, "data_hash": manifest["data_hash"], "compute_dtype": "float32"}
    writer = FeatureStoreWriter(root / "data/features", layout, made_by)
    (number,) = writer.begin()
    shard = Shard(layout, number)
    shard.add(ids, torch.randn(len(ids), 3, 4))
    writer.write(shard)
    writer.publish()
    checkpoint = root / "checkpoints/flips/checkpoint-4"
    checkpoint.mkdir(parents=True)
    work = checkpoint_files.Writer(checkpoint.parent, 0, 1, 2)
    work.save(4, {"a": torch.ones(9)}, {"rows": {}}, {"trainer_state.json": "{}"})
    work.wait()
    fault_cases.make_export(root / "models")
    rows = load_questions(root / "data/records", "val").to_list()
    columns = {name: [row[name] for row in rows] for name in ("image_id", "question", "answers")}
    (root / "reports").mkdir()
    columns |= {"prediction": ["yes"] * len(rows), "score": [1.0, 0.0] * (len(rows) // 2)}
    write_table(pa.table(columns), root / "reports/predictions.parquet")
    return root


@pytest.mark.slow
def test_every_kind_is_read_and_left_as_it_was(project):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(project), str(DRAWS)], env=environment, capture_output=True,
                          text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    draws = json.loads(done.stdout.splitlines()[-1])
    assert [draw["kind"] for draw in draws] == [kind for kind in KINDS for _ in range(DRAWS)]
    assert {draw["verdict"] for draw in draws if draw["kind"] == "checkpoint"} == {"detected"}
    assert {path: path.read_bytes() for path in before} == before


def test_a_flip_is_one_bit_and_keeps_the_time(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(4))
    path.chmod(0o444)
    before = path.stat()
    flips.flip(path, 2, 7)
    assert path.read_bytes() == b"\0\0\x80\0"
    assert (path.stat().st_mtime_ns, path.stat().st_mode) == (before.st_mtime_ns, before.st_mode)


@pytest.mark.parametrize(
    ("ending", "verdict"),
    [(("done", "whole"), "no effect"), (("done", "other"), "silent"), (("refused", "data/records: damaged"), "detected"),
     (("refused", "data/features: damaged"), "misnamed"), (("raised", "KeyError"), "raised"), (("hung", ""), "hung")],
)  # fmt: skip
def test_what_a_verdict_means(ending, verdict, project, monkeypatch):
    monkeypatch.setattr(flips.child, "in_child", lambda call: ending)
    one = flips.draw(project, "records", 0, 0, None, "whole")
    assert one.verdict == verdict and (verdict in flips.GOOD) == (verdict in ("detected", "no effect"))
