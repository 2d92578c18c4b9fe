"""From a source to `data/records`: read, check the contract, store. The format stands in `vlm_vqa.data.records`.

Texts go first, then every image once, decoded in threads and stored as the bytes it was. No more than a row group's images
and the few that are being decoded are in memory. After the first violation all is still checked, but nothing stored.
"""

import logging
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vlm_vqa.cores import usable_cores
from vlm_vqa.data import records
from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.contract import ReadAgain, Row, Source, Split, ViolationKind, Violations
from vlm_vqa.fetch.data_report import ALIKE_SHOWN, render_report
from vlm_vqa.fetch.sources import open_source
from vlm_vqa.fetch.sources.image_files import ImageFiles, MissingImage
from vlm_vqa.fetch.statistics import Images, Look, Lookalikes, Texts, look
from vlm_vqa.files import claim
from vlm_vqa.hashing import hash_json, sha256_bytes, sha256_file
from vlm_vqa.params import DataParams, Doubtful
from vlm_vqa.prefetch import ordered_map
from vlm_vqa.sealed import PART, fingerprint, publish, scratch, write_sealed

log = logging.getLogger(__name__)

_HASHED_VERSION = 1  # of what `data_hash` is made of: raised when records mean something else
_QUESTIONS_PER_GROUP = 10_000
# Small groups, so that images can be streamed, and read one by one; few large files, because DVC is slow with many.
_IMAGES_PER_GROUP = 10
_BYTES_PER_GROUP = 64 * 2**20
_BYTES_PER_SHARD = 512 * 2**20


def fetch(data: DataParams, folder: str | Path) -> dict[str, Any]:
    """Read and check the data that `data` names, store them in `folder`, and return their manifest. What stood there
    before is replaced only after everything has been checked and written, the manifest last. UserError if the source is
    not there, its data break the contract (every violation is named), or another process is at work in `folder`."""
    folder = Path(folder)
    busy = f"{folder}: another fetch-vqav2 is writing there. Wait for its end, or end it, then run `dvc repro` again."
    folder.mkdir(parents=True, exist_ok=True)
    # The lock lies beside the folder, which DVC removes before it runs the stage; unfinished records inside, on its disk.
    with (
        claim(folder.with_name(f"{folder.name}.lock"), busy),
        open_source(data, folder) as source,
        scratch(folder / PART) as part,
    ):
        part.mkdir()
        manifest = _store(source, data, part)
        write_sealed(part / records.MANIFEST, manifest)
        # Without its manifest, a folder does not count as records.
        (folder / records.MANIFEST).unlink(missing_ok=True)
        for old in [*folder.glob("questions-*.parquet"), *folder.glob("images-*.parquet")]:
            old.unlink()
        for path in [*sorted(part.glob("*.parquet")), part / records.REPORT, part / records.MANIFEST]:
            publish(path, folder / path.name)
    return manifest


def _store(source: Source, data: DataParams, part: Path) -> dict[str, Any]:
    """Write all Parquet files and the report into `part` and return the manifest."""
    violations, texts, images = _read(source, data, part)
    violations.raise_if_any()
    content = {split: text.digest.hexdigest() for split, text in texts.items()}
    manifest = {
        "schema_version": records.SCHEMA_VERSION,
        "source": source.name,
        "origin": source.origin,
        "notes": list(source.notes),
        "allow_split_overlap": data.allow_split_overlap,
        "data_hash": hash_json({"schema_version": _HASHED_VERSION, "images": images.digest.hexdigest(), **content}),
        "images": images.count,
        "pictures": {
            "changed": dict(sorted(images.changes.items())),
            "twins": dict(zip(texts, images.lookalikes.twins, strict=True)),
            "twins_across": len(images.lookalikes.equal()),
            "alike_across": len(images.alike),
        },
        "splits": {
            split: {
                "questions": text.questions,
                "images": len(text.images),
                "answer_types": dict(text.answer_types),
                "answers_per_question": {str(count): number for count, number in sorted(text.humans.items())},
                "unsaid_answers": len(text.unsaid_answers),
                "asked_in_both": text.asked_in_both,
                "dropped": len(dropped := violations.dropped_records(split)),
                "dropped_records": dropped,
                "inputs": {
                    key: {"name": one.name, "sha256": sha256_file(one)} for key, one in text.paths.inputs.items()
                },
            }
            for split, text in texts.items()
        },
        "files": {path.name: fingerprint(path) for path in sorted(part.iterdir())},
    }
    page = render_report(manifest, texts, images, data.max_image_pixels)
    (part / records.REPORT).write_text(page, encoding="utf-8")
    return manifest


