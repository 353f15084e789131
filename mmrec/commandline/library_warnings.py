"""Warnings of libraries about themselves, or about what is meant here: they would hide those that a user can do something about."""

import warnings

_KNOWN = (
    ".*isinstance.treespec, LeafSpec.. is deprecated",  # Lightning's use of torch
    ".*'set_vital' is deprecated",  # torchdata's use of torch
    "The `srun` command is available on your system but is not used",  # one process on a machine that also has Slurm
    ".*FSDP2-wrapped module .* returned a view tensor",  # a block's state after the last token, which nobody writes to
    "Your `IterableDataset` has `__len__` defined",  # it counts a rank's batches, whatever the number of workers
)


def ignore_known_warnings(*more: str) -> None:
    """Silence them in this process, and those whose message begins with one of `more`, regular expressions."""
    for message in (*_KNOWN, *more):
        warnings.filterwarnings("ignore", message=message)
