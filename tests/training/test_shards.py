"""One process builds the model: the others get its shape, and FSDP2's their rows, with nothing held twice."""

import copy
import itertools
import math
import pickle
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import distributed, nn

from tests.tiny_model import tiny_base
from tests.training.test_checkpoint_state import acting_as
from vlm_vqa.model.adapters import add_adapters
from vlm_vqa.params import LoraParams
from vlm_vqa.training import prepare, rows
from vlm_vqa.training.launch import Strategy
from vlm_vqa.training.optimizer import local
from vlm_vqa.training.rows import named_parameters, rows_held


@pytest.fixture(params=["plain", "adapters"])
def model(tiny, request):
    found = tiny_base(tiny)
    if request.param == "adapters":
        add_adapters(found, LoraParams(2, 4.0, 0.0, ("q_proj",)))
    return found


def running(strategy, process, processes=2):
    return SimpleNamespace(strategy=strategy, process=process, processes=processes, main=process == 0, device="cpu")


def building(model, strategy, process, monkeypatch):
    """Return what a process of two gets, process 0 being played by what it would send, and whether it has built one."""
    built = []

    def receive(things):
        # As it is sent.
        things[0] = things[0] or pickle.loads(pickle.dumps(prepare.shape_of(model)))

    monkeypatch.setattr(distributed, "broadcast_object_list", receive)
    found = prepare.build_once(lambda: built.append(1) or model, running(strategy, process))
    return found, bool(built)


@pytest.mark.parametrize("strategy", [Strategy.DDP, Strategy.FSDP2])
def test_the_first_process_builds_and_the_others_get_the_shape(model, strategy, monkeypatch):
    assert building(model, strategy, 0, monkeypatch) == (model, True)
    found, built = building(model, strategy, 1, monkeypatch)
    assert not built
    theirs, ours = named_parameters(found), named_parameters(model)
    assert [*theirs] == [*ours]
    for name, one in theirs.items():
        assert (one.shape, one.dtype, one.requires_grad) == (
            ours[name].shape,
            ours[name].dtype,
            ours[name].requires_grad,
        )
        assert one.is_meta == (strategy is Strategy.FSDP2)
    assert found.lm_head.weight is found.model.language_model.embed_tokens.weight
    # Nobody sends a buffer.
    for name, buffer in found.named_buffers():
        torch.testing.assert_close(buffer, model.get_buffer(name), rtol=0, atol=0)


@pytest.mark.parametrize("strategy", [Strategy.ZERO2, Strategy.ZERO3])
def test_under_deepspeed_each_process_builds(model, strategy, monkeypatch):
    assert building(model, strategy, 1, monkeypatch) == (model, True)


@pytest.mark.parametrize(("world", "at_once"), [(2, 1 << 22), (3, 100), (2, 1000)])
def test_each_process_holds_its_rows_and_what_was_sent_is_let_go(model, world, at_once, monkeypatch):
    monkeypatch.setattr(rows, "SENT_AT_ONCE", at_once)
    whole = {name: one.detach().clone() for name, one in named_parameters(model).items()}
    for rank in range(world):
        mine = copy.deepcopy(model)
        taken = rows.take_weights(mine)
        assert taken.keys() == whole.keys() and all(one.is_meta for one in mine.parameters())
        with acting_as(rank, world) as divide:
            divide(mine)
            # Of the fake group only its first process receives what is sent: itself.
            sent = copy.deepcopy(taken)
            rows.send_rows(mine, sent, torch.device("cpu"))
            assert not sent
            for name, one in named_parameters(mine).items():
                held = whole[name][slice(*rows_held(one))]
                torch.testing.assert_close(local(one.detach()), held, rtol=0, atol=0)
            assert isinstance(mine.lm_head, nn.Linear)
            assert mine.lm_head.weight is mine.model.language_model.embed_tokens.weight


@pytest.mark.parametrize(("world", "at_once"), [(2, 1 << 22), (3, 100)])
def test_process_0_gets_whole_what_all_hold_and_the_others_nothing(model, world, at_once, monkeypatch):
    monkeypatch.setattr(rows, "SENT_AT_ONCE", at_once)
    model = model.to(torch.bfloat16)
    whole = {name: one.detach().float() for name, one in named_parameters(model).items()}
    parts, holders = [], []
    for rank in range(world):
        mine = copy.deepcopy(model)
        with acting_as(rank, world) as divide:
            divide(mine)
            parts.append({name: local(one.detach()).clone() for name, one in named_parameters(mine).items()})
            holders.append({name: rows_held(one) for name, one in named_parameters(mine).items()})
    for name, expected in whole.items():
        held = [one[name] for one in holders]
        places = {rank: itertools.count(0, max(1, at_once // math.prod(expected.shape[1:]))) for rank in range(world)}

        def receive(piece, sender, name=name, places=places):
            # What the others send comes in the order of rows.
            first = next(places[sender])
            piece.copy_(parts[sender][name][first : first + len(piece)])

        monkeypatch.setattr(distributed, "broadcast", receive)
        found = rows.whole_rows(parts[0][name], held, 0)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        sent = []
        monkeypatch.setattr(distributed, "broadcast", lambda piece, sender, sent=sent: sent.append((sender, piece)))
        assert not len(rows.whole_rows(parts[1][name], held, 1))
        ours = [piece for sender, piece in sent if sender == 1]
        assert not ours and not len(parts[1][name]) or torch.equal(torch.cat(ours), parts[1][name])


def test_a_shape_has_no_weights_to_take(model):
    assert rows.take_weights(prepare.shape_of(model)) == {}


@pytest.mark.skipif(rows.TRIM is None, reason="the allocator of this system is not glibc's")
def test_what_is_let_go_on_a_cpu_goes_back_to_the_system():
    # glibc maps a block of this size alone, and no longer when one was freed.
    held = [nn.Parameter(torch.full((21 << 18,), 1.0)) for _ in range(2)][:1]
    held += [nn.Parameter(torch.full((21 << 18,), 1.0)) for _ in range(20)]
    size, before = sum(one.nbytes for one in held), psutil.Process().memory_info().rss
    for one in held[:-1]:
        rows.let_go(one)
    assert before - psutil.Process().memory_info().rss > 0.8 * size
