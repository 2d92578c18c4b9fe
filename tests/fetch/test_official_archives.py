"""Source `official`: from a server that misbehaves come the right records or a named error, and no byte twice."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import threading
import time
import traceback
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from tqdm import tqdm

from proofs.faulty_server import FaultyServer, Request, fetch_command
from vlm_vqa.data import records
from vlm_vqa.errors import UserError
from vlm_vqa.fetch import write_records as fetching
from vlm_vqa.fetch.contract import Violations
from vlm_vqa.fetch.sources import official_archives, official_layout
from vlm_vqa.fetch.sources.official_archives import Download
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import OfficialParams, Source

REPO = Path(__file__).parents[2]
IMAGES, QUESTIONS = "train2014.zip", "v2_Questions_Train_mscoco.zip"
IMAGE = "train2014/COCO_train2014_000000000025.jpg"


def checksum(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def zipped(entries):
    """Return the bytes of a zip archive of [(name or ZipInfo, content)]."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def archives(folder):
    """Return {name: bytes} of the six archives of a folder in official layout."""
    files = {}
    for split in records.SPLITS:
        for title, name in (
            ("Questions", f"v2_OpenEnded_mscoco_{split}2014_questions.json"),
            ("Annotations", f"v2_mscoco_{split}2014_annotations.json"),
        ):
            files[f"v2_{title}_{split.capitalize()}_mscoco.zip"] = zipped([(name, (folder / name).read_bytes())])
        images = [
            (f"{split}2014/{path.name}", path.read_bytes()) for path in sorted((folder / f"{split}2014").iterdir())
        ]
        files[f"{split}2014.zip"] = zipped([(f"{split}2014/", b""), *images])
    return files


@pytest.fixture
def pin(monkeypatch):
    """Return a function that makes the checksums and sizes of some files the right ones."""

    def write(files):
        made = {name: (checksum(data), len(data)) for name, data in files.items()}
        monkeypatch.setattr(official_archives, "ARCHIVES", made)

    return write


@pytest.fixture
def server(vqav2_folder, pin, monkeypatch):
    """A server of six good archives; downloads wait little."""
    quick = official_archives._RETRY.new(backoff_factor=0.001, backoff_max=0.01, retry_after_max=0.01)
    monkeypatch.setattr(official_archives, "_RETRY", quick)
    monkeypatch.setattr(official_archives, "_TIMEOUT", (2.0, 0.3))
    files = archives(vqav2_folder())
    pin(files)
    server = FaultyServer(files)
    yield server
    server.close()


@pytest.fixture
def official_params(directory_params):
    """Return a function that gives the parameters to fetch from a URL."""

    def params(url, keep_archives=True, downloads=3):
        return directory_params(
            "data/vqav2", source=Source.OFFICIAL, official=OfficialParams(url, url, keep_archives, downloads)
        )

    return params


@pytest.fixture
def target(tmp_path):
    return tmp_path / "run" / "records"


def test_the_records_are_those_of_the_unpacked_folder(
    server, official_params, directory_params, vqav2_folder, target, tmp_path
):
    manifest = fetch(official_params(server.url), target)
    unpacked = fetch(directory_params(vqav2_folder("unpacked")), tmp_path / "unpacked-records")
    assert manifest["data_hash"] == unpacked["data_hash"] and manifest["files"] == unpacked["files"]
    assert server.sent == {name: len(data) for name, data in server.files.items()}
    assert manifest["source"] == "official"
    assert manifest["origin"]["archives"] == {name: checksum(data) for name, data in server.files.items()}
    assert manifest["splits"]["train"]["inputs"]["questions"]["name"] == QUESTIONS


def test_official_checksums_are_the_published_ones(vqav2_folder):
    checksums = {name: checksum for name, (checksum, _) in official_archives.ARCHIVES.items()}
    assert checksums.keys() == set(archives(vqav2_folder()))
    assert checksums["train2014.zip"] == "md5:0da8c0bd3d6becc4dcb32757491aca88"
    assert checksums["v2_Annotations_Val_mscoco.zip"].startswith("sha256:0caae7c8d1dafd85")
    lengths = {"md5": 32, "sha256": 64}
    assert all(len(digest) == lengths[name] for name, digest in (one.split(":") for one in checksums.values()))


