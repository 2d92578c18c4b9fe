"""Stage helm-eval: HELM's own `vqa` run, VQA accuracy or answer accuracy, and the baselines, over the exported model.

Started by `accelerate launch --config_file launch/NAME.yaml stages/helm_eval.py`; until it has ended, answers are kept in
data/answers.parts, from where a run that was ended goes on.
"""

import vlm_vqa  # noqa: F401 - first: from here on Ctrl-C ends without a traceback

# isort: split
import logging

from vlm_vqa import tracking, workers
from vlm_vqa.evaluation.evaluate import evaluate, take_part
from vlm_vqa.evaluation.vqa_accuracy import metric_in
from vlm_vqa.params import load_params
from vlm_vqa.pipeline import entrypoint

log = logging.getLogger(__name__)


def main() -> None:
    params = load_params()
    running = workers.join(workers.named(params.evaluation.launch), key="evaluation.launch")
    if not running.main:
        return take_part(params, running)
    report, files = evaluate(params, running=running)
    metric = metric_in(report)
    words = metric.replace("_", " ").replace("vqa", "VQA")
    for name, shown in {"bleu_1": "bleu_1", metric: words}.items():
        found = report["intervals"][name]["model"]["overall"]
        line = "%s %.4f (95%% interval %.4f .. %.4f) over %d questions on %d images"
        log.info(line, shown, *(found[key] for key in ("mean", "low", "high", "questions", "images")))
    for name, scores in report["baselines"].items():
        log.info("baseline %s: %s %.4f, bleu_1 %.4f", name, words, scores[metric], scores["bleu_1"])
    gain = report["looks_at_image"][metric]["overall"]
    line = "better than without a picture (%s) by %.4f (95%% interval %.4f .. %.4f)"
    log.info(line, report["prior"]["way"], *(gain[key] for key in ("mean", "low", "high")))
    tracking.log_results(params, weights_hash=report["model"]["weights_hash"], report=report, files=files)


if __name__ == "__main__":
    entrypoint.run("helm-eval", main)
