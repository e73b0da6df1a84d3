"""Accuracy, losses and diversity: summed on the device over an epoch, read back once at its end."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from okddip.errors import ConfigError
from okddip.methods.base import Losses, Method

Sums = dict[str, Tensor]


def count(losses: Losses, labels: Tensor, auxiliary: int | None = None) -> Sums:
    """Sums over one batch, on its device. Exact over an epoch: a smaller batch counts by its size.

    Args:
        losses: of the batch; predictions [Q, B, K].
        labels: [B].
        auxiliary: for evaluations; `diversity` of the first so many predictors, and the method's means.

    Returns:
        0-dim sums, `top1` and `top5` [Q]; `broken` [losses], in how many batches each loss, in the order of
        the names that end in `loss`, was not finite.
    """
    batch, classes = losses.predictions.shape[1:]
    ranked = losses.predictions.topk(min(5, classes)).indices  # [Q, B, 5], best first
    hits = ranked == labels[:, None]  # [Q, B, 5]
    sums = {"images": labels.new_full((), batch), "loss": losses.total * batch}
    sums |= {f"{name}_loss": part * batch for name, part in losses.parts.items()}
    sums["broken"] = torch.stack([losses.total, *losses.parts.values()]).isfinite().logical_not().long()
    sums["top1"] = hits[..., 0].sum(1)
    if classes >= 5:
        sums["top5"] = hits.sum((1, 2))
    if auxiliary is not None:
        means = dict(losses.means)
        if auxiliary > 1:
            means["diversity"] = diversity(losses.predictions[:auxiliary])
        # the mean over a rank's empty share of a batch is not a number
        sums |= {name: value * batch if batch else torch.zeros_like(value) for name, value in means.items()}
    return {name: value.detach() for name, value in sums.items()}


def diversity(logits: Tensor) -> Tensor:
    """Euclidean distance between peers' softmax outputs, mean over samples and unordered pairs of peers.

    The authors divide the sum by 3, the number of pairs among 3 peers, whatever their number (train_GL.py).

    Args:
        logits: [A, B, K], of at least two peers.
    """
    probabilities = logits.softmax(-1).transpose(0, 1)  # [B, A, K]
    # the matrix-product form loses the small distances of nearly equal peers
    distances = torch.cdist(probabilities, probabilities, compute_mode="donot_use_mm_for_euclid_dist")
    peers = logits.shape[0]
    return distances.sum((1, 2)).mean() / (peers * (peers - 1))


def calibration_gaps(predictions: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Confidence minus accuracy, summed over the samples of a batch in each bin of confidence.

    Summed over a data set, absolute, added over the bins and divided by the number of samples this is the
    expected calibration error (Guo et al., ICML 2017, equation 3; bins of equal width, open to the left).

    Args:
        predictions: logits [Q, B, K].
        labels: [B].

    Returns:
        [Q, bins] float64.
    """
    confidence, answer = predictions.softmax(-1).max(-1)  # [Q, B]
    edges = torch.linspace(0, 1, bins + 1, device=predictions.device)[1:-1]  # [bins - 1]
    members = torch.bucketize(confidence, edges)[..., None] == torch.arange(bins, device=edges.device)
    gaps = confidence.double() - (answer == labels).double()  # [Q, B]
    return torch.einsum("qb,qbn->qn", gaps, members.double())


def accumulate(sums: Sums | None, batch: Sums) -> Sums:
    """Add a batch's sums to the epoch's, in place after the first."""
    if sums is None:
        return {name: value.clone() for name, value in batch.items()}
    for dtype in {value.dtype for value in batch.values()}:
        names = [name for name, value in batch.items() if value.dtype == dtype]
        torch._foreach_add_([sums[name] for name in names], [batch[name] for name in names])
    return sums


def read(sums: Sums, method: Method) -> dict[str, float]:
    """Bring an epoch's sums to the host: means, and accuracies in percent by predictor.

    `top1` without a predictor is the primary predictor's; `mean/top1` is the mean of the accuracies of the
    peers that `Method.auxiliary` counts.

    Raises:
        ConfigError: there was no image.
    """
    values: dict[str, Any] = {name: value.tolist() for name, value in sums.items()}
    images: int = values.pop("images")
    if images == 0:
        raise ConfigError("A split has no image that can be read.")
    del values["broken"]
    metrics: dict[str, float] = {}
    for name, value in values.items():
        if name not in ("top1", "top5"):
            metrics |= {key: entry / images for key, entry in entries(name, value)}
            continue
        accuracies = [100 * hits / images for hits in value]
        # moving averages come last, and are not measured in training where no loss needs them
        by_predictor = dict(zip(method.measured, accuracies, strict=False))
        for mean, place in method.means.items():
            if chosen := accuracies[place]:
                by_predictor[mean] = sum(chosen) / len(chosen)
        if method.primary in by_predictor:
            metrics[name] = by_predictor[method.primary]
        metrics |= {f"{predictor}/{name}": accuracy for predictor, accuracy in by_predictor.items()}
    return metrics


def entries(name: str, value: float | list[list[float]]) -> list[tuple[str, float]]:
    """A number under its name; the entries of a matrix under NAME/ROW/COLUMN."""
    if isinstance(value, float | int):
        return [(name, value)]
    return [
        (f"{name}/{row}/{column}", entry)
        for row, numbers in enumerate(value)
        for column, entry in enumerate(numbers)
    ]


def sent_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Send values to the host without waiting for the device; the result waits, and returns them."""
    if tensor.device.type != "cuda":
        copy = tensor.clone()
        return lambda: copy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    sent = torch.cuda.Event()
    sent.record()

    def values() -> Tensor:
        sent.synchronize()
        return copy

    return values


def broken_losses(sums: Sums) -> list[str]:
    """Names of the losses that were first to be not finite, none if all are. Reads from the device.

    The step after a loss is not finite neither is any other, so the first are those broken most often.
    """
    counts = sums["broken"].tolist()
    names = [name for name in sums if name.endswith("loss")]
    return [name for name, times in zip(names, counts, strict=True) if times and times == max(counts)]
