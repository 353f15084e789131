"""BaselineLightningModule: a baseline trained as MM-Rec is, by the same steps, groups, schedule and validation."""

from typing import Any

from lightning_modules.mm_rec_module import MMRecLightningModule
from mmrec.baselines import BaselineConfig, BaselineModel


class BaselineLightningModule(MMRecLightningModule):
    """`MMRecLightningModule` around a BaselineModel.

    Args:
        network: kind and sizes of the baseline.
        training: as MMRecLightningModule's, but for what only MM-Rec has (λ_P, FP8).
    """

    config_class = BaselineConfig
    network_class = BaselineModel

    def __init__(self, network: BaselineConfig, **training: Any) -> None:
        super().__init__(network, **training)  # type: ignore[arg-type]  # the base builds what config_class and network_class say
