"""The planning loss "decode": equal to its definition, and its gradient nowhere but in the predictor and the states before."""

import pytest
import torch
from support import assert_same
from torch import Tensor

from mmrec.config import MMRecConfig
from mmrec.core.next_state import NextState
from mmrec.model import MMRecModel

B, T, D, VOCAB = 2, 9, 6, 11


def predictor(**fields) -> NextState:
    planner = NextState(MMRecConfig(vocab_size=VOCAB, model_dim=D, num_layers=1, **fields)).double()
    for linear in (planner.W_in, planner.W_out):
        torch.nn.init.normal_(linear.weight)
    return planner


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, [0, 4]] = True
    reset[1, [2, 3]] = True
    hidden, embedded, head = (torch.randn(*shape, dtype=torch.float64) for shape in ((B, T, D), (B, T, D), (VOCAB, D)))
    return hidden.requires_grad_(), embedded.requires_grad_(), head.requires_grad_(), reset


def naive(planner: NextState, hidden: Tensor, embedded: Tensor, head: Tensor, reset: Tensor) -> Tensor:
    """A token at a time, from the definition."""
    losses = []
    for b in range(B):
        for t in range(1, T):
            if reset[b, t]:
                continue
            joined = torch.cat([hidden[b, t - 1], embedded[b, t].detach()])
            foreseen = hidden[b, t - 1] + planner.W_out.weight @ torch.nn.functional.gelu(planner.W_in.weight @ joined)
            p, q = (head.detach() @ hidden[b, t].detach()).softmax(0), (head.detach() @ foreseen).softmax(0)
            losses.append((p * (p.log() - q.log())).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_it_is_the_mean_divergence_and_so_are_its_gradients(chunk_size: int) -> None:
    planner, (hidden, embedded, head, reset) = predictor(loss_chunk_size=chunk_size), inputs()
    wanted = [hidden, planner.W_in.weight, planner.W_out.weight]
    loss, expected = planner(hidden, embedded, head, reset), naive(planner, hidden, embedded, head, reset)
    assert loss.numbers == 2 * (T - 1) - 3
    assert_same(loss.mean(), expected)
    for actual, truth in zip(torch.autograd.grad(loss.mean(), wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert_same(actual, truth)


def test_no_gradient_reaches_the_state_foreseen_the_token_and_the_head() -> None:
    planner, (hidden, embedded, head, _) = predictor(), inputs()
    reset = torch.ones(B, T, dtype=torch.bool)
    reset[:, T - 1] = False  # the last token alone counts
    planner(hidden, embedded, head, reset).mean().backward()
    reached = hidden.grad.abs().sum(-1) > 0
    assert reached.nonzero()[:, 1].tolist() == [T - 2] * B
    assert embedded.grad is None
    assert head.grad is None


def test_states_foreseen_without_error_cost_nothing_and_one_token_has_nothing_to_foresee() -> None:
    planner, (hidden, embedded, head, reset) = predictor(), inputs()
    with torch.no_grad():
        planner.W_out.weight.zero_()
        still = hidden[:, :1].expand_as(hidden)
        assert planner(still, embedded, head, reset).mean().abs() < 1e-15
        alone = planner(hidden[:, :1], embedded[:, :1], head, None)
    assert (alone.mean(), alone.numbers) == (0, 0)


def test_in_the_network_it_reads_what_the_head_reads() -> None:
    model = MMRecModel(vocab_size=VOCAB, model_dim=D, num_layers=2, num_heads=2, planning_loss="decode", tie_embeddings=False).double()
    batch = {"input_ids": torch.randint(VOCAB, (B, T)), "labels": torch.randint(VOCAB, (B, T)), "reset": inputs()[3]}
    hidden, _ = model.hidden_states(batch["input_ids"], reset=batch["reset"])
    out = model.loss(batch)
    embedded = model.embedding(batch["input_ids"]) * model.config.input_scale
    expected = naive(model.planner, hidden, embedded, model.head.weight, batch["reset"])
    assert_same(out.auxiliary_by_layer, torch.stack([torch.zeros_like(expected), expected]))
    assert_same(out.auxiliary, model.lambda_P * expected)
    reached = {
        name
        for name, p in model.named_parameters()
        if torch.autograd.grad(out.auxiliary, p, retain_graph=True, allow_unused=True)[0] is not None
    }
    assert {name for name, _ in model.named_parameters()} - reached == {"head.weight"}


def test_its_flops_are_the_predictors_and_once_more_the_heads() -> None:
    """The head multiplies both states forward and one backward: as often as a weight with a gradient does."""
    sizes = {"vocab_size": VOCAB, "model_dim": D, "num_layers": 2, "num_heads": 2}
    with_it, without = MMRecModel(planning_loss="decode", **sizes), MMRecModel(use_uboo=False, **sizes)
    assert with_it.flops_per_token(T) - without.flops_per_token(T) == 6 * (3 * D * D + VOCAB * D)
