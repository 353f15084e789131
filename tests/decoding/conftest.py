"""Under the interpreter the kernels run with small tiles, and without the interpreter's costliest habit."""

from collections.abc import Iterator

import pytest
from decoding_cases import SMALL
from kernel_tools import patch_language_once

from mmrec.decoding.tiles import overridden


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.node.get_closest_marker("interpreted") is None:
        yield
        return
    patch_language_once(monkeypatch)
    with overridden(**SMALL):
        yield
