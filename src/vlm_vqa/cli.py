"""The command `vlm-vqa`: what a user needs beside `dvc repro` and `mlflow ui`."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vlm_vqa.errors import UserError
from vlm_vqa.pipeline.early import end_quietly
from vlm_vqa.secrets import mask_output, without_secrets

# Everything else is imported by the command that needs it: torch and MLflow cost seconds, `--help` should not.


def _track(arguments: argparse.Namespace) -> int:
    from vlm_vqa.tracking import checkout_root, recreate_run, tracking_uri

    run_id, made = recreate_run()
    store = without_secrets(tracking_uri(checkout_root()))
    if made:
        print(f"recorded these outputs as MLflow run {run_id} in {store}; `mlflow ui` shows it")
    else:
        print(f"these weights and parameters have their MLflow run already: {run_id} in {store}; nothing to do")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from vlm_vqa.evaluation.compare import REPORT, compare_reports, metrics_diff, report_at, report_here, summary

    new = report_here()
    base = report_at(arguments.base)
    if base is None and not arguments.allow_missing_base:
        raise UserError(
            f"{REPORT} is not in git at {arguments.base}, so there is nothing to compare with: commit it there, name"
            " another revision by --base, or pass --allow-missing-base for the change that brings the first report"
        )
    comparison = compare_reports(base, new, arguments.tolerance)
    text = summary(comparison, arguments.base, metrics_diff(arguments.base))
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(text, encoding="utf-8")
    print(text)
    return 0 if comparison.passed else 1


def _check(arguments: argparse.Namespace) -> int:
    from vlm_vqa.checks import check_here, fill_in
    from vlm_vqa.params import Source, load_params

    if arguments.write:
        for key in fill_in(arguments.params):
            print(f"{arguments.params}: added {key}")
    params = load_params(arguments.params)
    check_here(params)
    print(f"{arguments.params}: {len(params.flat())} parameters, valid; params_hash {params.hash()}")
    if params.data.source in (Source.DIRECTORY, Source.TABLE) and not arguments.params_only:
        import numpy as np

        from vlm_vqa.data.held_out import check_enough
        from vlm_vqa.fetch.write_records import inspect_data

        found = inspect_data(params.data)
        found.violations.raise_if_any()
        check_enough(params, *(np.array([*text.statistics.of_image.elements()]) for text in found.texts))
        counts = " and ".join(f"{text.statistics.questions} questions for {text.paths.split}" for text in found.texts)
        print(f"{params.data.directory}: {counts}, which keep the data contract")
    return 0


def _init(arguments: argparse.Namespace) -> int:
    from vlm_vqa.fetch.write_params import init

    for line in init(arguments.path, arguments.preset, arguments.force):
        print(line)
    return 0


def _preflight(arguments: argparse.Namespace) -> int:
    import json

    from vlm_vqa.estimate.predict import Asked, predict
    from vlm_vqa.estimate.render import as_json, as_text

    given = {name: getattr(arguments, name) for name in Asked._fields if getattr(arguments, name) is not None}
    prediction = predict(arguments.params, Asked(**given))
    print(json.dumps(as_json(prediction), indent=2) if arguments.json else as_text(prediction, arguments.details))
    return 0 if prediction.fits else 1


def _ask(arguments: argparse.Namespace) -> int:
    from vlm_vqa.inference.asking import Asked, answered, read_csv, show
    from vlm_vqa.quick_start import quick_start

    image, questions = arguments.image, arguments.questions
    if arguments.csv is not None and image is not None:
        raise UserError("--csv names the pictures and the questions: give no others beside it")
    if arguments.csv is None and not questions:
        raise UserError('give a picture and a question, as in: vlm-vqa ask photo.jpg "What is it?"; or --csv FILE')
    asked = read_csv(arguments.csv) if image is None else [Asked(image, question, image) for question in questions]

    def load():
        with quick_start():
            from transformers.utils.logging import disable_progress_bar

            from vlm_vqa.inference.predictor import Predictor

            disable_progress_bar()
            return Predictor.from_export(arguments.model)

    lacking = show(asked, answered(asked, load, arguments.max_image_pixels), arguments.json)
    if lacking and arguments.csv is not None:
        print(f"vlm-vqa: {lacking} of {len(asked)} rows have no answer; row 1 is the header", file=sys.stderr)
    return 2 if lacking else 0


def _unlock(arguments: argparse.Namespace) -> int:
    from vlm_vqa.pipeline.unlock import project_of, unlock

    for line in unlock(project_of(Path())) or ([] if arguments.quiet else ["no killed dvc has left anything here"]):
        print(line)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from vlm_vqa.errors import make_again
    from vlm_vqa.pipeline.repair import recorded, verify
    from vlm_vqa.pipeline.unlock import project_of

    with recorded(project_of(Path()), arguments.stages) as outs:
        faults = verify(outs)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{len(outs)} outputs: every file is what dvc.lock records")
        return 0
    print(make_again(" ".join(sorted({fault.stage for fault in faults}))))
    return 1


def _repair(arguments: argparse.Namespace) -> int:
    from vlm_vqa.pipeline.repair import repair
    from vlm_vqa.pipeline.unlock import project_of

    return repair(project_of(Path()), arguments.stages, not arguments.no_run)


def _gallery(arguments: argparse.Namespace) -> int:
    from vlm_vqa.evaluation.gallery import draw_gallery

    print(f"wrote {draw_gallery(out_path=arguments.out, seed=arguments.seed)}")
    return 0


def _helm_web(arguments: argparse.Namespace) -> int:
    from vlm_vqa.evaluation.helm.run import HelmFolders
    from vlm_vqa.evaluation.helm.web import PAGE, serve, write_page

    first = write_page(HelmFolders())
    if arguments.no_serve:
        print(f"wrote {PAGE}: any web server can show it")
    else:
        serve(PAGE, first, arguments.port)
    return 0


def _easy_vqa(arguments: argparse.Namespace) -> int:
    from vlm_vqa.fetch.sources.easy_vqa import write_official_layout

    write_official_layout(arguments.folder)
    print(f"wrote easy-VQA in VQAv2's layout to {arguments.folder}")
    return 0


def _add_ask_options(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "Answers come on standard output, in order. What cannot be answered is named on standard error; the others are"
        " answered all the same, and the exit code is 2. One question gives its answer alone, several give a line each of"
        " question, tab and answer, and a csv gives a csv with the column answer."
    )
    sub.add_argument("image", nargs="?", metavar="PICTURE", help="a picture's file, or - for standard input")
    sub.add_argument("questions", nargs="*", metavar="QUESTION", help="in quotes; one or more")
    sub.add_argument("--csv", metavar="FILE", help="columns image (beside the csv) and question; - for standard input")
    sub.add_argument("--json", action="store_true", help="a JSON object a line: image, question, answer; error if none")
    sub.add_argument(
        "--model", type=Path, default=Path("models/export"), help="an exported model (default: %(default)s)"
    )
    sub.add_argument(
        "--max-image-pixels", type=int, default=50_000_000, help="refuse larger pictures (default: %(default)s)"
    )


def _add_preflight_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("params", type=Path, nargs="?", default=Path("params.yaml"), help="default: %(default)s")
    sub.add_argument("--device", metavar="NAME", help='such as A100-80GB, "RTX 4090" or cpu; by default the one here')
    for option, unit, text in (
        ("--price", "PER_GPU_HOUR", "of one device, in any currency"),
        ("--host-memory", "GIB", "of each machine; by default this one's"),
        ("--disk", "GIB", "for all outputs; by default what is free here"),
        ("--utilisation", "SHARE", "of the device's peak FLOP/s; by default measured on CPUs, assumed on GPUs"),
        ("--bandwidth", "MB_PER_S", "of downloads; by default 20"),
    ):
        sub.add_argument(option, type=float, metavar=unit, help=text)
    sub.add_argument("--details", action="store_true", help="print the parts of every figure")
    sub.add_argument("--json", action="store_true", help="print JSON; sizes in bytes")


def _add_compare_options(sub: argparse.ArgumentParser) -> None:
    from vlm_vqa.evaluation.compare import TOLERANCE

    sub.add_argument(
        "--base", required=True, metavar="REV", help="git revision to compare with, such as main or HEAD~1"
    )
    sub.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="drop of helm.bleu_1 that passes (default: %(default)s)"
    )
    sub.add_argument("--markdown", type=Path, metavar="FILE", help="write the comparison there too")
    sub.add_argument("--allow-missing-base", action="store_true", help="pass where REV has no report yet")


def _add_params(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that write params.yaml and check it."""
    sub = command("init", _init, "Write params.yaml for questions of your own, and say what was found.")
    sub.add_argument("path", type=Path, metavar="PATH", help="a folder or file of questions, or OWNER/NAME on the hub")
    sub.add_argument("--preset", default="small", help="a file of presets/, for the models (default: %(default)s)")
    sub.add_argument("--force", action="store_true", help="replace a params.yaml that was edited")

    sub = command(
        "check", _check, "Check a parameter file, and the data in the folder that it names, without running anything."
    )
    sub.add_argument("params", type=Path, nargs="?", default=Path("params.yaml"), help="default: %(default)s")
    sub.add_argument(
        "--write",
        action="store_true",
        help="add the keys that a file of an earlier version lacks, each as it was before",
    )
    sub.add_argument("--params-only", action="store_true", help="leave out the data, of which every picture is decoded")


