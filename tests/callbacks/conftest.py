"""The small training run that these tests share."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

STUBS = Path(__file__).parents[1] / "lightning_modules" / "stub_run.py"


@pytest.fixture(scope="session")
def stubs() -> ModuleType:
    """tests/lightning_modules/stub_run.py as a module."""
    if "stub_run" not in sys.modules:
        spec = importlib.util.spec_from_file_location("stub_run", STUBS)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["stub_run"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["stub_run"]
