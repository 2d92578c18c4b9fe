"""What is stored is found as it was written, or named."""

import random

import pytest

from vlm_vqa import sealed
from vlm_vqa.errors import UserError


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
