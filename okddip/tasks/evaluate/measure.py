"""Measure the predictors of a checkpoint in one pass over the test set."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

from okddip.errors import ConfigError
from okddip.run.parts import Parts
from okddip.training import metrics
from okddip.training.epoch import evaluate_on
from okddip.training.precision import PRECISIONS


class Answers(NamedTuple):
    """What each predictor says of each image. Linear in the images: nothing here grows with the classes."""

    images: np.ndarray  # [N] which of the split's images
    labels: np.ndarray  # [N]
    predictions: np.ndarray  # [Q, N] the most probable class
    probabilities: np.ndarray  # [Q, N] its probability


def measure(parts: Parts, epoch: int) -> tuple[dict[str, float], Answers]:
    """Measure all predictors on the test set, in one pass.

    Args:
        parts: with the weights of the checkpoint.
        epoch: of the checkpoint; sets the ramp in its loss.

    Returns:
        The metrics of an evaluation in training and, for each predictor, `cross_entropy` and, in percent,
        `ece` (the expected calibration error), `balanced_accuracy` and `macro_f1`; and its answers.

    Raises:
        ConfigError: a loss is not finite, or the logits of a predictor are not.
    """
    trainer, group, method = parts.trainer, parts.group, parts.method
    dtype = PRECISIONS[trainer.precision]
    answers: list[tuple[Tensor, Tensor, Tensor]] = []  # labels, predictions, probabilities of each batch

    def step(images: Tensor, labels: Tensor, ramp: Tensor) -> tuple[Tensor, metrics.Sums]:
        with torch.autocast(trainer.device.type, dtype=dtype, enabled=dtype is not None):
            output = group(images)
        losses = method(output, labels, ramp)
        logits = losses.predictions  # [Q, B, K]
        answers.append((labels, logits.argmax(-1), logits.float().softmax(-1).amax(-1)))
        details = {
            "cross_entropy": cross_entropy(logits, labels),  # [Q]
            "gaps": metrics.calibration_gaps(logits, labels),  # [Q, bins]
        }
        return losses.total, metrics.count(losses, labels, method.auxiliary) | details

    trainer.set_backend_flags()
    loader = parts.dataset.eval_loader("test", trainer.eval_batch_size, trainer.device, trainer.channels_last)
    ramp = torch.tensor(method.ramp(epoch), device=trainer.device)
    with trainer.progress(loader.batches(), len(loader), "test") as batches:
        sums = evaluate_on(group, method, step, batches, ramp)
    entropies = sums.pop("cross_entropy") / sums["images"]  # [Q]
    errors = 100 * sums.pop("gaps").abs().sum(1) / sums["images"]  # [Q]
    broken = metrics.broken_losses(sums)
    broken += [name for name, value in zip(method.measured, entropies, strict=True) if not value.isfinite()]
    if broken:
        raise ConfigError(
            f"checkpoint, epoch {epoch + 1}: on these images {', '.join(broken)} is not finite, so that no"
            " accuracy means anything. trainer.precision=fp32 may help; else name another checkpoint, such as"
            " previous.pt or best.pt in the same folder."
        )
    labels, predictions, probabilities = (
        torch.cat(batches, dim=-1).cpu().numpy() for batches in zip(*answers, strict=True)
    )
    unread = getattr(loader, "unread", ())  # images that a streamed data set has left out
    read = np.setdiff1d(np.arange(parts.dataset.sizes["test"]), list(unread))[: len(labels)]
    results = metrics.read(sums, method)
    balanced, f1 = zip(*(unweighted(labels, one) for one in predictions), strict=True)
    details = {
        **{"cross_entropy": entropies.tolist(), "ece": errors.tolist()},
        **{"balanced_accuracy": balanced, "macro_f1": f1},
    }
    for name, values in details.items():
        by_predictor = zip(method.measured, values, strict=True)
        results |= {f"{predictor}/{name}": value for predictor, value in by_predictor}
    return results, Answers(read, labels, predictions, probabilities)


def cross_entropy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each predictor, summed over the samples: [Q, B, K] and [B] to [Q]."""
    every = labels.expand(len(predictions), -1)  # [Q, B]
    return F.cross_entropy(predictions.transpose(1, 2), every, reduction="none").double().sum(1)


def unweighted(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, float]:
    """Balanced accuracy and macro F1, in percent: means in which each class that has images counts the same.

    Args:
        labels, predictions: [N].
    """
    _, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=np.unique(labels), zero_division=0
    )
    return 100 * float(recall.mean()), 100 * float(f1.mean())


def class_accuracy(labels: np.ndarray, predictions: np.ndarray, classes: int) -> list[float | None]:
    """Accuracy within each class, in percent; None for a class without images.

    Args:
        labels, predictions: [N].
        classes: how many there are.
    """
    images = np.bincount(labels, minlength=classes)  # [K]
    right = np.bincount(labels[labels == predictions], minlength=classes)
    return [
        100 * hits / count if count else None
        for hits, count in zip(right.tolist(), images.tolist(), strict=True)
    ]


def most_confused(labels: np.ndarray, predictions: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """The most frequent mistakes: class, what it was taken for, how often. Memory grows with the images only.

    Args:
        labels, predictions: [N].
        most: how many of them.
    """
    wrong = labels != predictions
    pairs, counts = np.unique(np.stack([labels, predictions])[:, wrong], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(*pairs[:, place].tolist(), int(counts[place])) for place in order]
