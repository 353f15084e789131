"""A killed and resumed run is the uninterrupted one, to the bit; two processes train as one with the doubled batch."""

import json
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import ROOT, run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TWO = {"devices": 2, "strategy": "ddp"}


def run_process(folder: Path, expect: int = 0, **options: Any) -> str:
    """Train in a process of its own (which may be killed, or start a second); what it printed."""
    given = json.dumps({"folder": str(folder), **options})
    return run_python(ROOT / "tests" / "stub_run.py", given, expect=expect, cwd=folder.parent).stdout


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# Steps of two micro-batches, over the end of an epoch of 7 batches, validated every 3 batches: also right after a checkpoint.
OPTIONS: dict[str, Any] = {"max_steps": 9, "accumulate_grad_batches": 2, "data": {"batches": 7}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, stubs: ModuleType) -> dict[int, tuple[float, float]]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    stubs.main({"folder": folder, **OPTIONS})
    return stubs.read_steps(folder)


@pytest.mark.parametrize("kill_after", [3, 7])
def test_kill_9_and_resume_to_the_bit(
    kill_after: int, uninterrupted: dict[int, tuple[float, float]], tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run_process(folder, expect=-signal.SIGKILL, kill_after=kill_after, **OPTIONS)
    assert max(stubs.read_steps(folder)) == kill_after
    (folder / "steps-0.txt").unlink()
    # Another seed: everything random must come from the checkpoint.
    stubs.main({"folder": folder, "resume": str(folder / "checkpoints" / "last.ckpt"), "seed": 99, **OPTIONS})
    saved = kill_after - 1
    assert f"resumed from step {saved}: {folder / 'checkpoints' / 'last.ckpt'}\n" in capsys.readouterr().out
    resumed = stubs.read_steps(folder)
    assert list(resumed) == list(range(saved + 1, 10))
    assert resumed == {step: values for step, values in uninterrupted.items() if step > saved}


@pytest.mark.parametrize("stop", range(1, 9))
def test_stop_anywhere_and_resume_to_the_bit(
    stop: int, uninterrupted: dict[int, tuple[float, float]], tmp_path: Path, stubs: ModuleType
) -> None:
    folder = tmp_path / "run"
    stubs.main({"folder": folder, **OPTIONS, "max_steps": stop, "model": {"decay_steps": 9}})
    stubs.main({"folder": folder, "resume": str(folder / "checkpoints" / "last.ckpt"), "seed": 99, **OPTIONS})
    assert stubs.read_steps(folder) == uninterrupted


def test_another_seed_draws_other_numbers(uninterrupted: dict[int, tuple[float, float]], tmp_path: Path, stubs: ModuleType) -> None:
    """Else the tests above could not fail."""
    stubs.main({"folder": tmp_path, **OPTIONS, "max_steps": 1, "seed": 99})
    assert stubs.read_steps(tmp_path)[1][1] != uninterrupted[1][1]


def test_kill_9_in_the_midst_of_a_save(tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    run_process(folder, expect=-signal.SIGKILL, max_steps=6, kill_in_save=[4, 1000])
    checkpoints = folder / "checkpoints"
    assert len(list(checkpoints.glob(".*.tmp"))) == 1
    stubs.main({"folder": folder, "resume": str(checkpoints / "last.ckpt"), "max_steps": 6})
    assert "resumed from step 2: " in capsys.readouterr().out
    assert list(checkpoints.glob(".*")) == []
    assert max(stubs.read_steps(folder)) == 6


def test_a_resumed_run_goes_on_where_the_curves_ended(tmp_path: Path, stubs: ModuleType) -> None:
    """No second validation before the first step, no step twice, no token lost."""
    stubs.main({"folder": tmp_path, "max_steps": 4})
    stubs.main({"folder": tmp_path, "max_steps": 6, "resume": str(tmp_path / "checkpoints" / "last.ckpt")})
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["val/loss"]] == [0, 3, 6]
    assert [step for step, _ in logged["train/loss"]] == [0, 1, 2, 3, 4, 5]
    assert [value for _, value in logged["train/tokens"]] == [step * 4 * stubs.SEQ_LEN for step in range(1, 7)]


@pytest.mark.filterwarnings("ignore:set_hem changed the parameters:UserWarning")
def test_a_converted_network_is_saved_with_the_configuration_it_has_now(tmp_path: Path, stubs: ModuleType) -> None:
    module, trainer = stubs.make_module(), stubs.make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=stubs.StubData())
    module.network.set_hem(False)
    trainer.save_checkpoint(tmp_path / "converted.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "converted.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["network"]["use_hem"] is False
    again = type(module)(**checkpoint["hyper_parameters"])
    again.load_state_dict(checkpoint["state_dict"])


def test_two_processes(tmp_path: Path, stubs: ModuleType) -> None:
    """They train as one with the doubled batch, and resume to the bit, each rank with its own random states."""
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    # With a large ε, Adam does not turn the rounding of tiny gradients into steps of full size.
    options = {"max_steps": 6, "checkpoint_every": 4, "model": {"eps": 1e-3, "network": {"planning_loss": "normalized"}}}
    stubs.main({"folder": one, "data": {"batch_size": 8}, **options})
    run_process(two, data={"batch_size": 4}, **options, **TWO)
    expected, found = stubs.read_steps(one), stubs.read_steps(two)
    assert list(found) == list(range(1, 7))
    for step, (loss, _) in expected.items():
        assert found[step][0] == pytest.approx(loss, rel=1e-6), step
    curves, others = scalars(one), scalars(two)
    assert curves.keys() == others.keys()
    for tag in ("train/loss", "train/loss_aux", "train/grad_norm", "train/lr", "train/tokens", "val/loss"):
        assert others[tag] == [(step, pytest.approx(value, rel=1e-5)) for step, value in curves[tag]], tag

    (fourth,) = (two / "checkpoints").glob("step=000004-*.ckpt")
    assert fourth.name == f"step=000004-loss={others['train/loss'][3][1]:.3f}.ckpt"  # the mean of the ranks
    run_process(resumed, data={"batch_size": 4}, resume=str(fourth), seed=99, **options, **TWO)
    for rank in (0, 1):
        after = {step: values for step, values in stubs.read_steps(two, rank).items() if step > 4}
        assert stubs.read_steps(resumed, rank) == after
    assert stubs.read_steps(two, 0)[5][1] != stubs.read_steps(two, 1)[5][1]
