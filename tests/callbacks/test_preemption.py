"""A signal ends the run after the step it came in, saved once, and the resumed run is the uninterrupted one."""

import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from callbacks import Preemption, RandomStates, RunCheckpoint
from callbacks.stop_agreement import StopAgreement
from mmrec.stop_signals import keep_stop_signals, received_stop_signal, stop_signals_kept


class Signal(Callback):
    """Sends the process a signal in a hook, the first time it is called at or behind a step, and counts validations."""

    def __init__(self, hook: str, step: int = 0, number: int = signal.SIGTERM) -> None:
        self.sent, self.validated = False, []
        self._step, self._number = step, number
        setattr(self, hook, self._send)

    def _send(self, trainer: Trainer, *arguments: Any, **named: Any) -> None:
        if not self.sent and trainer.global_step >= self._step:
            self.sent = True
            os.kill(os.getpid(), self._number)

    def on_validation_end(self, trainer: Trainer, *arguments: Any) -> None:
        self.validated.append(trainer.global_step)


class Fit:
    """A fit of the stub run with a signal in it; validated every 3 batches."""

    def __init__(self, folder: Path, stubs: ModuleType, *callbacks: Callback, resume: bool = False, **options: Any) -> None:
        self.preemption, self.checkpoints = Preemption(), RunCheckpoint(every_n_steps=4)
        ours = [*callbacks, RandomStates(), self.preemption, self.checkpoints]
        self.trainer = stubs.make_trainer(folder, ours, **{"max_steps": 9, "logger": False} | options)
        self.module = stubs.make_module(decay_steps=9)
        self.last = folder / "checkpoints" / "last.ckpt"
        self.trainer.fit(self.module, datamodule=stubs.StubData(batches=20), ckpt_path=str(self.last) if resume else None)

    def saved_step(self) -> int:
        return torch.load(self.last, weights_only=True)["global_step"]


def test_it_stops_after_the_step_and_goes_on_to_the_bit(tmp_path: Path, stubs: ModuleType) -> None:
    straight = Fit(tmp_path / "straight", stubs)
    assert straight.preemption.stopped_by is None
    for number, step, resume in ((signal.SIGTERM, 2, False), (signal.SIGUSR1, 6, True)):
        keep_stop_signals()  # a process of its own would not know of the first
        stopped = Fit(tmp_path / "run", stubs, Signal("on_train_batch_start", step - 1, number), resume=resume)
        assert stopped.preemption.stopped_by is number
        assert stopped.preemption.stopped_at == stopped.trainer.global_step == stopped.saved_step() == step
        assert stopped.preemption.saved == stopped.last
        assert type(stopped.preemption.stopped_by) is signal.Signals
    keep_stop_signals()
    resumed = Fit(tmp_path / "run", stubs, resume=True)
    assert resumed.saved_step() == 9
    for name, value in straight.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


@pytest.mark.parametrize(("micro_batch", "step"), [(1, 1), (2, 1), (3, 2)])
def test_it_stops_at_the_end_of_a_step(micro_batch: int, step: int, tmp_path: Path, stubs: ModuleType) -> None:
    class Count(Callback):
        batches = 0

        def on_train_batch_start(self, *arguments: Any) -> None:
            self.batches += 1
            if self.batches == micro_batch:
                os.kill(os.getpid(), signal.SIGTERM)

    count = Count()
    stopped = Fit(tmp_path, stubs, count, accumulate_grad_batches=2)
    assert (stopped.preemption.stopped_at, stopped.saved_step(), count.batches) == (step, step, 2 * step)


@pytest.mark.parametrize(("step", "validated"), [(2, []), (3, [3]), (4, [3])])
def test_it_validates_only_where_that_is_due(step: int, validated: list[int], tmp_path: Path, stubs: ModuleType) -> None:
    sender = Signal("on_train_batch_start", step - 1)
    stopped = Fit(tmp_path, stubs, sender, num_sanity_val_steps=0)
    assert stopped.saved_step() == step
    assert sender.validated == validated


