"""What is bad input and what is a bug; jsonargparse's texts reduced; the nearest name."""

import errno
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.tokenizer import load_tokenizer
from mmrec.commandline.errors import BadInputError, bad_input_message, one_line_errors
from mmrec.commandline.parse_errors import one_line
from mmrec.config import MMRecConfig
from mmrec.nearest import nearest_key, nearest_name


def message_of(action: Callable[[], object]) -> str | None:
    try:
        action()
    except Exception as error:
        return bad_input_message(error)
    raise AssertionError("nothing was raised")


def test_what_our_packages_raise_is_bad_input() -> None:
    assert message_of(lambda: MMRecConfig(model_dim=8, num_heads=3)).startswith("num_heads = 3 does not divide")
    assert message_of(lambda: load_tokenizer("none.json")).startswith("no tokenizer file none.json")
    assert message_of(lambda: Path("none.txt").read_text()) == "none.txt: no such file or directory"


def test_a_package_that_lightning_misses_is_one_line_and_one_that_our_code_misses_is_a_bug() -> None:
    assert bad_input_message(ModuleNotFoundError("install psutil\nHINT: pip")) == "install psutil HINT: pip"
    with pytest.raises(ModuleNotFoundError) as missing:
        importlib.import_module("no_such_module_at_all")
    assert bad_input_message(missing.value) is None


def test_what_a_bug_raises_keeps_its_traceback() -> None:
    assert message_of(lambda: torch.zeros(2).view(3, 3)) is None  # RuntimeError
    assert message_of(lambda: torch.nn.functional.one_hot(torch.tensor([1]), -2)) is None
    assert message_of(lambda: int("x")) is None  # a ValueError, but nobody's word to the user
    with pytest.raises(ZeroDivisionError), one_line_errors():
        1 / 0  # noqa: B018


def raises(error: Exception) -> Callable[[], object]:
    """Something that raises outside of our packages."""

    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (
            errno.ENOSPC,
            "no space left on device; free some space (df shows which disk is full), or choose another folder (trainer.default_",
        ),
        (errno.EDQUOT, "disk quota exceeded; delete files of yours, ask for a larger quota, or choose another folder (trainer."),
        (errno.EROFS, "read-only file system; choose another folder (trainer.default_root_dir, data.cache_dir, --output; TMPDIR is"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line_wherever_it_is_found_out(number: int, text: str) -> None:
    said = os.strerror(number)
    assert message_of(raises(OSError(number, said))).startswith(text)
    assert message_of(raises(OSError(number, said, "a/b"))).startswith(f"a/b: {text}")
    assert message_of(raises(Exception(f"I/O error: {said} (os error {number})"))).startswith(text)  # tokenizers, safetensors
    assert message_of(lambda: list(DataLoader(_Broken(OSError(number, said)), num_workers=1))).startswith(text)
    assert message_of(raises(OSError(errno.EIO, os.strerror(errno.EIO)))) is None
    assert message_of(raises(RuntimeError(f"of [Errno {number}] and (os error {number}) somewhere"))) is None


class _Broken(Dataset):
    def __init__(self, ours: bool | Exception) -> None:
        self.ours = ours

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        if isinstance(self.ours, Exception):
            raise self.ours
        return load_tokenizer("none.json") if self.ours else int("x")


def test_an_error_of_ours_in_a_data_worker_is_one_line_and_a_bug_there_is_not() -> None:
    assert message_of(lambda: list(DataLoader(_Broken(ours=True), num_workers=1))).startswith("no tokenizer file none.json")
    assert message_of(lambda: list(DataLoader(_Broken(ours=False), num_workers=1))) is None


def test_the_line_is_one_and_the_exit_code_two(capsys) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise BadInputError("first\n  second")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: first second\n"


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False)])
def test_the_traceback_is_shown_where_it_is_asked_for(value: str, shown: bool, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMREC_TRACEBACK", value)
    for arguments in (["configs", "nope"], ["fit", "--config", "cpu_tiny", "--trainer.max_steps", "x"]):
        ended = cli(*arguments)
        assert ended.code == 2
        assert ended.err.splitlines()[-1].startswith("error: ")
        assert ended.err.startswith("Traceback (most recent call last):") is shown


def test_a_text_that_is_not_recognised_is_joined_to_one_line() -> None:
    assert one_line("Something new:\n  - of which\n    nobody knew") == "Something new: - of which nobody knew"
    nested = (
        'Parser key "a.b":\n  Does not validate against any of the Union subtypes\n  Subtypes: [x]\n  Errors:\n    - Odd\n    - Odder\n'
    )
    assert one_line(nested).startswith("a.b: ")
    assert "\n" not in one_line(nested)


def test_a_number_below_its_bound_is_answered_in_words(cli) -> None:
    for value in ("-3", "0"):
        error = cli("configs", "--explain", "cpu_tiny", "--gpu-memory", value).error
        assert error == f"gpu_memory: expected a number of GB above 0, got {value}"
    assert cli("doctor", "--distributed", "--min_bus_bandwidth", "-1").error.endswith("expected a number of GB/s above 0, got -1")
    assert one_line('Parser key "a":\n  Not of type NonNegativeFloat: -2 does not conform') == "a: expected a number from 0, got -2"


def test_the_nearest_name() -> None:
    names = ["learning_rate", "eps", "betas", "warmup_steps"]
    assert nearest_name("lr", names) == "learning_rate"
    assert nearest_name("warm", names) == "warmup_steps"
    assert nearest_name("epz", names) == "eps"
    assert nearest_name("zzzz", names, cutoff=0.5) is None
    assert nearest_name("x", []) is None
    keys = ["trainer.max_steps", "trainer.max_epochs", "model.network.model_dim", "model.eps"]
    assert nearest_key("model.model_dim", keys) == "model.network.model_dim"
    assert nearest_key("trainer.maxsteps", keys) == "trainer.max_steps"
    assert nearest_key("model.ep", keys) == "model.eps"
