"""One flipped bit in a stored file is found before it decides anything, or decides nothing; a named command mends it.

    python -m proofs.flips [--draws 40] [--seed 0] [--kinds records features ...] [--no-repair] [--folder FOLDER]

The five stages run once in a temporary copy of the project on the sample of VQAv2, real or drawn (see `benchmarks.vqav2`).
Then, draw by draw, one bit of one file is flipped, its time kept, and what a later stage or command does with files of this
kind (`proofs.readers`) is done in a process of its own:

    records       manifest, questions and images read, features opened for them
    features      opened, and those of every image read
    checkpoint    chosen, verified and read as a training does that goes on
    trained       joined with the tower and exported
    export        loaded, asked in our way and in the stock way
    predictions   read as a table

A UserError that names the place is "detected", and what comes out to the byte as without the flip is "no effect". The rest
are faults: "misnamed" a UserError that names another place, "raised" another exception, "hung", "died", and "silent".

Then one detected flip of each kind is made in the project itself, where the file is DVC's cache's too, and the command that
the message names is called: the file's bytes and dvc.lock must be as before.

Left out is what nothing reads again: report.html, the export's card, helm_predictions.parquet. About 6 minutes on 2 cores.
"""

import os
import random
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import measure, vqav2
from benchmarks.measure import Claim
from proofs import child
from proofs.project import Project, finished
from proofs.readers import KINDS, Kind
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.errors import UserError
from vlm_vqa.model.encoder import Encoder, load_encoder
from vlm_vqa.params import load_params
from vlm_vqa.training import checkpoint_files, launch
from vlm_vqa.training.dataset import Collator
from vlm_vqa.training.prepare import model_to_train, prepare
from vlm_vqa.training.trainer import VqaTrainer, training_arguments

SETTINGS = {"train.batch_size": 8, "train.save_steps": 4, "train.num_train_epochs": 1}
GOOD = ("detected", "no effect")
BAD = ("misnamed", "silent", *child.BAD)


@dataclass(frozen=True)
class Draw:
    """A flip and what came of it."""

    kind: str
    file: str
    byte: int
    bit: int
    verdict: str
    said: str


def files_of(root: Path, kind: Kind) -> list[Path]:
    place = root / kind.folder
    if kind.folder.startswith("checkpoints"):
        # Older ones are read by nobody.
        place = checkpoint_files.whole_checkpoints(place)[0]
    found = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return [path for path in found if path.name not in kind.unread]


def flip(path: Path, byte: int, bit: int) -> None:
    """Flip a bit in place, as a disk does: time and mode stay."""
    found = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))
    path.chmod(found.st_mode & 0o777)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def draw(root: Path, name: str, number: int, seed: int, encoder: Encoder, whole: str) -> Draw:
    """Flip one drawn bit, read, flip it back."""
    kind, rng = KINDS[name], random.Random(f"{seed} {name} {number}")
    path = rng.choice(files_of(root, kind))
    byte, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
    flip(path, byte, bit)
    what, said = child.in_child(lambda: kind.read(root, encoder))
    flip(path, byte, bit)
    verdict = {"done": "no effect" if said == whole else "silent", "refused": "misnamed"}.get(what, what)
    if what == "refused" and kind.folder in said:
        verdict = "detected"
    return Draw(name, path.relative_to(root).as_posix(), byte, bit, verdict, "" if what == "done" else said[:800])


def all_draws(root: Path, names: Sequence[str], count: int, seed: int, encoder: Encoder) -> list[Draw]:
    """Draw `count` flips of every kind in the project at `root`, whose files are no links.

    Raises:
        UserError: undamaged files cannot be read.
    """
    found = []
    for name in names:
        what, whole = child.in_child(lambda name=name: KINDS[name].read(root, encoder))
        if what != "done":
            raise UserError(f"{name}: reading the undamaged files failed: {what} {whole}")
        mine = [draw(root, name, number, seed, encoder, whole) for number in range(count)]
        print(
            f"{name:<12} " + ", ".join(f"{verdict} {n}" for verdict, n in Counter(d.verdict for d in mine).items()),
            flush=True,
        )
        found += mine
    return found


