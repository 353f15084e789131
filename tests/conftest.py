"""Every test starts from the same random state and, where it asks for it, with poisoned memory."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmrec.stop_signals import default_stop_signals, stop_signals_kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that would silently take the other form of an operator fails instead."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if item.get_closest_marker("interpreted") and not interprets:
        pytest.fail("needs TRITON_INTERPRET=1 before Python starts; `make test` sets it")
    if item.get_closest_marker("gpu") and interprets:
        pytest.fail("TRITON_INTERPRET=1 runs no kernel on a GPU; unset it")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """After a test the environment is as before: Lightning leaves LOCAL_RANK there, and whoever finds it waits for others' ranks."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """After a `fit` within the test's process, signals end that process again."""
    yield
    if stop_signals_kept():
        default_stop_signals()


@pytest.fixture(scope="session")
def stubs() -> ModuleType:
    """tests/stub_run.py, the small training run of the tests of module and callbacks; it imports Lightning, so only where asked for."""
    return importlib.import_module("stub_run")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so that an element nobody wrote shows."""
    # On a GPU the truth itself may use a sum that PyTorch calls nondeterministic: only the poison is wanted.
    torch.use_deterministic_algorithms(True, warn_only=True)
    previous, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = previous
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/document.py, whose modules import each other as scripts of one folder do; gone from the interpreter afterwards."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield __import__("document")
    for name in [
        name for name in sys.modules if name == "document" or name.startswith(("document_", "decode_options", "train_step_cases"))
    ]:
        del sys.modules[name]
