from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from okddip.methods.base import Losses, Method
from okddip.outputs import GroupOutput
from okddip.training import metrics


def group_output(batch: int, peers: int = 4, classes: int = 10) -> tuple[GroupOutput, Tensor]:
    labels = torch.randint(classes, (batch,))
    logits = torch.randn(peers, batch, classes)
    return GroupOutput(logits, torch.randn(peers, batch, 64), torch.randn(batch, 32, 4, 4)), labels


def test_accuracies_over_uneven_batches_are_exact(make_method: Callable[..., Method]) -> None:
    method = make_method("okddip")
    ramp = torch.tensor(0.5)
    batches = [group_output(size) for size in (64, 64, 7)]
    sums = None
    for output, labels in batches:
        sums = metrics.accumulate(sums, metrics.count(method(output, labels, ramp), labels, method.auxiliary))
    read = metrics.read(sums, method)

    logits = torch.cat([output.logits for output, _ in batches], dim=1)  # [P, 135, K]
    labels = torch.cat([labels for _, labels in batches])
    correct = [100 * (peer.argmax(-1) == labels).double().mean().item() for peer in logits]
    assert read["top1"] == read["leader/top1"] == pytest.approx(correct[3])
    assert [read[f"peer{i}/top1"] for i in range(3)] == pytest.approx(correct[:3])
    assert read["mean/top1"] == pytest.approx(sum(correct[:3]) / 3)
    ensemble = logits[:3].mean(0)
    assert read["ensemble/top1"] == pytest.approx(
        100 * (ensemble.argmax(-1) == labels).double().mean().item()
    )
    in_five = [label in ranked for label, ranked in zip(labels, ensemble.topk(5).indices, strict=True)]
    assert read["ensemble/top5"] == pytest.approx(100 * sum(in_five) / 135)
    hard = sum(torch.nn.functional.cross_entropy(peer, labels).item() for peer in logits)
    assert read["hard_loss"] == pytest.approx(hard, rel=1e-5)

    probabilities = logits[:3].softmax(-1)
    distances = [
        (probabilities[a] - probabilities[b]).norm(dim=-1).mean() for a, b in combinations(range(3), 2)
    ]
    assert read["diversity"] == pytest.approx(sum(distances).item() / 3, rel=1e-5)


def test_without_five_classes_there_is_no_top5(make_method: Callable[..., Method]) -> None:
    method = make_method("okddip")
    output, labels = group_output(8, classes=3)
    read = metrics.read(metrics.count(method(output, labels, torch.tensor(1.0)), labels), method)
    assert "top1" in read
    assert not any("top5" in name for name in read)


def test_nothing_that_answers_the_same_to_all_is_called_right() -> None:
    """Ties and NaN are no hits for whoever comes first in a comparison."""
    labels = torch.arange(10)
    for value in (0.0, float("nan")):
        predictions = torch.full((1, 10, 10), value)
        sums = metrics.count(Losses(torch.tensor(0.0), {}, predictions), labels)
        assert sums["top1"].item() <= 1


def test_identical_peers_have_no_diversity() -> None:
    logits = torch.randn(1, 16, 10).expand(3, -1, -1)
    assert metrics.diversity(logits).item() == 0


def test_calibration_error_is_the_weighted_gap_of_each_bin_of_confidence() -> None:
    # confidences of 2 predictors for 4 images of 2 classes; labels are all 0
    first = torch.tensor([[0.55, 0.45], [0.45, 0.55], [0.9, 0.1], [0.95, 0.05]])
    second = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.zeros(4, dtype=torch.long)
    predictions = torch.stack([first, second]).clamp_min(1e-30).log()  # [2, 4, 2]
    halves = [
        metrics.calibration_gaps(predictions[:, part], labels[part], bins=10)
        for part in (slice(0, 3), slice(3, 4))
    ]
    errors = (halves[0] + halves[1]).abs().sum(1) / 4
    # first: in (0.5, 0.6] confidence 0.55, accuracy 1/2; 0.9 in (0.8, 0.9] and 0.95 in (0.9, 1] both right
    # second: confidence 1, accuracy 3/4
    assert errors.tolist() == pytest.approx([(2 * 0.05 + 0.1 + 0.05) / 4, 0.25], abs=1e-6)


def test_values_sent_to_the_host_are_those_of_the_moment() -> None:
    tensor = torch.tensor([1, 2])
    values = metrics.sent_to_host(tensor)
    tensor += 1
    assert values().tolist() == [1, 2]
