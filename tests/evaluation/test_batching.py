"""Many threads ask one worker: full, sorted batches on one thread, and errors go to those who asked."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vlm_vqa.evaluation.helm.client import Asked, BatchWorker


def run(worker, questions, threads):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda asked: worker.ask(asked, f"pixels of {asked.image_key}"), questions))


QUESTIONS = [Asked(f"image{7 * at % 5}", f"question{at:02d}") for at in range(40)]


def test_answers_reach_those_who_asked_and_batches_are_full_sorted_and_on_one_thread():
    batches, threads = [], set()

    def answer(asked, images):
        batches.append(list(asked))
        threads.add(threading.current_thread().name)
        assert images == [f"pixels of {one.image_key}" for one in asked]
        return [one.question.upper() for one in asked]

    worker = BatchWorker(answer, batch_size=16, patience=1.0)
    assert run(worker, QUESTIONS, threads=16) == [asked.question.upper() for asked in QUESTIONS]
    assert [len(batch) for batch in batches] == [16, 16, 8]
    assert all(batch == sorted(batch) for batch in batches)
    assert threads == {"answers"}
    # The same batches whatever order the threads came in.
    assert [set(batch) for batch in batches] == [set(QUESTIONS[at : at + 16]) for at in (0, 16, 32)]


def test_a_batch_that_never_fills_goes_after_a_while():
    worker = BatchWorker(lambda asked, images: ["yes"] * len(asked), batch_size=1000, patience=0.01)
    assert run(worker, QUESTIONS[:3], threads=3) == ["yes"] * 3


def test_an_error_goes_to_its_batch_alone_and_the_worker_goes_on():
    def answer(asked, images):
        if asked[0].question == "bad":
            raise RuntimeError("no memory")
        return ["good"] * len(asked)

    worker = BatchWorker(answer, batch_size=1)
    with pytest.raises(RuntimeError, match="no memory"):
        worker.ask(Asked("a", "bad"), None)
    assert worker.ask(Asked("a", "fine"), None) == "good"


def test_too_few_answers_are_an_error_and_leave_nobody_waiting():
    worker = BatchWorker(lambda asked, images: [], batch_size=1)
    with pytest.raises(ValueError):
        worker.ask(Asked("a", "b"), None)
