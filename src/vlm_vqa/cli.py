"""The command `vlm-vqa`: what a user needs beside `dvc repro` and `mlflow ui`."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

from vlm_vqa.errors import UserError, make_again
from vlm_vqa.pipeline.early import end_quietly, handle, send_again
from vlm_vqa.secrets import mask_output, without_secrets

# Everything else is imported by the command that needs it: torch and MLflow cost seconds, `--help` should not.

PARSER = argparse.ArgumentParser(
    prog="vlm-vqa", description="Beside `dvc repro` and `mlflow ui`. Run it in the project's folder."
)
_COMMANDS = PARSER.add_subparsers(metavar="COMMAND", required=True)


def option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return what `command` takes: the words of argparse's `add_argument`, with the default said at the end of its help."""
    if settings.get("default") is not None:
        settings["help"] = f"{settings['help']} (default: %(default)s)"
    return names, settings


def command(*options: tuple[tuple[str, ...], dict[str, Any]], epilog: str | None = None) -> Callable:
    """Make a function a command of its name: its docstring is the help, its arguments the options, None is exit code 0."""

    def add(function: FunctionType) -> FunctionType:
        name, text = function.__name__.strip("_").replace("_", "-"), function.__doc__
        sub = _COMMANDS.add_parser(name, help=text, description=text, epilog=epilog)
        for names, settings in options:
            sub.add_argument(*names, **settings)
        sub.set_defaults(function=function)
        return function

    return add


PARAMS = option("params", type=Path, nargs="?", default=Path("params.yaml"), help="parameter file")
MODEL = option(
    "--model", default="models/export", help="an exported folder, or models:/NAME/VERSION or models:/NAME@ALIAS"
)
MAX_PIXELS = option("--max-image-pixels", type=int, default=50_000_000, help="refuse larger pictures")
STAGES = option("stages", nargs="*", metavar="STAGE", help="as in dvc.yaml (default: all)")


def _load(model: str) -> Any:
    """Return the predictor of an exported folder or of a registered model."""
    from vlm_vqa.quick_start import quick_start

    if model.startswith("models:/"):
        from vlm_vqa.tracking.registry import local_folder

        folder = local_folder(model)
    else:
        folder = Path(model)
    with quick_start():
        from transformers.utils.logging import disable_progress_bar

        from vlm_vqa.inference.predictor import Predictor

        disable_progress_bar()
        return Predictor.from_export(folder)


@command(
    option("image", nargs="?", metavar="PICTURE", help="a picture's file, a folder of them, or - for standard input"),
    option("questions", nargs="*", metavar="QUESTION", help="in quotes; one or more"),
    option("--csv", metavar="FILE", help="columns image (beside the csv) and question; - for standard input"),
    option("--json", action="store_true", help="a JSON object a line, with probability and the next two answers"),
    MODEL,
    MAX_PIXELS,
    epilog=(
        "Answers come on standard output, in order. What cannot be answered is named on standard error; the others are"
        " answered all the same, and the exit code is 2. One question gives its answer alone, several give a line each of"
        " question, tab and answer, and a folder or a csv gives a csv with the column answer. A probability is the product"
        " of those of the answer's tokens, its end among them."
    ),
)
def _ask(
    image: str | None, questions: list[str], csv: str | None, json: bool, model: str, max_image_pixels: int
) -> int:
    """Answer questions about pictures with the exported model."""
    from vlm_vqa.inference.asking import Asked, about_folder, answered, read_csv, show

    if csv is not None and image is not None:
        raise UserError("--csv names the pictures and the questions: give no others beside it")
    if csv is not None:
        asked = read_csv(csv)
    elif image is None or not questions:
        raise UserError('give a picture and a question, as in: vlm-vqa ask photo.jpg "What is it?"; or --csv FILE')
    elif os.path.isdir(image):
        from vlm_vqa.fetch.recognise import PICTURES

        asked = about_folder(image, questions, PICTURES)
    else:
        asked = [Asked(image, question, image) for question in questions]
    as_table = csv is not None or os.path.isdir(image or "")
    lacking = show(asked, answered(asked, lambda: _load(model), max_image_pixels), json, as_table)
    if lacking and csv is not None:
        print(f"vlm-vqa: {lacking} of {len(asked)} rows have no answer; row 1 is the header", file=sys.stderr)
    return 2 if lacking else 0


