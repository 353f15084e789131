"""`torch.compile` of a network's blocks, in place."""

from collections.abc import Iterable
from typing import Any

import torch._dynamo
from torch import nn

# Blocks share one forward: with a matrix or a window, with a planning error or none, in training and validation, with document starts or
# without, of one length and of any. Beyond the default of 8 specialisations torch would run the others eagerly, saying so once.
_RECOMPILATIONS = 64


def compile_blocks(blocks: Iterable[nn.Module], **options: Any) -> None:
    """Compile each block in place; raises how often torch may recompile a function in this process, all its networks together.

    Args:
        blocks: those of a network.
        options: of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)
    for block in blocks:
        block.compile(**options)
