"""Dividing, merging and keeping answers: batches that no process has a say in, and no answer that another model gave."""

import threading
from collections import Counter

import pytest
import torch

from vlm_vqa.cores import Threads
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation import answering
from vlm_vqa.evaluation.answering import IN_A_ROW, Ask, KeptAnswers, answer_asks, asked_in, plan_batches
from vlm_vqa.inference.predictor import Candidate
from vlm_vqa.workers import WorkerGroup


class Predictor:
    """Answers with the question and what it was shown; a token a letter."""

    longest_row = 40

    def __init__(self, shared=True, says=""):
        self.shared, self.says, self.batches = shared, says, []

    def count_tokens(self, question):
        return len(question)

    def grid(self, tokens):
        return (1, 10 + sum(tokens)) if self.shared else (len(tokens), 10 + max(tokens))

    def encode(self, images):
        return torch.tensor([-1.0] * len(images))

    def answer_features(self, questions, features, rows):
        self.batches.append(list(questions))
        return [
            Candidate(f"{self.says}{one} {features[row]:.0f}", 1 / 3) for one, row in zip(questions, rows, strict=True)
        ]


class Store:
    live = False

    def inputs(self, image_ids):
        return {"ids": torch.tensor([float(image_id) for image_id in image_ids])}

    def of(self, inputs):
        return inputs["ids"]


ASKS = [Ask(image, "?" * length) for image in (3, 1, 2) for length in (2, 9, 9, 1)]
ASKS += [Ask(None, "?" * length) for length in (1, 2, 3)]


@pytest.mark.parametrize("shared", [True, False])
def test_batches_hold_whole_images_of_like_length_within_bounds(shared):
    asks = [
        Ask(image, "x" * (1 + image % 7) + chr(97 + number)) for image in range(40) for number in range(1 + image % 5)
    ]
    predictor = Predictor(shared)
    batches = plan_batches([*asks, *asks[::-1], *(Ask(None, "abc") for _ in range(3))], predictor, batch_size=6)
    # Each distinct question once, whatever the order in which they came.
    assert Counter(ask for batch in batches for ask in asked_in(batch)) == Counter([*asks, Ask(None, "abc")])
    assert plan_batches([Ask(None, "abc"), *asks[::-1]], predictor, batch_size=6) == batches
    images = [{ask.image_id for ask in asked_in(batch)} for batch in batches]
    assert sum(map(len, images)) == 41 and [one for one in images if None in one] == [{None}]
    for batch in batches:
        grids = [predictor.grid([len(ask.question) for ask in part]) for part in batch]
        size = sum(high for high, _ in grids) * max(wide for _, wide in grids)
        assert len(asked_in(batch)) <= 6 and (size <= 6 * predictor.longest_row or len(batch) == 1)
    widths = [predictor.grid([len(ask.question) for ask in part])[1] for batch in batches[:-1] for part in batch]
    assert widths == sorted(widths, reverse=True)
    (rows,) = plan_batches([Ask(1, f"{number:03}") for number in range(100)], predictor, batch_size=1000)[:1]
    assert max(map(len, rows)) == IN_A_ROW


def test_the_next_batch_of_pictures_is_read_while_one_is_answered():
    read_two = threading.Event()

    class Slow(Store):
        live, count = True, 0

        def inputs(self, image_ids):
            self.count += 1
            if self.count == 2:
                read_two.set()
            return super().inputs(image_ids)

    class Waiting(Predictor):
        def answer_features(self, questions, features, rows):
            assert read_two.wait(10), "nothing is read beside the first batch"
            return super().answer_features(questions, features, rows)

    assert answer_asks(ASKS, Waiting(), Slow(), 4, "x") == answer_asks(ASKS, Predictor(), Store(), 4, "x")


def group(rank, size, store):
    return WorkerGroup(rank, size, torch.device("cpu"), store, Threads(1, "a test"))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_processes_gives_the_same_answers_and_asks_each_once(tmp_path, size):
    store, predictors, found = torch.distributed.HashStore(), [Predictor() for _ in range(size)], {}

    def work(rank):
        kept = KeptAnswers(tmp_path)
        found[rank] = answer_asks(ASKS, predictors[rank], Store(), 4, "x", group(rank, size, store), kept)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {rank: found[0] if rank == 0 else {} for rank in range(size)}
    shown = {ask: -1 if ask.image_id is None else ask.image_id for ask in ASKS}
    assert found[0] == {ask: Candidate(f"{ask.question} {image}", 1 / 3) for ask, image in shown.items()}
    planned = Counter(tuple(ask.question for ask in asked_in(batch)) for batch in plan_batches(ASKS, Predictor(), 4))
    assert Counter(tuple(batch) for one in predictors for batch in one.batches) == planned


def test_what_was_answered_is_not_asked_again_and_a_torn_file_is_none(tmp_path):
    class Dies(Predictor):
        def answer_features(self, *asked):
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().answer_features(*asked)

    first, second, third = Dies(), Predictor(), Predictor(says="other ")
    with pytest.raises(KeyboardInterrupt):
        answer_asks(ASKS, first, Store(), 4, "x", kept=KeptAnswers.begin(tmp_path, "a"))
    torn = min(tmp_path.glob("*/*.json"))
    torn.write_text(torn.read_text()[:-9])
    found = answer_asks(ASKS, second, Store(), 4, "x", kept=KeptAnswers.begin(tmp_path, "a"))
    batches = len(plan_batches(ASKS, second, 4))
    assert len(second.batches) == batches - 1
    assert found == answer_asks(ASKS, Predictor(), Store(), 4, "x")
    # Another model: nothing of this one is found, nor left.
    kept = KeptAnswers.begin(tmp_path, "b")
    assert all(
        given.answer.startswith("other ") for given in answer_asks(ASKS, third, Store(), 4, "x", kept=kept).values()
    )
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [kept.folder]
    kept.remove()
    assert not tmp_path.exists()


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    kept = KeptAnswers.begin(tmp_path, "a")
    with pytest.raises(UserError, match="another helm-eval is at work there"):
        KeptAnswers.begin(tmp_path, "b")
    assert kept.folder.is_dir()


def test_progress_and_rate_are_told(caplog, monkeypatch):
    monkeypatch.setattr(answering.time, "monotonic", iter(range(100)).__next__)
    with caplog.at_level("INFO"):
        answer_asks(ASKS, Predictor(), Store(), 100, "x")
    assert "12 answers by 1 process(es), 6.0 a second and process" in caplog.text
