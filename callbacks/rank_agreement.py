"""RankAgreement: before the first step, ranks that would train different things are found out."""

import hashlib
from collections.abc import Mapping, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from mmrec.ranks import gathered


class RankAgreement(Callback):
    """Compares facts of all ranks at the start of `fit`, before the validation that precedes the first step.

    Compared are what it is given (the command line gives the resolved config, the code's versions and hash, the kernels' table of tiles)
    and, from the data module, `data_order`: what the order of the samples depends on. Ranks exchange one digest; only where those differ,
    the facts themselves.
    """

    def __init__(self, facts: Mapping[str, str] | None = None) -> None:
        """Compare `facts`, values by name, beside those of the data."""
        self.facts = dict(facts or {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare.

        Raises:
            ValueError: on every rank, in one line that names what differs first, and which ranks have which.
        """
        if trainer.world_size == 1:
            return
        order = getattr(getattr(trainer, "datamodule", None), "data_order", {})
        facts = self.facts | {f"data.{name}": repr(value) for name, value in order.items()}
        if len(set(gathered(hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()))) > 1:
            raise ValueError(disagreement(gathered(facts)))


def disagreement(facts: Sequence[Mapping[str, str]]) -> str:
    """One line about the first fact, by name, in which ranks differ; `facts` holds one mapping a rank."""
    names = sorted(set().union(*facts))
    differing = [name for name in names if len({rank.get(name) for rank in facts}) > 1]
    name = differing[0]
    ranks_by_value: dict[str, list[int]] = {}
    for rank, own in enumerate(facts):
        ranks_by_value.setdefault(own.get(name, "not there"), []).append(rank)
    have = "; ".join(f"{_ranks(ranks)} {value[:80]}" for value, ranks in ranks_by_value.items())
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"the ranks disagree on {name}{more}: {have}; start all of them with the same config, code and data"


def _ranks(ranks: Sequence[int]) -> str:
    few = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank {few} has" if len(ranks) == 1 else f"ranks {few} have"
