"""What the Trainer is fed: every question once an epoch, images together, nothing cut, and the same loss however packed."""

import datasets
import pytest
import torch

from vlm_vqa.errors import UserError
from vlm_vqa.model.layout import Row, rows_of
from vlm_vqa.params import Mask, TooLong
from vlm_vqa.training.dataset import ImageOrderSampler, QuestionDataset

IMAGE_IDS = [image for image in range(40) for _ in range(1 + image % 7)]


def epoch(sampler, number=0):
    sampler.set_epoch(number)
    return list(sampler)


def test_every_question_once_in_batches_of_exactly_that_size():
    sampler = ImageOrderSampler(IMAGE_IDS, 8, seed=0)
    batches = epoch(sampler)
    assert len(sampler) == len(batches)
    assert {len(batch) for batch in batches[:-1]} == {8}
    assert sorted(index for batch in batches for index in batch) == list(range(len(IMAGE_IDS)))


def test_questions_of_an_image_stand_together():
    order = [IMAGE_IDS[index] for batch in epoch(ImageOrderSampler(IMAGE_IDS, 8, seed=0)) for index in batch]
    changes = sum(one != other for one, other in zip(order, order[1:], strict=False))
    assert changes == len(set(IMAGE_IDS)) - 1
    assert order != IMAGE_IDS


def test_the_order_depends_on_seed_and_epoch_alone():
    first = epoch(ImageOrderSampler(IMAGE_IDS, 8, seed=0))
    assert epoch(ImageOrderSampler(IMAGE_IDS, 8, seed=0)) == first
    assert epoch(ImageOrderSampler(IMAGE_IDS, 8, seed=1)) != first
    assert epoch(ImageOrderSampler(IMAGE_IDS, 8, seed=0), 1) != first


def records(answer="yes"):
    return datasets.Dataset.from_dict(
        {"question_id": [7, 8], "image_id": [1, 1], "question": ["Is it red?", "Is it?"],
         "multiple_choice_answer": ["yes", answer]}
    )  # fmt: skip


def test_a_record_too_long_is_an_error_or_a_counted_drop(tiny):
    layout = tiny.layout("image-prefix")
    layout.text_length = layout.text_tokens(layout.tokenize("Is it red?", "yes"))
    assert QuestionDataset(records(), layout, TooLong.ERROR).dropped == 0
    with pytest.raises(UserError, match="question_id 8: .*prompt.text_length"):
        QuestionDataset(records("a long answer of many words"), layout, TooLong.ERROR)
    kept = QuestionDataset(records("a long answer of many words"), layout, TooLong.DROP)
    assert (len(kept), kept.dropped) == (1, 1)


def gradients(tiny, rows, features):
    layout = tiny.layout("image-prefix")
    tiny.training.zero_grad()
    loss = tiny.training(features[[row.image_id for row in rows]], **layout.collate(rows))["loss"]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().clone() for p in tiny.training.parameters() if p.grad is not None])


def test_shared_rows_give_the_loss_and_gradients_of_one_row_per_question(tiny):
    layout = tiny.layout("image-prefix")
    stream = [(image, layout.tokenize(question, answer)) for image, question, answer in [
        (0, "What color is the shape?", "red"), (0, "Is it?", "yes"), (1, "How many dogs?", "twelve"), (1, "Is it?", "no"),
        (1, "Is there a circle?", "no"),
    ]]  # fmt: skip
    features = torch.randn(2, tiny.num_patches, 24, generator=torch.Generator().manual_seed(0))
    packed = rows_of(stream, Mask.IMAGE_PREFIX)
    assert [len(row.questions) for row in packed] == [2, 3]
    loss, gradient = gradients(tiny, packed, features)
    plain_loss, plain_gradient = gradients(tiny, [Row(image, (tokens,)) for image, tokens in stream], features)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert (gradient - plain_gradient).norm() / plain_gradient.norm() < 1e-5
