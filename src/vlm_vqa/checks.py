"""What must hold beside the parameter file itself, checked before anything is computed from it.

`load_params` knows what a file alone can tell. Here stands the rest: this machine, and the records, once there are some; so
that no hour of extraction or training is spent on what a later stage must refuse.
"""

import copy
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ruamel.yaml.nodes import MappingNode, ScalarNode

from vlm_vqa.data.held_out import check_enough
from vlm_vqa.data.records import load_questions, manifest_for_a_look, picture_ids, read_manifest
from vlm_vqa.errors import UserError
from vlm_vqa.launch_file import check_params, read_copies, read_launch
from vlm_vqa.params import Params, Punkt, Source, Start, is_local, keys_of, lacking_keys, parse_params, written
from vlm_vqa.yaml_file import compose, read_yaml

if TYPE_CHECKING:
    from vlm_vqa.model.layout import TokenLayout

log = logging.getLogger(__name__)

LAUNCHES = Path("launch")
RECORDS = Path("data/records")
KNOWN = {Source.EASY_VQA: ((38_575, 4_000), (9_673, 1_000)), Source.OFFICIAL: ((443_757, 82_783), (214_354, 40_504))}
"""Questions and images of train and of val, where they are known before there are records."""


def check_here(params: Params, launches: Path = LAUNCHES, records: Path = RECORDS, run: bool = False) -> None:
    """Check this machine, and the records where there are some of this source, or what is known of it; `run` as for
    `check_machine`. UserError if they do not allow the five stages."""
    check_machine(params, launches, run)
    manifest = read_manifest(records) if run else manifest_for_a_look(records)
    if manifest is not None and manifest.get("source") == params.data.source.value:
        check_records(params, records, run)
    elif params.data.source in KNOWN:
        check_enough(params, *(np.arange(count) * images // count for count, images in KNOWN[params.data.source]))


def check_machine(params: Params, launches: Path = LAUNCHES, run: bool = True) -> None:
    """Refuse, by a UserError that names the parameter, launches and models that are not here, and nltk data that cannot
    be had where the stages `run`; a look at another machine's run only says what nltk lacks here."""
    read_copies(params.vision.launch, launches)
    if params.evaluation.launch is not None:
        read_copies(params.evaluation.launch, launches, "evaluation.launch")
    check_params(params.train, read_launch(params.train.launch, launches).strategy)
    for key, model in (("vision.model", params.vision.model), ("language.model", params.language.model)):
        if is_local(model) and not os.path.isfile(os.path.join(os.path.expanduser(model), "config.json")):
            raise UserError(f"{key} is {model!r}, but no model's config.json is there. Mend the path.")
    main = os.environ.get("RANK", "0") == "0"
    # By one process for all of a launch: it may read every weight, and who loads the model makes the same checks.
    if main and params.model.start is Start.CHECKPOINT and (run or params.model.revision is None):
        check_start(params)
    if params.evaluation.punkt_tab is Punkt.INSTALLED:
        # nltk is only loaded where it is asked for.
        from vlm_vqa.evaluation.bleu import prepare_punkt, punkt_is_installed

        if run and main:
            prepare_punkt(Punkt.INSTALLED)
        elif not run and not punkt_is_installed():
            lacking = "nltk's punkt_tab is not on this machine: needs a network"
            log.warning("evaluation.punkt_tab is installed, but %s", lacking)


def check_start(params: Params) -> None:
    """Refuse, by UserError, a checkpoint or adapter that training cannot start from; of a hub's, settings alone are read."""
    # transformers is only loaded where it is asked for.
    from vlm_vqa.hf_hub import SETTINGS
    from vlm_vqa.model import checkpoint
    from vlm_vqa.model.encoder import read_settings
    from vlm_vqa.model.vlm import build_processor

    start = params.model
    folder = checkpoint.folder_of(start, SETTINGS)
    config = checkpoint.read_config(start, folder)
    if start.revision is None:
        checkpoint.check_weights(start, folder, config)
    _, images, num_patches = read_settings(params.vision, start, folder)
    tokenizer = checkpoint.load_tokenizer(start, folder)
    processor = build_processor(images, tokenizer, num_patches)
    checkpoint.check_tokens(start, config, processor)
    if start.adapter is not None:
        from vlm_vqa.model.adapters import check_adapter
        from vlm_vqa.model.vlm import checkpoint_model, hash_weights, trained_state

        # An adapter names its base by the hash of all weights; a folder's are here to be read.
        base = checkpoint_model(start, config.vision_config, processor) if start.revision is None else None
        own = hash_weights(trained_state(base)) if base else None
        check_adapter(start.adapter, config, str(start.checkpoint), own)


def check_records(
    params: Params, records: Path = RECORDS, run: bool = True, layout: "TokenLayout | None" = None
) -> None:
    """Refuse records that the training or the evaluation would refuse, by a UserError that names the split. A tokenizer
    is downloaded where the stages `run`; `layout` is of all training questions, where they have been tokenised already."""
    val = load_questions(records, "val", ["image_id", "question"])
    train = load_questions(records, "train", ["image_id"])["image_id"]
    check_enough(params, picture_ids(records, "train", train), np.asarray(val["image_id"]))
    if params.evaluation.vqa_questions is not None:
        from vlm_vqa.evaluation.helm.files import helm_order

        val = val.select(helm_order(len(val))[: params.evaluation.vqa_questions])
    if len(set(val["image_id"])) < 2:
        none = "so none can be shown another (baselines.shuffled_images). Raise evaluation.vqa_questions."
        raise UserError(f"{records}: the {len(val)} validation questions to evaluate are all about one image, {none}")
    if os.environ.get("RANK", "0") != "0" or not run and (params.language.revision or params.model.revision):
        return
    # transformers is only loaded where there are records. It makes the examples to teach, too, or says which are too long.
    from vlm_vqa.training.prepare import examples

    layout = copy.copy(layout or examples(params, records)[0].layout)
    layout.text_length = sys.maxsize
    asked = set(val["question"])
    needed, longest = max((layout.text_tokens(layout.tokenize(question)), question) for question in asked)
    if needed > params.prompt.text_length:
        takes = f"takes {needed} text tokens; prompt.text_length is {params.prompt.text_length}"
        mend = f"Set it to {needed} or more, or shorten the question: {longest!r:.200}"
        raise UserError(f"{records}: the longest validation question {takes}. {mend}")


def fill_in(path: Path) -> list[str]:
    """Write into a valid parameter file what it lacks: keys and whole sections, each below the one before it; return
    them. UserError if the file is not valid, or its layout has no place for a line."""
    values, text = read_yaml(path), path.read_text(encoding="utf-8")
    lacking = lacking_keys(parse_params(values, str(path)), values)
    for key, value in lacking.items():
        *section, name = key.split(".")
        line = f"{name}: {written(value)}"
        if section and section[0] not in values:
            # A section is written when its first key is; the others are added to it.
            section, name, line, values = [], section[0], f"\n{section[0]}:\n  {line}", {**values, section[0]: None}
        try:
            text = _with_line(text, section, keys_of(section), name, line)
        except LookupError as error:
            where = section[-1] if section else "its first level"
            raise UserError(f"{path}: {where} is not in lines of its own. Write `{line.strip()}` into it.") from error
    path.write_text(text, encoding="utf-8")
    return list(lacking)


def _with_line(text: str, section: Sequence[str], names: Sequence[str], name: str, line: str) -> str:
    """Return a file's text with a line of key `name` in a section: below the key before it in `names`, indented like it.
    LookupError if the section is not written in lines of its own, or has no such key."""
    node = compose(text)
    for one in section:
        node = {key.value: value for key, value in node.value}[one]
    if node.flow_style:
        raise LookupError(section)
    lines = text.split("\n")
    if name == names[0]:
        key, _ = node.value[0]
        end = key.start_mark.line
        while lines[end - 1].lstrip().startswith("#"):
            end -= 1
    else:
        key, last = {key.value: (key, value) for key, value in node.value}[names[names.index(name) - 1]]
        while not isinstance(last, ScalarNode) and not last.flow_style:
            last = last.value[-1][1] if isinstance(last, MappingNode) else last.value[-1]
        # A block scalar ends where the next line begins.
        end = last.end_mark.line + (last.style not in ("|", ">") if isinstance(last, ScalarNode) else 1)
    return "\n".join([*lines[:end], " " * key.start_mark.column + line, *lines[end:]])
