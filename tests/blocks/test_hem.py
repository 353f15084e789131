"""HEM: one projection and six are the same function, forward and backward, and convert into each other."""

import copy

import pytest
import torch
from support import relative_error
from torch.profiler import ProfilerActivity, profile

from mmrec.blocks.hem import FusedProjections, SeparateProjections, fuse, unfuse
from mmrec.blocks.mm_rec_block import MMRecBlock

D = 64


def separate(pe_dim: int = 16, dtype: torch.dtype = torch.float32, bias: float = 0.1) -> SeparateProjections:
    module = SeparateProjections(D, pe_dim)
    with torch.no_grad():
        for linear in module.children():
            linear.bias.normal_(std=bias)
    return module.to(dtype)


@pytest.mark.parametrize("pe_dim", [16, 64])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_fused_equals_separate(dtype: torch.dtype, limit: float, pe_dim: int) -> None:
    six = separate(pe_dim, dtype)
    x = torch.randn(2, 9, D, dtype=dtype)
    one = fuse(six)
    assert one.W_fused.weight.dtype == dtype
    for name, actual, expected in zip("qkvzpe", one(x), six(x), strict=True):
        assert relative_error(actual, expected) <= limit, name


@pytest.mark.parametrize("pe_dim", [16, 64])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_there_and_back(dtype: torch.dtype, limit: float, pe_dim: int) -> None:
    six = separate(pe_dim, dtype)
    back = unfuse(fuse(six))
    for name, parameter in six.named_parameters():
        if "W_e" not in name:
            assert torch.equal(parameter, dict(back.named_parameters())[name]), name
    W_E, W_E_back = (m.W_e.weight.double() @ m.W_p.weight.double() for m in (six, back))
    assert relative_error(W_E_back, W_E) <= limit


def test_what_has_trained_beyond_the_family_is_refused_by_name() -> None:
    one = FusedProjections(D, 16)
    with torch.no_grad():
        one.W_fused.weight[-D:].normal_()
    with pytest.raises(ValueError, match=r"cannot unfuse: .*P = 16, rank of W_p 16, condition \d") as error:
        unfuse(one)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("factor", [1.0, 0.0], ids=["repeated", "zero"])
def test_a_rank_deficient_path_is_unfused_where_a_solution_exists(factor: float) -> None:
    for _ in range(10):
        six = separate(16, torch.float64)
        with torch.no_grad():
            six.W_p.weight[-1] = factor * six.W_p.weight[0]
        back = unfuse(fuse(six))
        x = torch.randn(2, 9, D, dtype=torch.float64)
        assert relative_error(back(x).e, six(x).e) < 1e-9  # a least-squares solution of a deficient system keeps fewer digits


def test_both_modes_start_as_the_same_function() -> None:
    blocks = []
    for use_hem in (False, True):
        torch.manual_seed(5)
        blocks.append(MMRecBlock(model_dim=D, num_heads=2, use_hem=use_hem, pe_dim=16))
    x = torch.randn(2, 9, D)
    assert relative_error(blocks[1](x), blocks[0](x)) < 2e-6
    assert torch.equal(blocks[0].W_o.weight, blocks[1].W_o.weight)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("planning_loss", ["mse", "normalized"])
def test_gradient_parity(dtype: torch.dtype, limit: float, planning_loss: str) -> None:
    torch.manual_seed(7)
    off = MMRecBlock(model_dim=D, num_heads=2, use_hem=False, pe_dim=16, planning_loss=planning_loss).to(dtype)
    with torch.no_grad():
        for linear in off.projections.children():
            linear.bias.normal_(std=0.1)
    on = copy.deepcopy(off)
    on.set_hem(True)
    x = torch.randn(2, 33, D, dtype=dtype)
    weight = torch.randn(2, 33, D, dtype=dtype)
    results = []
    for block in (off, on):
        leaf = x.clone().requires_grad_()
        y, planning = block(leaf, return_auxiliary_loss=True)
        ((y * weight).sum() + planning.mean()).backward()
        results.append((y, planning.mean(), leaf.grad))
    for name, actual, expected in zip(("output", "L_aux", "dx"), results[1], results[0], strict=True):
        assert relative_error(actual, expected) <= limit, name

    grads_off = {name: p.grad for name, p in off.named_parameters() if p.grad is not None}
    grads_on = {name: p.grad for name, p in on.named_parameters() if p.grad is not None}
    shared = set(grads_off) & set(grads_on)
    assert {"W_o.weight", "ffn.W_down.weight", "head_decay.A_log", "state_gate.w_g", "mdi.W_planning_target.weight"} <= shared
    for name in shared:
        assert relative_error(grads_on[name], grads_off[name]) <= limit, name

    widths = on.projections.widths
    dW_q, dW_k, dW_v, dW_z, dW_p, dW_E = grads_on["projections.W_fused.weight"].split(widths)
    db_q, db_k, db_v, db_z, db_p, db_E = grads_on["projections.W_fused.bias"].split(widths)
    W_p, b_p, W_e = off.projections.W_p.weight, off.projections.W_p.bias, off.projections.W_e.weight
    expected = {
        "W_q.weight": dW_q, "W_k.weight": dW_k, "W_v.weight": dW_v, "W_z.weight": dW_z,
        "W_q.bias": db_q, "W_k.bias": db_k, "W_v.bias": db_v, "W_z.bias": db_z,
        "W_e.weight": dW_E @ W_p.T + torch.outer(db_E, b_p),
        "W_e.bias": db_E,
        "W_p.weight": dW_p + W_e.T @ dW_E,
        "W_p.bias": db_p + W_e.T @ db_E,
    }  # fmt: skip
    for name, value in expected.items():
        assert relative_error(grads_off[f"projections.{name}"], value) <= limit, name


def test_the_six_parts_are_views_and_the_forward_copies_nothing() -> None:
    one = FusedProjections(D, 16).bfloat16()
    x = torch.randn(2, 9, D, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU]) as recorded, torch.no_grad():
        parts = one(x)
    storages = {part.untyped_storage().data_ptr() for part in parts}
    assert len(storages) == 1
    names = {event.name for event in recorded.events()}
    assert "aten::linear" in names
    # The CPU's addmm writes the bias into its output first; that copy is inside the product.
    outside = {event.name for event in recorded.events() if event.cpu_parent is None or event.cpu_parent.name != "aten::addmm"}
    assert not {name for name in outside if any(word in name for word in ("cat", "contiguous", "copy", "clone"))}
