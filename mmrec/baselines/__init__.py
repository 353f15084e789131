"""Networks of others to compare with, in the harness of MM-Rec: same embedding, loss, optimiser groups and start of the weights."""

from mmrec.baselines.config import BaselineConfig
from mmrec.baselines.model import BaselineModel

__all__ = ["BaselineConfig", "BaselineModel"]
