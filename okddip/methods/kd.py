"""Classic knowledge distillation from a trained teacher (Hinton et al. 2015; the authors' train_kd.py)."""

from typing import Any

import torch
from torch import Tensor

from okddip.errors import ConfigError
from okddip.methods.base import Distillation, Losses, at_least_single
from okddip.methods.losses import hard_loss
from okddip.outputs import GroupOutput


class KD(Distillation):
    """hard + alpha * soft: the labels, and the predictions of a teacher that stays as it is.

    The group carries the teacher and hands its logits over in `GroupOutput.teacher`.
    """

    fewest_peers = 1
    most_peers = 1

    def __init__(self, *, teacher: str | None, teacher_model: str | None, **settings: Any) -> None:
        """
        Args:
            teacher: where the trained teacher is; the path of a checkpoint, `runs:/ID`, or `auto`: a finished
                baseline of `teacher_model`, trained first where the store has none.
            teacher_model: with `auto`, the model that the teacher is.
            settings: see `Distillation`. No gradient flows through the teacher.
        """
        super().__init__(**settings)
        if not teacher:
            raise ConfigError(
                "method.teacher is not set: name the checkpoint of a trained network"
                " (method.teacher=outputs/.../best.pt) or its MLflow run (method.teacher=runs:/ID),"
                " or let one be trained (method.teacher=auto method.teacher_model=resnet110)."
            )
        if teacher == "auto" and not teacher_model:
            raise ConfigError(
                "method.teacher=auto: takes method.teacher_model, an option of the group `model`,"
                " such as resnet110."
            )
        self.primary = "student"

    @property
    def predictors(self) -> tuple[str, ...]:
        return ("student", "teacher")

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        assert output.teacher is not None, "the group was built without a teacher"
        teacher = at_least_single(output.teacher.detach())[None]  # [1, B, K]
        hard = hard_loss(output.logits, labels)
        soft = self.soft_loss(output.logits, self.soften(teacher))
        predictions = torch.cat([output.logits, teacher])
        return Losses(self.weighted(hard, soft, ramp), {"hard": hard, "soft": soft}, predictions)
