"""Names and order of a run's checkpoints, and which of them is gone on from when some are damaged."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmrec.checkpoint_files import BEST, LAST, best_copies, best_name, copies, copy_name, newest_readable, require_whole
from mmrec.files import DamagedCheckpointError


def write(folder: Path, step: int, seconds: int | None = None) -> Path:
    """A checkpoint of a step, written `seconds` (default: as many as steps) after another time; `last.ckpt` is a link to it."""
    folder.mkdir(exist_ok=True)
    path = folder / copy_name(step, 1.0)
    torch.save({"global_step": step, "weights": torch.full((1000,), float(step))}, path)
    os.utime(path, (1e9 + (step if seconds is None else seconds),) * 2)
    (folder / LAST).unlink(missing_ok=True)
    os.link(path, folder / LAST)
    return path


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """The newest first."""
    return [write(tmp_path, step) for step in (2, 4, 6)][::-1]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with open(path, "r+b") as file:  # in place: a hard link of it is the same file
        file.write(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    path.unlink()
    (path.parent / LAST).unlink(missing_ok=True)


DAMAGES = {"truncated": truncate, "flipped": flip, "emptied": empty, "removed": remove}


def test_copies_are_in_the_order_of_their_writing(tmp_path: Path) -> None:
    for step, seconds in ((10, 1), (2, 3), (4, 2), (6, 2)):
        write(tmp_path, step, seconds)
    for name in ("step=x-loss=1.ckpt", "step=000008-loss=1.000.ckpt.damaged", "best-step=000001-val_loss=1.000000.ckpt"):
        (tmp_path / name).touch()
    assert [path.name[5:11] for path in copies(tmp_path)] == ["000002", "000006", "000004", "000010"]
    assert copies(tmp_path / "none") == []


def test_the_best_is_the_one_of_the_lowest_loss(tmp_path: Path) -> None:
    for step, loss in ((5, 2.5), (100, 2.25), (7, 3.0)):
        (tmp_path / best_name(step, loss)).touch()
    (tmp_path / "best-step=000001-val_loss=none.ckpt").touch()
    assert [(best.step, best.val_loss) for best in best_copies(tmp_path)] == [(100, 2.25), (5, 2.5), (7, 3.0)]


def test_the_newest_is_last(three: list[Path], tmp_path: Path) -> None:
    assert newest_readable(tmp_path) == (tmp_path / LAST, [], "")
    assert newest_readable(tmp_path / "none") == (None, [], "")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_where_the_newest_is_damaged_the_one_before_is_chosen(damage: Callable[[Path], None], three: list[Path], tmp_path: Path) -> None:
    damage(three[0])
    choice = newest_readable(tmp_path)
    assert choice.path == three[1]
    gone = damage is remove
    assert choice.damaged == ([] if gone else [tmp_path / LAST, three[0]])
    fault = "is gone" if gone else r"is damaged or no checkpoint \(.*\)"
    assert re.fullmatch(rf".*{LAST} {fault}: using the one before, {re.escape(three[1].name)}", choice.remark)
    assert "\n" not in choice.remark
    damage(three[1])
    assert newest_readable(tmp_path).path == three[2]


def test_a_damaged_link_does_not_speak_of_the_copy_beside_it(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / LAST).unlink()
    (tmp_path / LAST).touch()
    assert newest_readable(tmp_path).path == three[0]


def test_where_none_is_whole_that_is_said_and_nothing_begun_anew(three: list[Path], tmp_path: Path) -> None:
    shutil.copyfile(three[2], tmp_path / BEST)
    for path in three:
        truncate(path)
    with pytest.raises(DamagedCheckpointError) as error:
        newest_readable(tmp_path)
    assert str(error.value).startswith(f"no checkpoint under {tmp_path} can be read: checkpoint {tmp_path / LAST} is damaged")
    assert str(error.value).endswith(f"; give --ckpt_path {tmp_path / BEST}, which is whole, or leave it out to begin anew")
    assert "\n" not in str(error.value)
    truncate(tmp_path / BEST)
    with pytest.raises(
        DamagedCheckpointError, match=r"; give one of another folder as --ckpt_path, or leave it out to begin anew$"
    ) as error:
        newest_readable(tmp_path)
    assert BEST not in str(error.value)


def test_one_that_was_named_and_is_damaged_names_a_whole_one(three: list[Path], tmp_path: Path) -> None:
    best = tmp_path / BEST
    shutil.copyfile(three[2], best)
    require_whole(best, tmp_path)
    truncate(best)
    for damaged, remedy in (
        ([], f"give --ckpt_path last, which takes {tmp_path / LAST}"),
        ([three[0]], f"give --ckpt_path last, which takes {three[1]}"),  # its link last.ckpt is damaged as well
        ([three[1], three[2]], "give one of another folder as --ckpt_path, none beside it is whole"),
    ):
        for path in damaged:
            truncate(path)
        with pytest.raises(DamagedCheckpointError) as error:
            require_whole(best, tmp_path)
        fault, _, said = str(error.value).partition("; ")
        assert fault.startswith(f"checkpoint {best} is damaged or no checkpoint (")
        assert said == remedy
    shutil.copyfile(write(tmp_path / "elsewhere", 3), tmp_path / "elsewhere" / BEST)
    truncate(tmp_path / "elsewhere" / BEST)
    with pytest.raises(DamagedCheckpointError, match=rf"; give --ckpt_path {tmp_path}/elsewhere/last\.ckpt, which is whole$"):
        require_whole(tmp_path / "elsewhere" / BEST, tmp_path)
    write(tmp_path, 8)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "x.ckpt").touch()
    with pytest.raises(DamagedCheckpointError, match=rf"; give --ckpt_path last, which takes {tmp_path}/last\.ckpt$"):
        require_whole(tmp_path / "alone" / "x.ckpt", tmp_path)


def test_one_that_would_run_code_is_not_passed_over(three: list[Path], tmp_path: Path) -> None:
    torch.save({"module": torch.nn.Linear(1, 1)}, tmp_path / LAST)
    with pytest.raises(ValueError, match=r"last\.ckpt is refused: it holds more than tensors and plain types$"):
        newest_readable(tmp_path)
