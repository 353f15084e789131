"""The time lost to data, and percentiles."""

import time
from collections.abc import Sequence

from lightning.pytorch.profilers import Profiler


class FetchTimer:
    """Host time spent waiting for training batches.

    No callback hook stands right before the fetch: between two steps lie also validation, checkpoints and logging. Lightning does tell
    its profiler when the fetch begins and ends, so the timer listens there and passes every call on.
    """

    ACTION = "[_TrainingEpochLoop].train_dataloader_next"

    def __init__(self) -> None:
        self._profiler: Profiler | None = None
        self._started: float | None = None
        self._waited_ms = 0.0

    def install(self, profiler: Profiler) -> None:
        """Listen to `profiler`."""
        self.remove()
        start, stop = profiler.start, profiler.stop

        def listening_start(action_name: str) -> None:
            start(action_name)
            if action_name == self.ACTION:
                self._started = time.perf_counter()

        def listening_stop(action_name: str) -> None:
            if action_name == self.ACTION and self._started is not None:
                self._waited_ms += (time.perf_counter() - self._started) * 1e3
                self._started = None
            stop(action_name)

        profiler.start, profiler.stop = listening_start, listening_stop  # type: ignore[method-assign]
        self._profiler = profiler

    def remove(self) -> None:
        """Leave the profiler as it was."""
        if self._profiler is not None:
            del self._profiler.start, self._profiler.stop
        self._profiler = self._started = None

    def take_ms(self) -> float:
        """Milliseconds waited since the last call."""
        waited, self._waited_ms = self._waited_ms, 0.0
        return waited


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 … 100) of `values`, linear between neighbours as in `numpy.percentile`."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    lower = int(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (position - lower)
