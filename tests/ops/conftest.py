"""Under the interpreter every kernel runs with small tiles, and without the interpreter's costliest habit."""

from collections.abc import Iterator

import pytest
from kernel_tools import patch_language_once
from tiles import small_tiles

from mmrec.ops.tuning import overridden


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.node.get_closest_marker("interpreted") is None:
        yield
        return
    patch_language_once(monkeypatch)
    with overridden(**small_tiles()):
        yield
