"""A checkpoint written behind the training: what it holds, how many at a time, what becomes of errors, and that nothing is left undone."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import environment

from callbacks import AtomicCheckpointIO, BackgroundCheckpointIO

PATIENCE = 30.0


class Gate:
    """Stands in for torch.save: writing waits until it is opened; how many are in it at a time is counted."""

    def __init__(self, real: Callable[..., None]) -> None:
        self.real, self.entered, self.open = real, threading.Semaphore(0), threading.Event()
        self.inside = self.most = 0

    def __call__(self, *arguments: Any) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.release()
        assert self.open.wait(PATIENCE)
        self.real(*arguments)
        self.inside -= 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(torch.save)
    monkeypatch.setattr(torch, "save", gate)
    return gate


@pytest.fixture
def io() -> Iterator[BackgroundCheckpointIO]:
    io = BackgroundCheckpointIO()
    yield io
    io.teardown()


def state() -> dict[str, Any]:
    """What checkpoints hold: tied weights, a view, an empty tensor, several dtypes, nested containers, plain values."""
    weight = torch.randn(40, 30)
    module = torch.nn.Linear(3, 4)
    return {
        "state_dict": {"embedding": weight, "head": weight, "row": weight[3], "transposed": weight.t()},
        "module": module.state_dict(),  # an OrderedDict with metadata
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "codes": torch.arange(9, dtype=torch.uint8)}}}],
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "plain": {"lists": [[1, 2.5], ("a", None, True)], "number": 10**12},
    }


def test_the_file_is_that_of_the_plain_one_to_the_byte(io: BackgroundCheckpointIO, tmp_path: Path) -> None:
    content = state()
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "plain.ckpt")
    for _ in range(2):  # the second from the memory that the first has left
        io.save_checkpoint(content, tmp_path / "behind.ckpt")
        io.wait()
        assert (tmp_path / "behind.ckpt").read_bytes() == (tmp_path / "plain.ckpt").read_bytes()
        (tmp_path / "behind.ckpt").unlink()
    loaded = io.load_checkpoint(tmp_path / "plain.ckpt")["state_dict"]
    assert loaded["embedding"].data_ptr() == loaded["head"].data_ptr()


def test_a_thread_can_wait_for_a_write_but_not_for_ever(io: BackgroundCheckpointIO, gate: Gate, tmp_path: Path) -> None:
    io.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    io.linger(0.01)
    assert not (tmp_path / "a.ckpt").exists()
    waiting = threading.Thread(target=io.linger, args=(PATIENCE,))
    waiting.start()
    gate.open.set()
    waiting.join()
    assert (tmp_path / "a.ckpt").exists()


def test_the_file_holds_what_was_there_when_it_was_saved(io: BackgroundCheckpointIO, gate: Gate, tmp_path: Path) -> None:
    content = {"weights": torch.zeros(1000), "nested": [{"lr": 0.5}], "step": torch.tensor(1)}
    io.save_checkpoint(content, tmp_path / "a.ckpt")
    assert gate.entered.acquire(timeout=PATIENCE)
    content["weights"].fill_(7.0)  # the next step
    content["nested"][0]["lr"] = 0.25
    content["step"] += 1
    gate.open.set()
    io.wait()
    loaded = io.load_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded["weights"], torch.zeros(1000))
    assert (loaded["nested"], int(loaded["step"])) == ([{"lr": 0.5}], 1)


def test_saving_returns_before_the_file_is_there_and_one_is_written_at_a_time(
    io: BackgroundCheckpointIO, gate: Gate, tmp_path: Path
) -> None:
    events: list[str] = []
    io.save_checkpoint({"step": 1}, tmp_path / "1.ckpt")
    io.then(lambda: events.append(f"after 1: {sorted(path.name for path in tmp_path.glob('*.ckpt'))}"))
    assert gate.entered.acquire(timeout=PATIENCE)
    assert list(tmp_path.glob("*.ckpt")) == []
    assert events == []
    second = threading.Thread(target=lambda: (io.save_checkpoint({"step": 2}, tmp_path / "2.ckpt"), events.append("saved 2")))
    second.start()
    gate.open.set()
    second.join(PATIENCE)
    io.wait()
    assert events == ["after 1: ['1.ckpt']", "saved 2"]
    assert gate.most == 1
    assert [io.load_checkpoint(tmp_path / f"{step}.ckpt")["step"] for step in (1, 2)] == [1, 2]


def test_a_write_that_fails_is_told_once_and_what_should_follow_it_is_left_out(io: BackgroundCheckpointIO, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done: list[str] = []
    io.save_checkpoint({"step": 1}, tmp_path / "file" / "a.ckpt")
    io.then(lambda: done.append("followed"))
    with pytest.raises(OSError, match=r"^cannot write the checkpoint .*a\.ckpt: "):
        io.save_checkpoint({"step": 2}, tmp_path / "b.ckpt")
    assert done == []
    assert not (tmp_path / "b.ckpt").exists()
    io.save_checkpoint({"step": 3}, tmp_path / "c.ckpt")
    io.then(lambda: done.append("c"))
    io.wait()
    assert done == ["c"]
    assert io.load_checkpoint(tmp_path / "c.ckpt") == {"step": 3}


def test_at_the_end_a_failure_is_raised_or_printed_where_another_error_is_under_way(
    io: BackgroundCheckpointIO, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    io.save_checkpoint({}, tmp_path / "file" / "a.ckpt")
    with pytest.raises(OSError, match="cannot write the checkpoint"):
        io.teardown()
    io.save_checkpoint({}, tmp_path / "file" / "a.ckpt")
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        io.teardown()
    assert capsys.readouterr().err.startswith("error: cannot write the checkpoint ")


def test_without_memory_for_a_copy_it_is_written_at_once(
    io: BackgroundCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore")

    monkeypatch.setattr("callbacks.host_copy.HostCopy.take", full)
    with pytest.warns(UserWarning, match=r"^host memory cannot hold a checkpoint \(DefaultCPUAllocator.*\): it is written at once; set"):
        io.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    assert io.load_checkpoint(tmp_path / "a.ckpt") == {"step": 1}


def test_after_its_end_it_begins_anew(io: BackgroundCheckpointIO, tmp_path: Path) -> None:
    for step in (1, 2):
        io.save_checkpoint({"step": step, "weights": torch.ones(3)}, tmp_path / "a.ckpt")
        io.teardown()
        assert io.load_checkpoint(tmp_path / "a.ckpt")["step"] == step


SLOW = """
import sys, threading, time, torch
from callbacks import BackgroundCheckpointIO
real, folder = torch.save, sys.argv[1]
def slow(content, file):
    if content["step"] == 2:
        file.write(b"half")
        file.flush()
        print("writing", flush=True)
        time.sleep(float(sys.argv[2]))
        file.seek(0)
    real(content, file)
torch.save = slow
io = BackgroundCheckpointIO()
for step in (1, 2):
    io.save_checkpoint({"step": step}, folder + "/last.ckpt")
"""


def saving_process(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that has written step 1, takes `seconds` to write step 2, and has nothing else left to do."""
    return subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(seconds)], env=environment(), stdout=subprocess.PIPE, text=True)


def test_a_process_ends_after_its_last_write_and_a_kill_in_it_leaves_the_one_before(io: BackgroundCheckpointIO, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("left_alone", "killed")]
    for folder in folders:
        folder.mkdir()
    with saving_process(folders[0], 1.0) as left_alone, saving_process(folders[1], 1000.0) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "writing\n"
        killed.send_signal(signal.SIGKILL)
        assert left_alone.wait(120) == 0
    assert [io.load_checkpoint(folder / "last.ckpt")["step"] for folder in folders] == [2, 1]
    assert len(list(folders[1].glob(".last.ckpt.*.tmp"))) == 1  # half of step 2, which the next start removes
