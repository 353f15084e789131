"""Compiled blocks: all of them stay compiled."""

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo

from lightning_modules.compilation import compile_blocks
from mmrec.config import MMRecConfig
from mmrec.model import MMRecModel


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def everything_a_training_asks_for(network: MMRecModel) -> None:
    """Training and validation, with document starts and without, of two lengths."""
    for length in (24, 40):
        ids = torch.randint(50, (2, length))
        batch = {"input_ids": ids, "labels": ids}
        starts = torch.zeros(2, length, dtype=torch.bool)
        starts[0, 5] = True
        for given in (batch, {**batch, "reset": starts}):
            network.train()
            network.loss(given).loss.backward()
            network.eval()
            with torch.no_grad():
                network.loss(given)


def make_network(num_layers: int = 7) -> MMRecModel:
    # Matrices and windows without a planning error, and a matrix with one; of six layers the last is a window.
    sizes = {"vocab_size": 50, "model_dim": 16, "num_layers": num_layers, "num_heads": 2, "ffn_dim": 16, "window": 8}
    return MMRecModel(MMRecConfig(**sizes, use_uboo=True, planning_layers="last"))


@pytest.mark.parametrize("num_layers", [6, 7])
def test_every_form_of_every_block_is_compiled(num_layers: int) -> None:
    network = make_network(num_layers)
    compile_blocks(network.blocks, backend="eager")
    everything_a_training_asks_for(network)


def test_torch_would_run_some_of_them_eagerly() -> None:
    """Why the limit is lifted; where this no longer raises, `compile_blocks` need not."""
    network = make_network()
    for block in network.blocks:
        block.compile(backend="eager")
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        everything_a_training_asks_for(network)