@command(
    option("path", type=Path, metavar="PATH", help="a folder or file of questions, or OWNER/NAME on the hub"),
    option("--preset", default="small", help="a file of presets/, for the models"),
    option("--force", action="store_true", help="replace a params.yaml that was edited"),
)
def _init(path: Path, preset: str, force: bool) -> None:
    """Write params.yaml for questions of your own, and say what was found."""
    from vlm_vqa.fetch.write_params import init

    print(*init(path, preset, force), sep="\n")


@command(
    PARAMS,
    option(
        "--write", action="store_true", help="add the keys that an earlier version's file lacks, each as it was before"
    ),
    option("--params-only", action="store_true", help="leave out the data, of which every picture is decoded"),
)
def _check(params: Path, write: bool, params_only: bool) -> None:
    """Check a parameter file, and the data in the folder that it names, without running anything."""
    from vlm_vqa.checks import check_here, fill_in
    from vlm_vqa.params import Source, load_params

    for key in fill_in(params) if write else ():
        print(f"{params}: added {key}")
    values = load_params(params)
    check_here(values)
    print(f"{params}: {len(values.flat())} parameters, valid; params_hash {values.hash()}")
    if values.data.source in (Source.DIRECTORY, Source.TABLE) and not params_only:
        import numpy as np

        from vlm_vqa.data.held_out import check_enough
        from vlm_vqa.fetch.write_records import inspect_data

        found = inspect_data(values.data)
        found.violations.raise_if_any()
        check_enough(values, *(np.array([*text.of_image.elements()]) for text in found.texts.values()))
        counts = " and ".join(f"{text.questions} questions for {text.paths.split}" for text in found.texts.values())
        print(f"{values.data.directory}: {counts}, which keep the data contract")


@command(option("folder", type=Path, help="new folder for the model"))
def _base(folder: Path) -> None:
    """Write the model that params.yaml trains, before its first step: the base that an adapter is of.

    It is a stock folder, as an export is: keep it once, and beside it the adapters of every training that began there.
    data/records must be there, for a random Gemma 2's tokenizer is trained on them.
    """
    from vlm_vqa.inference.export import write_base
    from vlm_vqa.model.encoder import load_encoder
    from vlm_vqa.params import load_params
    from vlm_vqa.training.prepare import base_model, prepare

    params = load_params("params.yaml", whole=True)
    encoder = load_encoder(params.vision, "cpu", params.model)
    processor = prepare(params, encoder)[2]
    weights_hash = write_base(folder, base_model(params, encoder, processor), encoder, processor, params)
    print(f"wrote {folder}: weights_hash {weights_hash}")


@command(
    option("old", nargs="?", metavar="A", help="git revision, DVC experiment, MLflow run id, or folder of reports"),
    option("new", nargs="?", metavar="B", help="likewise (default: the working tree)"),
    option(
        "--base", metavar="REV", help="instead of A and B: git revision to hold this checkout against, such as main"
    ),
    option("--tolerance", type=float, default=0.004, help="with --base: drop of the score that passes"),
    option("--allow-missing-base", action="store_true", help="with --base: pass where REV has no report yet"),
    option("--markdown", type=Path, metavar="FILE", help="write the comparison there too"),
    option("--html", type=Path, metavar="FILE", help="of A and B: write a page with pictures"),
    epilog=(
        "B is compared with A: parameters, scores paired by question, the questions that flipped. A name that could be more"
        " than one thing is said as folder:NAME, git:NAME, exp:NAME or run:NAME. With --base, exit 1 if scores surely fell."
    ),
)
def _compare(
    old: str | None, new: str | None, base: str | None, tolerance: float, allow_missing_base: bool,
    markdown: Path | None, html: Path | None,
) -> int:  # fmt: skip
    """Compare two evaluated models question by question, or hold this checkout against a git revision."""
    if (old is None) == (base is None) or (base and html):
        raise UserError("give A, or A and B, to compare them; or --base REV alone, without --html, for the gate")
    if base is not None:
        from vlm_vqa.gate import hold_against
        from vlm_vqa.params import load_params

        text, passed = hold_against(base, tolerance, allow_missing_base, load_params().evaluation.gate)
        files = {markdown: text}
    else:
        from vlm_vqa.evaluation.difference_page import as_html, as_markdown, as_text
        from vlm_vqa.evaluation.differences import compare_sides
        from vlm_vqa.sides import side_of, working_tree

        assert old is not None, "checked above"
        found = compare_sides(side_of(old), side_of(new) if new else working_tree())
        text, passed = as_text(found), True
        files = {markdown: as_markdown(found) if markdown else "", html: as_html(found) if html else ""}
    for file, content in files.items():
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
    print(text)
    return 0 if passed else 1


