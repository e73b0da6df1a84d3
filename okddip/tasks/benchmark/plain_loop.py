"""What the benchmark compares with: a training loop as it is commonly written.

Its structure is that of the authors' train_GL.py and utils.py: eager, single precision, contiguous images, a
Python loop over the peers for losses and accuracies, each number read back with `.item()`, an optimizer that
goes over the parameters one by one, diversity sample by sample, images transformed one by one. It trains the
same networks with the same losses, so that the ratio says what the program around them is worth.
"""

import copy
from collections.abc import Iterator
from itertools import combinations, islice
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from okddip.data.dataset import Dataset
from okddip.methods.base import Method
from okddip.methods.okddip import OKDDip, Projections
from okddip.models.group import PeerGroup, rescale_gradient

# total loss, its parts, logits [B, K] of each predictor
Result = tuple[Tensor, list[Tensor], list[Tensor]]


class PlainLoop:
    """Copies of a group and a method, trained by the plain loop.

    The losses of OKDDip are computed peer by peer, as its paper has them (attention, aggregated logits, KL);
    those of other methods, and of OKDDip with other switches, as `Method` computes them, and only what is
    around them is plain.
    """

    def __init__(self, group: PeerGroup, method: Method) -> None:
        self.group = copy.deepcopy(group).to(memory_format=torch.contiguous_format)
        for teacher in self.group.teacher:
            teacher.to(memory_format=torch.contiguous_format)
        self.method = copy.deepcopy(method)
        # the paper's optimizer and numbers
        self.optimizer = torch.optim.SGD(
            [*self.group.parameters(), *self.method.parameters()],
            lr=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            foreach=False,
            fused=False,
        )

    def train_step(self, images: Tensor, labels: Tensor, ramp: Tensor) -> dict[str, float]:
        """One update of all parameters from a batch [B, C, H, W]; returns losses and accuracies."""
        total, parts, predictions = self.losses(images, labels, ramp)
        numbers = read_losses(total, parts) | read_accuracies(predictions, labels)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.group.update_averages()
        return numbers

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor, ramp: Tensor) -> dict[str, float]:
        """Losses, accuracies and diversity of one batch [B, C, H, W]."""
        total, parts, predictions = self.losses(images, labels, ramp)
        numbers = read_losses(total, parts) | read_accuracies(predictions, labels)
        peers = predictions[: self.method.auxiliary]
        return numbers | ({"diversity": read_diversity(peers)} if len(peers) > 1 else {})

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images [B, C, H, W] to the peers' logits and features."""
        logits, features = [], []
        trunk = self.group.trunk(images) if self.group.structure == "branch" else None
        if trunk is not None and self.group.rescale:
            trunk = rescale_gradient(trunk, 1 / len(self.group.peers))
        peers: Any = self.group.peers
        for peer in peers:
            feature = peer.head(peer.trunk(images) if trunk is None else trunk)
            features.append(feature)
            logits.append(peer.classifier(feature))
        with torch.no_grad():  # whose logits a forward pass gives too
            for teacher in self.group.teacher:
                teacher(images)
            if self.group.computes_averages:
                self.group.averages[0].group(images)
        return logits, features

    def losses(self, images: Tensor, labels: Tensor, ramp: Tensor) -> Result:
        if isinstance(self.method, OKDDip) and follows_the_paper(self.method):
            return okddip_losses(self.method, *self.forward(images), labels, ramp)
        losses = self.method(self.group(images), labels, ramp)
        return losses.total, list(losses.parts.values()), list(losses.predictions.unbind())


def follows_the_paper(method: OKDDip) -> bool:
    """Whether `okddip_losses` computes what the method does."""
    usual = method.loss == "kl" and method.aggregate == "logits" and method.include_self
    equal = not isinstance(method.query, Projections)
    return usual and equal and not method.detach_targets and method.views == 1


