"""One case in a process of its own: builds what a user's command would build, trains a few steps, and answers with rows."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from train_step_cases import SILENT, Case
from train_step_clock import StepClock

from callbacks.device_peaks import dense_bf16_peak
from lightning_modules import MMRecLightningModule
from mmrec.config import MMRecConfig
from mmrec.measuring.clocks import median_ms
from mmrec.measuring.machine import device, device_name, machine, synchronize
from mmrec.model import MMRecModel

Row = dict[str, Any]
GIB = 2**30
LAYERS = (3, 6)  # of the networks from which the planning projections' cost a layer is taken: of three, one has a window


class RandomTokens(IterableDataset):
    """Batches without end of random tokens, the labels shifted by one; drawn once, so that the host spends nothing on them."""

    def __init__(self, batch: int, seq_len: int, vocab_size: int) -> None:
        tokens = torch.randint(vocab_size, (4, batch, seq_len + 1), generator=torch.Generator().manual_seed(0))
        self.batches = [{"input_ids": part[:, :-1].contiguous(), "labels": part[:, 1:].contiguous()} for part in tokens]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.batches


def limit_memory(where: torch.device, gib: float) -> float | None:
    """Let this process take no more than `gib` of a larger GPU's memory, as on a smaller one; the limit that holds, or None."""
    if where.type != "cuda" or gib <= 0:
        return None
    fraction = gib * GIB / torch.cuda.get_device_properties(where).total_memory
    if fraction >= 1:
        return None
    torch.cuda.set_per_process_memory_fraction(fraction, where)
    return gib


def common(case: Case, batch: int, where: torch.device, limit: float | None) -> Row:
    """What every row says of its case."""
    settings = case.settings()
    network, model = MMRecConfig(**settings["network"]), settings["model"]
    ours = case.kind != "llama"
    return {
        "case": case.name,
        "what": case.what,
        "config": case.config if ours else "LlamaForCausalLM",
        "params_m": None,
        "uboo": ours and network.use_uboo,
        "hem": ours and network.use_hem,
        "windows": network.num_windows if ours else 0,
        "B": batch,
        "T": case.seq_len,
        "accumulate": case.accumulate,
        "gpus": 1,
        "strategy": "single_device",
        "precision": settings["trainer"].get("precision", "32-true"),
        "optimizer": model.get("optimizer", "adamw"),
        "compile": ours and bool(model.get("compile_blocks")),
        "cuda_graph": ours and bool(model.get("cuda_graph")) and where.type == "cuda",
        "fp8": ours and bool(model.get("fp8")),
        "checkpointing": ours and network.activation_checkpointing,
        "tokens_per_s": None,
        "ms_per_step": None,
        "mfu": None,
        "peak_gib": None,
        "first_step_s": None,
        "peers": {},
        "host_ms": None,
        "memory_limit_gib": limit,
        **machine(where),
    }


def run(case: Case, batch: int, began: float, profiled: bool = False, memory_gib: float = 0.0) -> list[Row]:
    """Measure a case.

    Args:
        case: the case.
        batch: B.
        began: `time.time()` when this process was started.
        profiled: whether to print the kernels of one step.
        memory_gib: GPU memory that may be used; 0 for all.

    Returns:
        A row; two for the kind `planning`.
    """
    where = device()
    row = common(case, batch, where, limit_memory(where, memory_gib))
    if case.kind == "planning":
        return [row | planning_cost(case, batch, uses, where) for uses in (False, True)]
    return [row | training_steps(case, batch, began, profiled, where)]


def build(case: Case, where: torch.device) -> LightningModule:
    """The module to train. On the GPU itself, which is quicker; on the CPU as the command line does where the first step counts."""
    settings = case.settings()
    torch.manual_seed(0)
    with torch.device("cpu" if case.cold else where):
        if case.kind == "llama":
            from train_step_llama import LlamaModule

            return LlamaModule(settings["network"]["vocab_size"], case.seq_len, tiny=where.type == "cpu")
        return MMRecLightningModule(MMRecConfig(**settings["network"]), **settings["model"])


