"""What only a CUDA device can show; `make test-gpu` runs these."""

from pathlib import Path

import pytest
import torch
import torch._dynamo
from support import TOLERANCE, relative_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.compilation import compile_blocks
from mmrec.cli import main
from mmrec.model import MMRecModel

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("use_hem", [True, False], ids=["HEM", "six"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_against_float64(dtype: torch.dtype, use_hem: bool, compiled: bool) -> None:
    model = MMRecModel(vocab_size=101, model_dim=64, num_layers=2, num_heads=2, pe_dim=16, use_hem=use_hem, orthogonalize=True)
    batch = {"input_ids": torch.randint(101, (2, 130)), "labels": torch.randint(-1, 101, (2, 130)), "reset": torch.rand(2, 130) < 0.05}
    exact = MMRecModel(model.config).double()
    exact.load_state_dict(model.to(dtype).state_dict())
    exact.loss(batch).loss.backward()
    if compiled:
        torch._dynamo.reset()  # its limit is the process's: what it gave up would pass as compiled
        compile_blocks(model.blocks)
    model.cuda().loss({name: tensor.cuda() for name, tensor in batch.items()}).loss.backward()
    exact_gradients = {name: parameter.grad.flatten() for name, parameter in exact.named_parameters()}
    gradients = {name: parameter.grad.cpu().flatten() for name, parameter in model.named_parameters()}
    # A bf16 network rounds every activation; what reaches a single weight through norms may be little more than rounding.
    whole, single = (0.05, 0.3) if dtype == torch.bfloat16 else (TOLERANCE[dtype], 5 * TOLERANCE[dtype])
    assert relative_error(torch.cat([g.double() for g in gradients.values()]), torch.cat(list(exact_gradients.values()))) < whole
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact_gradients[name]) < single, name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_on_a_gpu(precision: str, compiled: bool, tmp_path: Path) -> None:
    arguments = ["--trainer.accelerator=gpu", f"--trainer.precision={precision}", f"--model.compile_blocks={compiled}".lower()]
    main(["fit", "--config", "debug.yaml", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=10", *arguments])
    found = scalars(tmp_path)
    assert found["val/loss"][0] == pytest.approx(torch.tensor(4096.0).log().item(), rel=0.05)
    assert found["train/loss"][-1] < found["train/loss"][0]
    assert found["memory/peak"][-1] >= found["memory/allocated"][-1] > 0
    assert found["latency/step_p50_ms"][-1] > 0
    assert 0 < found["throughput/mfu"][-1] < 1


def test_a_memory_snapshot_is_for_the_viewer(tmp_path: Path) -> None:
    arguments = ["--trainer.accelerator=gpu", "--trainer.max_steps=4", "--memory_profile.snapshot_steps=[2]"]
    main(["fit", "--config", "debug.yaml", f"--trainer.default_root_dir={tmp_path}", *arguments])
    (snapshot,) = (tmp_path / "memory").glob("step=000002*")
    assert snapshot.suffix == ".pickle"
    assert snapshot.stat().st_size > 1000
