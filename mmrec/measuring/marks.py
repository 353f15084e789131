"""Clocks that never wait for the device: marks in its work, read once it has passed them."""

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks points in a step's work and tells, later, how far apart they were."""

    def mark(self) -> Any:
        """A mark at this point of the work."""

    def is_ready(self, mark: Any) -> bool:
        """Whether the work before `mark` is done, so that its time can be read."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks that are ready."""


class HostClock:
    """Marks are points in the host's time: right where the host does the work."""

    def mark(self) -> float:
        """Seconds of a monotonic clock."""
        return time.perf_counter()

    def is_ready(self, mark: float) -> bool:
        """Always."""
        return True

    def elapsed_ms(self, start: float, end: float) -> float:
        """Milliseconds from `start` to `end`."""
        return (end - start) * 1e3


class CudaClock:
    """Marks are events on the device's current stream, read once the device has passed them."""

    def mark(self) -> torch.cuda.Event:
        """An event, recorded; the host goes on."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_ready(self, mark: torch.cuda.Event) -> bool:
        """Whether the device has passed the event; asks without waiting."""
        return mark.query()

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Milliseconds the device took from `start` to `end`."""
        return start.elapsed_time(end)
