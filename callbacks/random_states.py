"""RandomStates: the random states of every rank travel with the checkpoint, and validation leaves them alone."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mmrec.ranks import gathered

KEY = "random_states"


def collect_random_states() -> dict[str, Any]:
    """This process's states of `random`, `numpy.random`, torch and all CUDA devices, in types that `weights_only=True` loads."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": {"version": version, "internal": torch.tensor(internal, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set what `collect_random_states` returned. CUDA's states are set where as many devices are visible as then."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(states["torch"].cpu())
    cuda = states.get("cuda", [])
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in cuda])


class RandomStates(Callback):
    """Stores the random states of all ranks in every checkpoint and restores each rank's own before its first batch.

    A validation within `fit` ends with the states it began with, so that a run that validates draws the same numbers as one that was
    stopped before it.
    """

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._torch_after_step: torch.Tensor | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gather every rank's states; all ranks take part."""
        own = self._before_validation if self._before_validation is not None else collect_random_states()
        checkpoint[KEY] = gathered(own)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's states until training starts."""
        if trainer.state.fn != "fit":
            return
        states = checkpoint.get(KEY)
        if states is None or len(states) != trainer.world_size:
            found = "no random states" if states is None else f"the random states of {len(states)} process(es)"
            if trainer.is_global_zero:
                print(
                    f"the checkpoint holds {found}, this run has {trainer.world_size}: random numbers, as those that bf16 weights are "
                    "rounded by, begin anew; that does no harm",
                    flush=True,
                )
            return
        self._to_restore = states[trainer.global_rank]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore, after the loaders were set up (that draws numbers) and before the first batch."""
        if self._to_restore is not None:
            restore_random_states(self._to_restore)
            self._to_restore = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Remember torch's state (5 kB): a validation loader draws its seed from it before any hook of the validation runs."""
        self._torch_after_step = torch.get_rng_state()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the states."""
        if trainer.state.fn == "fit" and self._torch_after_step is not None:
            self._before_validation = {**collect_random_states(), "torch": self._torch_after_step}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them back."""
        if self._before_validation is not None:
            restore_random_states(self._before_validation)
            self._before_validation = None
