"""What is stored is found as it was written, or named."""

import errno
import os
import random

import pytest

from vlm_vqa import files, sealed
from vlm_vqa.data.feature_store import Layout
from vlm_vqa.errors import UserError
from vlm_vqa.features.writer import FeatureStoreWriter
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import StoreDtype
from vlm_vqa.training import checkpoint_files


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of ten blocks and a half, of ten bytes each, and its fingerprint."""
    monkeypatch.setattr(sealed, "BLOCK_BYTES", 10)
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(105))
    return path, sealed.fingerprint(path)


def test_any_piece_is_read_as_it_was_written(file):
    path, made = file
    with sealed.open_checked(path, made, "Fix it.") as checked:
        assert checked.read() == path.read_bytes() and checked.read(1) == b""
        rng = random.Random(1)
        for _ in range(200):
            start, count = rng.randrange(110), rng.randrange(40)
            assert checked.seek(start) == checked.tell() == start
            assert checked.read(count) == path.read_bytes()[start : start + count]
        assert checked.seek(-5, 2) == 100 and checked.seek(2, 1) == 102


def test_a_flipped_bit_is_named_when_its_block_is_read_and_not_before(file, monkeypatch):
    path, made = file
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        block = place // 10 * 10
        with sealed.open_checked(path, made, "Fix it.") as checked:
            assert checked.read(block) == whole[:block]
            with pytest.raises(UserError, match=rf"{path}: damaged at byte {block} or after it.*Fix it\."):
                checked.read(1)
    monkeypatch.setenv(sealed.SWITCH, "off")
    with sealed.open_checked(path, made, "Fix it.") as checked:
        assert checked.read() == path.read_bytes() != whole


def test_another_size_is_refused(file):
    path, made = file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="has 104 bytes where 105 were written. Fix it."):
        sealed.open_checked(path, made, "Fix it.")


def test_every_flipped_bit_of_a_seal_is_found_or_changes_nothing(tmp_path):
    path = tmp_path / "seal.json"
    content = {"a": [1, 2.5e-7, "ü"], "b": {"c": None, "d": True}}
    sealed.write_sealed(path, content)
    whole = path.read_bytes()
    found = 0
    for bit in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            assert sealed.read_sealed(path, "a seal", "Fix it.") == content
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and str(error).endswith("Fix it.")
            found += 1
    assert found > 7 * len(whole)


def test_a_folder_is_read_whole(tmp_path):
    (tmp_path / "made/below").mkdir(parents=True)
    for name in ("made/one", "made/below/two", "three"):
        (tmp_path / name).write_text(name)
    path = tmp_path / "made/seal.json"
    sealed.write_folder(path, {"fact": 1}, [tmp_path / "three"])
    (tmp_path / "made/more").write_text("not of the seal")
    assert sealed.read_folder(path, "a seal", "Fix it.") == {"fact": 1}
    for name in ("made/one", "made/below/two", "three"):
        (tmp_path / name).write_text("other")
        with pytest.raises(UserError, match=f"^{tmp_path / name}: damaged.*Fix it."):
            sealed.read_folder(path, "a seal", "Fix it.")
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"^{tmp_path / name}: missing.*Fix it."):
            sealed.read_folder(path, "a seal", "Fix it.")
        (tmp_path / name).write_text(name)


def make(path, content):
    """Make a file, or a folder with a file in a folder."""
    if isinstance(content, str):
        path.write_text(content)
    else:
        (path / "below").mkdir(parents=True)
        (path / "below" / "file").write_text(*content)


@pytest.mark.parametrize("content", ["new", ["new"]])
def test_what_is_made_aside_replaces_what_was_there_once_it_is_on_the_disk(content, tmp_path, monkeypatch):
    target, done = tmp_path / "made", []
    flush, replace = sealed.flush, os.replace
    monkeypatch.setattr(sealed, "flush", lambda path: (done.append(path.name), flush(path)))
    monkeypatch.setattr(sealed.os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    make(target, content)
    (tmp_path / "made.part").write_text("what a killed run left")
    with sealed.aside(target) as part:
        assert part == tmp_path / "made.part" and not part.exists() and target.exists()
        make(part, content)
    inside = [] if isinstance(content, str) else ["below", "file"]
    assert done == [*inside, "made.part", "renamed", tmp_path.name]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("content", ["new", ["new"]])
def test_what_fails_aside_is_removed_and_what_was_there_stays(content, tmp_path):
    (tmp_path / "made").write_text("old")
    with pytest.raises(KeyboardInterrupt), sealed.aside(tmp_path / "made") as part:
        make(part, content)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["made"] and (tmp_path / "made").read_text() == "old"


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    """As DVC links outputs into its cache."""
    (tmp_path / "cache").write_text("old")
    (tmp_path / "seal.json").symlink_to("cache")
    sealed.write_sealed(tmp_path / "seal.json", {"fact": 1})
    assert (tmp_path / "cache").read_text() == "old" and not (tmp_path / "seal.json").is_symlink()


def fetch_records(folder, params):
    assert fetch(params, folder / "records")["images"] == 6


def begin_features(folder, _):
    layout = Layout(images=3, num_tokens=2, width=4, dtype=StoreDtype.FLOAT32)
    assert FeatureStoreWriter(folder / "features", layout, {}).begin() == [0]


def claim_checkpoints(folder, _):
    checkpoint_files.claim(folder / "key").close()


@pytest.mark.parametrize("work", [fetch_records, begin_features, claim_checkpoints])
def test_a_file_system_without_locks_costs_a_warning(
    work, vqav2_folder, directory_params, tmp_path, monkeypatch, caplog
):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    work(tmp_path, directory_params(vqav2_folder()))
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text
