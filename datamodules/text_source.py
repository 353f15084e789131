"""Shards of text and their division among ranks and workers: disjoint, complete, seeded, and with a position that can be returned to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from datamodules.documents import LineCounts, is_validation, parse_line, read_lines
from datamodules.permutation import Permutation

_logger = logging.getLogger(__name__)
Record = tuple[str | None, str | None]


class TextShards(Protocol):
    """Numbered shards of records: a text and None, or None and the reason why the line is skipped."""

    num_shards: int

    def name(self, shard: int) -> str: ...

    def read(self, shard: int, skip: int, step: int, offset: int) -> Iterator[tuple[int, Record]]:
        """Yield (number, record) of the records numbered `offset`, `offset + step`, ... of a shard, from number `skip` on (0-based)."""
        ...


class LocalShards:
    """JSON-lines files, one shard each."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.num_shards = len(files)

    def name(self, shard: int) -> str:
        return self.files[shard]

    def read(self, shard: int, skip: int, step: int, offset: int) -> Iterator[tuple[int, Record]]:
        for number, line in enumerate(read_lines(self.files[shard], skip), start=skip):
            if number % step == offset:
                yield number, parse_line(line)


class HubShards:
    """A dataset of the Hugging Face hub (or a local folder in its form), streamed.

    Args:
        dataset, config, split, revision: as in `datasets.load_dataset`; records need a `text` field.

    Raises:
        ValueError: it cannot be loaded, or has no `text`; one line with the cause.
    """

    def __init__(self, dataset: str, config: str | None, split: str, revision: str | None = None) -> None:
        # Imported where it is used: it costs a second, and the other sources do without.
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(dataset, config, revision=revision)
            self._stream: Any = builder.as_streaming_dataset(split=split)
        except Exception as error:  # network, missing name, missing split: the library has no common class for them
            lines = str(error).splitlines() or [type(error).__name__]
            what = f"{dataset!r} (config {config!r}, split {split!r})"
            raise ValueError(f"data.hub_dataset: cannot load {what}: {lines[0]}; check the name and the network") from error
        self.num_shards = int(self._stream.num_shards)
        self.identity = [dataset, config, split, builder.hash, self.num_shards]
        self._name = f"{dataset}/{split}"

    def name(self, shard: int) -> str:
        return f"{self._name}[shard {shard}]"

    def read(self, shard: int, skip: int, step: int, offset: int) -> Iterator[tuple[int, Record]]:
        stream = self._stream.shard(num_shards=self.num_shards, index=shard)
        if skip:
            stream = stream.skip(skip)
        number = skip
        # `iter(batch_size)`, not `__iter__`: the latter divides shards among the workers of torch's loader on its own account.
        for batch in stream.iter(batch_size=64):
            if "text" not in batch:
                raise ValueError(f"data.hub_dataset: {self._name} has no field 'text', only {', '.join(batch)}")
            for text in batch["text"]:
                if number % step == offset:
                    good = isinstance(text, str) and bool(text.strip())
                    yield number, (text, None) if good else (None, "empty" if isinstance(text, str) else "no_text")
                number += 1


@dataclass(frozen=True)
class Cursor:
    """A place in a consumer's stream: the epoch, the shard's place in that epoch's order, the record's number in the shard."""

    epoch: int = 0
    position: int = 0
    line: int = 0


@dataclass(frozen=True)
class Block:
    """Neighbouring documents that are shuffled together. `start` and `counts` say where reading began and what had been counted by then."""

    start: Cursor
    counts: dict[str, int | str | None]
    texts: list[str]


class DocumentStream:
    """The training documents of one of `num_consumers` consumers (ranks times workers), epoch after epoch without end.

    In each epoch's order of shards, whole rounds go shard by shard to the consumers in turn; the shards left over, which do not divide
    evenly, are shared record by record. So every document belongs to exactly one consumer whatever the numbers are.

    Shuffling is by shards and within blocks of `shuffle_block` documents, both from (seed, place): nothing has to be stored but the place.
    (`datasets`' own shuffle buffer loses its contents on resume.)

    Skipped lines are reported to the log after each shard that had some.

    Args:
        shards: where records come from.
        consumer, num_consumers: which part is ours.
        seed, shuffle, shuffle_block: see above.
        validation_fraction: documents that the hash puts into validation are left out.
        max_bad_line_share: more skipped records than that raise a ValueError, at the end of an epoch or after 1,000 records.
    """

    def __init__(
        self,
        shards: TextShards,
        *,
        consumer: int,
        num_consumers: int,
        seed: int,
        shuffle: bool,
        shuffle_block: int,
        validation_fraction: float,
        max_bad_line_share: float,
    ) -> None:
        self._shards, self._consumer, self._num_consumers = shards, consumer, num_consumers
        self._seed, self._shuffle, self._block_size = seed, shuffle, shuffle_block if shuffle else 64
        self._fraction, self._max_bad = validation_fraction, max_bad_line_share

    def blocks(self, start: Cursor, counts: LineCounts) -> Iterator[Block]:
        """Blocks from a place on; `counts` is counted on in place."""
        texts: list[str] = []
        begin, counted = start, counts.as_dict()
        for place, text in self._documents(start, counts):
            texts.append(text)
            if len(texts) == self._block_size:
                yield Block(begin, counted, self._shuffled(texts, begin))
                texts, begin, counted = [], replace(place, line=place.line + 1), counts.as_dict()

    def _shuffled(self, texts: list[str], begin: Cursor) -> list[str]:
        if not self._shuffle:
            return texts
        key = (((begin.epoch * 1_000_003 + begin.position) * 1_000_003) + begin.line) * 1_000_003 + self._consumer
        order = Permutation(len(texts), self._seed, key)(np.arange(len(texts)))
        return [texts[index] for index in order]

    def _documents(self, start: Cursor, counts: LineCounts) -> Iterator[tuple[Cursor, str]]:
        epoch, found, reported = start.epoch, start.position > 0 or start.line > 0, counts.skipped
        while True:
            for position, shard, step, offset in self._plan(epoch):
                if epoch == start.epoch and position < start.position:
                    continue
                skip = start.line if epoch == start.epoch and position == start.position else 0
                for number, (text, reason) in self._shards.read(shard, skip, step, offset):
                    counts.add(reason, f"{self._shards.name(shard)}:{number + 1}")
                    if reason is not None:
                        counts.require_share(self._max_bad, final=False)
                    if text is not None and not is_validation(text, self._fraction):
                        found = True
                        yield Cursor(epoch, position, number), text
                if counts.skipped > reported:
                    reported = counts.skipped
                    _logger.warning("after %s: %s", self._shards.name(shard), counts.summary())
            counts.require_share(self._max_bad, final=True)
            if not found:
                raise ValueError(
                    f"the training files hold no document for consumer {self._consumer + 1} of {self._num_consumers} "
                    "(ranks x data.num_workers): give more documents or start fewer"
                )
            epoch, found = epoch + 1, False

    def _plan(self, epoch: int) -> Iterator[tuple[int, int, int, int]]:
        """(place in the order, shard, step, offset) of the shards that this consumer reads in an epoch."""
        total, parts = self._shards.num_shards, self._num_consumers
        order = np.arange(total)
        if self._shuffle:
            order = Permutation(total, self._seed, epoch)(order)
        whole = total // parts * parts
        for position, shard in enumerate(order.tolist()):
            if position >= whole:
                yield position, shard, parts, self._consumer
            elif position % parts == self._consumer:
                yield position, shard, 1, 0
