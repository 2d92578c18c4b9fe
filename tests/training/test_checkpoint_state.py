"""What a checkpoint holds, divided anew: written by some processes, read by more or fewer, or refused by name.

The processes of a world are played one after the other in this one, by torch's fake process group and FSDP2's own division
of parameters. Gradients are given, so nothing has to be communicated.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from vlm_vqa.errors import UserError
from vlm_vqa.training import checkpoint_files, checkpoint_state
from vlm_vqa.training.launch import Launch, Strategy
from vlm_vqa.training.optimizer import ClippedAdamW8bit, local
from vlm_vqa.training.rows import rows_held
from vlm_vqa.training.trainer import VqaTrainer

# Rows that no world here divides evenly, or that leave some of its processes without any.
FLOAT_STATES = {"matrix": (7, 40), "norm": (5,), "two": (2, 3)}
# Of 4,096 elements and more, in rows of whole blocks: their 8-bit states can be divided anew.
# "late" is first trained in step 3, after the checkpoint.
ALIGNED = FLOAT_STATES | {"eight": (6, 768), "few": (2, 2304), "late": (6, 768)}
# In rows that begin within a block: theirs cannot.
CROSSING = ALIGNED | {"crossing": (103, 40)}
OPTIMIZERS = {"adamw_torch": torch.optim.AdamW, "adamw_bnb_8bit": ClippedAdamW8bit}


@contextmanager
def acting_as(rank, world, sharded=True):
    """Be process `rank` of `world`; yield what divides a model as FSDP2 does, or leaves it whole."""
    if not sharded or world == 1:
        yield lambda model: model
        return
    distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        # torch takes meshes of the same name for the same one, with the first one's rank.
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=(f"as_{rank}",))
        yield lambda model: fully_shard(model, mesh=mesh)
    finally:
        distributed.destroy_process_group()


class Training:
    """A model, its optimizer and a schedule, of which this process holds a part."""

    def __init__(self, divide, shapes, optimizer, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Module()
        for name, shape in shapes.items():
            self.model.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        divide(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr=0.1, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def train(self, *steps):
        """Take steps whose gradients depend on their numbers alone."""
        for step in steps:
            for number, (name, parameter) in enumerate(self.model.named_parameters()):
                whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))
                rows = whole[slice(*rows_held(parameter))]
                if isinstance(parameter, DTensor):
                    rows = DTensor.from_local(
                        rows, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
                        stride=parameter.stride(),
                    )  # fmt: skip
                parameter.grad = rows if name != "late" or step > 2 else None
            self.optimizer.step()
            self.scheduler.step()
        return self

    def held(self):
        parameters = self.model.named_parameters()
        return {name: (rows_held(p), local(p.detach()).clone()) for name, p in parameters}

    def take_up(self, checkpoint, rank, world, restart=False):
        opened = checkpoint_state.Checkpoint(checkpoint, rank, world)
        opened.load_state(self.model, self.optimizer, restart=restart)
        self.scheduler.load_state_dict(opened.facts[0]["scheduler"])
        return self


def write(folder, world, shapes, optimizer, sharded=True):
    """Train two steps in `world` processes and let each write its part."""
    for rank in range(world):
        with acting_as(rank, world, sharded) as divide:
            training = Training(divide, shapes, optimizer).train(1, 2)
            tensors, facts = checkpoint_state.save_state(training.model, training.optimizer, rank=rank, copy=True)
            more, general = checkpoint_state.save_random_state(training.scheduler)
        writer = checkpoint_files.Writer(folder, rank, world, limit=2)
        writer.save(2, tensors | more, facts | general, {})
        writer.wait()
    return checkpoint_files.folder_of(folder, 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world", [1, 2, 5])
def test_by_as_many_processes_it_goes_on_bit_for_bit(tmp_path, optimizer, world):
    checkpoint = write(tmp_path, world, CROSSING, optimizer)
    for rank in range(world):
        with acting_as(rank, world) as divide:
            unbroken = Training(divide, CROSSING, optimizer).train(1, 2, 3, 4).held()
            resumed = Training(divide, CROSSING, optimizer, seed=1).take_up(checkpoint, rank, world).train(3, 4).held()
        for name, (rows, values) in unbroken.items():
            assert resumed[name][0] == rows
            torch.testing.assert_close(resumed[name][1], values, rtol=0, atol=0)


def test_deepspeeds_files_hold_what_is_trained_and_are_read_strictly():
    """It writes `state_dict()` and reads it by `load_state_dict`; the embedding has two names."""

    def made(value):
        model = nn.ModuleDict(
            {"embedding": nn.Embedding(4, 3), "layer": nn.Linear(3, 3), "head": nn.Linear(3, 4, False)}
        )
        model["head"].weight = model["embedding"].weight
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        model["embedding"].requires_grad_(False)
        checkpoint_state.leave_out_frozen(model)
        return model

    written, read = made(1.0).state_dict(), made(2.0)
    assert set(written) == {"layer.weight", "layer.bias"}
    read.load_state_dict(written)
    assert {name: one.unique().item() for name, one in read.named_parameters()} == {
        "embedding.weight": 2, "layer.weight": 1, "layer.bias": 1
    }  # fmt: skip
    with pytest.raises(RuntimeError, match='Missing key.*"layer.bias"'):
        read.load_state_dict({"layer.weight": written["layer.weight"]})


def test_frozen_weights_are_not_written_and_stay_as_they_are():
    training = Training(lambda model: model, CROSSING, "adamw_torch")
    training.model.crossing.requires_grad_(False)
    tensors, facts = checkpoint_state.save_state(training.model, training.optimizer, rank=0, copy=True)
    assert {name for name in CROSSING if f"model/{name}" not in tensors} == {"crossing"}
    assert set(facts["parameters"]) == set(CROSSING)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_copy_stays_while_training_goes_on_and_else_nothing_is_held_twice(optimizer, copy):
    training = Training(lambda model: model, CROSSING, optimizer).train(1, 2)
    tensors, _ = checkpoint_state.save_state(training.model, training.optimizer, rank=0, copy=copy)
    before = {name: one.clone() for name, one in tensors.items()}
    training.train(3)
    assert any(name.startswith("optimizer/") for name in tensors)
    same = {name for name, one in tensors.items() if torch.equal(one, before[name])}
    assert same == (set(tensors) if copy else set())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("written", "read"), [(2, 1), (2, 3), (1, 2), (3, 2), (2, 5), (5, 4)])
def test_divided_anew_it_goes_on_as_the_undivided_one(tmp_path, optimizer, written, read):
    shapes = CROSSING if optimizer == "adamw_torch" else ALIGNED
    checkpoint = write(tmp_path, written, shapes, optimizer)
    whole = dict(Training(lambda model: model, shapes, optimizer).train(1, 2, 3, 4).model.named_parameters())
    next_row = dict.fromkeys(shapes, 0)
    for rank in range(read):
        with acting_as(rank, read) as divide:
            held = Training(divide, shapes, optimizer, seed=1).take_up(checkpoint, rank, read).train(3, 4).held()
        for name, (rows, values) in held.items():
            assert rows.start == next_row[name]
            next_row[name] = rows.stop
            torch.testing.assert_close(values, whole[name].detach()[slice(*rows)], rtol=1e-6, atol=1e-6)
    assert next_row == {name: shape[0] for name, shape in shapes.items()}


@pytest.mark.parametrize(("written", "read"), [(2, 1), (2, 3), (1, 2), (2, 4)])
def test_blocks_that_run_across_new_borders_are_refused_by_every_process(tmp_path, written, read):
    """Also by one whose own rows begin at a block: processes with fresh and with old states would train no one model."""
    checkpoint = write(tmp_path, written, CROSSING, "adamw_bnb_8bit")
    for rank in range(read):
        with acting_as(rank, read) as divide:
            training = Training(divide, CROSSING, "adamw_bnb_8bit", seed=1)
            with pytest.raises(UserError) as refused:
                training.take_up(checkpoint, rank, read)
        for words in (str(checkpoint), "8-bit", " crossing ", f"{written} processes", "restart_optimizer: true"):
            assert words in str(refused.value)


@pytest.mark.parametrize(("written", "read"), [(2, 1), (1, 2)])
def test_restart_optimizer_goes_on_from_the_weights_alone(tmp_path, written, read, caplog):
    checkpoint = write(tmp_path, written, CROSSING, "adamw_bnb_8bit")
    weights = {}
    for rank in range(written):
        with acting_as(rank, written) as divide:
            for name, (_, values) in Training(divide, CROSSING, "adamw_bnb_8bit").train(1, 2).held().items():
                weights.setdefault(name, []).append(values)
    for rank in range(read):
        caplog.clear()
        with acting_as(rank, read) as divide:
            training = Training(divide, CROSSING, "adamw_bnb_8bit", seed=1)
            training.take_up(checkpoint, rank, read, restart=True)
            held = training.held()
        assert "crossing" in caplog.text and "fresh optimizer states" in caplog.text
        assert not any(training.optimizer.state.values())
        # The schedule is not the optimizer's.
        assert training.scheduler.last_epoch == 2 and training.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 3)
        for name, (rows, values) in held.items():
            assert torch.equal(values, torch.cat(weights[name])[slice(*rows)])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ddp_s_first_process_writes_what_all_hold(tmp_path, optimizer):
    checkpoint = write(tmp_path, 2, CROSSING, optimizer, sharded=False)
    assert checkpoint_files.read_tensors(checkpoint, 1, 2).keys() == ["random/cpu"]
    unbroken = Training(lambda model: model, CROSSING, optimizer).train(1, 2, 3, 4).held()
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        training = Training(lambda model: model, CROSSING, optimizer, seed=1)
        resumed = training.take_up(checkpoint, rank, world).train(3, 4).held()
        assert all(torch.equal(resumed[name][1], values) for name, (_, values) in unbroken.items())


def test_another_model_is_refused(tmp_path):
    checkpoint = write(tmp_path, 2, FLOAT_STATES, "adamw_torch")
    for other in ({**FLOAT_STATES, "norm": (6,)}, {**FLOAT_STATES, "more": (1,)}, {"norm": (5,), "two": (2, 3)}):
        training = Training(lambda model: model, other, "adamw_torch")
        before = training.held()
        (name,) = (name for name in other.keys() | FLOAT_STATES if other.get(name) != FLOAT_STATES.get(name))
        with pytest.raises(UserError, match=rf"another model.*\['{name}'\]"):
            training.take_up(checkpoint, 0, 1)
        assert all(torch.equal(values, training.held()[key][1]) for key, (_, values) in before.items())


def test_random_numbers_go_on_where_they_were(tmp_path, caplog):
    torch.manual_seed(1)
    checkpoint = write(tmp_path, 2, FLOAT_STATES, "adamw_torch")
    for rank in range(2):
        # What the process drew after it had written is what it draws again.
        torch.set_rng_state(checkpoint_files.read_tensors(checkpoint, rank, 2).get_tensor("random/cpu"))
        opened = checkpoint_state.Checkpoint(checkpoint, rank, 2)
        opened.load_random_state(seed=5)
        first = torch.rand(2).tolist()
        opened.load_random_state(seed=5)
        assert torch.rand(2).tolist() == first
    assert not caplog.text
    checkpoint_state.Checkpoint(checkpoint, 0, 1).load_random_state(seed=5)
    assert "another number of processes" in caplog.text
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()


@pytest.mark.parametrize(
    ("strategy", "written", "processes"),
    [
        (Strategy.FSDP2, "ZeRO-2", 2),
        (Strategy.ZERO2, "ZeRO-3", 2),
        (Strategy.ZERO2, "rows", 2),
        (Strategy.ZERO2, "ZeRO-2", 1),
    ],
)
def test_a_launch_that_cannot_go_on_is_refused(tmp_path, monkeypatch, strategy, written, processes):
    for rank in range(2):
        writer = checkpoint_files.Writer(tmp_path, rank, 2, limit=2)
        writer.save(2, {}, {"kind": written}, {})
        writer.wait()
    launch = Launch("it", strategy, processes, 0, 1, "cpu", "gloo", 1)
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda choice: None)
    trainer = VqaTrainer.__new__(VqaTrainer)
    trainer.launch, trainer.folder = launch, tmp_path
    words = f"checkpoint-2 was written by 2 processes as {written}; {processes} processes with ({strategy.value}|rows) "
    with pytest.raises(UserError, match=words):
        trainer._newest_checkpoint()
