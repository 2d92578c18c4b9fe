"""The stage extract-features: stored features are the live encoder's whoever makes them, and a run that was ended goes on.

`live` is the plain way to the features: one image after another, on one thread. `stock` is transformers' own.
"""

import csv
import functools
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import load_image

from stages import extract_features
from tests.sealing import seal_records
from vlm_vqa import workers
from vlm_vqa.cores import Threads
from vlm_vqa.data import records
from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.feature_store import FeatureStore, Layout
from vlm_vqa.errors import UserError
from vlm_vqa.features import extract
from vlm_vqa.model.encoder import SMALL_ENCODER, Encoder, load_encoder
from vlm_vqa.params import load_params

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = Path(os.environ.get("VLM_VQA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
BATCH = 4
ONE = Threads(1, "1 core / 1 process")
SMALL_SHARDS = """
import functools, sys, time
from stages import extract_features as it
from vlm_vqa.pipeline import entrypoint
images, seconds = int(sys.argv[1]), float(sys.argv[2])
it.Layout = functools.partial(it.Layout, shard_bytes=images * 65 * 128 * 4)
write = it.FeatureStoreWriter.write
it.FeatureStoreWriter.write = lambda *given: (time.sleep(seconds), write(*given))
entrypoint.run("extract-features", it.main)
"""
"""The stage with some images a shard, each of which takes some seconds more to write."""


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_jpeg(image: Image.Image) -> bytes:
    return saved(image, "JPEG")


def write_records(images: dict[int, bytes]) -> None:
    """The part of `data/records` that this stage reads, in the format of `vlm_vqa.data.records`."""
    folder = Path("data/records")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for image_id, data in sorted(images.items()):
        row = {"image_id": image_id, "file_name": f"{image_id}.jpg", "width": 1, "height": 1, "sha256": ""}
        rows.append({**row, "image": {"bytes": data, "path": None}})
    table = datasets.Dataset.from_list(rows, features=records.image_features()).data.table
    pq.write_table(table, folder / "images-00000-of-00001.parquet", row_group_size=3)
    seal_records(folder, data_hash="d" * 64, images=len(images))


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A working directory with the launches, the small preset's params and batches of four images."""
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch")
    params = yaml.safe_load((REPOSITORY / "presets" / "small.yaml").read_text())
    params["vision"]["batch_size"] = BATCH
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_vision(folder: Path, **values: object) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["vision"].update(values)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def noise(count: int) -> dict[int, bytes]:
    generator = np.random.default_rng(0)
    sizes = [(17, 90), (64, 64), (101, 33)]
    images = {}
    for number in range(count):
        pixels = generator.integers(0, 256, (*sizes[number % 3], 3), dtype=np.uint8)
        images[10 * number + 1] = as_jpeg(Image.fromarray(pixels))
    return images


def live(images: dict[int, bytes]) -> torch.Tensor:
    encoder = load_encoder(load_params("params.yaml").vision, "cpu")
    opened = [open_image(data, str(image_id), 10**8) for image_id, data in sorted(images.items())]
    return torch.cat([encoder.encode(opened[start : start + BATCH]) for start in range(0, len(opened), BATCH)])


def stock(files: list[bytes]) -> torch.Tensor:
    """What transformers makes of files by its own means, without a line of ours."""
    processor, model = AutoImageProcessor.from_pretrained(SMALL_ENCODER), AutoModel.from_pretrained(SMALL_ENCODER)
    found = []
    for start in range(0, len(files), BATCH):
        images = [load_image(Image.open(io.BytesIO(data))) for data in files[start : start + BATCH]]
        with torch.no_grad():
            found.append(model(**processor(images=images, return_tensors="pt")).last_hidden_state)
    return torch.cat(found)


def stored_bytes() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path("data/features").iterdir())}