class Inspection(NamedTuple):
    """All that is wrong with the data, and what was read, by split."""

    violations: Violations
    texts: dict[str, Texts]
    images: Images


def inspect_data(data: DataParams, most_images: int | None = None) -> Inspection:
    """Apply the data contract and keep nothing; of the images only the first `most_images`. No source: `UserError`."""
    with tempfile.TemporaryDirectory() as folder, open_source(data, Path(folder) / "records") as source:
        return _read(source, data, Path(folder), most_images, keep=False)


def _read(
    source: Source, data: DataParams, part: Path, most_images: int | None = None, keep: bool = True
) -> Inspection:
    """Check everything, and write it into `part`, images only where they are to be kept."""
    texts: list[Texts] = []
    while not texts:
        violations = Violations(data)
        with suppress(ReadAgain):
            texts = [_store_questions(split, part, violations) for split in source.splits]
    wanted = {row["image_id"] for text in texts for row in text.examples()}
    images = Images(Lookalikes([text.images for text in texts]), wanted)
    with ExitStack() as stack:
        places = dict(islice(_wanted_images(texts, stack, violations).items(), most_images))
        _store_images(places, data.max_image_pixels, part if keep else None, images, violations)
        _check_alike(places, data, images, violations)
    train, val = texts = [_without_bad_images(text, images, part, violations) for text in texts]
    if both := len(train.asked & val.asked):
        log.warning("%d questions stand in both splits, about the same picture", both)
    if not violations and len(val.images) < 2:
        about = f"{val.paths.name}: {val.questions} questions about {len(val.images)} image"
        violations.add(ViolationKind.FEW_VALIDATION, about)
    for text in texts:
        text.asked_in_both, unsaid = both, text.unsaid_answers
        for where in unsaid if data.doubtful is Doubtful.REFUSE else ():
            violations.add(ViolationKind.UNSAID_ANSWER, where)
        if unsaid:
            log.warning("%s: %d main answers that nobody gave, such as %s", text.paths.name, len(unsaid), unsaid[0])
        if dropped := violations.dropped_records(text.paths.split):
            log.warning("%s: %d bad records dropped, such as %s", text.paths.name, len(dropped), dropped[0])
    if not data.allow_split_overlap:
        names = f"{train.paths.name} and {val.paths.name}"
        for image_id in sorted((train.images.keys() & val.images.keys()) - images.conflicts):
            violations.add(ViolationKind.IMAGE_OVERLAP, f"{names}: image_id {image_id}")
        for question_id in sorted(train.question_ids & val.question_ids):
            violations.add(ViolationKind.QUESTION_OVERLAP, f"{names}: question_id {question_id}")
    return Inspection(violations, {text.paths.split: text for text in texts}, images)


def _store_questions(split: Split, part: Path, violations: Violations) -> Texts:
    """Write a split's questions, in their file's order, and return what they are about."""
    texts, violations.split = Texts(split), split.split
    schema = records.question_features().arrow_schema

    def counted() -> Iterator[dict[str, Any]]:
        for where, image_name, row in tqdm(split.rows(violations), f"{split.split} questions", unit="question"):
            texts.images[row["image_id"]] = image_name
            texts.add(row, where)
            yield row

    with pq.ParquetWriter(part / records.questions_file(split.split), schema, compression="zstd") as writer:
        for group in _groups(counted(), _QUESTIONS_PER_GROUP):
            writer.write_table(pa.Table.from_pylist(group, schema))
    violations.settle(split.split, texts.questions)
    return texts


