"""Which checkpoint a training goes on from: the newest whole one, never a torn or a damaged one."""

import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.training import checkpoints


def write(folder, step, sealed=True):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights %d" % step)
    if sealed:
        checkpoints.seal(checkpoint)
    return checkpoint


def test_the_newest_whole_one(tmp_path):
    assert checkpoints.latest(tmp_path / "none") is None
    write(tmp_path, 90)
    newest = write(tmp_path, 100)
    torn = write(tmp_path, 110, sealed=False)
    assert checkpoints.latest(tmp_path) == newest
    assert not torn.exists()


@pytest.mark.parametrize("damage", ["change", "remove", "seal"])
def test_a_damaged_one_is_refused_by_name(tmp_path, damage):
    newest = write(tmp_path, 100)
    weights = newest / "model.safetensors"
    if damage == "change":
        weights.write_bytes(b"weights 101")
    elif damage == "remove":
        weights.unlink()
    else:
        (newest / checkpoints.SEAL).write_text("{")
    with pytest.raises(UserError, match=rf"{newest.name}.*corrupt or missing.*Delete the folder"):
        checkpoints.latest(tmp_path)


def test_other_facts_other_folder():
    facts = {"params_hash": "1", "data_hash": "2", "code_hash": "3"}
    keys = {checkpoints.checkpoint_key({**facts, name: "other"}) for name in facts}
    assert len(keys | {checkpoints.checkpoint_key(facts)}) == 4