def launched(launch: str, images: int, seconds: float = 0.0) -> subprocess.Popen:
    """Start the stage as dvc.yaml does, with small shards."""
    Path("small_shards.py").write_text(SMALL_SHARDS)
    command = f"accelerate launch --quiet --config_file launch/{launch}.yaml small_shards.py {images} {seconds}"
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
             "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}"}  # fmt: skip
    return subprocess.Popen(
        command.split(), env={**os.environ, **paths}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture
def three_threads(monkeypatch):
    """Three decoding threads, whatever the machine has."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.fixture(params=["threads", "processes"])
def decoders(request, three_threads, monkeypatch):
    """What is alive of three decoding threads, or processes, as there are where the encoder is on a GPU."""
    monkeypatch.setattr(extract, "in_processes", lambda _: request.param == "processes")
    return multiprocessing.active_children if request.param == "processes" else decoding_threads


def encoder_that(preprocess: Callable[[list[Image.Image]], torch.Tensor]) -> SimpleNamespace:
    return SimpleNamespace(preprocess=preprocess, model=SimpleNamespace(device=torch.device("cpu")))


def first_pixels(images: list[Image.Image]) -> torch.Tensor:
    return torch.tensor([image.getpixel((0, 0))[0] for image in images])


def shades(count: int) -> Iterator[records.ImageRecord]:
    """Images whose every pixel is their id."""
    for shade in range(count):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (shade,) * 3).save(file, "PNG")
        yield records.ImageRecord(shade, f"{shade}.png", file.getvalue())


def batches_of(images: Iterable[records.ImageRecord]) -> Iterator[extract.Batch]:
    images = iter(images)
    while batch := list(itertools.islice(images, BATCH)):
        yield 0, batch


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_stored_features_are_the_live_encoders_bit_for_bit(run_folder, decoders):
    images = noise(10)
    write_records(images)
    extract_features.main()
    store = FeatureStore("data/features")
    assert torch.equal(store.batch(sorted(images)), live(images))
    encoder = load_encoder(load_params("params.yaml").vision, "cpu")
    expected = {"encoder_hash": encoder.hash, "data_hash": "d" * 64, "dtype": "float32", "num_tokens": 65, "width": 128}
    FeatureStore("data/features", expected)
    assert store.manifest["processor"]["image_processor_type"] == "BitImageProcessor"
    assert store.manifest["processor"]["backend"] == "torchvision"

    before = stored_bytes()
    extract_features.main()
    assert stored_bytes() == before
    assert not list(Path("data").glob("features.parts"))


def test_store_dtype_rounds_the_live_features(run_folder):
    set_vision(run_folder, store_dtype="bfloat16")
    images = noise(3)
    write_records(images)
    extract_features.main()
    store = FeatureStore("data/features", {"dtype": "bfloat16"})
    assert torch.equal(store.batch(sorted(images)), live(images).to(torch.bfloat16))


def test_real_photographs_become_the_stock_paths_features(run_folder):
    sample = SHARED_DATA / "vqav2-sample"
    if not sample.is_dir():
        pytest.skip(f"no VQAv2 sample in {sample}; set VLM_VQA_SHARED_DATA")
    with open(sample / "images.csv", newline="") as file:
        images = {int(row["image_id"]): (sample / row["file"]).read_bytes() for row in csv.DictReader(file)}
    assert len(images) == 75
    # COCO has greyscale files, this sample of it has none.
    images[1] = as_jpeg(Image.open(io.BytesIO(next(iter(images.values())))).convert("L"))
    write_records(images)
    extract_features.main()
    store = FeatureStore("data/features")
    assert len(store) == len(images) == 76
    features = store.batch(sorted(images))
    assert torch.equal(features, stock([data for _, data in sorted(images.items())]))


def test_odd_images_become_the_stock_paths_features(run_folder):
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    files = [
        saved(image.convert("L"), "JPEG"),
        saved(image.convert("CMYK"), "JPEG"),
        saved(image.convert("P"), "PNG"),
        saved(image.convert("RGBA"), "PNG"),
        saved(image.convert("LA"), "PNG"),
        saved(image.crop((0, 0, 1, 40)), "JPEG"),
        saved(image.crop((0, 0, 1, 1)), "PNG"),
        saved(image.resize((5000, 1)), "PNG"),
        saved(Image.new("1", (6000, 6000)), "PNG"),
    ]
    write_records(dict(enumerate(files)))
    extract_features.main()
    assert torch.equal(FeatureStore("data/features").batch(range(len(files))), stock(files))


def test_a_photo_is_seen_upright(run_folder):
    """As people and transformers' `load_image` see it; its processor alone would leave it on its side."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    turned = saved(Image.fromarray(pixels), "PNG", exif=orientation)
    upright = saved(Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_270), "PNG")
    write_records({1: turned, 2: upright})
    extract_features.main()
    features = FeatureStore("data/features").batch([1, 2])
    assert torch.equal(features, stock([turned, upright])) and torch.equal(features[0], features[1])
    assert not torch.equal(features[:1], stock([saved(Image.fromarray(pixels), "PNG")]))


