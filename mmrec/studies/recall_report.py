"""What the screen and a picture show of recall: each network with its best learning rate."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mmrec.studies.row_file import arm_name, grouped
from mmrec.studies.runs import Row

WANTED = 0.99  # of the answers: from here on a task counts as solved
_TASK = ("seq_len", "num_pairs", "vocab_size", "steps", "batch_tokens", "num_layers", "gpu")
_NETWORK = (*_TASK, "model", "variant", "model_dim", "num_heads")


class Best(NamedTuple):
    """A network with the learning rate at which it recalls most.

    Attributes:
        accuracy: mean over seeds.
        rows: a row a seed.
    """

    accuracy: float
    rows: list[Row]

    @property
    def arm(self) -> str:
        """Its kind, or what it differs in."""
        return arm_name(self.rows[0])

    @property
    def state_bytes(self) -> int:
        """Of a sequence."""
        return int(self.rows[0]["state_bytes"])

    def __str__(self) -> str:
        row = self.rows[0]
        seeds = f", {len(self.rows)} seeds" if len(self.rows) > 1 else ""
        return (
            f"{self.state_bytes:>10,}  {100 * self.accuracy:>8.2f} %  {self.arm}, D {row['model_dim']}, H {row['num_heads']}, "
            f"{row['params_m']:g} M, lr {row['lr']:g}{seeds}"
        )


def best(rows: Iterable[Row]) -> list[Best]:
    """Every network of one task once, the smallest state first."""
    found = []
    for of_a_network in grouped(rows, _NETWORK):
        rates = [Best(statistics.fmean(row["accuracy"] for row in seeds), seeds) for seeds in grouped(of_a_network, ("lr",))]
        found.append(max(rates, key=lambda candidate: candidate.accuracy))
    return sorted(found, key=lambda candidate: (candidate.state_bytes, candidate.arm))


def tasks(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by task, steps and machine, which alone compare, by a title."""
    return {
        f"{first['num_pairs']} pairs in {first['seq_len']} tokens of {first['vocab_size']:,}, {first['num_layers']} layers, "
        f"{first['steps']:,} steps of {first['batch_tokens']:,} tokens, {first['gpu']}": found
        for found in grouped(rows, _TASK)
        for first in found[:1]
    }


def table(rows: Sequence[Row]) -> str:
    """A line a network, and for each kind the smallest state that recalls almost everything."""
    lines = []
    for title, found in tasks(rows).items():
        lines += [title, f"{'bytes of state':>14}  {'recalled':>6}"]
        networks = best(found)
        lines += [f"    {network}" for network in networks] + smallest_states(networks)
    return "\n".join(lines)


def smallest_states(networks: Sequence[Best]) -> list[str]:
    """A line a kind of network: the smallest state that recalls almost everything, or that none does; networks as `best` returns them."""
    return [
        _smallest(arm, [network for network in networks if network.arm == arm])
        for arm in dict.fromkeys(network.arm for network in networks)
    ]


def _smallest(arm: str, networks: Sequence[Best]) -> str:
    wanted = f"{100 * WANTED:g} %"
    for network in networks:  # in the order of their states
        if network.accuracy >= WANTED:
            row = network.rows[0]
            size = f"D {row['model_dim']}, H {row['num_heads']}"
            which = "the smallest state measured that recalls" if len(networks) > 1 else "the only state measured, and recalls at least"
            return f"{arm}: {network.state_bytes:,} bytes a sequence is {which} {wanted} ({size})"
    most = max(networks, key=lambda network: network.accuracy)
    return f"{arm}: no state measured recalls {wanted}; the most is {100 * most.accuracy:.2f} % with {most.state_bytes:,} bytes"


def draw(path: Path, rows: Sequence[Row]) -> list[str]:
    """A picture a task; the lines that say what was written, or why nothing was."""
    try:
        from mmrec.studies.plots import draw_recall
    except ImportError as error:
        return [f"no plot ({error}); pip install matplotlib, then --plot-only"]
    written = []
    for number, (title, found) in enumerate(tasks(rows).items()):
        place = path if number == 0 else path.with_name(f"{path.stem}_{number}{path.suffix}")
        arms: dict[str, list[tuple[int, float]]] = {}
        for network in best(found):
            arms.setdefault(network.arm, []).append((network.state_bytes, network.accuracy))
        draw_recall(place, title, arms)
        written.append(f"plot: {place}")
    return written
