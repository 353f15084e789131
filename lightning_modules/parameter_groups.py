"""Which parameters decay: every trainable parameter of a network in exactly one of two groups."""

from collections.abc import Collection
from typing import Any

from torch import nn


def parameter_groups(
    network: nn.Module, weight_decay: float, no_weight_decay: Collection[str], decay_embeddings: bool = False
) -> list[dict[str, Any]]:
    """AdamW's groups: `decay` holds the matrices, `no_decay` vectors (norms, biases, gains) and what `no_weight_decay` names.

    Args:
        network: the network; frozen parameters are left out, shared ones are counted once.
        weight_decay: coefficient of the first group; the second has 0.
        no_weight_decay: names, as in `network.named_parameters()`, that never decay.
        decay_embeddings: whether the weights of `nn.Embedding` decay (a tied output head with them).

    Raises:
        ValueError: a name in `no_weight_decay` is no parameter of the network.
        RuntimeError: the groups do not cover every trainable parameter exactly once.
    """
    parameters = dict(network.named_parameters())
    unknown = sorted(set(no_weight_decay) - parameters.keys())
    if unknown:
        raise ValueError(f"no parameter of the network is named {unknown[0]}; correct no_weight_decay_parameters()")
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}

    decay: dict[str, nn.Parameter] = {}
    no_decay: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        spared = name in no_weight_decay or parameter.ndim < 2 or (id(parameter) in embeddings and not decay_embeddings)
        (no_decay if spared else decay)[name] = parameter

    groups = [
        {"name": "decay", "params": list(decay.values()), "weight_decay": weight_decay},
        {"name": "no_decay", "params": list(no_decay.values()), "weight_decay": 0.0},
    ]
    assert_covers(network, groups)
    return [group for group in groups if group["params"]]


def assert_covers(network: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Raise RuntimeError, naming the first culprit, unless `groups` hold every trainable parameter exactly once."""
    counts: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for name, parameter in network.named_parameters():
        expected = 1 if parameter.requires_grad else 0
        if (count := counts.pop(id(parameter), 0)) != expected:
            raise RuntimeError(f"parameter {name} is in {count} optimiser groups instead of {expected}")
    if counts:
        raise RuntimeError(f"{len(counts)} parameters in the optimiser's groups do not belong to the network")