def test_what_is_there_is_not_fetched_again(server, official_params, target):
    before = fetch(official_params(server.url), target)
    asked = len(server.requests)
    server.close()
    assert fetch(official_params(server.url), target) == before and len(server.requests) == asked


def test_what_has_changed_on_disk_is_fetched_again(server, official_params, target):
    before = fetch(official_params(server.url), target)
    archive = target.parent / "archives" / IMAGES
    data = bytearray(archive.read_bytes())
    data[100] ^= 0xFF
    archive.write_bytes(data)
    assert fetch(official_params(server.url), target) == before and len(server.gets()) == 7


def test_archives_may_be_put_there_by_hand(server, official_params, target):
    folder = target.parent / "archives"
    folder.mkdir(parents=True)
    for name, data in server.files.items():
        (folder / name).write_bytes(data)
    assert fetch(official_params("http://127.0.0.1:9/"), target)["images"] == 6 and not server.requests


def test_archives_go_when_the_records_are_complete(server, official_params, target):
    fetch(official_params(server.url, keep_archives=False), target)
    assert records.read_manifest(target)["images"] == 6 and not list((target.parent / "archives").iterdir())


def test_archives_stay_when_no_records_were_made(server, official_params, target, pin):
    server.files[QUESTIONS] = zipped([("v2_OpenEnded_mscoco_train2014_questions.json", "{")])
    pin(server.files)
    with pytest.raises(UserError, match="v2_Questions_Train_mscoco.zip: not complete JSON"):
        fetch(official_params(server.url, keep_archives=False), target)
    assert (target.parent / "archives" / IMAGES).is_file()