def _add_mending(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands for what DVC leaves locked or damaged."""
    sub = command(
        "repair",
        _repair,
        "Remove what is damaged of stages' outputs, from DVC's cache too, and let `dvc repro` make it again.",
    )
    sub.add_argument("stages", nargs="*", metavar="STAGE", help="as in dvc.yaml (default: all)")
    sub.add_argument("--no-run", action="store_true", help="only remove, for a `dvc pull` or `dvc repro` of yours")

    sub = command("unlock", _unlock, "Mend the locks that a killed dvc has left, so that `dvc repro` works again.")
    sub.add_argument("--quiet", action="store_true", help="say nothing where there is nothing to do")

    sub = command(
        "verify", _verify, "Read stages' outputs whole and compare them with dvc.lock; exit 1 if any differs."
    )
    sub.add_argument("stages", nargs="*", metavar="STAGE", help="as in dvc.yaml (default: all)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm-vqa", description="Beside `dvc repro` and `mlflow ui`. Run it in the project's folder."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    _add_ask_options(command("ask", _ask, "Answer questions about pictures with the exported model."))

    _add_params(command)

    _add_compare_options(
        command(
            "compare",
            _compare,
            "Compare reports/evaluation.json with the one committed at a git revision; exit 1 if bleu_1 dropped.",
        )
    )

    sub = command("easy-vqa", _easy_vqa, "Write easy-VQA in VQAv2's official file layout.")
    sub.add_argument("folder", type=Path, help="new folder for questions, annotations and images")

    sub = command("gallery", _gallery, "Draw test questions with the model's answers, right and wrong ones.")
    sub.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("evaluation/helm/images/gallery.png"),
        help="PNG to write (default: %(default)s)",
    )
    sub.add_argument("--seed", type=int, default=0, help="another one draws other questions (default: %(default)s)")

    sub = command(
        "helm-web", _helm_web, "Show HELM's own page of the last evaluation, with its pictures, to this machine."
    )
    sub.add_argument("--port", type=int, default=8000, help="0 for any free one (default: %(default)s)")
    sub.add_argument("--no-serve", action="store_true", help="only write helm-web/, for a web server of yours")

    sub = command(
        "preflight",
        _preflight,
        "Predict disk, memory, FLOPs, hours and cost of every stage, and what would make it fit; exit 1 if it does not.",
    )
    _add_preflight_options(sub)

    command("track", _track, "Record the outputs here as an MLflow run, after `dvc pull` or when tracking had failed.")
    _add_mending(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 lower scores or damaged files, 2 a user's mistake, 130 Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is end_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if more and not ("questions" in arguments and all(not word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        # argparse gives the questions before an option only.
        arguments.questions += more
    mask_output("vlm-vqa: %(message)s", logging.WARNING)
    try:
        return arguments.function(arguments)
    except UserError as error:
        print(f"vlm-vqa: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlm-vqa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who reads has enough, as `head` has; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
