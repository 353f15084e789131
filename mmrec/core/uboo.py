"""UBÖO: the planning error as an auxiliary loss, and the routing of its gradient.

The founding form is `P_error = W_planning_error(sg[h_t]) − W_planning_target(h_{t−1})`, `L_aux = mean(P_error²)`, where `sg` stops the
gradient: the updated memory is not pulled towards its own prediction, the previous memory is.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmrec.ops import planning_error


class PlanningLoss(NamedTuple):
    """A block's planning error before it is averaged, so that chunks of a sequence add up to the whole.

    Attributes:
        total: 0-dim fp32, the squared error summed over tokens and channels.
        numbers: 0-dim, how many were summed.
    """

    total: Tensor
    numbers: Tensor

    def mean(self) -> Tensor:
        """L_aux of the block, 0-dim; 0 where no token counts."""
        return self.total / self.numbers.clamp(min=1)

    def plus(self, other: "PlanningLoss") -> "PlanningLoss":
        """The two together, as if they had been one sequence."""
        return PlanningLoss(self.total + other.total, self.numbers + other.numbers)


def project_out(a: Tensor, m: Tensor) -> Tensor:
    """`a' = a − (⟨a,m⟩/⟨m,m⟩) m` over the last dimension, in fp32 or wider; `a` where `m` is zero.

    Args:
        a: (..., D), the cotangent to be made orthogonal.
        m: (..., D), the cotangent it must not interfere with.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    wide_a, wide_m = a.to(dtype), m.to(dtype)
    # Scaled first: gradients of a mean over a large batch are so small that their squares underflow.
    largest = wide_m.abs().amax(-1, keepdim=True)
    direction = wide_m / torch.where(largest > 0, largest, 1)
    squared = direction.square().sum(-1, keepdim=True)
    share = (wide_a * direction).sum(-1, keepdim=True) / torch.where(squared > 0, squared, 1)
    return (wide_a - share * direction).to(a.dtype)


class _OrthogonalRoute(torch.autograd.Function):
    """Hands `h` to the block's output and to the planning target, and joins the two cotangents as `m + a'`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        return h.view_as(h), h.view_as(h)

    @staticmethod
    def backward(ctx: Any, m: Tensor, a: Tensor) -> Tensor:
        return m + project_out(a, m)


def route(h_BTD: Tensor, orthogonalize: bool) -> tuple[Tensor, Tensor]:
    """The short-term states as the block's output sees them and as the planning target sees them.

    With `orthogonalize`, the target's cotangent loses, for each token, its part along the output's: moving the scan's output along
    what is left changes the loss behind the output to second order only.
    """
    if not orthogonalize:
        return h_BTD, h_BTD
    for_output, for_target = _OrthogonalRoute.apply(h_BTD)
    return for_output, for_target


def shift(h_BTD: Tensor, carried_BD: Tensor | None) -> Tensor:
    """`h_{t−1}` for every token, (B, T, D): the carried state, or zero, stands before the first."""
    first = torch.zeros_like(h_BTD[:, :1]) if carried_BD is None else carried_BD.to(h_BTD.dtype).unsqueeze(1)
    return torch.cat([first, h_BTD[:, :-1]], dim=1)


def counted_tokens(h_BTD: Tensor, carried_BD: Tensor | None, reset_BT: Tensor | None) -> Tensor:
    """Boolean (B, T): which tokens have a previous state. The first without a carry and a document's first have none."""
    counted = torch.ones(h_BTD.shape[:2], dtype=torch.bool, device=h_BTD.device) if reset_BT is None else ~reset_BT
    has_carry = torch.zeros_like(counted[:, 0]) if carried_BD is None else (carried_BD != 0).any(-1)
    return torch.cat([counted[:, :1] & has_carry.unsqueeze(1), counted[:, 1:]], dim=1)


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x` divided by its root mean square over the last dimension, in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def literal_loss(
    W_planning_error: nn.Linear,
    W_planning_target: nn.Linear,
    h_BTD: Tensor,
    h_target_BTD: Tensor,
    carried_BD: Tensor | None,
    counted_BT: Tensor,
) -> PlanningLoss:
    """The founding form, `Σ (W_planning_error sg[h_t] − W_planning_target h_{t−1})²`.

    Args:
        h_BTD, h_target_BTD: the states, and the same as the target's gradient may reach them.
        carried_BD: the state before the first token, or None.
        counted_BT: what `counted_tokens` returned.
    """
    updated = W_planning_error(h_BTD.detach())
    first = None if carried_BD is None else W_planning_target(carried_BD.to(h_target_BTD.dtype))
    total = planning_error(updated, W_planning_target(h_target_BTD), first, counted_BT)
    return PlanningLoss(total, counted_BT.sum() * updated.shape[-1])


def normalized_loss(
    W_planning_error: nn.Linear, W_planning_target: nn.Linear, h_BTD: Tensor, previous_BTD: Tensor, counted_BT: Tensor
) -> tuple[PlanningLoss, Tensor]:
    """The form without a trivial minimum, `Σ (rms(W_planning_target h_{t−1}) − sg[rms(W_planning_error h_t)])²`, and its target.

    Args:
        previous_BTD: what `shift` returned.
        counted_BT: what `counted_tokens` returned.
    """
    target = rms(W_planning_error(h_BTD.detach())).detach()
    squared_BT = (target - rms(W_planning_target(previous_BTD))).square().sum(-1)
    return PlanningLoss(torch.where(counted_BT, squared_BT, 0).sum(), counted_BT.sum() * target.shape[-1]), target


def target_statistics(target_BTE: Tensor, counted_BT: Tensor, max_tokens: int = 1024) -> tuple[Tensor, Tensor]:
    """Whether the planning target has collapsed: its variance over tokens, averaged over channels, and its effective rank.

    The effective rank is the exponential of the entropy of the normalised singular values (Roy & Vetterli 2007), between 1 and E.

    Args:
        target_BTE: the target of the planning error.
        counted_BT: the tokens that count.
        max_tokens: how many of them, at the most, are looked at.

    Returns:
        Two 0-dim fp32 tensors; NaN where a token's target is not finite.
    """
    tokens = target_BTE.detach()[counted_BT][:max_tokens].float()
    if tokens.shape[0] < 2:
        return tokens.new_zeros(()), tokens.new_ones(())
    centred = tokens - tokens.mean(0)
    finite = centred.isfinite().all()
    # LAPACK raises on numbers that are not finite, and would end a run before it can say what is wrong with it.
    singular = torch.linalg.svdvals(torch.where(finite, centred, 0.0))
    share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    rank = torch.special.entr(share).sum().exp()
    return centred.square().mean(), torch.where(finite, rank, torch.nan)
