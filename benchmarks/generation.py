"""How fast questions are answered: in batches that share an image's prefix, against one question at a time.

    python -m benchmarks.generation [--rounds 3]

The same weights answer the same questions by `Predictor.answer_features`, from given image features (the tower's work is
not part of it). Two sets of questions, two shapes of model:

    whole set   every question of some images, as the evaluation answers a validation split
    HELM        questions picked at random from 29,761, so that hardly two share an image, in batches as HELM's client
                gathers them
    small       the shape of presets/small.yaml
    medium      257 image tokens of width 768, hidden width 512, 4 layers, vocabulary 32,000

Questions are VQAv2's or drawn ones, dealt to images as `benchmarks.workload` says: 5.36 an image. Weights are random and
hardly ever say `<eos>`, so every answer is cut after three tokens: a word and `<eos>`, or two. One at a time is slow and is
timed on some of the questions only; what is compared is seconds per question. Answers must be equal.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Config, PaliGemmaProcessor

from benchmarks import measure, workload
from benchmarks.measure import Claim, Timing
from benchmarks.workload import TOKENIZER_LIMIT, read_questions
from vlm_vqa.data.feature_store import Features as Stored
from vlm_vqa.evaluation.answering import Ask, answer_asks, plan_batches
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.model.flops import model_cost
from vlm_vqa.model.layout import PAD_SEGMENT, rows_of, visible
from vlm_vqa.model.vlm import VlmForTraining, build_processor, initial_model, train_tokenizer
from vlm_vqa.params import HELM_INSTRUCTION, LanguageConfig, LanguageParams, Mask, load_params

PRESET = Path(__file__).parents[1] / "presets" / "small.yaml"
NEW_TOKENS = 3
TEXT_LENGTH = 256
"""Long enough for every question in the small shape's tokens; nothing is padded to it."""
HELM_INSTANCES = 1000
TARGET = 5
ROUNDS = 3

Question = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model's shape, and how many questions it is asked."""

    name: str
    num_patches: int
    feature_width: int
    language: LanguageConfig
    tokenizer_limit: int
    """Most tokens of the tokenizer before PaliGemma's own are added."""
    vocabulary: int | None
    """Embedding rows; None is as many as the tokenizer has."""
    whole_set: int
    """Questions of the whole set, to the end of an image."""
    helm: int
    """How many of HELM's picks are asked."""
    alone: int
    """How many of either are asked one at a time."""
    batch_size: int = 128
    helm_threads: int = 32


