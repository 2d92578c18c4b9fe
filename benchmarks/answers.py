"""How helm-eval answers, with the model and the data that `make repro` has left here.

    python -m benchmarks.answers [--questions 2000] [--rounds 3]

The first validation questions, of whole images and from stored features, as the stage answers them:

    processes   two processes against one, a thread each, answers kept on the disk
    shuffled    every question about its own image and about another one's, against its own alone; in seconds of one core,
                which what else the machine does hardly changes, where there is no GPU
    prefill     the FLOP/s of reading the questions, against the machine's own matrix rate at that size
    bfloat16    the answers that are others than float32's
"""

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed

from benchmarks import generation, measure
from benchmarks.measure import Claim
from vlm_vqa.cores import Threads
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.data.records import load_questions
from vlm_vqa.evaluation.answering import Ask, KeptAnswers, answer_asks
from vlm_vqa.evaluation.baselines import shuffled_images
from vlm_vqa.evaluation.evaluate import EXPORT, FEATURES, RECORDS
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.params import Params, load_params
from vlm_vqa.workers import WorkerGroup

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `answers.json`."""
    options = measure.parse(measure.parser("answers", __doc__, questions=2000, rounds=3), arguments)
    params, (own, borrowed) = load_params(), asks_of(options.questions)
    size, new = params.evaluation.batch_size, params.evaluation.max_new_tokens
    processes = {f"{count} process(es)": [] for count in (1, 2)}
    for _ in range(options.rounds):
        for count, seconds in zip((1, 2), processes.values(), strict=True):
            seconds.append(together(count, own, params))
    timings = {name: measure.Timing(tuple(seconds)) for name, seconds in processes.items()}
    predictors = {
        name: Predictor.from_export(EXPORT, max_new_tokens=new, dtype=dtype) for name, dtype in DTYPES.items()
    }
    predictor, store = predictors["float32"], FeatureStore(FEATURES)
    given = {}

    def ask(asks: Sequence[Ask], by: str = "float32") -> None:
        found = answer_asks(asks, predictors[by], store, size, by)
        given[by] = [found[one].answer for one in asks]

    torch.set_num_threads(1)
    clock = time.perf_counter if predictor.model.device.type == "cuda" else time.process_time
    spent: dict[str, list[float]] = {"both": [], "own": []}
    for _ in range(options.rounds):
        for name, asks in (("both", [*own, *borrowed]), ("own", own)):
            begun = clock()
            ask(asks)
            spent[name].append(clock() - begun)
    timings |= {name: measure.Timing(tuple(seconds)) for name, seconds in spent.items()}
    ask(own, "bfloat16")
    changed = sum(one != other for one, other in zip(given["float32"], given["bfloat16"], strict=True))
    _, share = generation.prefill(own, predictor, store, size)
    claims = [
        measure.claim("helm-eval: answers by two processes against one", *list(timings.values())[:2], target=1.8),
        measure.claim("helm-eval: time with shuffled images over the model's own", timings["both"], timings["own"],
                      target=1.7, at_most=True),
        Claim("helm-eval: prefill's share of the machine's matrix rate", share, share, share),
        Claim("helm-eval: answers that bfloat16 changes", changed / len(own), 0, 1, note=f"{changed} of {len(own)}"),
    ]  # fmt: skip
    rates = {name: len(own) / timing.median for name, timing in timings.items() if name != "both"}
    measure.write("answers", claims, {"answers_per_second": rates}, {"questions": "of data/records"})


def asks_of(count: int) -> tuple[list[Ask], list[Ask]]:
    """Return the first questions, to the end of an image, each of its image and of another."""
    rows = load_questions(RECORDS, "val").to_list()
    images = list(dict.fromkeys(row["image_id"] for row in rows[:count]))
    rows = [row for row in rows if row["image_id"] in set(images)]
    others = shuffled_images((row["image_id"] for row in rows), load_params().seed)
    return [Ask(row["image_id"], row["question"]) for row in rows], [
        Ask(others[row["image_id"]], row["question"]) for row in rows
    ]


def together(count: int, asks: Sequence[Ask], params: Params) -> float:
    """Return the seconds in which so many processes, once each is ready, have answered all."""
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        rest = (count, server.port, folder, asks, params)
        parts = [context.Process(target=_take_part, args=(rank, *rest), daemon=True) for rank in range(count)]
        for part in parts:
            part.start()
        while server.add("ready", 0) < count and all(part.is_alive() for part in parts):
            time.sleep(0.05)
        begun = time.perf_counter()
        server.set("go", "")
        for part in parts:
            part.join()
            assert not part.exitcode, f"a process {measure.ended(part.exitcode)}"
        return float(server.get("end")) - begun


def _take_part(rank: int, size: int, port: int, folder: str, asks: Sequence[Ask], params: Params) -> None:
    torch.set_num_threads(1)
    server = distributed.TCPStore("127.0.0.1", port, is_master=False)
    predictor, store = Predictor.from_export(EXPORT, "cpu", params.evaluation.max_new_tokens), FeatureStore(FEATURES)
    group = WorkerGroup(
        rank, size, torch.device("cpu"), distributed.PrefixStore("work", server), Threads(1, "measured")
    )
    server.add("ready", 1)
    server.wait(["go"])
    answer_asks(asks, predictor, store, params.evaluation.batch_size, "answers", group, KeptAnswers(Path(folder)))
    if rank == 0:
        server.set("end", str(time.perf_counter()))


if __name__ == "__main__":
    main()
