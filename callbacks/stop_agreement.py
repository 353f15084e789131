"""StopAgreement: all ranks learn of a signal that one of them got, at the same batch, and no GPU is waited for."""

from datetime import timedelta

import torch
import torch.distributed as dist


class StopAgreement:
    """The largest of the ranks' numbers, one exchange after another.

    A process group of its own, gloo on the CPU: an exchange over NCCL would stand in the GPU's queue behind the batch, and to read it the
    host would have to wait for both. An exchange that begins at the end of one batch and is read at the end of the next has long gone
    through by then. With one process there is no group, and it hears its own number at once.

    Every rank must call the same methods in the same order.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        """Make the group; a collective call where there are several ranks.

        Args:
            timeout: how long to wait for the other ranks; None: torch's default.
        """
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self._value = torch.zeros(1, dtype=torch.uint8)
        self._work: dist.Work | None = None

    def now(self, number: int) -> int:
        """The largest number (0 to 255) of all ranks; waits for them."""
        self._begin(number)
        return self.finish()

    def since_last(self, number: int) -> int:
        """The largest number of all ranks as of the call before; `number` is for the next one. With one process, `number` itself."""
        if self._group is None:
            return number
        largest = self.finish()
        self._begin(number)
        return largest

    def finish(self) -> int:
        """Wait for the exchange under way, if there is one; the largest number of the last."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._value)

    def wait_for_all(self) -> None:
        """Return once every rank has come here."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def _begin(self, number: int) -> None:
        self._value = torch.tensor([number], dtype=torch.uint8)
        if self._group is not None:
            self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, group=self._group, async_op=True)
