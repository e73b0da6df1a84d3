"""Classic knowledge distillation from a trained teacher (Hinton et al. 2015; the authors' train_kd.py)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from okddip.errors import ConfigError
from okddip.methods.base import Distillation, Losses
from okddip.methods.losses import hard_loss
from okddip.outputs import GroupOutput


class KD(Distillation):
    """hard + alpha * soft: the labels, and the predictions of a teacher that stays as it is.

    Of several teachers the student imitates the mean of their softened predictions. The group carries them
    and hands their logits over in `GroupOutput.teacher`.
    """

    fewest_peers = 1
    most_peers = 1

    def __init__(
        self,
        *,
        teacher: str | Sequence[str] | None,
        teacher_model: str | None,
        **settings: Any,
    ) -> None:
        """
        Args:
            teacher: where the trained teacher is; the path of a checkpoint, `runs:/ID`, or `auto`: a finished
                baseline of `teacher_model`, trained first where the store has none. Or a list of such.
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
        several = isinstance(teacher, Sequence) and not isinstance(teacher, str)
        names = list(teacher) if several else [teacher]
        if not all(isinstance(name, str) and name for name in names):
            raise ConfigError(
                f"method.teacher={teacher}: must be the path of a checkpoint, runs:/ID or auto, or a list of"
                " such."
            )
        if "auto" in names and not teacher_model:
            raise ConfigError(
                "method.teacher=auto: takes method.teacher_model, an option of the group `model`,"
                " such as resnet110."
            )
        self.primary = "student"
        self.teachers = len(names)

    @property
    def predictors(self) -> tuple[str, ...]:
        each = [f"teacher{i}" for i in range(self.teachers)] if self.teachers > 1 else []
        return ("student", "teacher", *each)

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        assert output.teacher is not None, "the group was built without a teacher"
        teachers = output.teacher.detach()  # [B, K], or of several [T, B, K]
        hard = hard_loss(output.logits, labels)
        if self.teachers == 1:
            answers = teachers[None]  # [1, B, K]
            targets = self.soften(answers)
        else:
            targets = self.soften(teachers).logsumexp(0, keepdim=True) - math.log(self.teachers)  # [1, B, K]
            answers = torch.cat([self.temperature * targets, teachers])  # [1 + T, B, K]
        soft = self.soft_loss(output.logits, targets)
        predictions = torch.cat([output.logits, answers])
        return Losses(self.weighted(hard, soft, ramp), {"hard": hard, "soft": soft}, predictions)
