"""Under the interpreter every kernel runs with small tiles, and without the interpreter's costliest habit."""

from collections.abc import Iterator

import pytest
from kernel_tools import small_where_interpreted
from tiles import small_tiles

from mmrec.ops.tuning import overridden


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from small_where_interpreted(request, monkeypatch, lambda: overridden(**small_tiles()))
