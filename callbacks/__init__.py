"""What watches a run and keeps it safe: memory, latency, losses, signals, other ranks, random states, checkpoints, progress."""

from callbacks.atomic_checkpoint_io import AtomicCheckpointIO
from callbacks.auxiliary_loss_curves import AuxiliaryLossCurves
from callbacks.background_checkpoint_io import BackgroundCheckpointIO
from callbacks.gpu_memory_profile import GPUMemoryProfile
from callbacks.loss_spikes import LossSpikes
from callbacks.preemption import Preemption
from callbacks.random_states import RandomStates
from callbacks.rank_agreement import RankAgreement
from callbacks.rank_change import RankChange
from callbacks.rank_watch import RankWatch
from callbacks.run_checkpoint import RunCheckpoint
from callbacks.same_checkpoint import SameCheckpoint
from callbacks.skipped_steps import SkippedSteps
from callbacks.step_latency import StepLatency
from callbacks.tensorboard_logger import FaultTolerantTensorBoardLogger
from callbacks.training_progress_bar import TrainingProgressBar

__all__ = [
    "AtomicCheckpointIO",
    "AuxiliaryLossCurves",
    "BackgroundCheckpointIO",
    "FaultTolerantTensorBoardLogger",
    "GPUMemoryProfile",
    "LossSpikes",
    "Preemption",
    "RandomStates",
    "RankAgreement",
    "RankChange",
    "RankWatch",
    "RunCheckpoint",
    "SameCheckpoint",
    "SkippedSteps",
    "StepLatency",
    "TrainingProgressBar",
]
