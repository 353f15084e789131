"""FSDP2Strategy: data-parallel training in which every GPU holds a shard of weights, gradients and moments."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.optim import Optimizer

from lightning_modules.checks import check_batch_form
from lightning_modules.sharded_states import load_optimizer_state, load_weights, whole_optimizer_state, whole_weights
from lightning_modules.sharding import average_gradients, check_shardable, is_sharded, shard_network, wide_parameters
from lightning_modules.strategies import check_communication
from mmrec.files import read_checkpoint

NAME = "fsdp2"  # as trainer.strategy takes it, without options
_DTYPES = {"full": None, "bf16": torch.bfloat16, "fp32": torch.float32}


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all ranks in one group of data parallelism, for networks that one GPU cannot hold.

    The module's `configure_model` calls `shard`. Checkpoints are the same single files as without shards: rank 0 gathers and writes
    them, by the checkpoint IO that the Trainer was given, and a run may go on with shards or without. That takes host memory for the whole
    state on rank 0.

    Gradients are averaged over the ranks with equal weight, whatever the number of labels on each.
    """

    def __init__(
        self,
        gradients: Literal["full", "bf16", "fp32"] = "full",
        reduce_every_micro_batch: bool = True,
        timeout_seconds: float = 600.0,
        process_group_backend: str | None = None,
    ) -> None:
        """Choose how gradients travel.

        Args:
            gradients: in what they are summed over the ranks. `full`: their own dtype; `bf16`: halves what fp32 gradients send and costs
                their sum its lower bits; `fp32`: with bf16-true sends twice as much, and rounds once.
            reduce_every_micro_batch: whether each micro-batch's gradients are summed over the ranks at once, and only a shard is kept;
                else it is done once a step, and a GPU holds whole gradients in between.
            timeout_seconds: how long a collective waits for the other ranks.
            process_group_backend: None: NCCL on GPUs, gloo on a CPU.
        """
        check_communication(timeout_seconds, process_group_backend)
        if gradients not in _DTYPES:
            raise ValueError(f"trainer.strategy.gradients is {gradients}; give one of {', '.join(_DTYPES)}")
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_seconds),
        )
        self.gradients = gradients
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self._whole: list[torch.nn.Parameter] = []  # weights that are not in shards
        self._within_step = False  # in a micro-batch that is not the step's last

    def setup_environment(self) -> None:
        """All ranks into one group; their number is known from here on."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, module: Any) -> None:
        """Shard `module.network`, unless another Trainer has; called by the module's `configure_model`.

        Raises:
            ValueError: for a hyperparameter of the module that cannot be meant with shards.
        """
        if is_sharded(module.network):
            self._whole = wide_parameters(module.network)
            return
        check_shardable(module.hparams)
        network = self.precision_plugin.convert_module(module.network)  # before: a shard's dtype is settled with it
        self._whole = wide_parameters(network)
        shard_network(network, self.device_mesh["data_parallel"], _DTYPES[self.gradients])

    def setup(self, trainer: Any) -> None:
        """As Lightning's; what is whole begins as rank 0 has it, as under DDP.

        Evaluation is without inference mode: what it gathers has no version, which shards need, nor may a later backward save it.
        """
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)
        for parameter in self._whole:
            torch.distributed.broadcast(parameter.detach(), 0)

    # ---- steps

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Whether a micro-batch that is not the step's last keeps its gradients to itself; Lightning's own never does."""
        network = self._network
        network.set_requires_gradient_sync(self.reduce_every_micro_batch)
        self._within_step = True
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)
            self._within_step = False

    def post_backward(self, closure_loss: torch.Tensor) -> None:
        """Average the gradients that lie whole on every rank, once a step; the others have been."""
        super().post_backward(closure_loss)
        if not self._within_step:
            average_gradients(self._whole)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Leave nothing gathered: after a forward without a backward what lies around the blocks would stay so."""
        return self._resharded(super().validation_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in validation."""
        return self._resharded(super().test_step(*args, **kwargs))

    def predict_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """As in validation. The module's own is a forward a row, each a gather of all ranks', whose rows need not be equally many.

        A rank with fewer rows than another, or with no batch left, takes part with its last row and drops what comes of it.

        Raises:
            ValueError: for a batch without integer `input_ids` and `labels` of one shape (B, T).
        """
        check_batch_form(batch)
        predict, rows = super().predict_step, len(batch["labels"])

        def fill_up(number: int) -> None:
            if number > 0:
                predict({name: value[[-1] * number] for name, value in batch.items()}, *args, **kwargs)

        most = self._largest(rows)
        output = predict(batch, *args, **kwargs)
        fill_up(most - rows)
        self._network.reshard()  # not before: the ranks that fill nothing up have what lies around the blocks gathered until here
        if self._module.trainer.predict_loop.batch_progress.is_last_batch:  # of this rank
            while (most := self._largest(0)) > 0:
                self._resharded(fill_up(most))
        return output

    def _largest(self, number: int) -> int:
        """The largest of the ranks' numbers; a collective."""
        return int(self.reduce(torch.tensor(number, device=self.root_device), reduce_op="max"))

    def _resharded(self, output: Any) -> Any:
        self._network.reshard()
        return output

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _network(self) -> Any:
        return self._module.network

    # ---- checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded as everywhere, before the first file of a run is written: shards are there from `configure_model` on."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """States are loaded from what `load_checkpoint` read, as everywhere."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0; a collective."""
        return whole_weights(self._module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole states on rank 0; a collective."""
        return whole_optimizer_state(getattr(optimizer, "optimizer", optimizer))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """What the file holds, mapped into memory: each rank reads its rows, and a host holds no copy a rank. Never runs what is in it."""
        found: dict[str, Any] = read_checkpoint(self.broadcast(checkpoint_path), mmap=True)
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank its rows; the module has compared names and shapes in `on_load_checkpoint`."""
        load_weights(self._module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank its rows."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer_state(optimizer, state)

    def teardown(self) -> None:
        """Also the checkpoint IO's, which Lightning's own leaves out: a write may be under way."""
        super().teardown()
        self.checkpoint_io.teardown()


StrategyRegistry.register(NAME, FSDP2Strategy, description="weights, gradients and moments in shards", override=True)