def _without_bad_images(text: Texts, images: Images, part: Path, violations: Violations) -> Texts:
    """Return a split without the questions about dropped images, written anew if there are any."""
    if violations or not (bad := images.bad.keys() & text.images.keys()):
        return text
    earlier = part / "with bad images"
    (part / records.questions_file(text.paths.split)).rename(earlier)

    def rows(violations: Violations) -> Iterator[Row]:
        with pq.ParquetFile(earlier) as file:
            for record in (record for batch in file.iter_batches() for record in batch.to_pylist()):
                where, image_id = f"{text.paths.name}: question_id {record['question_id']}", record["image_id"]
                if image_id in bad:
                    kind, problem = images.bad[image_id]
                    violations.add(kind, f"{where}: {problem}")
                else:
                    yield Row(where, text.images[image_id], record)

    left = _store_questions(replace(text.paths, rows=rows), part, violations)
    left.files_without_questions = text.files_without_questions
    earlier.unlink()
    return left


_Place = tuple[ImageFiles, str]  # where an image is: among which files, and by which name
_Problems = list[tuple[ViolationKind, str]]
_Seen = tuple[dict[str, Any], list[str], Look]  # row of `image_features`, what was changed, and how it looks


def _wanted_images(texts: list[Texts], stack: ExitStack, violations: Violations) -> dict[int, list[_Place]]:
    """Return the places of every image by ascending id: one, or one a split; archives are closed with `stack`."""
    opened: dict[tuple[Path, ...], ImageFiles | None] = {}
    places: dict[int, list[_Place]] = {}
    for text in texts:
        files = opened.get(paths := tuple(text.paths.images))
        try:
            if paths not in opened:
                files = stack.enter_context(ImageFiles(paths))
        except FileNotFoundError as error:
            missing = f"{error.filename}: neither a folder nor a zip archive of images"
            violations.add(ViolationKind.MISSING_FILE, missing)
        except UserError as error:
            violations.add(ViolationKind.OTHER_ARCHIVE, str(error))
        except (OSError, zipfile.BadZipFile) as error:
            named = " or ".join(map(str, paths))
            violations.add(ViolationKind.BROKEN_FILE, f"{named}: not a usable zip archive ({error})")
        opened[paths] = files
        if files is not None:
            text.files_without_questions = files.count - len(text.images)
        for image_id, name in text.images.items():
            found = places.setdefault(image_id, [])
            if files is not None and (place := (files, name)) not in found:
                found.append(place)
    there = [files for files in opened.values() if files is not None]
    for files in there:
        files.others = [other for other in there if other is not files]
    return dict(sorted(places.items()))


def _store_images(
    images: dict[int, list[_Place]], max_pixels: int, part: Path | None, seen: Images, violations: Violations
) -> None:
    """Check every image, count it and store it once, if anywhere."""
    workers = usable_cores().count

    def good(checked: Iterable[_Seen | _Problems]) -> Iterator[dict[str, Any]]:
        """Yield rows up to the first violation, and go on checking."""
        for image_id, found in zip(images, checked, strict=True):
            if isinstance(found, tuple):
                seen.add(*found)
                if not violations:
                    yield found[0]
            elif violations.drops and found and all(kind.of_record for kind, _ in found):
                seen.bad[image_id] = found[0]
            else:
                for kind, text in found:
                    violations.add(kind, text)
                    if kind is ViolationKind.IMAGE_CONFLICT:
                        seen.conflicts.add(image_id)

    with ThreadPoolExecutor(workers) as pool:
        # Pillow decodes without holding the interpreter's lock, so threads are enough.
        checked = ordered_map(pool, partial(_check_image, max_pixels=max_pixels), images.items(), window=4 * workers)
        with tqdm(checked, "images", len(images), unit="image") as progress:
            deque(good(progress), maxlen=0) if part is None else _write_shards(good(progress), part)