def okddip_losses(
    method: OKDDip, logits: list[Tensor], features: list[Tensor], labels: Tensor, ramp: Tensor
) -> Result:
    """The losses of OKDDip, peer by peer.

    Args:
        logits, features: of each peer, [B, K] and [B, D].
        labels: [B].
        ramp: 0-dim, weight of the distillation terms.
    """
    auxiliary = method.auxiliary
    peers = torch.stack(logits[:auxiliary], -1)  # [B, K, A]
    if method.query is not None and method.key is not None:
        queries = torch.stack([method.query(feature) for feature in features[:auxiliary]], 1)  # [B, A, d]
        keys = torch.stack([method.key(feature) for feature in features[:auxiliary]], 1)  # [B, A, d]
        attention = torch.bmm(queries, keys.transpose(1, 2)).softmax(-1)  # [B, A, A]
        targets = torch.bmm(peers, attention.transpose(1, 2))  # [B, K, A]
    else:
        targets = peers.mean(-1, keepdim=True).expand_as(peers)
    hard: Tensor | float = 0.0
    soft: Tensor | float = 0.0
    for i in range(auxiliary):
        hard = hard + F.cross_entropy(peers[..., i], labels)
        soft = soft + divergence(peers[..., i], targets[..., i], method.temperature)
    mean = peers.mean(-1)  # [B, K]
    predictions = [peers[..., i] for i in range(auxiliary)]
    for leader in logits[auxiliary:]:
        hard = hard + F.cross_entropy(leader, labels)
        soft = soft + divergence(leader, mean, method.temperature)
        predictions.append(leader)
    assert isinstance(hard, Tensor)
    assert isinstance(soft, Tensor)
    return hard + method.alpha * ramp * soft, [hard, soft], [*predictions, mean]


def divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """T^2 times the KL divergence from softened targets, batch mean, with the authors' 1e-7; [B, K] each."""
    probabilities = (targets / temperature).softmax(1) + 1e-7
    cost = F.kl_div((logits / temperature).log_softmax(1), probabilities, reduction="batchmean")
    return temperature * temperature * cost


def read_losses(total: Tensor, parts: list[Tensor]) -> dict[str, float]:
    return {f"loss{i}": loss.item() for i, loss in enumerate([total, *parts])}


def read_accuracies(predictions: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 of each predictor in percent, from logits [B, K]."""
    numbers = {}
    for i, logits in enumerate(predictions):
        ranked = logits.topk(min(5, logits.shape[1]), 1).indices.t()  # [5, B], best first
        hits = ranked.eq(labels.view(1, -1).expand_as(ranked))
        for k in (1, 5):
            right = hits[:k].reshape(-1).float().sum(0)
            numbers[f"{i}/top{k}"] = right.mul_(100 / len(labels)).item()
    return numbers


def read_diversity(peers: list[Tensor]) -> float:
    """Mean distance between the softmax outputs of two peers, sample by sample; logits [B, K] each."""
    probabilities = torch.stack(peers, -1).softmax(1)  # [B, K, A]
    pairs = list(combinations(range(len(peers)), 2))
    distance = nn.PairwiseDistance()
    total = 0.0
    for sample in probabilities:
        rows = sample.t()  # [A, K]
        distances = sum(distance(rows[i : i + 1], rows[j : j + 1]) for i, j in pairs)
        total += (distances / len(pairs)).item()
    return total / len(probabilities)


class PilLoader:
    """Training images transformed one by one on one core, as torchvision's CIFAR recipes do."""

    def __init__(self, dataset: Dataset, batch_size: int, views: int = 1) -> None:
        self.images, self.labels = dataset.splits["train"]
        self.batch_size = batch_size
        self.views = views
        self.order: Iterator[int] = iter(())
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(dataset.image_size, padding=dataset.pad),
                *([transforms.RandomHorizontalFlip()] if dataset.flip else []),
                transforms.ToTensor(),
                transforms.Normalize(dataset.mean, dataset.std),
            ]
        )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] float32, or of several views [B, V, C, H, W], and labels [B], on the host."""
        chosen = list(islice(self.order, self.batch_size))
        if not chosen:
            self.order = iter(torch.randperm(len(self.labels)).tolist())
            chosen = list(islice(self.order, self.batch_size))
        pixels = [self.images[i].squeeze(-1).numpy() for i in chosen]  # [H, W, 3] or grey [H, W]
        views = []
        for _ in range(self.views):
            views.append(torch.stack([self.transform(Image.fromarray(image)) for image in pixels]))
        return views[0] if self.views == 1 else torch.stack(views, 1), self.labels[chosen]
