"""Windows: every question once, exactly so many a step, images together, forward micro_batches of about one size."""

import itertools
import random

import pytest

from vlm_vqa.training.sampler import GlobalBatchSampler, GlobalBatchShape, divide, fill

IMAGE_IDS = [image for image in range(60) for _ in range(3 + image % 7)]
LENGTHS = [5 + index % 9 for index in range(len(IMAGE_IDS))]
PREFIX = 30


def sampler(seed=0, epoch=0, image_ids=IMAGE_IDS, **shape):
    made = GlobalBatchSampler(
        image_ids,
        lambda epoch: LENGTHS,
        PREFIX,
        GlobalBatchShape(**{"questions": 24, "questions_per_row": 32, "micro_batches": 3, **shape}),
        seed,
    )
    made.set_epoch(epoch)
    return made


def steps(batches, micro_batches):
    return [list(itertools.chain(*batches[at : at + micro_batches])) for at in range(0, len(batches), micro_batches)]


def questions(rows):
    return [question for row in rows for question in row.questions]


@pytest.mark.parametrize("per_row", [1, 4, 32])
@pytest.mark.parametrize(("micro_batches", "processes"), [(1, 1), (3, 1), (4, 2), (12, 4)])
def test_every_question_once_and_exactly_so_many_a_step(per_row, micro_batches, processes):
    shape = {"questions_per_row": per_row, "micro_batches": micro_batches, "processes": processes}
    parts = [list(sampler(process=process, **shape)) for process in range(processes)]
    # All processes make the same number of micro_batches: none may wait for the others for ever.
    assert {len(part) for part in parts} == {len(sampler(**shape))}
    batches = zip(*(steps(part, micro_batches) for part in parts), strict=True)
    sizes = [len(questions(itertools.chain(*whole))) for whole in batches]
    assert set(sizes[:-1]) == {24} and 0 < sizes[-1] <= 24
    seen = [question for part in parts for batch in part for question in questions(batch)]
    assert sorted(seen) == list(range(len(IMAGE_IDS)))
    assert all(batch for part in parts for batch in part), "a pass without rows cannot take part in FSDP"


def test_rows_hold_one_image_and_at_most_the_asked_number():
    rows = [row for batch in sampler(questions_per_row=4) for row in batch]
    assert all(IMAGE_IDS[question] == row.image_id for row in rows for question in row.questions)
    assert max(len(row.questions) for row in rows) == 4
    # 7 questions become 4 and 3, not 4, 2 and 1.
    whole = [row for batch in sampler(questions_per_row=4, questions=len(IMAGE_IDS), micro_batches=1) for row in batch]
    counts = sorted(len(row.questions) for row in whole if row.image_id == 4)
    assert counts == [3, 4]


def test_sharing_does_not_depend_on_a_small_batch_size():
    """The same questions a step in one pass or in six make the same rows."""
    rows = {
        micro_batches: sorted(row for batch in sampler(micro_batches=micro_batches) for row in batch if row.questions)
        for micro_batches in (1, 6)
    }
    assert rows[1] == rows[6]


def test_images_are_cut_only_where_nothing_fits():
    batches = list(sampler(questions=24).global_batches())
    pieces = [IMAGE_IDS[group[0]] for whole in batches for group in whole]
    # One after another, nearly every whole of 24 would cut an image of 6.
    assert len(pieces) - len(set(pieces)) <= 2
    assert [sum(map(len, whole)) for whole in batches[:-1]] == [24] * (len(batches) - 1)


@pytest.mark.parametrize("seed", range(5))
def test_fill_takes_everything_once_in_windows_of_one_size(seed):
    draw = random.Random(seed)
    groups, start = [], 0
    for _ in range(200):
        count = draw.choice([1, 2, 3, 5, 9, 40])
        groups.append(tuple(range(start, start + count)))
        start += count
    batches = list(fill(groups, 16))
    assert [sum(map(len, whole)) for whole in batches[:-1]] == [16] * (len(batches) - 1)
    assert sorted(question for whole in batches for group in whole for question in group) == list(range(start))
    assert list(fill([], 16)) == []


def test_the_order_depends_on_seed_and_epoch_alone():
    first = list(sampler())
    assert list(sampler()) == first
    assert list(sampler(seed=1)) != first
    assert list(sampler(epoch=1)) != first
    # The division among processes and micro_batches changes nothing about which questions make a step.
    one, other = (
        [sorted(questions(step)) for step in steps(list(sampler(micro_batches=micro_batches)), micro_batches)]
        for micro_batches in (1, 4)
    )
    assert one == other


def test_one_question_a_row_comes_in_random_order():
    whole = next(iter(sampler(questions_per_row=1, micro_batches=1)))
    assert {len(row.questions) for row in whole} == {1}
    assert len({row.image_id for row in whole}) > 12, "as it is drawn, hardly two are about one image"


def test_passes_are_of_about_one_size_and_rows_in_them_of_about_one_length():
    sizes, padding, real = [], 0, 0
    made = sampler(questions=120, micro_batches=5)
    for batch in itertools.islice(made, 10):
        lengths = [PREFIX + sum(LENGTHS[question] for question in row.questions) for row in batch]
        sizes.append(sum(lengths))
        padding += len(lengths) * max(lengths) - sum(lengths)
        real += sum(lengths)
    assert max(sizes) / min(sizes) < 1.5
    assert padding / (padding + real) < 0.05


@pytest.mark.parametrize(
    ("lengths", "parts", "sizes"),
    [
        ([9, 9, 9, 9], 2, [2, 2]),
        ([10, 5, 5], 2, [1, 2]),
        ([10], 3, [1, 0, 0]),
        ([8, 4, 4, 4], 1, [4]),
        ([20, 1, 1, 1, 1], 2, [1, 4]),
        # Three would fit into the second pass, but the third must not stand idle.
        ([10, 1, 1, 1], 3, [1, 2, 1]),
    ],
)
def test_divide(lengths, parts, sizes):
    assert divide(lengths, parts) == sizes


def test_a_process_with_nothing_left_gets_a_row_that_teaches_nothing():
    tail = list(sampler(image_ids=IMAGE_IDS[:3], micro_batches=2, processes=2, process=1))
    assert [[row.questions for row in batch] for batch in tail] == [[()], [()]]
