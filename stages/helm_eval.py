"""Stage helm-eval: HELM's own `vqa` run, VQA accuracy and the baselines, over the exported model."""

import vlm_vqa  # noqa: F401 - first: from here on Ctrl-C ends without a traceback

# isort: split
import logging

import torch

from vlm_vqa import cores, tracking
from vlm_vqa.evaluation.evaluate import Folders, evaluate
from vlm_vqa.params import load_params
from vlm_vqa.pipeline import entrypoint

log = logging.getLogger(__name__)


def main() -> None:
    params = load_params()
    torch.set_num_threads(cores.threads().count)
    evaluation = evaluate(params, Folders())
    report = evaluation.report
    log.info("bleu_1 %.4f over %d HELM instances", report["helm"]["bleu_1"], report["helm"]["instances"])
    log.info("VQA accuracy %.4f over %d questions", *(report["vqa_accuracy"][key] for key in ("overall", "questions")))
    for name, scores in report["baselines"].items():
        log.info("baseline %s: VQA accuracy %.4f, bleu_1 %.4f", name, scores["vqa_accuracy"], scores["bleu_1"])
    tracking.log_evaluation(params, weights_hash=evaluation.weights_hash, report=report, files=evaluation.files)


if __name__ == "__main__":
    entrypoint.run("helm-eval", main)
