"""What a configuration was instantiated into."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.optim import Optimizer

from okddip.data.dataset import Dataset
from okddip.methods.base import Method
from okddip.models.group import PeerGroup
from okddip.tracking import tracker as tracking
from okddip.training.schedules import Schedule
from okddip.training.trainer import Trainer


@dataclass
class Parts:
    """What a configuration was instantiated into."""

    trainer: Trainer
    tracker: tracking.MLflow | tracking.NoTracking
    dataset: Dataset
    group: PeerGroup
    method: Method
    optimizer: Optimizer
    schedule: Schedule
    teacher: Mapping[str, str] = field(default_factory=dict)  # tags that say what it is, if there is one
