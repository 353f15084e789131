"""Warnings of libraries about themselves, or about what is meant here: they would hide those that a user can do something about."""

import logging
import re
import warnings

_KNOWN = (
    ".*isinstance.treespec, LeafSpec.. is deprecated",  # Lightning's use of torch
    ".*'set_vital' is deprecated",  # torchdata's use of torch
    "The `srun` command is available on your system but is not used",  # one process on a machine that also has Slurm
    ".*FSDP2-wrapped module .* returned a view tensor",  # a block's state after the last token, which nobody writes to
    "Your `IterableDataset` has `__len__` defined",  # it counts a rank's batches, whatever the number of workers
    r"It is recommended to use `self.log\('(val|test)/[^']*', ..., sync_dist=True\)`",  # these are means over all ranks already
)
_ADVERTISEMENT = re.compile(r"try installing \[lit(logger|models)\]")  # packages for a service, named at every start


def ignore_known_warnings(*more: str) -> None:
    """Silence them in this process, and those whose message begins with one of `more`, regular expressions; Lightning's tips as well."""
    for message in (*_KNOWN, *more):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)  # once, however often it is added


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return _ADVERTISEMENT.search(record.getMessage()) is None