@command(
    option(
        "model",
        nargs="?",
        metavar="FOLDER",
        default="models/export",
        help="an exported folder, or models:/NAME/VERSION",
    ),
    option(
        "--records", metavar="FOLDER", default="data/records", help="for examples and what the question alone would say"
    ),
    option("--port", type=int, default=7860, help="0 for the first free one"),
    MAX_PIXELS,
)
def _demo(model: str, records: str, port: int, max_image_pixels: int) -> None:
    """Show a page to ask the exported model in, to this machine (needs the extra `demo`)."""
    try:
        from vlm_vqa.demo import run
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs gradio: pip install 'vlm-vqa[demo]', or -e '.[demo]' in a checkout") from error
    run(_load(model), model, records, max_image_pixels, port)


@command(option("folder", type=Path, help="new folder for questions, annotations and images"))
def _easy_vqa(folder: Path) -> None:
    """Write easy-VQA in VQAv2's official file layout."""
    from vlm_vqa.fetch.sources.easy_vqa import write_official_layout

    write_official_layout(folder)
    print(f"wrote easy-VQA in VQAv2's layout to {folder}")


@command(
    option("--port", type=int, default=8000, help="0 for any free one"),
    option("--no-serve", action="store_true", help="only write helm-web/, for a web server of yours"),
)
def _helm_web(port: int, no_serve: bool) -> None:
    """Show HELM's own page of the last evaluation, with its pictures, to this machine."""
    from vlm_vqa.evaluation.helm.web import PAGE, serve, write_page

    first = write_page()
    if no_serve:
        print(f"wrote {PAGE}: any web server can show it")
    else:
        serve(first, port)


@command(
    PARAMS,
    option("--device", metavar="NAME", help='such as A100-80GB, "RTX 4090" or cpu; by default the one here'),
    option("--price", type=float, metavar="PER_GPU_HOUR", help="of one device, in any currency"),
    option("--host-memory", type=float, metavar="GIB", help="of each machine; by default this one's"),
    option("--disk", type=float, metavar="GIB", help="for all outputs; by default what is free here"),
    option(
        "--utilisation", type=float, metavar="SHARE",
        help="of the device's peak FLOP/s; by default measured on CPUs, assumed on GPUs",
    ),
    option("--bandwidth", type=float, metavar="MB_PER_S", help="of downloads; by default 20"),
    option("--details", action="store_true", help="print the parts of every figure"),
    option("--json", action="store_true", help="print JSON; sizes in bytes"),
)  # fmt: skip
def _preflight(params: Path, details: bool, json: bool, **asked: Any) -> int:
    """Predict disk, memory, FLOPs, hours and cost of every stage, and what would make it fit; exit 1 if it does not."""
    from json import dumps

    from vlm_vqa.estimate.predict import Asked, predict
    from vlm_vqa.estimate.render import as_json, as_text

    prediction = predict(params, Asked(**{name: value for name, value in asked.items() if value is not None}))
    print(dumps(as_json(prediction), indent=2) if json else as_text(prediction, details))
    return 0 if prediction.fits else 1


@command(
    option("name", metavar="VERSION|RUN", help="number of a registered version, or id of the MLflow run that made it"),
    option("--margin", type=float, metavar="M", help="let it follow if surely less than this worse; needs --reason"),
    option("--reason", metavar="TEXT", help="why a model not shown to be better follows; kept with the figures"),
    epilog="Exit code 1: it is not shown to be better. The score is the one that evaluation.gate names.",
)
def _promote(name: str, margin: float | None, reason: str | None) -> int:
    """Move MLflow's alias champion to a model that is shown to be better than today's, question by question."""
    from vlm_vqa.params import load_params
    from vlm_vqa.promote import promote

    said, done = promote(load_params(), name, margin, reason)
    print(said)
    return 0 if done else 1


