"""On a CPU: the process's memory by phase, the table, snapshots on demand and when memory runs out."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import FakeTensorMode

from callbacks import GPUMemoryProfile
from callbacks.memory_readings import SavedActivations, category_bytes, markdown_table, storages
from callbacks.memory_snapshot import is_out_of_memory, largest_tensors
from mmrec.measuring.meters import ProcessMemoryMeter


def fit(tmp_path: Path, stubs: ModuleType, *callbacks: Callback, **options: Any) -> Any:
    module = stubs.make_module()
    stubs.make_trainer(tmp_path, list(callbacks), **options).fit(module, datamodule=stubs.StubData())
    return module


def test_the_tags_and_the_table_reach_tensorboard(tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    profile = GPUMemoryProfile()
    module = fit(tmp_path, stubs, profile, max_steps=3)
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("memory/")}
    phases = {f"memory/{phase}_{name}" for phase in ("forward", "backward", "optimizer") for name in ("rss", "peak")}
    assert tags == phases | {"memory/rss", "memory/peak"}
    for tag in tags:
        assert all(50 < event.value < 50_000 for event in events.Scalars(tag)), tag  # MiB of a process with torch in it
    assert "memory/table/text_summary" in events.Tags()["tensors"]
    assert "| optimizer state |" in capsys.readouterr().out

    parameters = sum(parameter.numel() * 4 for parameter in module.network.parameters())
    assert profile.table["parameters"] == profile.table["gradients"] == parameters
    # Two moments of every parameter, and a step count each.
    assert 0 < profile.table["optimizer state"] - 2 * parameters < 1024
    assert profile.table["activations"] > 0


def test_more_tokens_keep_more_activations(tmp_path: Path, stubs: ModuleType) -> None:
    tables = []
    for batch_size in (2, 8):
        profile = GPUMemoryProfile()
        trainer = stubs.make_trainer(tmp_path, [profile], max_steps=2, logger=False)
        trainer.fit(stubs.make_module(), datamodule=stubs.StubData(batch_size=batch_size))
        tables.append(profile.table)
    assert tables[0]["parameters"] == tables[1]["parameters"]
    assert 3 < tables[1]["activations"] / tables[0]["activations"] < 5


def test_checkpointing_keeps_fewer_activations(tmp_path: Path, stubs: ModuleType) -> None:
    tables = []
    for recompute in (False, True):
        profile = GPUMemoryProfile()
        module = stubs.make_module({"activation_checkpointing": recompute})
        stubs.make_trainer(tmp_path, [profile], max_steps=2, logger=False).fit(module, datamodule=stubs.StubData())
        tables.append(profile.table)
    assert tables[1]["activations"] < 0.5 * tables[0]["activations"]


def test_snapshots_at_steps_and_on_request(tmp_path: Path, stubs: ModuleType) -> None:
    class Request(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2 and not (tmp_path / "memory" / "request").exists():
                (tmp_path / "memory").mkdir(exist_ok=True)
                (tmp_path / "memory" / "request").touch()

    profile = GPUMemoryProfile(snapshot_steps=[0])
    fit(tmp_path, stubs, profile, Request(), max_steps=5, accumulate_grad_batches=2, logger=False)
    assert [path.name for path in profile.snapshots] == ["step=000000-rank=0.json", "step=000002-rank=0.json"]
    assert all(path.parent == tmp_path / "memory" for path in profile.snapshots)
    snapshot = json.loads(profile.snapshots[1].read_text())
    assert snapshot["step"] == 2
    assert snapshot["memory_bytes"]["rss"] > 50 * 2**20
    assert len(snapshot["largest_tensors"]) > 5
    sizes = [tensor["bytes"] for tensor in snapshot["largest_tensors"]]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("where", ["on_train_batch_start", "on_before_backward", "on_train_batch_end"])
def test_out_of_memory_leaves_a_snapshot_and_the_error(
    where: str, tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(trainer: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    failing = Callback()
    setattr(failing, where, fail)
    profile = GPUMemoryProfile(snapshot_dir=str(tmp_path / "snapshots"))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        fit(tmp_path, stubs, profile, failing, logger=False)
    assert [path.name for path in profile.snapshots] == ["out-of-memory-step=000001-rank=0.json"]
    assert "out of memory at step 1, rank 0: rss" in capsys.readouterr().out
    seen: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        (torch.ones(2, requires_grad=True) ** 2).sum()
    assert seen  # the profile's own hooks do not stay on the stack


def test_other_errors_leave_none(tmp_path: Path, stubs: ModuleType) -> None:
    class Failing(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("something else")

    profile = GPUMemoryProfile()
    with pytest.raises(RuntimeError, match="something else"):
        fit(tmp_path, stubs, profile, Failing(), logger=False)
    assert profile.snapshots == []


@pytest.mark.parametrize("options", [{"record_history": True}, {"snapshot_steps": [0]}])
@pytest.mark.parametrize("failing", [True, False])
def test_recording_ends_with_the_training_however_it_ends(
    options: dict[str, Any], failing: bool, tmp_path: Path, stubs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr("callbacks.gpu_memory_profile.start_history", lambda: events.append("start"))
    monkeypatch.setattr("callbacks.gpu_memory_profile.stop_history", lambda: events.append("stop"))

    class Failing(Callback):
        def on_before_backward(self, *args: Any) -> None:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else") if failing else nullcontext():
        fit(tmp_path, stubs, GPUMemoryProfile(**options), *([Failing()] if failing else []), logger=False, max_steps=2)
    assert events == ["start", "stop"]


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("x"))


def test_the_peak_of_a_phase_is_seen_after_it_was_freed() -> None:
    meter = ProcessMemoryMeter()
    meter.reset_peak()
    before = meter.read()
    block = torch.ones(16 * 2**20)  # 64 MiB
    del block
    after = meter.read()
    assert after["peak"] - before["rss"] > 50 * 2**20


def test_storages_are_counted_once() -> None:
    tensor = torch.zeros(10, 10)
    assert sum(storages([tensor, tensor[0], tensor.T, None]).values()) == 400
    layer = torch.nn.Linear(4, 4, bias=False)
    tied = torch.nn.ModuleList([layer, layer])
    assert category_bytes(tied, []) == {"parameters": 64, "buffers": 0, "gradients": 0, "optimizer state": 0}


def test_saved_activations_are_what_autograd_keeps() -> None:
    layer = torch.nn.Linear(8, 16)
    counter = SavedActivations(layer)
    counter.start()
    layer(torch.zeros(4, 8)).exp().sum()
    assert counter.stop() == 4 * 8 * 4 + 4 * 16 * 4  # the input for the weight's gradient, exp's result for its own


def test_the_table() -> None:
    text = markdown_table({"parameters": 3 * 2**20, "gradients": 2**20}, "Memory")
    assert text.splitlines()[-3:] == ["| parameters | 3.00 | 75.0% |", "| gradients | 1.00 | 25.0% |", "| sum | 4.00 | 100.0% |"]


def test_tensors_of_a_compiler_that_hold_nothing_are_passed_over() -> None:
    """Their sizes may be symbols, too, which cannot be compared."""
    with FakeTensorMode():
        fake = torch.empty(1013, 1019)
    real = torch.empty(1013, 1021)
    found = [tensor["shape"] for tensor in largest_tensors()]
    assert list(real.shape) in found
    assert list(fake.shape) not in found
