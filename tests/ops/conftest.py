"""Under the interpreter every kernel runs with small tiles, and without the interpreter's costliest habit."""

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import triton.language as tl
from tiles import small_tiles
from triton.runtime import interpreter

from mmrec.ops.tuning import overridden


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.node.get_closest_marker("interpreted") is None:
        yield
        return
    patch_language = interpreter._patch_lang
    patched: set[frozenset[str]] = set()

    def patch_language_once(function):
        """Every call of a device function patches Triton's language anew, a third of the run time: once a kernel is enough."""
        seen = {v.__name__ for v in function.__globals__.values() if isinstance(v, ModuleType) and v in (tl, tl.core)}
        if seen in patched:
            return None
        patched.add(frozenset(seen))
        scope = patch_language(function)

        def restore():  # called for the kernel alone
            patched.clear()
            scope.restore()

        return SimpleNamespace(restore=restore)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_language_once)
    with overridden(**small_tiles()):
        yield