@command(
    option("name", metavar="OWNER/NAME", help="model on the Hugging Face hub; made if it is not there"),
    option("--dry-run", action="store_true", help="ask no hub: print the card and name the files"),
    option("--public", action="store_true", help="a repository that is made is for all to see (default: private)"),
    epilog="The token is HF_TOKEN's or that of `hf auth login`. What is there already stays as private as it is.",
)
def _publish(name: str, dry_run: bool, public: bool) -> None:
    """Push the export, its card with the scores, and the reports to the hub as one commit."""
    from vlm_vqa.publish import prepared, push

    with prepared(name) as folder:
        if not dry_run:
            print(f"published: {push(folder, name, public)}")
            return
        print((folder / "README.md").read_text(encoding="utf-8"))
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:>14,} bytes  {path.relative_to(folder)}")
        print(f"dry run: nothing was sent; without --dry-run these files go to {name}")


@command(
    option("folder", type=Path, nargs="?", metavar="FOLDER", default=Path("models/export"), help="an exported model"),
    option("--host", default="127.0.0.1", help="other than loopback needs a key: VLM_VQA_API_KEY"),
    option("--port", type=int, default=8000, help="0 for any free one"),
    option("--max-image-pixels", type=int, default=50_000_000, help="refuse larger pictures"),
)
def _serve(folder: Path, host: str, port: int, max_image_pixels: int) -> None:
    """Answer OpenAI's chat completions with the exported model, to this machine."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise UserError("packages are missing. Install them: pip install 'vlm-vqa[serve]'")
    from vlm_vqa.inference.serving import serve

    serve(folder, host, port, max_image_pixels)


@command()
def _track() -> None:
    """Record the outputs here as an MLflow run, after `dvc pull` or when tracking had failed."""
    from vlm_vqa.tracking import checkout_root, recreate_run, tracking_uri

    run_id, made = recreate_run()
    store = without_secrets(tracking_uri(checkout_root()))
    if made:
        print(f"recorded these outputs as MLflow run {run_id} in {store}; `mlflow ui` shows it")
    else:
        print(f"these weights and parameters have their MLflow run already: {run_id} in {store}; nothing to do")


@command(STAGES, option("--no-run", action="store_true", help="only remove, for a `dvc pull` or `dvc repro` of yours"))
def _repair(stages: list[str], no_run: bool) -> int:
    """Remove what is damaged of stages' outputs, from DVC's cache too, and let `dvc repro` make it again."""
    from vlm_vqa.pipeline.repair import repair
    from vlm_vqa.pipeline.unlock import project_of

    return repair(project_of(Path()), stages, not no_run)


@command(option("--quiet", action="store_true", help="say nothing where there is nothing to do"))
def _unlock(quiet: bool) -> None:
    """Mend the locks that a killed dvc has left, so that `dvc repro` works again."""
    from vlm_vqa.pipeline.unlock import project_of, unlock

    for line in unlock(project_of(Path())) or ([] if quiet else ["no killed dvc has left anything here"]):
        print(line)


@command(STAGES)
def _verify(stages: list[str]) -> int:
    """Read stages' outputs whole and compare them with dvc.lock; exit 1 if any differs."""
    from vlm_vqa.pipeline.repair import recorded, verify
    from vlm_vqa.pipeline.unlock import project_of

    with recorded(project_of(Path()), stages) as outs:
        faults = verify(outs)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{len(outs)} outputs: every file is what dvc.lock records")
        return 0
    print(make_again(" ".join(sorted({fault.stage for fault in faults}))))
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 lower scores or damaged files, 2 a user's mistake, 130 Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is end_quietly:
        handle(signal.SIGINT, KeyboardInterrupt)
        sys.unraisablehook = send_again
    arguments, more = PARSER.parse_known_args(argv)
    if more and not ("questions" in arguments and all(not word.startswith("-") for word in more)):
        PARSER.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        # argparse gives the questions before an option only.
        arguments.questions += more
    mask_output("vlm-vqa: %(message)s", logging.WARNING)
    options = vars(arguments)
    try:
        return options.pop("function")(**options) or 0
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
