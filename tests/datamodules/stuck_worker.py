"""`python stuck_worker.py HOW`: a loader whose worker gives one batch and then no other; prints the worker's and the server's numbers.

HOW: `dropped` lets the loader's iterator go; `exit` leaves with it; `killed` waits for the signal.
"""

import os
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

import torch
from torch.utils.data import IterableDataset

from datamodules.loader import ResumableDataLoader

FOREVER = 10**6  # seconds


class Stuck(IterableDataset[Any]):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield {"process": torch.tensor(os.getpid())}
        time.sleep(FOREVER)


def main(how: str) -> None:
    loader = ResumableDataLoader(Stuck(), num_workers=1, rank=0, world_size=1, identity={})
    iterator = iter(loader)
    worker = int(next(iterator)["process"])
    print(worker, forkserver._forkserver._forkserver_pid, flush=True)  # type: ignore[attr-defined]
    if how == "dropped":
        processes = iterator._workers  # type: ignore[attr-defined]
        loader._iterator = None
        del iterator
        for process in processes:
            process.join()
    elif how == "killed":
        time.sleep(FOREVER)


if __name__ == "__main__":
    main(sys.argv[1])
