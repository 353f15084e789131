"""UBÖO: the loss, which gradient it sends where, and the orthogonalised route."""

import pytest
import torch
from support import assert_same

from mmrec.blocks.composition import long_term_memory, read_out, short_term_memory
from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.core import uboo
from mmrec.core.memory import BlockState
from mmrec.model import MMRecModel

B, T, D, E = 2, 7, 12, 5


def block(**fields) -> MMRecBlock:
    return MMRecBlock(**{"model_dim": D, "num_heads": 3, "pe_dim": 4, "planning_error_dim": E, "planning_loss": "mse", **fields}).double()


def states() -> torch.Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)


def test_mse_is_the_mean_squared_planning_error() -> None:
    one, h = block(), states()
    W_pe, W_pt = one.mdi.W_planning_error.weight, one.mdi.W_planning_target.weight
    error = h[:, 1:] @ W_pe.T - h[:, :-1] @ W_pt.T  # the first token has no previous state
    assert_same(one.planning_error(h, h, None, None).mean(), error.square().mean())


def test_gradient_to_the_memory_is_the_founding_formula_and_nothing_else() -> None:
    one, h, lam = block(), states(), 0.3
    W_pe, W_pt = one.mdi.W_planning_error.weight, one.mdi.W_planning_target.weight
    loss = one.planning_error(h, h, None, None)
    (lam * loss.mean()).backward()
    error = (h[:, 1:] @ W_pe.T - h[:, :-1] @ W_pt.T).detach()
    expected = torch.zeros_like(h)
    expected[:, :-1] = -(2 * lam / error.numel()) * error @ W_pt.detach()
    assert_same(h.grad, expected)
    assert torch.equal(h.grad[:, -1], torch.zeros(B, D, dtype=torch.float64))
    assert_same(W_pe.grad, (2 * lam / error.numel()) * torch.einsum("bte,btd->ed", error, h[:, 1:].detach()))
    assert_same(W_pt.grad, -(2 * lam / error.numel()) * torch.einsum("bte,btd->ed", error, h[:, :-1].detach()))


def test_tokens_without_a_previous_state_are_left_out() -> None:
    h = torch.randn(3, 4, D)
    reset = torch.zeros(3, 4, dtype=torch.bool)
    reset[1, 2] = True
    carried = torch.randn(3, D)
    carried[2] = 0
    counted = uboo.counted_tokens(h, carried, reset)
    assert counted.tolist() == [[True] * 4, [True, True, False, True], [False, True, True, True]]
    assert uboo.counted_tokens(h, None, None)[:, 0].any().item() is False
    alone = block().float().planning_error(h[:, :1], h[:, :1], None, None)
    assert alone.mean() == 0
    assert alone.numbers == 0


def test_normalized_form_regresses_on_a_fixed_random_projection() -> None:
    one, h = block(planning_loss="normalized"), states()
    W_pe, W_pt = one.mdi.W_planning_error.weight, one.mdi.W_planning_target.weight
    assert not W_pe.requires_grad
    one.planning_error(h, h, None, None).mean().backward()
    assert W_pe.grad is None
    assert W_pt.grad.norm() > 0
    assert torch.equal(h.grad[:, -1], torch.zeros(B, D, dtype=torch.float64))
    # The loss cannot be won by shrinking: it does not depend on the projections' scale.
    before = one.planning_error(h, h, None, None).mean()
    with torch.no_grad():
        W_pt.mul_(7)
        W_pe.mul_(0.5)
    assert_same(one.planning_error(h, h, None, None).mean(), before, limit=1e-3)
    a = uboo.rms(torch.randn(5, 100))
    assert_same(a.square().mean(-1), torch.ones(5))


def test_target_statistics_of_a_broken_network_are_nan_and_raise_nothing() -> None:
    target = torch.randn(2, 8, 4)
    target[1, 3, 2] = torch.inf
    assert all(value.isnan() for value in uboo.target_statistics(target, torch.ones(2, 8, dtype=torch.bool)))


def test_target_statistics_show_a_collapse() -> None:
    counted = torch.ones(4, 50, dtype=torch.bool)
    healthy = torch.randn(4, 50, 16)
    variance, rank = uboo.target_statistics(healthy, counted)
    assert 0.8 < variance < 1.2
    assert rank > 13
    axes = torch.eye(16)[:2].repeat(100, 1).view(4, 50, 16) * torch.tensor([3.0, 1.0] * 100).view(4, 50, 1)  # two values of one line
    assert_same(uboo.target_statistics(axes, counted)[1], torch.tensor(1.0))
    centred = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]).repeat(50, 1).view(4, 50, 2)  # singular values as 3 to 1
    share = torch.tensor([0.75, 0.25])
    assert_same(uboo.target_statistics(centred, counted)[1], torch.exp(-(share * share.log()).sum()))
    variance, rank = uboo.target_statistics(1e-4 * torch.randn(4, 50, 1) * torch.randn(16), counted)
    assert variance < 1e-7
    assert rank < 1.01
    assert [v.item() for v in uboo.target_statistics(healthy, torch.zeros_like(counted))] == [0, 1]


