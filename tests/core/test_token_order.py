"""The planning loss "order": equal to its definition, document by document."""

import math

import pytest
import torch
from support import assert_same
from torch import Tensor

from mmrec.config import MMRecConfig
from mmrec.core.token_order import WINDOW, TokenOrder, upcoming
from mmrec.model import MMRecModel

B, T, D, VOCAB = 2, 40, 6, 23


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(VOCAB, (B, T + 1))
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, [0, 17]] = True
    reset[1, [5, 6, 39]] = True
    labels = tokens[:, 1:].clone()
    labels[0, 3] = labels[1, 38] = -1
    return torch.randn(B, T, D, dtype=torch.float64, requires_grad=True), labels, reset


def naive(weight: Tensor, hidden: Tensor, labels: Tensor, reset: Tensor) -> tuple[Tensor, int]:
    """A token at a time: the first occurrence of each token that comes next decides."""
    losses = []
    for b in range(B):
        for t in range(T):
            target = torch.zeros(VOCAB, dtype=torch.float64)
            for distance in range(1, WINDOW + 1):
                place = t + distance  # of the token whose label stands before it
                if place > T or (place < T and reset[b, place]):
                    break
                token = int(labels[b, place - 1])
                if token >= 0 and target[token] == 0:
                    target[token] = math.exp(WINDOW - distance)
            if target.sum() > 0:
                losses.append(-(target / target.sum() * (weight @ hidden[b, t]).log_softmax(0)).sum())
    return torch.stack(losses).mean(), len(losses)


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_it_is_the_mean_cross_entropy_and_so_are_its_gradients(chunk_size: int) -> None:
    planner = TokenOrder(MMRecConfig(vocab_size=VOCAB, model_dim=D, num_layers=1, loss_chunk_size=chunk_size)).double()
    torch.nn.init.normal_(planner.W_order.weight)
    hidden, labels, reset = inputs()
    loss = planner(hidden, labels, reset)
    expected, counted = naive(planner.W_order.weight, hidden, labels, reset)
    assert loss.numbers == counted == B * T - 4  # the ends of four documents; the other −1 is followed by tokens
    assert_same(loss.mean(), expected)
    wanted = [hidden, planner.W_order.weight]
    for actual, truth in zip(torch.autograd.grad(loss.mean(), wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert_same(actual, truth)


def test_a_token_weighs_by_where_it_occurs_first() -> None:
    labels = torch.tensor([[5, 5, 2, 5, -1]])
    tokens, share = upcoming(labels, None, torch.float64)
    assert tokens.shape == share.shape == (1, 5, WINDOW)
    weights = torch.tensor([1, 0, math.exp(-2), 0, 0], dtype=torch.float64)
    assert_same(share[0, 0, :5], weights / weights.sum())
    assert share[0, 2].nonzero().tolist() == [[0], [1]]
    assert share[0, 3].tolist() == [1.0] + [0.0] * (WINDOW - 1)
    assert share[0, 4].sum() == 0
    _, stopped = upcoming(labels, torch.tensor([[False, False, True, False, False]]), torch.float64)
    assert stopped[0, 0].nonzero().tolist() == [[0]]
    assert stopped[0, 1].sum() == 0


def test_where_nothing_follows_there_is_no_loss_and_no_gradient() -> None:
    planner = TokenOrder(MMRecConfig(vocab_size=VOCAB, model_dim=D, num_layers=1)).double()
    hidden = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    loss = planner(hidden, torch.full((1, 3), -1), None)
    loss.mean().backward()
    assert (loss.mean(), loss.numbers) == (0, 0)
    assert not hidden.grad.any()


def test_in_the_network_it_reads_the_last_hidden_states() -> None:
    model = MMRecModel(vocab_size=VOCAB, model_dim=D, num_layers=2, num_heads=2, planning_loss="order").double()
    _, labels, reset = inputs()
    batch = {"input_ids": torch.randint(VOCAB, (B, T)), "labels": labels, "reset": reset}
    hidden, _ = model.hidden_states(batch["input_ids"], reset=reset)
    out = model.loss(batch)
    expected, _ = naive(model.planner.W_order.weight, hidden, labels, reset)
    assert_same(out.auxiliary_by_layer, torch.stack([torch.zeros_like(expected), expected]))
    assert_same(out.loss, out.main + model.lambda_P * expected)
    flops = model.flops_per_token(T) - MMRecModel(vocab_size=VOCAB, model_dim=D, num_layers=2, num_heads=2, use_uboo=False).flops_per_token(
        T
    )
    assert flops == 6 * VOCAB * D