def _check_alike(images: dict[int, list[_Place]], data: DataParams, seen: Images, violations: Violations) -> None:
    """Note pictures that both splits have under two ids, and those that only look alike; keep some for the report."""

    def named(image_id: int) -> str:
        files, name = images[image_id][0]
        return f"{files.find(name).where} (image_id {image_id})"

    if not data.allow_split_overlap:
        for first, second in seen.lookalikes.equal():
            violations.add(ViolationKind.IMAGE_TWIN, f"{named(first)} and {named(second)} are byte for byte the same")
    seen.alike = seen.lookalikes.near()
    if seen.alike:
        some = "; ".join(f"{named(first)} and {named(second)}" for first, second in seen.alike[:3])
        log.warning("%d pictures of val look like one of train, a score on them says less: %s", len(seen.alike), some)
    for first, second in seen.alike if data.doubtful is Doubtful.REFUSE else ():
        violations.add(ViolationKind.LOOKALIKE, f"{named(first)} and {named(second)}")
    for image_id in {one for both in seen.alike[:ALIKE_SHOWN] for one in both} if not violations else ():
        files, name = images[image_id][0]
        seen.pictures[image_id] = files.read(name, _most_bytes(data.max_image_pixels))


def _most_bytes(max_pixels: int) -> int:
    """Return what an image's file may have: longer ones are no honest images of that size; the rest is for headers."""
    return 8 * max_pixels + 2**20


def _write_shards(rows: Iterable[dict[str, Any]], part: Path) -> None:
    """Write image rows into files of about `_BYTES_PER_SHARD`, named when their number is known."""
    schema = records.image_features().arrow_schema
    shards: list[Path] = []
    groups = _groups(rows, _IMAGES_PER_GROUP)
    for first in groups:
        shards.append(part / f"{len(shards)}.parquet")
        room = _BYTES_PER_SHARD
        # The bytes are compressed already, and no two are equal.
        with pq.ParquetWriter(shards[-1], schema, compression="none", use_dictionary=False) as writer:
            for group in chain([first], groups):
                table = pa.Table.from_pylist(group, schema)
                writer.write_table(table)
                room -= table.nbytes
                if room <= 0:
                    break
    for index, path in enumerate(shards):
        path.rename(part / records.image_shard(index, len(shards)))


def _groups(rows: Iterable[dict[str, Any]], most_rows: int) -> Iterator[list[dict[str, Any]]]:
    """Cut rows into row groups of `most_rows`, or fewer where images are large."""
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row["image"]["bytes"]) if "image" in row else 0
        if len(group) == most_rows or size >= _BYTES_PER_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _check_image(item: tuple[int, list[_Place]], max_pixels: int) -> _Seen | _Problems:
    """Read and decode an image at each of its places; the first one's bytes are the ones stored."""
    image_id, places = item
    problems: _Problems = []
    seen: list[_Seen] = []
    for files, given in places:
        try:
            data, found = files.read(given, _most_bytes(max_pixels)), files.find(given)
            image = open_image(data, found.where, max_pixels)
        except MissingImage as error:
            where, hint = error.args
            problems.append((ViolationKind.MISSING_IMAGE, f"{where} (image_id {image_id}){hint}"))
        except (UserError, OSError) as error:
            problems.append((ViolationKind.BROKEN_IMAGE, f"{error} (image_id {image_id})"))
        else:
            name, (width, height) = found.path.rpartition("/")[2], image.size
            row = {"image_id": image_id, "file_name": name, "width": width, "height": height}
            more = {"sha256": sha256_bytes(data), "image": {"bytes": data, "path": name}}
            seen.append((row | more, image.info["changes"], look(image)))
    if len({row["sha256"] for row, _, _ in seen}) > 1:
        named = " and ".join(files.find(given).where for files, given in places)
        problems.append((ViolationKind.IMAGE_CONFLICT, f"{named} differ (image_id {image_id})"))
    return seen[0] if seen and not problems else problems
