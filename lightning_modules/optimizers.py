"""AdamW in three sizes, and how the 8-bit one's state travels in a checkpoint."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

OptimizerName = Literal["adamw", "adamw_8bit", "adamw_bf16"]
OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_bf16")
_PARTS = ("codes", "scale", "qmap")


def require_torchao(wanted_by: str) -> None:
    """Raise ModuleNotFoundError, in one line with the remedy, where torchao is not installed; without importing it, which takes seconds."""
    if find_spec("torchao") is None:
        raise ModuleNotFoundError(
            f"{wanted_by} needs torchao, which is not installed; install it: pip install torchao, or the extra [train]"
        )


def import_torchao(wanted_by: str) -> Any:
    """The package `torchao` with its optimisers; slow to import, and only `wanted_by` some settings.

    Raises:
        ModuleNotFoundError: it is not installed, or of no use with this torch; in one line, with the remedy.
    """
    require_torchao(wanted_by)
    try:
        import torchao.optim
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{wanted_by} needs torchao, which cannot be imported ({error}); install another version of it"
        ) from error
    return torchao


def make_optimizer(name: str, groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], eps: float) -> Optimizer:
    """The optimiser over `groups`.

    Args:
        name: `adamw`, PyTorch's, fused on a GPU, its moments in the parameters' dtype; `adamw_8bit`, torchao's, its moments in 8 bits
            with a scale for each 256 of them; `adamw_bf16`, torchao's with the moments in bf16. The last two round bf16 weights
            stochastically, so that updates smaller than a weight's last bit are not lost. Their step is our kernel on a GPU; elsewhere
            torchao compiles its own at first, for 20 s and more.
        groups: AdamW's parameter groups.
        learning_rate: in torchao's optimisers it becomes a 0-dim tensor, which `set_learning_rate` knows.
        betas: decay rates of the moments.
        eps: ε.
    """
    if name == "adamw":
        fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
        return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused or None)
    import_torchao(f"model.optimizer={name}")
    from lightning_modules.lean_adamw import FusedAdamW, FusedAdamW8bit

    kind: Any = FusedAdamW8bit if name == "adamw_8bit" else FusedAdamW
    optimizer: Optimizer = kind(groups, lr=learning_rate, betas=betas, eps=eps, bf16_stochastic_round=True)
    return optimizer


def set_learning_rate(group: dict[str, Any], value: float) -> None:
    """Set a group's rate, in its tensor where it is one: another object there would be refused or compiled anew."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(value)
    else:
        group["lr"] = value


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's `state_dict` with 8-bit moments taken apart into plain tensors; the optimiser's own is left alone.

    A tensor of torchao's class in a checkpoint could be read only where torchao has been imported, and not onto every device.
    """
    moments = {index: {name: _take_apart(value) for name, value in own.items()} for index, own in state["state"].items()}
    return {**state, "state": moments}


def _take_apart(value: Any) -> Any:
    if type(value).__name__ != "OptimState8bit":
        return value
    return {part: getattr(value, part) for part in _PARTS} | {"signed": value.signed}


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `plain_state` took apart, put together again."""
    from torchao.optim.subclass_8bit import OptimState8bit

    def join(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return OptimState8bit(*(value[part] for part in _PARTS), value["signed"])

    moments = {index: {name: join(value) for name, value in own.items()} for index, own in state["state"].items()}
    return {**state, "state": moments}


def check_saved_optimizer(checkpoint: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where a checkpoint's moments are of a kind that this run's optimiser cannot go on with."""
    saved = checkpoint.get("hyper_parameters", {}).get("optimizer", "adamw")
    if saved != name:
        raise ValueError(f"the checkpoint's optimiser is {saved}, this run's {name}; resume with model.optimizer={saved}")


def check_precision(name: str, precision: str) -> None:
    """Raise ValueError where the optimiser's name would promise what the precision does not give."""
    if name == "adamw_bf16" and precision != "bf16-true":
        raise ValueError(
            f"model.optimizer=adamw_bf16 keeps its moments in the parameters' dtype, which trainer.precision={precision} makes "
            "fp32; set trainer.precision=bf16-true, or model.optimizer=adamw"
        )


def learning_rate_of(optimizer: Optimizer) -> float:
    """The first group's rate; a tensor of it lies on the CPU, so that nothing waits."""
    return float(torch.as_tensor(optimizer.param_groups[0]["lr"]))
