"""Numbers on their way from a GPU to the host: asked for now, read later, so that nobody waits for the device."""

from typing import Any

import torch
from torch import Tensor


class LateValues:
    """A copy of a small tensor, made behind the work that is queued on its device; making one does not wait."""

    def __init__(self, values: Tensor) -> None:
        values = values.detach()
        self._passed: Any = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._passed = torch.cuda.Event()
            self._passed.record(torch.cuda.current_stream(values.device))
        else:
            self._host = values.clone()

    def read(self) -> Any:
        """The numbers, as `Tensor.tolist` gives them; waits until the device has come so far."""
        if self._passed is not None:
            self._passed.synchronize()
        return self._host.tolist()
