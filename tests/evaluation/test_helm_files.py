"""The scenario folder holds HELM's own choice, and results are read without HELM's copies."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from vlm_vqa.data.records import load_questions
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.helm.files import (
    SCORES,
    _mean_scores,
    helm_order,
    pick_instances,
    read_results,
    write_extract,
    write_scenario,
)
from vlm_vqa.params import HELM_INSTRUCTION, HELM_MAX_TOKENS


@pytest.mark.parametrize(("count", "most"), [(50, 7), (9673, 1000), (7, 7), (5, 7)])
def test_picks_are_helms_own_and_given_only_these_it_keeps_them(count, most):
    from helm.benchmark.runner import downsample_eval_instances
    from helm.benchmark.scenarios.scenario import Input, Instance

    split = [Instance(Input(text=str(at)), references=[], split="valid") for at in range(count)]
    theirs = downsample_eval_instances(split, most, ["valid"])
    picked = pick_instances(count, most)
    assert [int(instance.input.text) for instance in theirs] == picked
    again = downsample_eval_instances([split[at] for at in picked], len(picked), ["valid"])
    assert [int(instance.input.text) for instance in again] == picked


def test_picks_are_the_start_of_one_order():
    assert pick_instances(300, 20) == helm_order(300)[:20].tolist()
    assert sorted(helm_order(300)) == list(range(300))


def test_our_words_for_helms_run_are_helms():
    from helm.benchmark.run_specs.vlm_run_specs import get_vqa_spec

    adapter = get_vqa_spec().adapter_spec
    assert (adapter.instructions, adapter.max_tokens) == (HELM_INSTRUCTION, HELM_MAX_TOKENS)


def test_blank_references_do_not_reach_helm(records, tmp_path):
    (question, *_) = load_questions(records, "val").to_list()
    write_scenario(tmp_path / "vqa", [question | {"answers": ["", "red", " \n", "blue"]}], records)
    (annotation,) = json.loads((tmp_path / "vqa/valid/answers.json").read_text())["annotations"]
    assert annotation["answers"] == [{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}]


def test_helms_scenario_reads_the_folder_without_downloading(records, tmp_path):
    from helm.benchmark.scenarios.vision_language.vqa_scenario import VQAScenario

    questions = [load_questions(records, "val").to_list()[at] for at in (5, 2, 11)]
    folder = tmp_path / "scenarios" / "vqa"
    write_scenario(folder, questions, records)
    instances = VQAScenario().get_instances(str(folder))
    assert [instance.input.multimedia_content.media_objects[1].text for instance in instances] == [
        row["question"] for row in questions
    ]
    assert [[reference.output.text for reference in instance.references] for instance in instances] == [
        row["answers"] for row in questions
    ]
    for instance, row in zip(instances, questions, strict=True):
        location = instance.input.multimedia_content.media_objects[0].location
        assert location.endswith(f"COCO_val2014_{row['image_id']:012d}.jpg")
        with open(location, "rb") as file:
            assert file.read(2) == b"\xff\xd8"


def test_an_image_that_is_not_in_the_records_is_named(records, tmp_path):
    row = load_questions(records, "val").to_list()[0] | {"image_id": 12}
    with pytest.raises(UserError, match="no image 12"):
        write_scenario(tmp_path / "vqa", [row], records)


def stat(name, mean, count=1, **others):
    return {"name": {"name": name, "split": "valid", **others}, "count": count, "mean": mean}


STATS = [stat(name, 0.5) for name in SCORES] + [
    stat("exact_match", 0.5),  # HELM has some twice
    stat("bleu_1", 0.1, perturbation={"name": "robustness"}),
    stat("num_instances", 3.0),
    stat("inference_runtime", 0.123),
    stat("cider", 0.0),
    stat("num_references", 99.0, count=0),
]


def test_means_are_taken_without_copies_run_times_and_unmeasured_ones():
    assert _mean_scores(STATS, 3) == {**dict.fromkeys(SCORES, 0.5), "num_instances": 3.0}


@pytest.mark.parametrize(
    ("stats", "instances", "message"),
    [
        ([*STATS, stat("bleu_1", 0.6)], 3, "two values of bleu_1"),
        ([entry for entry in STATS if entry["name"]["name"] != "rouge_l"], 3, "no rouge_l"),
        (STATS, 4, "3 instances instead of 4"),
    ],
)
def test_statistics_that_do_not_add_up_are_refused(stats, instances, message):
    with pytest.raises(UserError, match=message):
        _mean_scores(stats, instances)


@pytest.fixture
def suite(tmp_path):
    """Two finished instances as HELM writes them."""
    run = tmp_path / "runs" / "vlm-vqa" / "vqa:model=x"
    run.mkdir(parents=True)
    states, per_instance = [], []
    for number, (question, answer) in enumerate((("what?", " red\n"), ("why?", "blue"))):
        media = [{"location": "a.jpg"}, {"text": question}]
        states.append(
            {
                "instance": {"id": f"id{number}", "input": {"multimedia_content": {"media_objects": media}}},
                "result": {"completions": [{"text": answer}], "request_time": 0.3},
            }
        )
        scores = [stat("bleu_1", number / 2), stat("inference_runtime", 0.3)]
        # One entry for each group of metrics, in any order.
        per_instance = [{"instance_id": f"id{number}", "stats": scores}, *per_instance]
        per_instance.append({"instance_id": f"id{number}", "stats": [stat("exact_match", 1)]})
    means = [entry | {"mean": 2.0} if entry["name"]["name"] == "num_instances" else entry for entry in STATS]
    for name, content in (
        ("scenario_state", {"request_states": states}),
        ("stats", means),
        ("per_instance_stats", per_instance),
        ("run_spec", {"name": "vqa"}),
    ):
        (run / f"{name}.json").write_text(json.dumps(content))
    return run.parent


QUESTIONS = [
    {"question_id": 1, "image_id": 5, "question": "what?", "answers": ["red"] * 10},
    {"question_id": 2, "image_id": 5, "question": "why?", "answers": ["red"] * 10},
]


def test_results_are_joined_by_position_and_written_without_times(suite, tmp_path):
    results = read_results(suite, QUESTIONS)
    assert results.predictions == ["red", "blue"]
    assert results.per_instance == [{"bleu_1": 0.0, "exact_match": 1}, {"bleu_1": 0.5, "exact_match": 1}]
    paths = write_extract(tmp_path / "helm", results, QUESTIONS)
    assert {path.name for path in paths} == {"stats.json", "run_spec.json", "helm_predictions.parquet"}
    rows = pq.read_table(tmp_path / "helm_predictions.parquet").to_pylist()
    assert [(row["question_id"], row["prediction"], row["bleu_1"]) for row in rows] == [
        (1, "red", 0.0),
        (2, "blue", 0.5),
    ]


def test_results_of_other_questions_or_of_no_run_are_refused(suite):
    with pytest.raises(UserError, match="other questions"):
        read_results(suite, QUESTIONS[::-1])
    with pytest.raises(UserError, match="0 finished HELM runs"):
        read_results(suite / "nowhere", QUESTIONS)


def test_numpys_choice_is_still_a_permutation_cut():
    np.random.seed(0)
    assert np.random.choice(1000, 10, replace=False).tolist() == helm_order(1000)[:10].tolist()