def test_project_out_is_orthogonal_and_leaves_what_has_no_direction() -> None:
    a, m = torch.randn(50, D, dtype=torch.float64), torch.randn(50, D, dtype=torch.float64)
    m[3] = 0
    for scale in (1.0, 1e-200):
        projected = uboo.project_out(a, scale * m)
        inner = (projected * m).sum(-1).abs()
        assert (inner <= 1e-12 * m.norm(dim=-1) * a.norm(dim=-1)).all()
        assert torch.equal(projected[3], a[3])
        assert_same(projected[0], a[0] - (a[0] @ m[0]) / (m[0] @ m[0]) * m[0])
    tiny = uboo.project_out(torch.randn(D), 1e-30 * torch.randn(D))
    assert tiny.isfinite().all()


@pytest.mark.parametrize("planning_loss", ["mse", "normalized"])
def test_in_every_layer_the_routed_cotangent_is_orthogonal_to_the_output_s(planning_loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = uboo.project_out

    def recording(a, m):
        seen.append((a, m, original(a, m)))
        return seen[-1][2]

    monkeypatch.setattr(uboo, "project_out", recording)
    model = MMRecModel(
        vocab_size=17, model_dim=D, num_layers=3, num_heads=3, pe_dim=4, orthogonalize=True, planning_loss=planning_loss
    ).double()
    tokens = torch.randint(17, (B, T))
    model.loss({"input_ids": tokens, "labels": tokens}).loss.backward()
    assert len(seen) == 3
    for a, m, routed in seen:
        assert a[:, :-1].norm() > 0
        assert m.norm() > 0
        assert ((routed * m).sum(-1).abs() <= 1e-12 * m.norm(dim=-1) * a.norm(dim=-1)).all()


def test_moving_along_the_routed_cotangent_changes_the_main_loss_to_second_order() -> None:
    model = MMRecModel(vocab_size=17, model_dim=D, num_layers=2, num_heads=3, pe_dim=4, lambda_P=0.1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    top, labels = model.blocks[-1], torch.randint(17, (B, T))
    x = model.embedding(torch.randint(17, (B, T))).detach()
    normed = top.norm(x)
    q, k, v, z, p, e = top.projections(normed)
    log_alpha = top.head_decay(normed)
    leaf = short_term_memory(top, z, p, top.mdi(z, k), None, None)[0].detach()

    def main_loss(h: torch.Tensor) -> torch.Tensor:
        r, _ = long_term_memory(top, q, k, v, h, log_alpha, None, None)
        y = x + top.W_o(read_out(top, h, r, e))
        logits = model.head(model.norm(top.ffn(top.ffn_norm(y), y)))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    h = leaf.clone().requires_grad_()
    (m,) = torch.autograd.grad(main_loss(h), h)
    (a,) = torch.autograd.grad(top.planning_error(leaf, h, None, None).mean(), h)
    direction = uboo.project_out(a, m)
    direction = direction / direction.norm()
    with torch.no_grad():
        base = main_loss(leaf)
        steps = [abs(main_loss(leaf + size * direction) - base).item() for size in (1e-3, 5e-4)]
        plain = [abs(main_loss(leaf + size * a / a.norm()) - base).item() for size in (1e-3, 5e-4)]
    assert 3.9 < steps[0] / steps[1] < 4.1
    assert 1.9 < plain[0] / plain[1] < 2.1


def test_orthogonalising_leaves_the_projections_gradients_as_they_are() -> None:
    grads = []
    for orthogonalize in (False, True):
        torch.manual_seed(3)
        model = MMRecModel(vocab_size=17, model_dim=D, num_layers=2, num_heads=3, pe_dim=4, orthogonalize=orthogonalize).double()
        tokens = torch.randint(17, (B, T))
        model.loss({"input_ids": tokens, "labels": tokens}).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    planning = [name for name in grads[0] if "W_planning" in name]
    assert len(planning) == 4
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in planning)
    assert not torch.equal(grads[0]["blocks.0.projections.W_fused.weight"], grads[1]["blocks.0.projections.W_fused.weight"])


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_a_sequence_in_two_pieces_has_the_whole_s_planning_error_and_gradients(orthogonalize: bool) -> None:
    one = block(orthogonalize=orthogonalize)
    x = torch.randn(B, T, D, dtype=torch.float64)

    def run(pieces: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        one.zero_grad()
        state: BlockState | None = None
        loss, outputs = None, []
        for piece in pieces:
            y, planning, state = one(piece, state=state, return_auxiliary_loss=True, return_state=True)
            loss = planning if loss is None else loss.plus(planning)
            outputs.append(y)
        (loss.mean() + torch.cat(outputs, 1).square().mean()).backward()
        return loss.mean(), one.projections.W_fused.weight.grad.clone()

    (whole, whole_grad), (split, split_grad) = run([x]), run([x[:, :3], x[:, 3:]])
    assert_same(split, whole)
    assert_same(split_grad, whole_grad)
