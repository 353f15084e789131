"""Every test starts from the same random state and, where it asks for it, with poisoned memory."""

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stubs() -> ModuleType:
    """tests/stub_run.py, the small training run of the tests of module and callbacks; it imports Lightning, so only where asked for."""
    return importlib.import_module("stub_run")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    previous, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = previous
    torch.use_deterministic_algorithms(False)
