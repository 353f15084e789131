"""Clipping: the same step whether the optimiser divides the gradients or a pass of its own does."""

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from support import relative_error

from lightning_modules.gradients import clip_gradients


def stepped(
    fused: bool, clips: list[float | None], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, torch.optim.Optimizer, list[torch.Tensor]]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype).to(device)) for shape in ((7, 5), (11,))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    norms = []
    for clip in clips:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        norm = clip_gradients(optimizer, clip, "norm")
        assert norm is not None
        norms.append(norm)
        optimizer.step()
    left = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    return torch.cat([left, *(p.detach().flatten() for p in parameters)]), optimizer, norms


@pytest.mark.parametrize("clips", [[0.3, 0.5], [0.3, None], [1e3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_fused_optimizer_clips_as_it_steps(clips: list[float | None], dtype: torch.dtype, device: str) -> None:
    expected, _, norms = stepped(False, clips, dtype, device)
    actual, optimizer, found = stepped(True, clips, dtype, device)
    assert relative_error(actual, expected) < 1e-6
    assert torch.equal(torch.stack(found), torch.stack(norms))
    scale = optimizer.grad_scale  # type: ignore[attr-defined]
    assert (scale is None) == (clips[-1] is None)
    if clips[-1] is not None:
        assert float(scale) == pytest.approx(max(1.0, float(norms[-1]) / clips[-1]), rel=1e-5)


def test_within_lightnings_wrapper_it_clips_too() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 4.0)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    clip_gradients(LightningOptimizer(optimizer), 0.5, "norm")
    optimizer.step()
    assert float(parameter.grad.norm()) == pytest.approx(0.5, rel=1e-5)


def test_by_value_nothing_is_divided() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([-4.0, 0.1, 4.0])
    optimizer = torch.optim.AdamW([parameter], fused=True)
    clip_gradients(optimizer, 0.5, "value")
    assert parameter.grad.tolist() == pytest.approx([-0.5, 0.1, 0.5])
    assert optimizer.grad_scale is None  # type: ignore[attr-defined]
