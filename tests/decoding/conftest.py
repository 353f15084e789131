"""Under the interpreter the kernels run with small tiles, and without the interpreter's costliest habit."""

from collections.abc import Iterator

import pytest
from decoding_cases import SMALL
from kernel_tools import small_where_interpreted

from mmrec.decoding.tiles import overridden


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from small_where_interpreted(request, monkeypatch, lambda: overridden(**SMALL))
