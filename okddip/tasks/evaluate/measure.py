"""Measure the predictors of a checkpoint in one pass over the test set."""

import torch
import torch.nn.functional as F
from torch import Tensor

from okddip.errors import ConfigError
from okddip.run.parts import Parts
from okddip.training import metrics
from okddip.training.epoch import evaluate_on
from okddip.training.precision import PRECISIONS


def measure(parts: Parts, epoch: int) -> tuple[dict[str, float], Tensor]:
    """Measure all predictors on the test set, in one pass.

    Args:
        parts: with the weights of the checkpoint.
        epoch: of the checkpoint; sets the ramp in its loss.

    Returns:
        The metrics of an evaluation in training and, for each predictor, `cross_entropy` and `ece`, the
        expected calibration error in percent; and the confusion matrices [Q, K, K], row the true class.

    Raises:
        ConfigError: a loss is not finite, or the logits of a predictor are not.
    """
    trainer, group, method = parts.trainer, parts.group, parts.method
    dtype = PRECISIONS[trainer.precision]

    def step(images: Tensor, labels: Tensor, ramp: Tensor) -> tuple[Tensor, metrics.Sums]:
        with torch.autocast(trainer.device.type, dtype=dtype, enabled=dtype is not None):
            output = group(images)
        losses = method(output, labels, ramp)
        details = {
            "cross_entropy": cross_entropy(losses.predictions, labels),  # [Q]
            "gaps": metrics.calibration_gaps(losses.predictions, labels),  # [Q, bins]
            "confusion": count_confusion(losses.predictions, labels),  # [Q, K, K]
        }
        return losses.total, metrics.count(losses, labels, method.auxiliary) | details

    trainer.set_backend_flags()
    loader = parts.dataset.eval_loader("test", trainer.eval_batch_size, trainer.device, trainer.channels_last)
    ramp = torch.tensor(method.ramp(epoch), device=trainer.device)
    with trainer.progress(loader.batches(), len(loader), "test") as batches:
        sums = evaluate_on(group, method, step, batches, ramp)
    entropies = sums.pop("cross_entropy") / sums["images"]  # [Q]
    errors = 100 * sums.pop("gaps").abs().sum(1) / sums["images"]  # [Q]
    confusion = sums.pop("confusion").cpu()
    broken = metrics.broken_losses(sums)
    broken += [name for name, value in zip(method.predictors, entropies, strict=True) if not value.isfinite()]
    if broken:
        raise ConfigError(
            f"checkpoint, epoch {epoch + 1}: on these images {', '.join(broken)} is not finite, so that no"
            " accuracy means anything. trainer.precision=fp32 may help; else name another checkpoint, such as"
            " previous.pt or best.pt in the same folder."
        )
    results = metrics.read(sums, method)
    for name, values in (("cross_entropy", entropies), ("ece", errors)):
        by_predictor = zip(method.predictors, values.tolist(), strict=True)
        results |= {f"{predictor}/{name}": value for predictor, value in by_predictor}
    return results, confusion


def cross_entropy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each predictor, summed over the samples: [Q, B, K] and [B] to [Q]."""
    every = labels.expand(len(predictions), -1)  # [Q, B]
    return F.cross_entropy(predictions.transpose(1, 2), every, reduction="none").double().sum(1)


def count_confusion(predictions: Tensor, labels: Tensor) -> Tensor:
    """Confusion matrices, a row a true class: [Q, B, K] and [B] to [Q, K, K]."""
    predictors, _, classes = predictions.shape
    cells = labels * classes + predictions.argmax(-1)  # [Q, B]
    counts = cells.new_zeros(predictors, classes * classes)
    return counts.scatter_add_(1, cells, torch.ones_like(cells)).view(predictors, classes, classes)


def class_accuracy(counts: Tensor) -> list[float | None]:
    """Accuracy within each class, in percent; None for a class without images."""
    shares = zip(counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True)
    return [100 * right / images if images else None for right, images in shares]
