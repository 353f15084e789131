"""What watches a run and keeps it safe: memory, latency, auxiliary loss, random states, checkpoints, progress."""

from callbacks.atomic_checkpoint_io import AtomicCheckpointIO
from callbacks.auxiliary_loss_curves import AuxiliaryLossCurves
from callbacks.background_checkpoint_io import BackgroundCheckpointIO
from callbacks.gpu_memory_profile import GPUMemoryProfile
from callbacks.random_states import RandomStates
from callbacks.run_checkpoint import RunCheckpoint
from callbacks.same_checkpoint import SameCheckpoint
from callbacks.step_latency import StepLatency
from callbacks.training_progress_bar import TrainingProgressBar

__all__ = [
    "AtomicCheckpointIO",
    "AuxiliaryLossCurves",
    "BackgroundCheckpointIO",
    "GPUMemoryProfile",
    "RandomStates",
    "RunCheckpoint",
    "SameCheckpoint",
    "StepLatency",
    "TrainingProgressBar",
]
