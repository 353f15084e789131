"""One rank of a point of `scaling.py`: trains as the command line would, and says how long a step took and what it held."""

import os
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from train_step_cases import SILENT, Case
from train_step_clock import StepClock
from train_step_worker import RandomTokens, build

from callbacks.device_peaks import dense_bf16_peak
from lightning_modules.fsdp2_strategy import FSDP2Strategy
from lightning_modules.strategies import TunedDDPStrategy
from mmrec.commandline.configs import config_layers, merge
from mmrec.commandline.library_warnings import ignore_known_warnings
from mmrec.commandline.memory_plan import asked_by
from mmrec.measuring.machine import device_name

Interval = tuple[float, float]
KINDS: dict[str, Any] = {"ddp": TunedDDPStrategy, "fsdp2": FSDP2Strategy}


class ScalingClock(StepClock):
    """A StepClock that profiles one step more, for what ranks send each other.

    Attributes:
        communication: milliseconds of the step by name; {} where none was seen, as on a CPU.
        in_use_gib: what the GPU had handed out to this process and its libraries when the steps were over; None on a CPU.
    """

    communication: Mapping[str, float] = {}
    in_use_gib: float | None = None

    def _start_profile(self) -> None:
        free, total = torch.cuda.mem_get_info(self.device)
        self.in_use_gib = (total - free) / 2**30
        # The first start takes as long as it likes on each rank, and the others' kernels would wait for the last one to begin.
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]):
            pass
        if dist.is_initialized():
            dist.barrier()
        super()._start_profile()

    def _end_profile(self) -> None:
        self._wait()
        self._profiler.__exit__(None, None, None)
        kernels = [
            (event.name, (float(event.time_range.start), float(event.time_range.end)))
            for event in self._profiler.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        self.communication, self._profiler = communication(kernels), None


def communication(kernels: Iterable[tuple[str, Interval]]) -> dict[str, float]:
    """How long NCCL's kernels ran, waiting for other ranks included, and which share of it other kernels ran beside.

    Args:
        kernels: name, beginning and end in microseconds.

    Returns:
        `communication_ms`, `communication_exposed_ms`, `communication_hidden` from 0 to 1; {} without any.
    """
    kernels = list(kernels)
    sending = union([span for name, span in kernels if "nccl" in name.lower()])
    computing = union([span for name, span in kernels if "nccl" not in name.lower()])
    total = sum(end - begin for begin, end in sending)
    if not total:
        return {}
    beside = sum(max(0.0, min(end, b) - max(begin, a)) for begin, end in sending for a, b in computing)
    return {
        "communication_ms": total / 1e3,
        "communication_exposed_ms": (total - beside) / 1e3,
        "communication_hidden": beside / total,
    }


def union(spans: Sequence[Interval]) -> list[Interval]:
    """The spans without overlaps, in order."""
    found: list[Interval] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def options_for(case: Case, name: str, gradients: str | None) -> dict[str, Any]:
    """All options of a strategy's class: the config's where that names the class, else `static_graph` for DDP and the class's own.

    Args:
        case: whose config is asked.
        name: single_device, which has none, ddp or fsdp2.
        gradients: in what they are summed; None: what the options say.
    """
    if name == "single_device":
        return {}
    kind = KINDS[name]
    asked = asked_by(merge(config_layers(case.config)), gpus=2)
    chosen = dict(asked.options) if asked.name == kind.__name__ else {"static_graph": True} if name == "ddp" else {}
    if gradients is not None:
        chosen["gradients"] = gradients
    return {option: parameter.default for option, parameter in signature(kind).parameters.items()} | chosen


def strategy_for(case: Case, name: str, gradients: str | None) -> Any:
    """The strategy, with the options of `options_for`."""
    return "auto" if name == "single_device" else KINDS[name](**options_for(case, name, gradients))


def run(case: Case, batch: int, strategy: str, gpus: int, gradients: str | None) -> dict[str, Any]:
    """Train on this rank; what it saw.

    Args:
        case: what is trained, and for how many steps.
        batch: sequences of a micro-batch.
        strategy: single_device, ddp or fsdp2.
        gpus: ranks.
        gradients: in what they are summed; None: as the config says.
    """
    ignore_known_warnings()
    on_gpu = torch.cuda.is_available()
    where = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    module, settings = build(case, where), case.settings()
    parameters = sum(parameter.numel() for parameter in module.network.parameters())
    clock = ScalingClock(where, case.warmup, case.steps, profiled=on_gpu)
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=gpus,
        strategy=strategy_for(case, strategy, gradients),
        max_steps=clock.total,
        accumulate_grad_batches=case.accumulate,
        use_distributed_sampler=False,
        callbacks=[clock],
        **SILENT,
        **settings["trainer"],
    )
    loader = DataLoader(RandomTokens(batch, case.seq_len, settings["network"]["vocab_size"]), batch_size=None, pin_memory=on_gpu)
    trainer.fit(module, loader)
    return clock.results() | clock.communication | {
        "in_use_gib": clock.in_use_gib,
        "config": case.config,
        "strategy": strategy,
        "strategy_class": type(trainer.strategy).__name__,
        "gpus": gpus,
        "B": batch,
        "T": case.seq_len,
        "accumulate": case.accumulate,
        "params_m": parameters / 1e6,
        "precision": settings["trainer"].get("precision", "32-true"),
        "optimizer": settings["model"].get("optimizer", "adamw"),
        "compile": bool(settings["model"].get("compile_blocks")),
        "checkpointing": module.network.config.activation_checkpointing,
        "uboo": module.network.use_uboo,
        "flops_per_token": module.flops_per_token(case.seq_len),
        "flops_peak": dense_bf16_peak(device_name(where)),
        "loss": float(trainer.callback_metrics["train/loss"]),
    }  # fmt: skip