def mended(root: Path, one: Draw) -> str | None:
    """Make a flip in the project, call the command that its message names, and return what is not as before."""
    path, lock = root / one.file, (root / "dvc.lock").read_bytes()
    before = path.read_bytes()
    command = re.search(r"vlm-vqa repair [\w -]+|Delete the folder \S+", one.said)
    if command is None:
        return f"the message names no command: {one.said}"
    flip(path, one.byte, one.bit)
    if command[0].startswith("Delete"):
        subprocess.run(["rm", "-r", str(path.parent)], check=True)
        return None if path.parent not in checkpoint_files.whole_checkpoints(path.parent.parent) else "still chosen"
    done = Project.at(root).command(f"{command[0]} 2>&1", MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    if done.returncode:
        return f"{command[0]} ended with {done.returncode}: {done.stdout[-300:]}"
    same = path.read_bytes() == before and (root / "dvc.lock").read_bytes() == lock
    return None if same else f"{command[0]}: {one.file} or dvc.lock is not as before"


def add_checkpoint(root: Path) -> None:
    """Train a few steps if there is no checkpoint.

    Raises:
        UserError: that failed.
    """
    if not checkpoint_files.whole_checkpoints(root / "checkpoints/flips"):
        what, words = child.in_child(lambda: _train(root), 300)
        if what != "done":
            raise UserError(f"no checkpoint could be written: {what} {words}")


def _train(root: Path) -> str:
    with chdir(root):
        params = load_params()
        encoder, running = load_encoder(params.vision, device="cpu"), launch.start(params.train)
        data, layout, processor = prepare(params, encoder)
        model = model_to_train(params, encoder, processor)
        arguments = training_arguments(params.train, params.seed, Path("checkpoints/flips"), running)
        collator = Collator(layout, FeatureStore("data/features"))
        VqaTrainer(model, arguments, params.train, data, collator, [], running).run()
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, repair, and write `flips.json`."""
    parser = measure.parser("flips", __doc__, "proofs", draws=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--no-repair", action="store_true", help="flip and read only")
    parser.add_argument("--folder", type=Path, help="keep the project here and use it again")
    options = measure.parse(parser, arguments)
    torch.set_num_threads(1)
    with finished(options.folder, "flips", SETTINGS) as root:
        add_checkpoint(root)
        encoder = load_encoder(load_params(root / "params.yaml").vision, device="cpu")
        with tempfile.TemporaryDirectory() as place:
            names = ("data", "models", "reports", "checkpoints", "params.yaml", "launch")
            subprocess.run(["cp", "-r", *(str(root / name) for name in names), place], check=True)
            draws = all_draws(Path(place), options.kinds, options.draws, options.seed, encoder)
        repairs = (
            {}
            if options.no_repair
            else {
                name: mended(root, next(d for d in draws if (d.kind, d.verdict) == (name, "detected")))
                for name in options.kinds
                if any((d.kind, d.verdict) == (name, "detected") for d in draws)
            }
        )
    report(draws, repairs, options.seed)


def report(draws: Sequence[Draw], repairs: Mapping[str, str | None], seed: int) -> None:
    """Write `flips.json` and print the table and every fault."""
    print(f"\n{'kind':<12} {'draws':>6} " + " ".join(f"{verdict:>9}" for verdict in (*GOOD, *BAD)) + "  repaired")
    claims = []
    for name in dict.fromkeys(one.kind for one in draws):
        counts = Counter(one.verdict for one in draws if one.kind == name)
        repaired = "not tried" if name not in repairs else repairs[name] or "yes"
        row = " ".join(f"{counts[verdict]:>9}" for verdict in (*GOOD, *BAD))
        print(f"{name:<12} {counts.total():>6} {row}  {repaired}")
        share = sum(counts[verdict] for verdict in GOOD) / counts.total()
        claims.append(
            Claim(
                f"flipped bits that are found or decide nothing, {name}",
                share,
                share,
                share,
                target=1.0,
                note=f"{counts.total()} draws, {counts['detected']} detected",
            )
        )
    for one in draws:
        if one.verdict in BAD:
            print(f"{one.verdict}: {one.file}, byte {one.byte}, bit {one.bit} {one.said[:300]}".rstrip())
    whole = sum(words is None for words in repairs.values())
    claims.append(
        Claim(
            "kinds that the named command mends, of those tried",
            whole / max(len(repairs), 1),
            0.0,
            1.0,
            1.0,
            note=f"{whole} of {len(repairs)}",
        )
    )
    details = {"draws": [asdict(one) for one in draws], "repairs": dict(repairs), "seed": seed}
    measure.write("flips", claims, details, {"questions and photographs": vqav2.origin(vqav2.SAMPLE)})


if __name__ == "__main__":
    main()
