"""The kills benchmark without trainings (tests/stages/test_train.py has them): what it plans, reads and claims."""

import argparse
import itertools
import random

from benchmarks import measure
from proofs import kills
from proofs.kills import Kill, Moment, Result, Training

PAIRS = len(kills.LAUNCHES) * len(kills.OPTIMIZERS)


def test_twenty_kills_hit_every_moment_one_rank_and_all():
    plans = [kills.kinds(number, 4 if number < 2 else 3, random.Random(number)) for number in range(PAIRS)]
    assert sum(map(len, plans)) == 20
    assert {kind for plan in plans for kind in plan} == set(itertools.product(Moment, (False, True)))
    for plan in plans:
        assert {Moment.STEP, Moment.CHECKPOINT} <= {moment for moment, _ in plan}
        assert [moment is Moment.END for moment, _ in plan] == sorted(moment is Moment.END for moment, _ in plan)


def test_the_step_is_that_of_the_training_s_own_bar(tmp_path):
    training = Training.__new__(Training)
    training.log = tmp_path / "train.log"
    training.log.write_text("tokenising: 100%|█| 109/109 [00:00<00:00]\n")
    assert training.step() is None
    with open(training.log, "a") as log:
        log.write("train: going on from checkpoints/0a/checkpoint-25\n")
        log.write("  0%| | 0/56 [00:00<?]\r 46%| | 26/56 [00:00<00:01, 9 it/s]\r{'loss': 1}\n 48%| | 27/56 [00:00")
    assert training.step() == 27
    kills.check_resumed(training, "checkpoint-25")


def test_a_training_that_differs_misses_its_target(monkeypatch):
    found = {}
    monkeypatch.setattr(measure, "write", lambda name, claims, details, data: found.update({name: (claims, details)}))
    kill = Kill("cpu", "adamw_torch", "a step", "after step 7", "rank 0", 2 * kills.ENDS_WITHIN, "checkpoint-5")
    results = [
        Result("cpu", "adamw_torch", [kill], []),
        Result("cpu-ddp", "adamw_torch", [kill], ["reports/train.json"]),
    ]
    kills.report(results, argparse.Namespace(seed=0))
    claims, details = found["kills"]
    assert [claim.met for claim in claims] == [True, False, False]
    assert len(details["kills"]) == 2 and details["differing"]["cpu-ddp, adamw_torch"] == ["reports/train.json"]
