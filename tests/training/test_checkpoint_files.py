"""Which checkpoint a training goes on from: the newest whole one, never a torn or a damaged one."""

import errno
import json
import os

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from vlm_vqa import files
from vlm_vqa.errors import UserError
from vlm_vqa.training import checkpoint_files


def write(folder, step, world=2, ranks=None):
    """Write a checkpoint as `world` processes do, or as only some of them did."""
    for rank in range(world) if ranks is None else ranks:
        writer = checkpoint_files.Writer(folder, rank, world, limit=9)
        writer.save(
            step, {"weights": torch.full((3,), float(step))}, {"step": step}, {"state.json": "{}"} if rank == 0 else {}
        )
        writer.wait()
    return checkpoint_files.folder_of(folder, step)


def test_the_newest_whole_one(tmp_path):
    assert checkpoint_files.latest(tmp_path / "none") is None
    write(tmp_path, 90)
    newest = write(tmp_path, 100)
    torn = write(tmp_path, 110, ranks=[1])
    assert checkpoint_files.latest(tmp_path) == newest
    assert not torn.exists()
    assert checkpoint_files.read_seal(newest, 1, 2) == {"step": 100}
    assert checkpoint_files.read_tensors(newest, 1, 2).get_tensor("weights").tolist() == [100.0] * 3


def test_every_moment_at_which_writing_can_be_cut_off_leaves_no_whole_one(tmp_path):
    """Files appear in the order in which they are written; with any of the last ones missing, it is torn."""
    whole = write(tmp_path / "whole", 10)
    names = sorted((path.name for path in whole.iterdir()), key=lambda name: (whole / name).stat().st_mtime_ns)
    assert names[-1] == "rank-1-of-2.json"
    for count in range(len(names)):
        part = tmp_path / str(count) / "checkpoint-10"
        part.mkdir(parents=True)
        for name in names[:count]:
            (part / name).write_bytes((whole / name).read_bytes())
        assert checkpoint_files.world_of(part) is None
        assert checkpoint_files.latest(part.parent) is None and not part.exists()


def test_seals_of_two_launches_make_no_whole_one(tmp_path):
    write(tmp_path, 10, world=2, ranks=[0])
    mixed = write(tmp_path, 10, world=3, ranks=[1, 2])
    assert checkpoint_files.world_of(mixed) is None


@pytest.mark.parametrize("damage", ["change", "remove", "seal", "fact"])
def test_a_damaged_one_is_refused_by_name(tmp_path, damage):
    newest = write(tmp_path, 100)
    tensors, seal = newest / "rank-1-of-2.safetensors", newest / "rank-1-of-2.json"
    if damage == "change":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "remove":
        tensors.unlink()
    elif damage == "seal":
        seal.write_text("{")
    else:
        content = json.loads(seal.read_text())
        content["facts"]["step"] = 99
        seal.write_text(json.dumps(content))
    checkpoint_files.verify(newest, 0, 2)
    with pytest.raises(UserError, match=rf"{newest.name}/rank-1.*(missing|damaged|not the seal).*Delete the folder"):
        checkpoint_files.verify(newest, 1, 2)


def test_as_many_are_kept_as_asked_and_unfinished_ones_stay(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    write(tmp_path, 40, ranks=[1])
    checkpoint_files.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-30", "checkpoint-40"]


def test_removing_takes_the_seals_first(tmp_path, monkeypatch):
    whole = write(tmp_path, 10)
    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", lambda *_, **__: None)
    checkpoint_files.remove(whole)
    assert (whole / "rank-0-of-2.safetensors").exists() and checkpoint_files.world_of(whole) is None


def test_two_trainings_do_not_share_a_folder(tmp_path):
    first = checkpoint_files.claim(tmp_path / "run")
    with pytest.raises(UserError, match="another process is training there"):
        checkpoint_files.claim(tmp_path / "run")
    first.close()
    checkpoint_files.claim(tmp_path / "run").close()


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    checkpoint_files.claim(tmp_path / "run").close()
    assert "cannot be locked" in caplog.text


def test_what_fails_in_the_thread_is_raised_in_the_training(tmp_path):
    writer = checkpoint_files.Writer(tmp_path, 0, 1, limit=2)
    (tmp_path / "checkpoint-5").write_text("in the way")
    writer.save(5, {}, {}, {})
    with pytest.raises(FileExistsError):
        writer.wait()


class Stranger:
    """What, unpickled without care, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "switch", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"}]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_could_run_code_is_refused_unread(tmp_path, monkeypatch, zipped, switch):
    for name, value in switch.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    path, made = tmp_path / "state.pt", tmp_path / "made"
    torch.save({"step": 1, "state": Stranger(made)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match="checkpoint-2: a pickle in it holds (io|_io).open .*was not read.*Delete the folder"
    ):
        with checkpoint_files.nothing_but_tensors(tmp_path / "checkpoint-2"):
            # As DeepSpeed asks.
            torch.load(path, weights_only=False)
    assert not made.exists() and os.environ == before
    # The file does what it is for where nobody is careful.
    monkeypatch.undo()
    torch.load(path, weights_only=False)
    assert made.exists()


def test_what_deepspeed_writes_is_read(tmp_path):
    states = {
        "scale": LossScaler(2.0),
        "stage": ZeroStageEnum.gradients,
        "place": fragment_address(3, 0),
        "step": torch.ones(1),
    }
    torch.save(states, tmp_path / "state.pt")
    with checkpoint_files.nothing_but_tensors(None):
        found = torch.load(tmp_path / "state.pt", weights_only=False)
    assert (
        found["scale"].cur_scale == 2.0
        and found["place"] == fragment_address(3, 0)
        and found["stage"] is ZeroStageEnum.gradients
    )