def test_an_enormous_image_is_refused_by_name_before_it_is_decoded(run_folder, monkeypatch):
    def load(image):
        assert image.size != (8000, 8000), "it was decoded"

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    write_records({**noise(3), 99: saved(Image.new("1", (8000, 8000)), "PNG")})
    with pytest.raises(UserError, match=r"99.jpg: 8000 x 8000 is more than data.max_image_pixels \(50000000\)"):
        extract_features.main()


def test_a_batch_never_reaches_beyond_its_shard(run_folder, monkeypatch):
    monkeypatch.setattr(extract_features, "Layout", functools.partial(Layout, shard_bytes=6 * 65 * 128 * 4))
    sizes = []
    encode = Encoder.encode_pixels
    monkeypatch.setattr(
        Encoder, "encode_pixels", lambda self, pixels: (sizes.append(len(pixels)), encode(self, pixels))[1]
    )
    images = noise(15)
    write_records(images)
    extract_features.main()
    assert sizes == [4, 2, 4, 2, 3]
    store = FeatureStore("data/features")
    assert [entry["images"] for entry in store.manifest["shards"]] == [6, 6, 3]
    torch.testing.assert_close(store.batch(sorted(images)), live(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_any_number_of_processes_write_the_same_bytes(run_folder, monkeypatch):
    write_records(noise(41))
    with monkeypatch.context() as patch:
        patch.setattr(extract_features, "Layout", functools.partial(Layout, shard_bytes=6 * 65 * 128 * 4))
        extract_features.main()
    found = [stored_bytes()]
    three = yaml.safe_load(Path("launch/cpu-ddp.yaml").read_text()) | {"num_processes": 3}
    Path("launch/cpu-three.yaml").write_text(yaml.safe_dump(three))
    for launch in ("cpu-ddp", "cpu-three"):
        shutil.rmtree("data/features")
        set_vision(run_folder, launch=launch)
        process = launched(launch, images=6)
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
        assert "extract-features: 100%" in errors and "41/41" in errors
        found.append(stored_bytes())
    assert len(found[0]) == 8
    assert found[1] == found[0] and found[2] == found[0]


@pytest.mark.slow
def test_a_killed_launch_goes_on_with_any_number_of_processes(run_folder, monkeypatch):
    write_records(noise(24))
    set_vision(run_folder, launch="cpu-ddp")
    process = launched("cpu-ddp", images=2, seconds=0.5)
    deadline = time.monotonic() + 120
    while len(finished := list(Path("data").glob("features.parts/*/features-*.json"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path.with_suffix(".safetensors").name: path.with_suffix(".safetensors").stat().st_ino for path in finished}
    assert not Path("data/features/manifest.json").exists()

    shutil.rmtree("data/features")
    set_vision(run_folder, launch="cpu")
    process = launched("cpu", images=2)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "of 12 shards" in errors, errors
    assert {name: (Path("data/features") / name).stat().st_ino for name in kept} == kept, (
        "a finished shard was made again"
    )
    resumed = stored_bytes()
    monkeypatch.setattr(extract_features, "Layout", functools.partial(Layout, shard_bytes=2 * 65 * 128 * 4))
    extract_features.main()
    assert stored_bytes() == resumed


@pytest.mark.parametrize(
    ("launch", "world", "message"),
    [
        (
            "cpu-fsdp2",
            2,
            "vision.launch is 'cpu-fsdp2', which divides a model.*Set vision.launch to cpu, cpu-ddp or ddp",
        ),
        ("zero3", 4, "divides a model"),
        ("nowhere", 1, "there is no launch/nowhere.yaml. Known launches: .*cpu-ddp"),
        ("cpu-ddp", 1, "asks for num_processes 2, but 1 started.*dvc repro extract-features"),
        ("cpu", 2, "asks for num_processes 1, but 2 started"),
        ("two-machines", 2, "divides a model or spans machines"),
        ("ddp", 4, "asks for GPUs 4, but 0 started"),
    ],
)
def test_a_launch_that_is_not_the_one_asked_for_stops(run_folder, monkeypatch, launch, world, message):
    two = yaml.safe_load(Path("launch/cpu-ddp.yaml").read_text()) | {"num_machines": 2}
    Path("launch/two-machines.yaml").write_text(yaml.safe_dump(two))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=message):
        workers.join(launch)


def test_processes_share_the_shards_among_them():
    store = torch.distributed.HashStore()
    one, other = (
        workers.WorkerGroup(rank, 2, torch.device("cpu"), store, ONE).claim([3, 4, 7, 8, 9]) for rank in (0, 1)
    )
    taken = [next(one), next(other), next(other), next(one)]
    assert taken + list(one) + list(other) == [3, 4, 7, 8, 9]


def test_threads_are_the_user_s_and_the_stage_says_so(run_folder, monkeypatch, caplog):
    write_records(noise(3))
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr("vlm_vqa.cores.waits", lambda: {"7": (100, 400)})
    try:
        with caplog.at_level("INFO"):
            extract_features.main()
        assert torch.get_num_threads() == 3 and ", threads 3 (OMP_NUM_THREADS" in caplog.text
        assert caplog.text.count("the machine is busy: this process gets 20%") == 1
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(UserError, match="OMP_NUM_THREADS is 'many'"):
        extract_features.main()


def test_a_process_that_does_not_come_stops_the_others(run_folder, monkeypatch):
    monkeypatch.setattr(workers, "JOIN_SECONDS", 0.5)
    alone = iter([(torch.distributed.HashStore(), 0, 2)])
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="asks for num_processes 2, but 1 started"):
        workers.join("cpu-ddp")


def test_a_bad_image_is_named_and_leaves_no_store(run_folder):
    images = noise(9)
    images[81] = images[81][: len(images[81]) // 2]
    write_records(images)
    with pytest.raises(UserError, match="81.jpg"):
        extract_features.main()
    with pytest.raises(UserError, match="data/features/manifest.json: cannot be read"):
        FeatureStore("data/features")


def test_batches_come_in_order_when_later_ones_are_ready_first(three_threads):
    second_is_ready = threading.Event()

    def preprocess(images: list[Image.Image]) -> torch.Tensor:
        pixels = first_pixels(images)
        if pixels[0] == 0:
            assert second_is_ready.wait(10), "nothing is decoded beside the first batch"
        second_is_ready.set()
        return pixels

    batches = list(extract.preprocessed(batches_of(shades(10)), encoder_that(preprocess), 100))
    assert [image_ids for _, image_ids, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(image_ids == pixels.tolist() for _, image_ids, pixels in batches)
    assert not decoding_threads()


def test_the_next_batches_are_decoded_while_one_is_looked_at_and_no_more(three_threads):
    taken, decoded = [], threading.Semaphore(0)

    def stream() -> Iterator[records.ImageRecord]:
        for record in shades(200):
            taken.append(record.image_id)
            yield record

    def preprocess(images: list[Image.Image]) -> torch.Tensor:
        decoded.release()
        return first_pixels(images)

    with closing(extract.preprocessed(batches_of(stream()), encoder_that(preprocess), 100)) as batches:
        for number, _ in enumerate(batches, 1):
            # This batch, and as many as there are threads.
            assert len(taken) == min(200, (number + 3) * BATCH)
            if number == 1:
                assert all(decoded.acquire(timeout=10) for _ in range(4)), "nothing is decoded ahead"


def test_decoders_end_when_the_work_is_left_early(decoders):
    with pytest.raises(KeyboardInterrupt):
        with closing(extract.preprocessed(batches_of(shades(200)), encoder_that(first_pixels), 100)) as batches:
            next(batches)
            assert decoders()
            raise KeyboardInterrupt
    assert not decoders()


def test_a_decoding_process_that_is_killed_is_told(three_threads, monkeypatch):
    monkeypatch.setattr(extract, "in_processes", lambda _: True)
    batches = extract.preprocessed(batches_of(shades(200)), encoder_that(first_pixels), 100)
    next(batches)
    children = multiprocessing.active_children()
    # Killed is not yet dead: what is decoded until then comes out as if nothing had been.
    for child in children:
        child.kill()
        assert wait([child.sentinel], 10)
    assert len(children) == 3
    with pytest.raises(UserError, match="process that decodes pictures was ended from outside.*--shm-size.*are kept"):
        list(batches)
    assert not multiprocessing.active_children()


def test_decoding_processes_end_with_a_stage_that_is_killed(tmp_path):
    program = f"""
import sys, time, types, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_extract_features import batches_of, encoder_that, extract, first_pixels, multiprocessing, shades
extract.in_processes = lambda _: True
torch.get_num_threads = lambda: 3
next(batches := extract.preprocessed(batches_of(shades(200)), encoder_that(first_pixels), 100))
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as stage:
        assert stage.stdout is not None
        children = [psutil.Process(int(pid)) for pid in stage.stdout.readline().split()]
        stage.kill()
    assert len(children) == 3 and not psutil.wait_procs(children, timeout=10)[1]


def test_pictures_are_decoded_in_processes_for_a_gpu_that_has_shared_memory_beside_it(monkeypatch, caplog):
    on = {kind: SimpleNamespace(model=SimpleNamespace(device=torch.device(kind))) for kind in ("cpu", "cuda")}
    sizes = SimpleNamespace(free=2 * extract.ENOUGH_SHARED_MEMORY)
    monkeypatch.setattr(extract.shutil, "disk_usage", lambda _: sizes)
    assert extract.in_processes(on["cuda"]) and not extract.in_processes(on["cpu"])
    sizes.free = 64 << 20
    assert not extract.in_processes(on["cuda"])
    assert "/dev/shm has 64 MiB free: pictures are decoded by threads, slower" in caplog.text


@pytest.mark.parametrize("position", [0, 5, 37, 39])
def test_a_bad_image_is_named_in_its_turn_and_the_decoders_end(decoders, position):
    images = list(shades(40))
    images[position] = images[position]._replace(data=b"no image")
    seen = []
    with pytest.raises(UserError, match=f"^{position}.png: not a readable image"):
        for _, image_ids, _ in extract.preprocessed(batches_of(images), encoder_that(first_pixels), 100):
            seen += image_ids
    assert seen == list(range(position // BATCH * BATCH))
    assert not decoders()


def test_decoding_threads_take_one_core_and_leave_the_encoder_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found = []

    def preprocess(images: list[Image.Image]) -> torch.Tensor:
        found.append(torch.get_num_threads())
        return first_pixels(images)

    try:
        list(extract.preprocessed(batches_of(shades(8)), encoder_that(preprocess), 100))
        assert found == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_missing_records_are_named(run_folder):
    with pytest.raises(UserError, match="data/records/manifest.json"):
        extract_features.main()
