"""Files whole or not at all, folders that cannot be written, checkpoints that are damaged or would run code."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmrec.files import (
    DamagedCheckpointError,
    link_or_copy,
    read_checkpoint,
    remove_leftovers,
    replacing,
    require_writable,
    write_atomically,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_written_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    for content in (b"first", b"second"):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert names(path.parent) == ["a"]


def test_the_bytes_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        events.append("sync " + ("folder" if os.path.samestat(os.fstat(descriptor), os.stat(tmp_path)) else "file"))
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_atomically(tmp_path / "a", b"content")
    assert events == ["sync file", "rename", "sync folder"]


def test_an_error_midway_leaves_the_old_file_alone(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")

    def interrupted() -> None:
        with replacing(tmp_path / "a") as temporary:
            assert temporary.parent == tmp_path
            temporary.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_temporary_file_of_a_killed_process_is_not_written_through(tmp_path: Path) -> None:
    """It may be a hard link of a good file."""
    good = tmp_path / "good"
    good.write_bytes(b"good")
    os.link(good, tmp_path / f".a.{os.getpid()}.tmp")
    write_atomically(tmp_path / "a", b"new")
    assert good.read_bytes() == b"good"


def test_a_link_replaces_what_was_there_in_one_step(tmp_path: Path) -> None:
    first, second, last = tmp_path / "first", tmp_path / "second", tmp_path / "last"
    first.write_text("1")
    second.write_text("2")
    for source in (first, second, second):
        link_or_copy(source, last)
        assert last.read_text() == source.read_text()
        assert os.path.samefile(last, source)
    assert names(tmp_path) == ["first", "last", "second"]


def test_without_hard_links_it_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "first").write_text("1")
    link_or_copy(tmp_path / "first", tmp_path / "last")
    assert (tmp_path / "last").read_text() == "1"
    assert not os.path.samefile(tmp_path / "last", tmp_path / "first")


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".last.ckpt.12.tmp", ".hidden", "last.ckpt", "mine.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "last.ckpt", "mine.tmp"]


def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "deeper", "folder")
    require_writable(tmp_path, "folder")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=rf"^output {folder} cannot be written: .*/file is a file; choose another folder$"):
            require_writable(folder, "output")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", full)
        with pytest.raises(OSError, match=rf"^output {tmp_path}/x cannot be written: no space left on device; choose another folder$"):
            require_writable(tmp_path / "x", "output")
    # Permissions do not bind root, under whom tests may run: the system's answer is what is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
    with pytest.raises(PermissionError, match=rf"^output {tmp_path}/x cannot be written: no permission in {tmp_path}; choose another"):
        require_writable(tmp_path / "x", "output")
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(PermissionError, match=rf"^output {tmp_path}/x cannot be written: read-only file system; choose another folder$"):
        require_writable(tmp_path / "x", "output")


def test_a_write_that_breaks_off_says_of_what(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"\[Errno 28\]") as broken, replacing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert broken.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="other") as broken, replacing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device", "other")
    assert broken.value.filename == "other"
    with pytest.raises(OSError, match=r"^a sentence$"), replacing(tmp_path / "a"):
        raise OSError("a sentence")


@pytest.mark.parametrize("mmap", [False, True])
def test_a_checkpoint_is_read(tmp_path: Path, mmap: bool) -> None:
    torch.save({"weights": torch.arange(5), "step": 3}, tmp_path / "a.ckpt")
    loaded = read_checkpoint(tmp_path / "a.ckpt", mmap=mmap)
    assert loaded["step"] == 3
    assert torch.equal(loaded["weights"], torch.arange(5))


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"weights": torch.zeros(1000)}, path)
    read_checkpoint(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    torch.save({"weights": torch.zeros(1000)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    faulty = {"half": whole[:middle], "empty": b"", "text": b"hello", "flipped": flipped, "old": (tmp_path / "old").read_bytes()}
    for name, content in faulty.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^checkpoint .*{name}\.ckpt is damaged or no checkpoint \(.*\); use another one") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"^no checkpoint .*none\.ckpt; give the path of a \.ckpt file, or 'last'$"):
        read_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("mmap", [False, True])
def test_no_flipped_bit_anywhere_goes_unseen_unless_it_changes_nothing(tmp_path: Path, mmap: bool) -> None:
    """Data, pickle, the records' headers, the directory: torch.load alone takes one in five for another content."""
    content = {"weights": torch.arange(8.0), "step": 3, "name": "x"}
    torch.save(content, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    path, seen = tmp_path / "a.ckpt", 0
    for place in range(len(whole)):
        path.unlink(missing_ok=True)  # another file each time: what is known of one of this size and age is kept
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            loaded = read_checkpoint(path, mmap=mmap)
        except DamagedCheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017
            seen += 1
            continue
        assert loaded.keys() == content.keys()
        assert torch.equal(loaded["weights"], content["weights"])
        assert (loaded["step"], loaded["name"]) == (3, "x")
    assert seen > len(whole) / 3  # the rest is padding between records


def test_a_disk_that_fails_to_read_is_a_damage_and_a_missing_right_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        torch.save({"step": 1}, tmp_path / name)

    def broken(number: int) -> Callable[[str], None]:
        def fail(path: str) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    monkeypatch.setattr("zipfile.ZipFile", broken(errno.EIO))
    with pytest.raises(DamagedCheckpointError, match=r"is damaged or no checkpoint \(input/output error\)"):
        read_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setattr("zipfile.ZipFile", broken(errno.EACCES))
    with pytest.raises(PermissionError):
        read_checkpoint(tmp_path / "b.ckpt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "canary",)

    torch.save({"state_dict": Touch()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"^checkpoint .*a\.ckpt is refused: it holds more than tensors and plain types$"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "canary").exists()
