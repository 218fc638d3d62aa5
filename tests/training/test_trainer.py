"""Batches too large for memory are computed in parts; long runs compile kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_training import make_disc_dataset, make_shapes, notice_kinds, quick_settings, train_shapes

from useg.errors import MachineError
from useg.training import trainer
from useg.training.plan import make_plan


@pytest.mark.parametrize(
    "limit",
    [{"train.steps": 25}, {"train.steps": None, "train.minutes": 0.06}],
    ids=["while training", "while measuring"],
)
def test_batch_too_large_for_memory_is_computed_in_parts(tmp_path, limit, monkeypatch):
    compute = trainer.compute_logits

    def compute_one(model, x, precision):
        if model.training and len(x) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return compute(model, x, precision)

    monkeypatch.setattr(trainer, "compute_logits", compute_one)
    run = train_shapes(make_shapes(tmp_path, 0), 0, **limit)
    assert notice_kinds(run) == {"too little memory"}
    assert len(run.log) == run.settings.train.steps


def test_crop_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    def compute_none(model, x, precision):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "compute_logits", compute_none)
    message = r"not enough memory for .* crops? of 48x32 pixels .*; choose a smaller data.crop"
    with pytest.raises(MachineError, match=message):
        train_shapes(make_shapes(tmp_path, 0), 0)


def test_only_long_runs_compile_kernels(tmp_path):
    dataset = make_disc_dataset(tmp_path / "data")
    settings = quick_settings(train__epochs=1)
    made = trainer.prepare_trainer(dataset, make_plan(settings, dataset), trainer.SilentProgress())
    per_epoch = made.batches.per_epoch
    for changes, is_long in (
        ({"epochs": 9000 / per_epoch}, False),
        ({"epochs": 11000 / per_epoch}, True),
        ({"epochs": None, "steps": 9000}, False),
        ({"epochs": None, "steps": 11000}, True),
        # A timed run keeps what it does after its steps have been counted.
        ({"epochs": None, "minutes": 1.0, "steps": 50_000}, False),
        ({"epochs": None, "minutes": 10.0}, True),
    ):
        made.settings = settings.with_({f"train.{key}": value for key, value in changes.items()})
        assert made.is_long == is_long, changes


def test_accumulated_parts_give_the_same_step(tmp_path):
    logs = []
    for parts in (1, 2):
        make_shapes(tmp_path / str(parts), 0)
        run = train_shapes(
            tmp_path / str(parts),
            0,
            train__accumulate=parts,
            train__steps=6,
            train__loss="ce",
            train__class_weights="none",
            model__normalize=False,
        )
        logs.append([row["loss"] for row in run.log])
    assert np.allclose(logs[0], logs[1], rtol=1e-4)
