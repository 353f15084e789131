"""In the steady state of training the host waits for the device nowhere: neither in the module, nor the callbacks, nor Lightning."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from callbacks import AuxiliaryLossCurves, GPUMemoryProfile, LossSpikes, RandomStates, SkippedSteps, StepLatency

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
FIRST, LAST, STEPS = 4, 12, 14  # before, everything is compiled and the first batches are checked; the last step is logged
WINDOWS = {"model_dim": 128, "window_every": 2, "window": 4}
OTHERS = ("windows", "graph-windows", "transformer", "graph-transformer")


class NoWaiting(Callback):
    """Makes every wait for the device an error between two steps."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += trainer.global_step > FIRST
        if trainer.global_step == FIRST:
            torch.cuda.set_sync_debug_mode("error")
        elif trainer.global_step == LAST:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("precision", "module", "network"),
    [
        ("bf16-mixed", {}, {"use_uboo": False}),
        ("bf16-mixed", {"compile_blocks": True}, {}),
        ("bf16-mixed", {"cuda_graph": True}, {}),
        ("bf16-mixed", {}, {"planning_loss": "normalized"}),
        ("bf16-true", {"lambda_P_final": 0.05, "lambda_P_anneal_steps": 8}, {"orthogonalize": True}),
        ("32-true", {}, {"use_dpg": True, "activation_checkpointing": True}),
        ("bf16-true", {"optimizer": "adamw_8bit"}, {"use_uboo": False}),
        ("bf16-true", {"optimizer": "adamw_bf16"}, {"use_uboo": False}),
        ("bf16-mixed", {}, WINDOWS),
        ("bf16-mixed", {"cuda_graph": True}, WINDOWS),
        ("bf16-mixed", {}, None),
        ("bf16-mixed", {"cuda_graph": True}, None),
    ],
    ids=["mixed", "compiled", "graph", "normalized", "bf16", "fp32", "8bit", "bf16 moments", *OTHERS],
)
def test_no_step_waits(
    precision: str, module: dict[str, Any], network: dict[str, Any] | None, accumulate: int, tmp_path: Path, stubs: ModuleType
) -> None:
    """Where `network` is None a Transformer++ is trained."""
    if module.get("optimizer"):
        pytest.importorskip("torchao")
    watch = NoWaiting()
    callbacks = [AuxiliaryLossCurves(), GPUMemoryProfile(), SkippedSteps(), LossSpikes(), RandomStates(), StepLatency(), watch]
    trainer = stubs.make_trainer(
        tmp_path,
        callbacks,
        accelerator="gpu",
        precision=precision,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1000,
        limit_val_batches=0,
    )
    batches = [stubs.make_batch(list(range(4 * index, 4 * index + 4))) for index in range(accumulate * STEPS)]
    trained = stubs.make_baseline(**module) if network is None else stubs.make_module(network, **module)
    trainer.fit(trained, DataLoader(batches, batch_size=None, pin_memory=True))
    assert trainer.global_step == STEPS
    assert watch.steps >= LAST - FIRST
