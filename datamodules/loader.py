"""The training loader: torchdata's StatefulDataLoader with the mends that an exact resume through Lightning needs.

- It has a length: Lightning prefetches a batch from loaders without one, and each resume would skip a batch.
- Its state is that of every rank: Lightning stores what rank 0 returns, and the others would resume at rank 0's place.
- The state outlives the iterator, which Lightning drops at the end of `fit`; a checkpoint saved afterwards would start over.
- `iter()` goes on where the loader is: a new Lightning epoch is not a new pass over the data.
- Its workers are no forks of the run, live through the signals by which a scheduler ends a job, and end with the run (`workers`).
- It draws nothing from torch's global random numbers, so that a loader more or less does not change a run.
- Over a source with random access it goes on with another number of ranks, or rows a batch, at the sample that all had come to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from datamodules.windows import Batch
from datamodules.workers import end_with_run, worker_context
from mmrec.ranks import gathered

# Runs are measured in steps (`trainer.max_steps`); one Lightning epoch is as good as endless unless `trainer.limit_train_batches` cuts it.
ENDLESS = 10**12
_FORMAT = 1
_OF_RANKS = ("batch_size", "num_workers")  # what may change with the number of ranks


class ResumableDataLoader(StatefulDataLoader[Batch]):
    """Endless loader of whole batches whose `state_dict` holds every rank's position.

    Where the dataset has `start`, a sample number to begin at (EndlessBatches), a run of another number of ranks, whose batches may have
    another number of rows, begins at the sample that all ranks together had come to: none is left out or seen twice.

    Args:
        dataset: yields batches without end; its iterator has `state_dict` and `load_state_dict`.
        num_workers: worker processes.
        rank, world_size: this process among those that train together.
        identity: plain values, by name, that a resumed run must share, e.g. the corpus' fingerprint. A difference is refused on load.
    """

    def __init__(self, dataset: IterableDataset[Batch], *, num_workers: int, rank: int, world_size: int, identity: dict[str, Any]) -> None:
        self._live: Any = None
        self._rank, self._world_size, self._identity = rank, world_size, {**identity, "num_workers": num_workers}
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(0),
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=worker_context() if num_workers > 0 else None,
            worker_init_fn=end_with_run,
        )

    def __len__(self) -> int:
        return ENDLESS

    @property
    def _iterator(self) -> Any:
        return self._live

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        if iterator is None and self._live is not None:
            self.next_iter_state = self._live.state_dict()
        self._live = iterator

    def __iter__(self) -> Iterator[Batch]:
        if self._live is not None:
            self._initial_iter_for_state_dict = False
            return self._live
        return super().__iter__()

    @property
    def batches_given(self) -> int:
        """How many batches this rank has been given since the dataset's `start`, those before a resumption among them."""
        state = self.next_iter_state if self._live is None else None
        return _given(state) if state is not None else getattr(self._live, "_num_yielded", 0)

    def state_dict(self) -> dict[str, Any]:
        """The positions of all ranks; with `torch.distributed` up a collective call, the same on every rank."""
        own = self.next_iter_state if self._live is None and self.next_iter_state is not None else super().state_dict()
        state = {"format": _FORMAT, "world_size": self._world_size, "identity": dict(self._identity), "ranks": gathered(own)}
        return state | ({"start": self.dataset.start} if hasattr(self.dataset, "start") else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to this rank's position, or, with another number of ranks, to where all of them had come.

        Raises:
            ValueError: the state belongs to another corpus or setting, or to another number of ranks that cannot be changed; one line
                says which.
        """
        if state_dict.get("format") != _FORMAT:
            raise ValueError(
                "cannot resume: the checkpoint holds no position of this data loader; start a new run or use its own data module"
            )
        world_size = state_dict["world_size"]
        changed = world_size != self._world_size
        if changed and not hasattr(self.dataset, "start"):
            raise ValueError(
                f"cannot resume: the checkpoint was written by {world_size} process(es), this run has {self._world_size}, and text is "
                f"divided among them as it is read; start {world_size} (trainer.devices, trainer.num_nodes). Tokens that `prepare` wrote "
                "can go on with any number"
            )
        for name, now in self._identity.items():
            then = state_dict["identity"].get(name)
            if then == now or (changed and name in _OF_RANKS):
                continue
            if name in ("corpus", "tokenizer"):
                raise ValueError(
                    f"cannot resume: the {name} changed since the checkpoint was written (fingerprint {str(then)[:12]}, "
                    f"now {str(now)[:12]}); restore the files or start a new run"
                )
            raise ValueError(f"cannot resume: data.{name} was {then!r} when the checkpoint was written, now it is {now!r}; set it back")
        if hasattr(self.dataset, "start"):
            self.dataset.start = state_dict.get("start", 0)
        if changed:
            self.dataset.start += _batches_of_all(state_dict["ranks"]) * world_size * state_dict["identity"]["batch_size"]
            return
        super().load_state_dict(state_dict["ranks"][self._rank])


def _batches_of_all(ranks: list[dict[str, Any]]) -> int:
    """How many batches every rank had been given.

    Raises:
        ValueError: not all as many.
    """
    given = [_given(state) for state in ranks]
    if len(set(given)) > 1:
        raise ValueError(
            f"cannot resume: the checkpoint's {len(given)} processes had read {', '.join(map(str, given))} batches, which no other number "
            f"of processes can go on from; start {len(given)} (trainer.devices, trainer.num_nodes)"
        )
    return given[0]


def _given(state: dict[str, Any]) -> int:
    """How many batches an iterator of torchdata's had given when it made this state, with workers or without."""
    if "_snapshot" in state:
        return int(state["_snapshot"]["_snapshot_step"]) + int(state["_steps_since_snapshot"])
    return int(state["_num_yielded"])
