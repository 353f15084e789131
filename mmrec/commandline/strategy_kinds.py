"""What a `trainer.strategy` stands for, in whichever form it is given; by names alone, as Lightning takes seconds to import."""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

ALONE, DDP, FSDP2 = "one GPU", "DDP", "FSDP2"
ASKED_FOR_BY = {  # in a config
    ALONE: "trainer.strategy: auto",
    DDP: "trainer.strategy.class_path: lightning_modules.strategies.TunedDDPStrategy",
    FSDP2: "trainer.strategy: fsdp2",
}
TUNED = "TunedDDPStrategy"
_CLASSES = {"SingleDeviceStrategy": ALONE, "DDPStrategy": DDP, TUNED: DDP, "FSDP2Strategy": FSDP2}
_FORKING = ("fork", "forkserver", "notebook")


class AskedStrategy(NamedTuple):
    """What is asked for.

    Attributes:
        kind: ALONE, DDP or FSDP2; the name where it is none of these.
        name: Lightning's for it, or its class's without the module.
        options: `init_args`; of a Strategy that is built, how it starts its processes.
    """

    kind: str
    name: str
    options: Mapping[str, Any]

    @property
    def holds_all(self) -> bool:
        """Whether every process has all weights."""
        return self.kind in (ALONE, DDP)

    @property
    def forks(self) -> bool:
        """Whether the ranks are forked from this process, which must not have initialised CUDA by then."""
        if self.name == "auto":  # Lightning's choice in a notebook, where there are several GPUs
            return hasattr(sys, "ps1") or bool(sys.flags.interactive)
        return self.options.get("start_method") in _FORKING or any(word in _FORKING for word in self.name.split("_"))


def asked_strategy(given: Any, processes: int | None = None) -> AskedStrategy:
    """Know a strategy.

    Args:
        given: a name of Lightning's or ours, a class path, a mapping or namespace with `class_path` and `init_args`, a Strategy, or None
            for `auto`.
        processes: that train; None: several, or it is not known. With one, what is DDP otherwise is ALONE.
    """
    given = given.as_dict() if hasattr(given, "as_dict") else "auto" if given is None else given
    options: Mapping[str, Any] = {}
    if isinstance(given, Mapping):
        name, options = _class_name(given.get("class_path")), given.get("init_args") or {}
    elif isinstance(given, str):
        name = _class_name(given) if "." in given else given.lower()
    else:  # the class itself and not what it descends from: DeepSpeed's descends from DDP's
        name, options = type(given).__name__, {"start_method": getattr(given, "_start_method", None)}
    kind = _kind(name)
    return AskedStrategy(ALONE if kind == DDP and processes == 1 else kind, name, options)


def _class_name(path: Any) -> str:
    return str(path).rpartition(".")[2]


def _kind(name: str) -> str:
    if name in _CLASSES:
        return _CLASSES[name]
    beginnings = {"auto": DDP, "ddp": DDP, "fsdp2": FSDP2, "single_": ALONE}
    return next((kind for begin, kind in beginnings.items() if name.startswith(begin)), name)
