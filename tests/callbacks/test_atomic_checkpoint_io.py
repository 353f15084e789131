"""A checkpoint is there and whole, or not there; what cannot be written or read is one line."""

import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import environment

from callbacks.atomic_checkpoint_io import AtomicCheckpointIO


@pytest.fixture
def io() -> AtomicCheckpointIO:
    return AtomicCheckpointIO()


def test_what_is_saved_is_loaded_onto_the_cpu_and_leaves_nothing_else(io: AtomicCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    io.save_checkpoint({"weights": torch.arange(5), "step": 3}, path)
    loaded = io.load_checkpoint(path)
    assert loaded["step"] == 3
    assert torch.equal(loaded["weights"], torch.arange(5))
    assert [entry.name for entry in path.parent.iterdir()] == ["a.ckpt"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 64 kB: the write fails midway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


def test_a_write_that_fails_midway_leaves_the_old_checkpoint(io: AtomicCheckpointIO, tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*last\.ckpt: File too large; it needs about 4\.0 MiB and") as error:
        io.save_checkpoint({"step": 2, "weights": torch.zeros(2**20)}, path)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("MiB are free; make room")
    assert io.load_checkpoint(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_larger_than_the_disk_is_not_begun(io: AtomicCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("callbacks.atomic_checkpoint_io.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"no space left on the disk; it needs about 4\.0 MiB and 1\.0 MiB are free"):
        io.save_checkpoint({"nested": [{"weights": torch.zeros(2**20)}]}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def tied() -> Any:
    head = torch.nn.Linear(256, 1024, bias=False)
    return {"state_dict": {"embedding.weight": head.weight.detach(), "head.weight": head.weight.detach()}, "callbacks": [head.weight]}


def views() -> Any:
    whole = torch.zeros(2**18)
    return {"row": whole[:10], "rows": (whole.view(512, 512)[::2], torch.zeros(1, dtype=torch.int8).expand(2**20))}


def in_8_bit() -> Any:
    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    return {"moment": torchao.OptimState8bit.zeros((1024, 256)), "step": torch.tensor(1.0), "empty": torch.zeros(0)}


@pytest.mark.parametrize("state", [tied, views, in_8_bit])
def test_the_room_it_asks_for_is_that_of_the_file(
    state: Callable[[], Any], io: AtomicCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are shared are written once, and of a view all that it is a view of."""
    checkpoint = state()
    torch.save(checkpoint, tmp_path / "plain")
    size = (tmp_path / "plain").stat().st_size
    for free, fits in ((size, True), (size - 8192, False)):  # names and the archive's own take a few kB
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("callbacks.atomic_checkpoint_io.shutil.disk_usage", lambda path, usage=usage: usage)
        with nullcontext() if fits else pytest.raises(OSError, match="no space left on the disk"):
            io.save_checkpoint(checkpoint, tmp_path / f"{fits}.ckpt")
        assert (tmp_path / f"{fits}.ckpt").exists() == fits


def test_a_folder_that_cannot_be_made(io: AtomicCheckpointIO, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*a\.ckpt: .*(exists|Not a directory)"):
        io.save_checkpoint({}, tmp_path / "file" / "a.ckpt")


def test_an_error_that_is_not_the_disks_is_left_as_it_is(io: AtomicCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("not about the disk")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match=r"^not about the disk$"):
        io.save_checkpoint({}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_what_it_loads_is_checked_and_runs_nothing(io: AtomicCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    io.save_checkpoint({"weights": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    (tmp_path / "flipped.ckpt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"^checkpoint .*flipped\.ckpt is damaged or no checkpoint \(its checksums do not fit"):
        io.load_checkpoint(tmp_path / "flipped.ckpt")
    torch.save({"module": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(ValueError, match=r"is refused: it holds more than tensors and plain types$"):
        io.load_checkpoint(path, weights_only=False)


def test_what_is_loaded_is_mapped_and_may_be_written_over(io: AtomicCheckpointIO, tmp_path: Path) -> None:
    """Without a change of the file, and though its name has gone."""
    path = tmp_path / "a.ckpt"
    io.save_checkpoint({"weights": torch.ones(100_000)}, path)
    first = io.load_checkpoint(path)["weights"]
    assert str(path) in Path("/proc/self/maps").read_text()
    first.fill_(2.0)
    second = io.load_checkpoint(path)["weights"]
    path.unlink()
    assert torch.equal(second, torch.ones(100_000))
    assert torch.equal(first, torch.full((100_000,), 2.0))


SAVER = """
import sys, torch
from callbacks import AtomicCheckpointIO
from mmrec.files import link_or_copy
from pathlib import Path
folder = Path(sys.argv[1])
for step in range(10_000):
    copy = folder / f"step={step % 3}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": step, "weights": torch.full((200_000,), float(step))}, copy)
    link_or_copy(copy, folder / "last.ckpt")
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_whole_files(io: AtomicCheckpointIO, tmp_path: Path) -> None:
    """One process that saves all the time, killed after more and more saves, at whatever point the next one has come to."""
    for saves in (1, 5):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(saves):
                printed = int(process.stdout.readline())
            process.kill()
        last = io.load_checkpoint(tmp_path / "last.ckpt")
        assert last["step"] >= printed
        for path in tmp_path.glob("*.ckpt"):
            loaded = io.load_checkpoint(path)
            assert torch.equal(loaded["weights"], torch.full((200_000,), float(loaded["step"])))
