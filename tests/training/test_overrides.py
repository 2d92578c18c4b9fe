"""What `VqaTrainer` overrides of transformers' Trainer: an upgrade that changes one of them fails here, by its name."""

import inspect
import re

import pytest
from transformers import Trainer

from vlm_vqa.training.trainer import VqaTrainer

# The parent's arguments, and which of its methods call it: private ones have no other promise than this.
OVERRIDDEN = {
    "create_optimizer": ("self, model=None", {"create_optimizer_and_scheduler", "_prepare_for_training"}),
    "create_scheduler": (
        "self, num_training_steps, optimizer=None",
        {"create_optimizer_and_scheduler", "_prepare_for_training"},
    ),
    "get_train_dataloader": ("self", {"_inner_training_loop"}),
    "get_batch_samples": ("self, epoch_iterator, num_batches, device", {"_run_epoch"}),
    "training_step": ("self, model, inputs, num_items_in_batch=None", {"_run_epoch"}),
    "_prepare_inputs": ("self, inputs", {"training_step", "prediction_step"}),
    "_prepare_for_training": ("self, max_steps, train_dataloader, resume_from_checkpoint", {"_inner_training_loop"}),
    "_get_num_items_in_batch": ("self, batch_samples, device", {"get_batch_samples", "prediction_step"}),
    "_get_grad_norm": ("self, model, grad_norm=None", {"_run_epoch"}),
    "_maybe_log_save_evaluate": (
        "self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None",
        {"_run_epoch"},
    ),
    "_evaluate": (
        "self, trial, ignore_keys_for_eval, skip_scheduler=False",
        {"_inner_training_loop", "_maybe_log_save_evaluate"},
    ),
    "_save_checkpoint": ("self, model, trial", {"_maybe_log_save_evaluate"}),
    "_load_from_checkpoint": ("self, resume_from_checkpoint, model=None", {"train", "_prepare_for_training"}),
    "_load_optimizer_and_scheduler": ("self, checkpoint", {"_prepare_for_training"}),
    "_load_rng_state": ("self, checkpoint", {"_run_epoch"}),
}
SOURCES = {name: inspect.getsource(method) for name, method in vars(Trainer).items() if inspect.isfunction(method)}


def test_the_table_names_all():
    methods = {name for name, member in vars(VqaTrainer).items() if inspect.isfunction(member)}
    assert {name for name in methods if hasattr(Trainer, name)} - {"__init__"} == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_trainer_still_calls_it_so(name):
    arguments, callers = OVERRIDDEN[name]
    found = inspect.signature(getattr(Trainer, name)).parameters.values()
    words = [one.name + ("" if one.default is one.empty else f"={one.default!r}") for one in found]
    assert ", ".join(words) == arguments
    assert {one for one, text in SOURCES.items() if one != name and re.search(rf"self\.{name}\(", text)} == callers


def test_what_else_is_read_of_the_trainer_is_there():
    """Its own loss since the last log, which a checkpoint carries on."""
    source = "".join(SOURCES.values())
    assert "self._tr_loss" in source and "self._globalstep_last_logged" in source
