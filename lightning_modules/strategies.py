"""TunedDDPStrategy: data-parallel training whose options are plain values in a config."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

_LONGEST = 86_400 * 30  # seconds


class TunedDDPStrategy(DDPStrategy):
    """Lightning's DDPStrategy with the options that matter here, none of which needs a config to name a function.

    Gradients are always averaged over the ranks with equal weight, whatever the number of labels on each: so are the losses logged.
    """

    def __init__(
        self,
        gradients: Literal["full", "bf16"] = "full",
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: int | None = None,
        timeout_seconds: float = 600.0,
        process_group_backend: str | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        """Choose how gradients travel.

        Args:
            gradients: `full`: in their own dtype; `bf16`: rounded to bf16 on the way, which halves what fp32 gradients send and costs
                their sum its lower bits.
            static_graph: promise that every step uses the same parameters in the same order, so that DDP may plan once. With activation
                checkpointing, and where blocks are compiled, it is what DDP wants.
            gradient_as_bucket_view: gradients lie in the buckets they are sent in and not beside them: a copy of all gradients less.
            bucket_cap_mb: size of a bucket in MiB; None: torch's.
            timeout_seconds: how long a collective waits for the other ranks.
            process_group_backend: None: NCCL on GPUs, gloo on a CPU.
            start_method: how the processes of a machine are started where no scheduler has done so.
        """
        check_communication(timeout_seconds, process_group_backend)
        if bucket_cap_mb is not None and bucket_cap_mb < 1:
            raise ValueError(f"trainer.strategy.bucket_cap_mb is {bucket_cap_mb}; give at least 1 MiB, or null for torch's")
        options: dict[str, Any] = {"static_graph": static_graph, "gradient_as_bucket_view": gradient_as_bucket_view}
        if bucket_cap_mb is not None:
            options["bucket_cap_mb"] = bucket_cap_mb
        super().__init__(
            process_group_backend=process_group_backend, timeout=timedelta(seconds=timeout_seconds), start_method=start_method, **options
        )
        self.gradients = gradients
        self._plans = False  # from when the module is wrapped to the first backward pass, from which a static graph is learnt

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Nothing: `ddp` and its like are Lightning's."""

    def configure_ddp(self) -> None:
        """Wrap the module, and have its gradients rounded on their way where that is wanted; Lightning does so on GPUs alone."""
        super().configure_ddp()
        self._plans = self._ddp_kwargs["static_graph"]
        if self.gradients == "bf16":
            assert isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
            self.model.register_comm_hook(None, sum_in_bf16)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients of this rank's micro-batch where they are, for a later one of the step to sum them over the ranks.

        Not in the very first, from which a static graph is learnt: without its sums torch fails in the second. The mean of what is the
        mean already is the same.
        """
        if self._plans:
            self._plans = False
            yield
            return
        with super().block_backward_sync():
            yield


def sum_in_bf16(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's `bf16_compress_hook`; by its own name DDP refuses it without NCCL, though gloo sums bf16 as well."""
    return bf16_compress_hook(state, bucket)


def check_communication(timeout_seconds: float, process_group_backend: str | None) -> None:
    """Raise ValueError where a strategy's timeout is no time, or its backend none of torch's that these packages use."""
    if not 0 < timeout_seconds <= _LONGEST:
        raise ValueError(f"trainer.strategy.timeout_seconds is {timeout_seconds}; give a number above 0, at most {_LONGEST}")
    if process_group_backend not in (None, "nccl", "gloo"):
        raise ValueError(f"trainer.strategy.process_group_backend is {process_group_backend}; give nccl, gloo or null")
