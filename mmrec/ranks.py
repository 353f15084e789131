"""What the processes that train together tell each other."""

from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def gathered(value: Value) -> list[Value]:
    """What every rank gives here, in the order of the ranks, on all of them; `[value]` itself where there is one process.

    A collective: all ranks call it, and wait for each other.

    Args:
        value: anything that can be pickled; of tensors on a GPU give copies on the CPU.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