def test_archives_stay_until_the_manifest_is_written(server, official_params, target, monkeypatch):
    monkeypatch.setattr(fetching, "write_sealed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch(official_params(server.url, keep_archives=False), target)
    assert (target.parent / "archives" / IMAGES).is_file()


@pytest.mark.parametrize("fault", ["drop", "stall", 503, 429, 500])
def test_what_passes_is_tried_again_and_goes_on_where_it_stopped(fault, server, official_params, target):
    server.faults[IMAGES] = [fault, fault]
    start = time.monotonic()
    assert fetch(official_params(server.url), target)["images"] == 6
    # A silent server would be silent for a minute.
    assert time.monotonic() - start < 30
    size = len(server.files[IMAGES])
    assert server.sent[IMAGES] == size and len(server.gets(IMAGES)) == 3
    if isinstance(fault, str):
        assert [one.start for one in server.gets(IMAGES)] == [None, size // 2, size // 2 + (size - size // 2) // 2]


@pytest.mark.parametrize(
    ("asked", "seconds"), [("5", 5), ("Mon, 03 Feb 2200 07:28:00 GMT", 60), ("7200", 60), ("soon", 0)]
)
def test_a_server_is_waited_for_as_long_as_it_asks_but_no_longer_than_a_minute(
    asked, seconds, server, official_params, target, monkeypatch
):
    waited, stop = [], threading.Event()
    monkeypatch.setattr(official_archives, "_RETRY", official_archives._RETRY.new(retry_after_max=60))
    monkeypatch.setattr(stop, "wait", waited.append)
    server.retry_after, server.faults[IMAGES] = asked, [503, 503]
    data = server.files[IMAGES]
    task = Download(server.url + IMAGES, target / IMAGES, checksum(data), len(data), "data.official.images_url")
    official_archives._fetch(task, tqdm(disable=True), stop)
    assert (target / IMAGES).read_bytes() == server.files[IMAGES]
    assert waited == [pytest.approx(seconds, abs=0.01)] * 2


def test_a_server_without_ranges_is_asked_for_all_again(server, official_params, target):
    server.ranges, server.faults[IMAGES] = False, ["drop"]
    assert fetch(official_params(server.url), target)["images"] == 6
    size = len(server.files[IMAGES])
    assert server.sent[IMAGES] == size // 2 + size


def test_a_server_without_ranges_that_always_drops_is_given_up(server, official_params, target):
    server.ranges, server.always[IMAGES] = False, "drop"
    with pytest.raises(UserError, match="train2014.zip: failed 8 times in a row .*go on where it stopped.*images_url"):
        fetch(official_params(server.url), target)
    # Only the first brought something new, though each brought half.
    assert len(server.gets(IMAGES)) == 8


def test_wrong_bytes_are_fetched_once_more(server, official_params, target):
    server.faults[IMAGES] = ["wrong"]
    assert fetch(official_params(server.url), target)["images"] == 6
    assert [one.start for one in server.gets(IMAGES)] == [None, None]


def test_wrong_bytes_twice_are_named(server, official_params, target):
    server.always[IMAGES] = "wrong"
    with pytest.raises(
        UserError, match=r"train2014.zip: has checksum sha256:\w+ instead of .*twice.*data.official.images"
    ):
        fetch(official_params(server.url), target)
    assert len(server.gets(IMAGES)) == 2
    assert (
        not list((target.parent / "archives").glob("train2014.zip.part")) and not (target / records.MANIFEST).exists()
    )


@pytest.mark.parametrize("status", [403, 404])
def test_a_wrong_address_ends_at_once(status, server, official_params, target):
    server.always[QUESTIONS] = status
    match = rf"{server.url}{QUESTIONS}: the server answers {status} .*Correct data.official.texts_url"
    with pytest.raises(UserError, match=match):
        fetch(official_params(server.url), target)
    assert server.gets(QUESTIONS) == [Request("GET", QUESTIONS, None)]


def test_a_server_that_stays_busy_is_given_up(server, official_params, target):
    server.always[IMAGES] = 503
    with pytest.raises(UserError, match="train2014.zip: failed 8 times in a row .*503"):
        fetch(official_params(server.url), target)
    assert len(server.gets(IMAGES)) == 8 and not server.sent[IMAGES]


@pytest.mark.parametrize(
    ("url", "expected"),
    [("http://127.0.0.1:9/", "failed 8 times"), ("ftp://x/", "cannot be fetched"), ("nonsense", "cannot be fetched")],
)
def test_no_server_is_named(url, expected, server, official_params, target):
    with pytest.raises(UserError, match=rf"\w+.zip: {expected}(.|\n)*data.official.\w+_url"):
        fetch(official_params(url), target)


def test_a_failure_stops_the_others_and_their_bytes_are_kept(server, official_params, target):
    server.faults[IMAGES], server.faults["val2014.zip"] = [404], ["stall"]
    with pytest.raises(UserError, match="404"):
        fetch(official_params(server.url, downloads=6), target)
    # Its stall was not waited out and gone on from.
    assert not (target.parent / "archives" / "val2014.zip").exists()
    assert fetch(official_params(server.url), target)["images"] == 6
    assert server.sent["val2014.zip"] == len(server.files["val2014.zip"])


def test_a_file_that_changed_between_the_tries_is_begun_again(server, official_params, target, pin):
    old = server.files[IMAGES]
    server.faults[IMAGES] = ["drop", 404]
    with pytest.raises(UserError, match="404"):
        fetch(official_params(server.url), target)
    with zipfile.ZipFile(BytesIO(old)) as archive:
        server.files[IMAGES] = zipped([(info, archive.read(info)) for info in reversed(archive.infolist())])
    pin(server.files)
    server.requests.clear()
    assert fetch(official_params(server.url), target)["images"] == 6
    assert [one.start for one in server.gets(IMAGES)] == [len(old) // 2, None]


def test_bytes_of_another_address_are_gone_on_with(server, official_params, target):
    server.faults[IMAGES] = ["drop", 404]
    with pytest.raises(UserError, match="404"):
        fetch(official_params(server.url), target)
    server.requests.clear()
    fetch(official_params(server.url + "mirror/"), target)
    assert [one.start for one in server.gets(IMAGES)] == [len(server.files[IMAGES]) // 2]


def test_a_part_longer_than_the_file_is_thrown_away(server, official_params, target):
    server.faults[IMAGES] = ["drop", 404]
    with pytest.raises(UserError, match="404"):
        fetch(official_params(server.url), target)
    with open(target.parent / "archives" / f"{IMAGES}.part", "ab") as file:
        file.write(bytes(len(server.files[IMAGES])))
    assert fetch(official_params(server.url), target)["images"] == 6


def test_a_part_that_is_whole_is_not_asked_for_again(server, official_params, target, monkeypatch):
    with monkeypatch.context() as patch:
        # As if killed between the last byte and what comes after it.
        patch.setattr(official_archives, "_checksum", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(official_params(server.url, downloads=1), target)
    fetch(official_params(server.url), target)
    assert len(server.gets()) == 6


def test_a_disk_too_small_is_named_before_the_first_byte(server, official_params, target, monkeypatch):
    total = sum(map(len, server.files.values()))
    usage = type("Usage", (), {"free": 2 * total - 1})
    monkeypatch.setattr(official_archives.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"run: .* GB are needed .*for archives, .*for records\), but .* GB are free"):
        fetch(official_params(server.url), target)
    assert not server.gets()
    # What is there need not come again.
    usage.free = 2 * total
    fetch(official_params(server.url), target)
    usage.free = total
    fetch(official_params(server.url), target)


def test_a_proxy_is_asked(server, official_params, target, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fetch(official_params("http://vqa.invalid/files"), target)["images"] == 6


# --- secrets: "sesame" is all of them -----------------------------------------------------------------------------------

SECRET = "sesame"


def with_login(url):
    return url.replace("//", f"//me:{SECRET}@")


def everything(caught, caplog, folder):
    """Return all that a fetch has said and left: the error with its causes, log lines, files."""
    said = "".join(traceback.format_exception(caught.value)) if caught else ""
    left = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".zip")
    return said + caplog.text + left.decode(errors="replace")


@pytest.mark.parametrize("fault", [404, 503, "wrong", "drop", None])
def test_a_password_in_the_address_is_shown_nowhere(fault, server, official_params, target, caplog):
    """Parameter files are refused with one; who builds the parameters himself is no worse off."""
    caplog.set_level("DEBUG")
    server.faults[IMAGES] = ["drop"]
    if fault is not None:
        server.always[IMAGES] = fault
        server.ranges = fault != "drop"
    caught = None
    if fault is None:
        fetch(official_params(with_login(server.url)), target)
    else:
        with pytest.raises(UserError, match=f"{server.url}{IMAGES}") as caught:
            fetch(official_params(with_login(server.url)), target)
    shown = everything(caught, caplog, target.parent)
    assert SECRET not in shown and IMAGES in shown
    # It is sent, though.
    assert server.authorizations == {f"Basic {base64.b64encode(f'me:{SECRET}'.encode()).decode()}"}


def test_another_password_goes_on_with_the_same_part(server, official_params, target):
    server.faults[IMAGES] = ["drop", 410]
    with pytest.raises(UserError, match="410"):
        fetch(official_params(with_login(server.url), downloads=1), target)
    fetch(official_params(server.url), target)
    assert server.gets(IMAGES)[-1].start == len(server.files[IMAGES]) // 2


@pytest.mark.parametrize("host", ["127.0.0.1:9", "vqa.invalid"])
def test_the_signed_link_that_a_mirror_redirects_to_is_shown_nowhere(host, server, official_params, target, caplog):
    server.always[IMAGES] = f"http://me:{SECRET}@{host}/{IMAGES}?X-Amz-Signature={SECRET}&sig={SECRET}"
    with pytest.raises(UserError, match="failed 8 times in a row") as caught:
        fetch(official_params(server.url), target)
    assert SECRET not in everything(caught, caplog, target.parent)


@pytest.mark.parametrize(
    "proxy", ["http://me:sesame@127.0.0.1:9", "me:sesame@127.0.0.1:9", "me:sesame@proxy:port", "socks9://me:ses/ame@h"]
)
@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy", "HTTP_PROXY"])
def test_a_proxy_s_password_is_shown_nowhere(variable, proxy, server, official_params, target, caplog, monkeypatch):
    for name in ("http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv(variable, proxy)
    with pytest.raises(UserError) as caught:
        fetch(official_params("http://vqa.invalid/files"), target)
    shown = everything(caught, caplog, target.parent)
    assert SECRET not in shown and "ses/ame" not in shown


def test_a_login_is_read_from_netrc(server, official_params, target, tmp_path, monkeypatch):
    """What a parameter file with a login is told to do instead."""
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert fetch(official_params(server.url), target)["images"] == 6
    assert server.authorizations == {f"Basic {base64.b64encode(f'me:{SECRET}'.encode()).decode()}"}


def symlink(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


GOOD = "train2014/COCO_train2014_{:012d}.jpg"
STRANGE = {
    "climbs": ([("train2014/../../evil.jpg", b"x")], r"would leave the archive's folder: 'train2014/../../evil.jpg'"),
    "absolute": ([("/etc/passwd", b"x")], r"would leave the archive's folder: '/etc/passwd'"),
    "drive": ([("C:evil.jpg", b"x")], r"would leave the archive's folder: 'C:evil.jpg'"),
    "backslash": ([("train2014\\..\\evil.jpg", b"x")], r"would leave the archive's folder: 'train2014"),
    "link": (
        [(symlink(GOOD.format(1)), b"/etc")],
        r"are links or devices: 'train2014/COCO_train2014_000000000001.jpg'",
    ),
    "twice": ([(GOOD.format(1), b"x"), (GOOD.format(1), b"y")], r"stand there more than once: '.*0001.jpg'"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", STRANGE)
def test_archives_with_strange_entries_are_refused_by_name(case, server, official_params, target, pin):
    entries, expected = STRANGE[case]
    server.files[IMAGES] = zipped(entries)
    pin(server.files)
    with pytest.raises(UserError, match=rf"archives/train2014.zip: not a usable zip archive .*{expected}"):
        fetch(official_params(server.url), target)
    assert not (target / records.MANIFEST).exists() and not list(target.parent.rglob("evil*"))


def test_entries_that_share_their_bytes_are_refused(server, official_params, target, pin):
    data = bytearray(server.files[IMAGES])
    # The second picture's entry in the directory points at the first one's bytes.
    first, second = (data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + skip) for skip in (4, 110))
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    server.files[IMAGES] = bytes(data)
    pin(server.files)
    with pytest.raises(UserError, match="share their bytes with others: 'train2014/COCO"):
        fetch(official_params(server.url), target)


@pytest.mark.parametrize("keep", [10, 0.5, 0.99])
def test_archives_cut_short_are_refused_by_name(keep, server, official_params, target, pin):
    data = server.files[IMAGES]
    server.files[IMAGES] = data[: int(keep * len(data) if keep < 1 else keep)]
    pin(server.files)
    with pytest.raises(UserError, match="train2014.zip: not a usable zip archive"):
        fetch(official_params(server.url), target)


def test_texts_that_unpack_to_too_much_are_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / QUESTIONS
    path.write_bytes(zipped([("questions.json", b'{"questions": [' + bytes(10_000) + b"]}")]))
    monkeypatch.setattr(official_layout, "MOST_BYTES", 10_000)
    violations = Violations()
    assert official_layout.read_json(path, violations) is None
    with pytest.raises(UserError, match="it unpacks to more than 10,000 bytes"):
        violations.raise_if_any()


def test_a_mirror_that_sends_a_byte_now_and_then_is_given_up(server, official_params, target, monkeypatch):
    """Every byte is progress, so without a least rate it would be asked for ever."""
    monkeypatch.setattr(official_archives, "_WINDOW", 0.1)
    server.always[IMAGES] = "drip"
    with pytest.raises(
        UserError, match="train2014.zip: failed 8 times in a row .less than 1024 bytes a second over 0 s"
    ):
        fetch(official_params(server.url), target)
    assert len(server.gets(IMAGES)) == 8


def test_a_page_in_a_file_s_place_is_another_file(server, official_params, target):
    server.files[IMAGES] = b"<html>Please log in.</html>"
    with pytest.raises(UserError, match="train2014.zip: sends 27 bytes instead of .*Correct data.official.images_url"):
        fetch(official_params(server.url), target)
    assert len(server.gets(IMAGES)) == 1


def test_a_mirror_without_end_is_ended(server, official_params, target):
    server.always[IMAGES] = "endless"
    with pytest.raises(UserError, match="train2014.zip: sends more than .* bytes: another file"):
        fetch(official_params(server.url), target)
    assert len(server.gets(IMAGES)) == 1 and not list(target.parent.glob("archives/train2014.zip"))


@pytest.mark.parametrize("name", [QUESTIONS, IMAGES])
def test_an_entry_longer_than_it_says_is_refused(name, server, official_params, target, pin):
    """The real size counts as the declared one does: what comes after it is not unpacked, and its checksum is missed."""
    data = bytearray(server.files[name])
    entry = data.rindex(b"PK\x01\x02")
    size = int.from_bytes(data[entry + 24 : entry + 28], "little")
    data[entry + 24 : entry + 28] = (size - 10).to_bytes(4, "little")
    server.files[name] = bytes(data)
    pin(server.files)
    with pytest.raises(UserError, match=rf"{name}: .*Bad CRC-32"):
        fetch(official_params(server.url), target)


def test_a_zip_of_texts_holds_one_file(tmp_path):
    path = tmp_path / QUESTIONS
    path.write_bytes(zipped([("a.json", b"{}"), ("b.json", b"{}"), ("__MACOSX/._a.json", b"")]))
    violations = Violations()
    assert official_layout.read_json(path, violations) is None
    with pytest.raises(UserError, match="the archive holds 2 files instead of one: 'a.json', 'b.json'"):
        violations.raise_if_any()


class Stage:
    """The real stage in a process of its own, in a folder with params.yaml."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        self.records, self.archives = folder / "data" / "records", folder / "data" / "archives"
        folder.mkdir()
        params = yaml.safe_load((REPO / "presets/small.yaml").read_text())
        urls = {"texts_url": server.url, "images_url": server.url, "keep_archives": True, "downloads": 3}
        params["data"] |= {"source": "official", "official": urls}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        (folder / "launch").symlink_to(REPO / "launch")
        checksums = {name: (checksum(data), len(data)) for name, data in server.files.items()}
        (folder / "checksums.json").write_text(json.dumps(checksums))

    def start(self):
        environment = {**os.environ, "PYTHONPATH": f"{REPO / 'src'}:{REPO}"}
        command = fetch_command(self.folder / "checksums.json")
        return subprocess.Popen(command, cwd=self.folder, env=environment, stderr=subprocess.DEVNULL)

    def run(self):
        assert self.start().wait(timeout=120) == 0

    def kill_when(self, condition, seconds=120):
        """Start, and kill without a warning as soon as `condition` holds, which it does within `seconds`."""
        process = self.start()
        end = time.monotonic() + seconds
        while not condition():
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                pytest.fail("the moment to kill the stage did not come")
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


@pytest.fixture
def unbroken(server, tmp_path):
    """The files of an unbroken run's records, by name."""
    stage = Stage(tmp_path / "unbroken", server)
    stage.run()
    server.requests.clear()
    server.sent.clear()
    return {path.name: path.read_bytes() for path in stage.records.iterdir()}


@pytest.mark.slow
def test_killed_in_mid_download_it_goes_on_and_ends_the_same(server, unbroken, tmp_path):
    stage = Stage(tmp_path / "killed", server)
    server.faults[IMAGES] = ["stall"]
    half, part = len(server.files[IMAGES]) // 2, stage.archives / f"{IMAGES}.part"
    others = [name for name in server.files if name != IMAGES]
    # Sooner than the stage notices that nothing more comes: the bytes were on disk before that.
    stage.kill_when(
        lambda: (
            part.is_file() and part.stat().st_size == half and all((stage.archives / name).is_file() for name in others)
        ),
        seconds=28,
    )
    stage.run()
    assert {path.name: path.read_bytes() for path in stage.records.iterdir()} == unbroken
    assert [one.start for one in server.gets(IMAGES)] == [None, half]
    assert server.sent == {name: len(data) for name, data in server.files.items()}


@pytest.mark.slow
def test_killed_in_mid_conversion_it_fetches_nothing_and_ends_the_same(server, vqav2_folder, pin, tmp_path):
    server.files = archives(vqav2_folder("large", train_images=4000))
    pin(server.files)
    whole = Stage(tmp_path / "whole", server)
    whole.run()
    stage = Stage(tmp_path / "killed", server)
    stage.kill_when(lambda: ((stage.records / ".part") / "0.parquet").is_file())
    assert not (stage.records / records.MANIFEST).exists()
    server.requests.clear()
    stage.run()
    assert not server.requests
    made, unbroken = ({path.name: path.read_bytes() for path in one.records.iterdir()} for one in (stage, whole))
    assert made == unbroken and len(list(records.iter_images(stage.records))) == 4002
    assert not (stage.records / ".part").exists()