@pytest.mark.parametrize("step", [3, 4, 9])
def test_it_saves_once(step: int, tmp_path: Path, stubs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at a step that is saved anyway, and at the last."""
    steps: list[int] = []
    real = RunCheckpoint._save_checkpoint

    def recording(self: Any, trainer: Trainer, path: str) -> None:
        steps.append(trainer.global_step)
        real(self, trainer, path)

    monkeypatch.setattr(RunCheckpoint, "_save_checkpoint", recording)
    Fit(tmp_path, stubs, Signal("on_train_batch_start", step - 1))
    assert steps == [saved for saved in (4, 8) if saved < step] + [step]


def test_no_minimum_keeps_it_going(tmp_path: Path, stubs: ModuleType) -> None:
    stopped = Fit(tmp_path, stubs, Signal("on_train_batch_start", 1), min_steps=7, min_epochs=1)
    assert stopped.saved_step() == 2


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_sanity_check_start", "on_validation_batch_end"])
def test_before_the_first_batch_there_is_nothing_to_save(hook: str, tmp_path: Path, stubs: ModuleType) -> None:
    keep_stop_signals()  # as the command line does, before anything is set up
    stopped = Fit(tmp_path, stubs, Signal(hook))
    assert (stopped.preemption.stopped_by, stopped.preemption.stopped_at) == (signal.SIGTERM, 0)
    assert stopped.preemption.saved is None
    assert not stopped.last.exists()


def test_resumed_and_stopped_at_once_it_leaves_the_checkpoint_alone(tmp_path: Path, stubs: ModuleType) -> None:
    Fit(tmp_path, stubs, Signal("on_train_batch_start", 1))
    keep_stop_signals()
    written = (tmp_path / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    stopped = Fit(tmp_path, stubs, Signal("on_fit_start"), resume=True)
    assert (stopped.preemption.started_at, stopped.preemption.stopped_at, stopped.preemption.saved) == (2, 2, None)
    assert stopped.last.stat().st_mtime_ns == written


@pytest.mark.parametrize("hook", ["on_validation_start", "on_save_checkpoint"])
def test_what_is_under_way_is_finished(hook: str, tmp_path: Path, stubs: ModuleType) -> None:
    """A validation (behind step 3) or a checkpoint (of step 4); the run stops at the end of the step after."""
    stopped = Fit(tmp_path, stubs, Signal(hook, 3))
    assert stopped.saved_step() == {"on_validation_start": 4, "on_save_checkpoint": 5}[hook]


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "teardown"])
def test_a_run_at_its_end_has_ended_by_itself(hook: str, tmp_path: Path, stubs: ModuleType) -> None:
    finished = Fit(tmp_path, stubs, Signal(hook))
    assert finished.preemption.stopped_by is None
    assert finished.saved_step() == 9
    assert received_stop_signal() == signal.SIGTERM


def test_the_last_step_is_the_end(tmp_path: Path, stubs: ModuleType) -> None:
    finished = Fit(tmp_path, stubs, Signal("on_train_batch_start", 8))
    assert finished.preemption.stopped_by is None
    assert finished.saved_step() == 9


def test_without_checkpoints_it_stops_all_the_same(tmp_path: Path, stubs: ModuleType) -> None:
    preemption = Preemption()
    trainer = stubs.make_trainer(tmp_path, [Signal("on_train_batch_start", 1), preemption], logger=False)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    assert (preemption.stopped_at, preemption.saved) == (2, None)


def test_lightnings_own_ways_are_off(tmp_path: Path, stubs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are what they were when they were switched off: an attribute of another name would be set for nothing."""
    called: list[str] = []
    for owner, name in ((_SignalConnector, "register_signal_handlers"), (_TrainingEpochLoop, "_broadcast_sigterm_tensor")):
        assert callable(getattr(owner, name))
        monkeypatch.setattr(owner, name, lambda self, name=name: called.append(name))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    fit = Fit(tmp_path, stubs, max_steps=2)
    fit.trainer._signal_connector.register_signal_handlers()
    fit.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert called == []
    assert stop_signals_kept()
    assert isinstance(_TrainingEpochLoop(fit.trainer)._skip_next_val, bool)


def test_other_stages_leave_signals_alone(tmp_path: Path, stubs: ModuleType) -> None:
    trainer = stubs.make_trainer(tmp_path, [Preemption()], logger=False)
    trainer.validate(stubs.make_module(), datamodule=stubs.StubData(), verbose=False)
    assert not stop_signals_kept()


def test_one_process_agrees_with_itself_at_once() -> None:
    agreement = StopAgreement()
    assert [agreement.now(0), agreement.since_last(0), agreement.since_last(15), agreement.now(10)] == [0, 0, 15, 10]
    assert agreement.finish() == 10
    agreement.wait_for_all()


def _exchange(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    agreement = StopAgreement()
    heard = [agreement.now(0)]
    heard += [agreement.since_last(number if rank else 0) for number in (0, 10, 15, 0)]
    heard.append(agreement.finish())
    agreement.wait_for_all()
    Path(folder, str(rank)).write_text(repr(heard))


def test_two_ranks_hear_a_batch_later_the_same(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_exchange, (str(tmp_path),), nprocs=2, start_method="fork")
    assert {(tmp_path / str(rank)).read_text() for rank in (0, 1)} == {"[0, 0, 0, 10, 15, 0]"}
