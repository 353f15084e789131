"""HEM: the six projections of a block as six matrix products or as one, and the conversion between the two.

Unfused, `e = W_e p` with `p = W_p x̂ + b_p`. Fused, `e` comes straight from `x̂` by the folded product `W_E = W_e W_p`,
`b_E = W_e b_p + b_e`. With P < D the fused form is the larger family: `W_E` may have any rank, `W_e W_p` at most P.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmrec.blocks.linear import apply_linear
from mmrec.core.initialization import empty_linear

_RESIDUAL_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class Projections(NamedTuple):
    """What a block reads from its normed input; all (B, T, D) but `p`, which is (B, T, P)."""

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    p: Tensor
    e: Tensor


class SeparateProjections(nn.Module):
    """Six `nn.Linear`: `W_q W_k W_v W_z : D→D`, `W_p : D→P`, `W_e : P→D`."""

    def __init__(self, model_dim: int, pe_dim: int, initializer_range: float = 0.02) -> None:
        super().__init__()
        self.model_dim, self.pe_dim, self.initializer_range = model_dim, pe_dim, initializer_range
        self.W_q = nn.Linear(model_dim, model_dim)
        self.W_k = nn.Linear(model_dim, model_dim)
        self.W_v = nn.Linear(model_dim, model_dim)
        self.W_z = nn.Linear(model_dim, model_dim)
        self.W_p = nn.Linear(model_dim, pe_dim)
        self.W_e = nn.Linear(pe_dim, model_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal, biases zero, each projection drawn on its own."""
        for linear in self.children():
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=self.initializer_range)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Projections:
        """(B, T, D) to the six parts."""
        q, k, v, z, p = (apply_linear(x, linear) for linear in (self.W_q, self.W_k, self.W_v, self.W_z, self.W_p))
        return Projections(q, k, v, z, p, apply_linear(p, self.W_e))

    def whole_and_parts(self, x: Tensor) -> tuple[None, Projections]:
        """No tensor that holds all six, and the six."""
        return None, self(x)


class FusedProjections(nn.Module):
    """One `nn.Linear` `W_fused : D→5D+P`; the six parts of its output are views, in the order q, k, v, z, p, e.

    It starts as the same function as a `SeparateProjections` drawn from the same random state.
    """

    def __init__(self, model_dim: int, pe_dim: int, initializer_range: float = 0.02) -> None:
        super().__init__()
        self.model_dim, self.pe_dim, self.initializer_range = model_dim, pe_dim, initializer_range
        separate = SeparateProjections(model_dim, pe_dim, initializer_range)
        self.W_fused = empty_linear(model_dim, 5 * model_dim + pe_dim)
        if not self.W_fused.weight.is_meta:
            _fold_into(self, separate)

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of q, k, v, z, p and e in `W_fused`."""
        return (self.model_dim,) * 4 + (self.pe_dim, self.model_dim)

    def forward(self, x: Tensor) -> Projections:
        """(B, T, D) to the six parts, views of one tensor."""
        return self.whole_and_parts(x)[1]

    def whole_and_parts(self, x: Tensor) -> tuple[Tensor, Projections]:
        """`W_fused x`, (B, T, 5D + P), and its parts, which are views of it."""
        whole = apply_linear(x, self.W_fused)
        return whole, Projections(*whole.split(self.widths, dim=-1))


@torch.no_grad()
def _fold_into(fused: FusedProjections, separate: SeparateProjections) -> None:
    """Write the six projections into `W_fused`; the folded product is formed in float64 and rounded once."""
    W_p, b_p = separate.W_p.weight.double(), separate.W_p.bias.double()
    W_e, b_e = separate.W_e.weight.double(), separate.W_e.bias.double()
    plain = (separate.W_q, separate.W_k, separate.W_v, separate.W_z, separate.W_p)
    weights = [linear.weight for linear in plain] + [W_e @ W_p]
    biases = [linear.bias for linear in plain] + [W_e @ b_p + b_e]
    for target, source in zip(fused.W_fused.weight.split(fused.widths), weights, strict=True):
        target.copy_(source)
    for target, source in zip(fused.W_fused.bias.split(fused.widths), biases, strict=True):
        target.copy_(source)


def _like(kind: type[SeparateProjections] | type[FusedProjections], source: nn.Module, weight: Tensor) -> nn.Module:
    """An empty module of the other kind with the source's sizes, device, dtype and mode; frozen where the source is."""
    with torch.device("meta"):
        module = kind(source.model_dim, source.pe_dim, source.initializer_range)  # type: ignore[arg-type]
    module = module.to(weight.dtype).to_empty(device=weight.device).train(source.training)
    return module.requires_grad_(any(parameter.requires_grad for parameter in source.parameters()))


def fuse(separate: SeparateProjections) -> FusedProjections:
    """The same function as one projection, to rounding; a new module with the source's device and dtype."""
    fused = _like(FusedProjections, separate, separate.W_q.weight)
    assert isinstance(fused, FusedProjections)
    _fold_into(fused, separate)
    return fused


@torch.no_grad()
def unfuse(fused: FusedProjections) -> SeparateProjections:
    """The same function as six projections, where there is one.

    `W_e` is solved for in float64 by least squares from `W_E = W_e W_p`, then rounded to the parameters' dtype and judged as rounded.

    Raises:
        ValueError: where `W_e W_p` or the bias misses by more than 1e-5 (fp32) or 1e-2 (bf16) relative: `W_E` has left the family.
    """
    separate = _like(SeparateProjections, fused, fused.W_fused.weight)
    assert isinstance(separate, SeparateProjections)
    weights = fused.W_fused.weight.split(fused.widths)
    biases = fused.W_fused.bias.split(fused.widths)
    plain = (separate.W_q, separate.W_k, separate.W_v, separate.W_z, separate.W_p)
    for linear, weight, bias in zip(plain, weights[:5], biases[:5], strict=True):
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)

    W_p, b_p = weights[4].double().cpu(), biases[4].double().cpu()
    W_E, b_E = weights[5].double().cpu(), biases[5].double().cpu()
    limit = _RESIDUAL_LIMIT[fused.W_fused.weight.dtype]
    # gelsd, by singular values, since a trained W_p need not have full rank. gelsy is quicker, but failed on one such matrix in five,
    # and on others the next time (torch 2.13, docs/log.md).
    separate.W_e.weight.copy_(torch.linalg.lstsq(W_p.T, W_E.T, driver="gelsd").solution.T)
    W_e = separate.W_e.weight.double().cpu()
    separate.W_e.bias.copy_(b_E - W_e @ b_p)
    b_e = separate.W_e.bias.double().cpu()
    residual = max(_relative_error(W_e @ W_p, W_E), _relative_error(W_e @ b_p + b_e, b_E))
    if residual <= limit:
        return separate

    singular = torch.linalg.svdvals(W_p)
    rank = int((singular > singular[0] * max(W_p.shape) * torch.finfo(W_p.dtype).eps).sum())
    condition = float(singular[0] / singular[-1]) if singular[-1] > 0 else float("inf")
    raise ValueError(
        f"cannot unfuse: no W_e with W_e W_p = W_E (relative residual {residual:.1e}, limit {limit:.0e}; P = {fused.pe_dim}, "
        f"rank of W_p {rank}, condition {condition:.1e}); W_E has trained beyond rank P, keep use_hem=True"
    )


def _relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖; 0 where both are zero."""
    norm = float(reference.norm())
    error = float((value - reference).norm())
    return error / norm if norm else (0.0 if error == 0 else float("inf"))