class Features:
    """Random image features in memory, read as the feature store is."""

    live = False

    def __init__(self, shape: Shape, images: Sequence[int], seed: int = 0):
        """Draw [T, E] for each of these images."""
        generator = torch.Generator().manual_seed(seed)
        self._place = {image: place for place, image in enumerate(images)}
        self._features = torch.randn(len(images), shape.num_patches, shape.feature_width, generator=generator)

    def batch(self, image_ids: Sequence[int]) -> Tensor:
        """Return float32 [I, T, E]."""
        return self._features[[self._place[image] for image in image_ids]]

    def inputs(self, image_ids: Sequence[int]) -> dict[str, Tensor]:
        return {"features": self.batch(image_ids)}

    def of(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["features"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both shapes and write `generation.json`."""
    options = measure.parse(measure.parser("generation", __doc__, rounds=ROUNDS), arguments)
    texts = [question for question, _ in read_questions()]
    claims: list[Claim] = []
    details: dict[str, Any] = {"new_tokens": NEW_TOKENS}
    for shape in (small_shape(), medium_shape()):
        more, details[shape.name] = compare(shape, texts, options.rounds)
        claims += more
    measure.write("generation", claims, details, workload.data())


def small_shape() -> Shape:
    """The committed small run."""
    params = load_params(PRESET)
    language, tokens = params.language.config, params.language.vocab_size
    assert language is not None and tokens is not None, "load_params asks for both where the model is random"
    return Shape(
        "small",
        params.vision.num_patches,
        params.vision.visual_embed_dim,
        language,
        tokenizer_limit=tokens,
        vocabulary=None,
        whole_set=1000,
        helm=HELM_INSTANCES,
        alone=100,
        batch_size=params.evaluation.batch_size,
        helm_threads=params.evaluation.helm_threads,
    )


def medium_shape() -> Shape:
    """Large enough that arithmetic counts; few questions, as each takes a quarter of a second alone."""
    language = LanguageConfig(512, 2048, 4, 8, 4, 64)
    return Shape("medium", 257, 768, language, TOKENIZER_LIMIT, vocabulary=32_000, whole_set=96, helm=32, alone=12)


def compare(shape: Shape, texts: Sequence[str], rounds: int = ROUNDS) -> tuple[list[Claim], dict[str, Any]]:
    """Time all ways of asking with one shape.

    Raises:
        ValueError: a question got another answer in a batch than alone.
    """
    questions = asked_of_images(texts)
    whole_set = whole_images(questions, shape.whole_set)
    picks = pick(questions, HELM_INSTANCES)[: shape.helm]
    features = Features(shape, sorted({row["image_id"] for row in (*whole_set, *picks)}))
    model, processor = build_model(shape, texts)
    claims: list[Claim] = []
    details: dict[str, Any] = {"shape": asdict(shape)}
    for mask in (Mask.IMAGE_PREFIX, Mask.PREFIX_LM):
        predictor = answerer_of(shape, model, processor, mask)
        details["instruction_tokens"] = len(predictor.layout.prefix)
        for name, asked, ask in (("whole set", whole_set, as_evaluation), ("HELM", picks, as_helm)):
            seconds, facts = time_ways(shape, predictor, features, asked, ask, rounds)
            what = f"answers/s, {shape.name} shape, {name}, {mask.value}, against one at a time"
            target = TARGET if mask is Mask.IMAGE_PREFIX else None
            claims.append(measure.claim(what, *seconds, target=target))
            details[f"{name}, {mask.value}"] = facts
    return claims, details


def time_ways(
    shape: Shape, predictor: Predictor, features: Features, asked: Sequence[Question], ask: Callable, rounds: int
) -> tuple[tuple[Timing, Timing], dict[str, Any]]:
    """Ask in batches and, evenly drawn from the same questions, one at a time.

    Returns:
        Seconds per question, alone and in batches; and what was asked.
    """
    places = range(0, len(asked), len(asked) // shape.alone)[: shape.alone]
    answers: dict[str, list[str]] = {}

    def in_batches() -> None:
        answers["batches"] = ask(shape, predictor, features, asked)

    def alone() -> None:
        answers["alone"] = [one_answer(predictor, features, asked[place]) for place in places]

    # Whatever is made once is made before.
    ask(shape, predictor, features, asked[: shape.helm_threads])
    one_answer(predictor, features, asked[0])
    seconds = measure.alternate({"alone": alone, "batches": in_batches}, rounds, warm_up=0)
    check_equal(answers["alone"], [answers["batches"][place] for place in places])
    per_question = per_one(seconds["alone"], len(places)), per_one(seconds["batches"], len(asked))
    facts = {
        "questions": len(asked),
        "images": len({row["image_id"] for row in asked}),
        "asked_alone": len(places),
        "different_answers": len(set(answers["batches"])),
        "answers_per_second": {"alone": 1 / per_question[0].median, "batches": 1 / per_question[1].median},
    }
    return per_question, facts


def per_one(timing: Timing, count: int) -> Timing:
    """Return seconds per question."""
    return Timing(tuple(seconds / count for seconds in timing.seconds))


def one_answer(predictor: Predictor, features: Features, row: Question) -> str:
    """Ask a batch of one."""
    return predictor.answer_features([row["question"]], features.batch([row["image_id"]]))[0].answer


def check_equal(alone: Sequence[str], in_batches: Sequence[str]) -> None:
    """Refuse answers that depend on how they were asked for."""
    differing = [place for place, pair in enumerate(zip(alone, in_batches, strict=True)) if pair[0] != pair[1]]
    if differing:
        first = differing[0]
        raise ValueError(
            f"{len(differing)} of {len(alone)} answers differ, the first: {alone[first]!r} alone, "
            f"{in_batches[first]!r} in a batch"
        )


def asked_of_images(texts: Sequence[str], seed: int = 0) -> list[Question]:
    """Shuffle the questions and deal them to images."""
    order, images = workload.deal(len(texts), torch.Generator().manual_seed(seed))
    return [{"question_id": at, "image_id": images[at], "question": texts[place]} for at, place in enumerate(order)]


def whole_images(questions: Sequence[Question], count: int) -> list[Question]:
    """Return the first `count` questions, and those that are left of the last one's image."""
    last = questions[count - 1]["image_id"]
    return [row for row in questions if row["image_id"] <= last]


def pick(questions: Sequence[Question], count: int, seed: int = 0) -> list[Question]:
    """Return `count` questions at random, in random order."""
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    return [questions[at] for at in order[:count]]


def prefill(asks: Sequence[Ask], predictor: Predictor, store: Stored, batch_size: int) -> tuple[float, float]:
    """Return the seconds of the forward pass over the questions, and its FLOP/s over those of a matrix product at the
    layers' width in the model's type."""
    cost, layout, model = model_cost(predictor.model.config, frozen_embeddings=False), predictor.layout, predictor.model
    flops = widest = 0
    for batch in plan_batches(asks, predictor, batch_size):
        asked = [(row, layout.tokenize(one.question)) for row, part in enumerate(batch) for one in part]
        grid = layout.collate(rows_of(asked, layout.mask))
        real = grid["segment_ids"] != PAD_SEGMENT
        seen = visible(grid["segment_ids"], grid["position_ids"], grid["bidirectional"])[real].sum()
        images = layout.num_patches * len(real)
        forward: list[Any] = [real.sum() * cost.token // 3, seen * cost.pair // 3, len(asked) * cost.supervised // 3]
        flops += int(sum(forward)) + images * cost.image_token // 2
        widest = max(widest, real.numel())
    # The first token costs no step beyond reading.
    first = copy.copy(predictor)
    first.max_new_tokens = 1
    seconds = measure.alternate({"prefill": lambda: answer_asks(asks, first, store, batch_size, "prefill")}, 3)[
        "prefill"
    ]
    text = model.config.text_config
    rate = measure.matmul_rate(widest, text.hidden_size, text.intermediate_size, model.dtype)
    return seconds.median, flops / seconds.median / rate


def build_model(shape: Shape, texts: Sequence[str]) -> tuple[VlmForTraining, PaliGemmaProcessor]:
    """Return a model of this shape with random float32 weights, and its processor; the tokenizer is trained on `texts`."""
    tokenizer = train_tokenizer([HELM_INSTRUCTION, *texts], shape.tokenizer_limit)
    processor = build_processor(BitImageProcessor(), tokenizer, shape.num_patches)
    encoder = Dinov2Config(hidden_size=shape.feature_width, num_hidden_layers=1, num_attention_heads=1)
    language = LanguageParams("random", None, shape.tokenizer_limit, shape.language)
    model = initial_model(language, encoder, processor, seed=0)
    if shape.vocabulary is not None:
        model.resize_token_embeddings(shape.vocabulary, mean_resizing=False)
    _sharpen(model)
    return model.to(measure.device()), processor


@torch.no_grad()
def _sharpen(model: VlmForTraining) -> None:
    """Make answers depend on image and question, or their equality would say nothing.

    Random layers as they come look everywhere alike and add little to the embedding, which is the output head too: every
    question would be answered by the same token.
    """
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.mul_(4)
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.fill_(3)


def answerer_of(shape: Shape, model: VlmForTraining, processor: PaliGemmaProcessor, mask: Mask) -> Predictor:
    """Return what the evaluation asks."""
    facts = {
        "weights_hash": "random",
        "mask": mask.value,
        "instruction": HELM_INSTRUCTION,
        "num_patches": shape.num_patches,
        "text_length": TEXT_LENGTH,
    }
    return Predictor(model, processor, facts, max_new_tokens=NEW_TOKENS)


def as_evaluation(shape: Shape, predictor: Predictor, features: Any, asked: Sequence[Question]) -> list[str]:
    """Answer as the evaluation answers a validation split."""
    asks = [Ask(row["image_id"], row["question"]) for row in asked]
    given = answer_asks(asks, predictor, features, shape.batch_size, "questions")
    return [given[ask].answer for ask in asks]


def as_helm(shape: Shape, predictor: Predictor, features: Features, asked: Sequence[Question]) -> list[str]:
    """Answer as HELM's client does: each thread waits with one question, and each batch is sorted by image."""
    answers = [""] * len(asked)
    for start in range(0, len(asked), shape.helm_threads):
        waiting = range(start, min(start + shape.helm_threads, len(asked)))
        batch = sorted(waiting, key=lambda at: (asked[at]["image_id"], asked[at]["question"]))
        images = sorted({asked[at]["image_id"] for at in batch})
        given = predictor.answer_features(
            [asked[at]["question"] for at in batch],
            features.batch(images),
            [images.index(asked[at]["image_id"]) for at in batch],
        )
        for at, one in zip(batch, given, strict=True):
            answers[at] = one.answer
    return answers


if __name__ == "__main__":
    main()