def training_steps(case: Case, batch: int, began: float, profiled: bool, where: torch.device) -> Row:
    """Steps through Lightning's Trainer, with nothing beside the clock: tokens a second, MFU, memory, the first step."""
    module = build(case, where)
    network = module.network
    settings = case.settings()
    clock = StepClock(where, case.warmup, case.steps, profiled)
    trainer = Trainer(
        accelerator="gpu" if where.type == "cuda" else "cpu",
        devices=1,
        max_steps=clock.total,
        accumulate_grad_batches=case.accumulate,
        callbacks=[clock],
        **SILENT,
        **settings["trainer"],
    )
    vocabulary = settings["network"]["vocab_size"]
    loader = DataLoader(RandomTokens(batch, case.seq_len, vocabulary), batch_size=None, pin_memory=where.type == "cuda")
    fitted = time.time()
    trainer.fit(module, loader)
    found = clock.results()
    assert found["ms_per_step"] is not None
    tokens_per_s = batch * case.seq_len * case.accumulate / found["ms_per_step"] * 1e3
    flops, peak = module.flops_per_token(case.seq_len), dense_bf16_peak(device_name(where))
    return found | {
        "params_m": sum(parameter.numel() for parameter in network.parameters()) / 1e6,
        "tokens_per_s": tokens_per_s,
        "tflops": tokens_per_s * flops / 1e12,
        "mfu": None if peak is None else tokens_per_s * flops / peak,
        # Otherwise the kernels may have been compiled by a run before.
        "first_step_s": clock.first_ended - began if case.cold else None,
        "first_step_of_fit_s": clock.first_ended - fitted,
        "loss": float(trainer.callback_metrics["train/loss"]) if "train/loss" in trainer.callback_metrics else None,
        "loss_step": clock.total,  # losses of different numbers of steps are not to be compared: a profiled case takes one more
    }


def planning_cost(case: Case, batch: int, uses: bool, where: torch.device) -> Row:
    """Bytes and times of forward and backward with UBÖO off or on: of networks of few layers, and from them, in a straight line, of all."""
    settings = case.settings()
    config = MMRecConfig(**(settings["network"] | {"use_uboo": uses}))
    dtype = torch.bfloat16 if settings["trainer"].get("precision") == "bf16-true" else torch.float32
    tokens = next(iter(RandomTokens(batch, case.seq_len, config.vocab_size)))
    on_device = {name: tensor.to(where) for name, tensor in tokens.items()}
    measured = {layers: _one_pass(case, config, layers, dtype, on_device, where) for layers in LAYERS}
    few, more = LAYERS
    whole: Row = {}
    for name, value in measured[few].items():
        a_layer = None if value is None else (measured[more][name] - value) / (more - few)
        whole[name] = None if a_layer is None else value + a_layer * (config.num_layers - few)
    with torch.device("meta"):
        parameters = MMRecModel(config).num_parameters()
    return {
        "uboo": uses,
        "optimizer": None,
        "params_m": parameters / 1e6,
        "step": "forward + backward",
        "layers": config.num_layers,
        "layers_measured": {str(layers): values for layers, values in measured.items()},
        "extrapolated": f"to {config.num_layers} layers, in a straight line from {few} and {more}",
        **whole,
        "tokens_per_s": batch * case.seq_len / whole["ms_per_step"] * 1e3,
    }


def _one_pass(case: Case, config: MMRecConfig, layers: int, dtype: torch.dtype, batch: dict[str, Tensor], where: torch.device) -> Row:
    """GiB of weights, of what the forward keeps, and at the peak; milliseconds of forward and backward."""
    torch.manual_seed(0)
    with torch.device(where):
        network = MMRecModel(replace(config, num_layers=layers)).to(dtype)
    if case.settings()["model"].get("compile_blocks"):
        for block in network.blocks:
            block.compile()

    def forward_and_backward() -> None:
        network.zero_grad()
        network.loss(batch).loss.backward()

    for _ in range(case.warmup):
        forward_and_backward()
    network.zero_grad()
    kept = peak = None
    if where.type == "cuda":
        synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        loss = network.loss(batch).loss
        kept = (torch.cuda.memory_allocated(where) - before) / GIB
        loss.backward()
        peak = torch.cuda.max_memory_allocated(where) / GIB
        del loss
    milliseconds = median_ms(forward_and_backward, where, repeat_ms=300)
    weights = sum(parameter.nbytes for parameter in network.parameters()) / GIB
    return {"weights_gib": weights, "activations_gib": kept, "peak_gib": peak, "ms_per_step": milliseconds}
