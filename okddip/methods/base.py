"""What a method is: it turns the outputs of a group of peers into losses and predictions."""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from okddip.errors import ConfigError, Incompatible, check_choice, check_number
from okddip.methods.losses import log_softened, ramp_weight, soft_loss
from okddip.outputs import GroupOutput

log = logging.getLogger(__name__)


MOST_PEERS = 1000  # far more than anybody trains; what methods keep of each pair of peers fits into memory


class Losses(NamedTuple):
    total: Tensor  # 0-dim; what is differentiated
    parts: dict[str, Tensor]  # 0-dim each, unweighted; logged as NAME_loss
    predictions: Tensor  # [Q, B, K], logits of `Method.predictors` in their order
    means: Mapping[str, Tensor] = MappingProxyType({})  # what else evaluations log; [] or [rows, columns]


class Method(nn.Module):
    """How peers learn: the hyper-parameters, whatever the method itself learns, and the loss.

    A method implements `losses` and, where the defaults do not fit, sets `predictors` and `primary`.

    Attributes:
        predictors: names of the networks and ensembles whose accuracy is measured.
        ramp: weight of the distillation terms in a 0-based epoch.
        primary: the predictor that stands for the method, or `mean`, the mean of the peers' accuracies, or
            `ema/mean`, that of their moving averages.
        kept: index of the peer that is kept for inference.
        auxiliary: the first so many peers are those that `mean`, `ensemble` and diversity cover.
        needs_averages: `GroupOutput.averages` has the logits of the peers' moving averages in training too.
        needs_maps: the group hands over the peers' last feature maps in `GroupOutput.maps`.
        views: how many augmented views of a batch training takes: 1, or one for each peer.
        combination: the predictor that `combine` computes, so that it can be exported; None: there is none.
    """

    fewest_peers: ClassVar[int] = 2
    most_peers: ClassVar[int | None] = None
    refused_structures: ClassVar[dict[str, str]] = {}  # structure -> reason
    needs_averages: bool = False
    needs_maps: ClassVar[bool] = False
    combination: str | None = None

    def __init__(
        self,
        *,
        peers: int,
        structure: str,
        feature_dim: int,
        trunk_channels: int,
        epochs: int,
        map_channels: int | None = None,
        feature_dims: Sequence[int] | None = None,
        rescale: bool = False,
        weight_decay: float | None = None,
        views: str = "shared",
        ema_decay: float | None = None,
    ) -> None:
        """
        Args:
            peers: how many students are trained together.
            structure: `branch`, they share their early stages, or `network`, they share nothing.
            feature_dim: D, length of a peer's feature vector.
            trunk_channels: c, channels of the feature map where the trunk ends.
            epochs: length of the run, to which a `ramp_epochs` below 1 is relative.
            map_channels: c', channels of the last feature maps; None: D; 0: those of the peers differ.
            feature_dims: the length of each peer's features, where networks differ; zeros follow up to D.
            rescale: multiply the gradient that peers send into the trunk by 1/P.
            weight_decay: of what the method itself learns; None: the optimizer's, as for the peers.
            views: `shared`, all peers see the same augmented images in training, or `each`, every peer its
                own augmentation of them. With a shared trunk the trunk sees all P views.
            ema_decay: of moving averages of the peers, which are measured as further predictors; see
                `MovingAverages`. None: there are none.

        Raises:
            ConfigError: a value is out of range, or the structure makes no sense for this method.
        """
        super().__init__()
        check_number("method.peers", peers, minimum=1, maximum=MOST_PEERS, integer=True)
        try:
            check_number("method.peers", peers, minimum=self.fewest_peers, maximum=self.most_peers)
        except ConfigError as error:
            raise Incompatible(str(error)) from None
        check_choice("method.structure", structure, ("branch", "network"))
        check_choice("method.rescale", rescale, (True, False))
        check_choice("method.views", views, ("shared", "each"))
        if ema_decay is not None:
            check_number("method.ema_decay", ema_decay, minimum=0, below=1)
        elif self.needs_averages:
            raise ConfigError(
                "method.ema_decay=null: this method learns from moving averages of the peers, or keeps one;"
                " give their decay, such as 0.999."
            )
        if weight_decay is not None:
            check_number("method.weight_decay", weight_decay, minimum=0)
        if structure in self.refused_structures:
            raise Incompatible(f"method.structure={structure}: {self.refused_structures[structure]}")
        if self.needs_maps and map_channels == 0:
            raise Incompatible(
                "model.peers: this method fuses the last feature maps of all peers, and those of these"
                " networks have different numbers of channels. Choose networks with equal maps, or another"
                " method."
            )
        if rescale and structure == "network":
            raise Incompatible(
                "method.rescale=true: scales the gradient where a shared trunk ends, and networks share none."
                " Use method.structure=branch or method.rescale=false."
            )
        self.peers = peers
        self.structure = structure
        self.feature_dim = feature_dim
        self.trunk_channels = trunk_channels
        self.map_channels = feature_dim if map_channels is None else map_channels
        self.feature_dims = (feature_dim,) * peers if feature_dims is None else tuple(feature_dims)
        self.epochs = epochs
        self.rescale = rescale
        self.weight_decay = weight_decay
        self.ema_decay = ema_decay
        self.views = peers if views == "each" else 1
        self.auxiliary = peers
        self.kept = 0
        self.primary = "mean"
        self.ramp: Callable[[int], float] = Ramp(0, 0, epochs)

    @property
    def predictors(self) -> tuple[str, ...]:
        return (*(f"peer{i}" for i in range(self.peers)), "ensemble")

    @property
    def averaged(self) -> tuple[str, ...]:
        """The moving averages of the peers among the predictors: `ema/peer0`..."""
        names = self.predictors[: self.peers] if self.ema_decay is not None else ()
        return tuple(f"ema/{name}" for name in names)

    @property
    def measured(self) -> tuple[str, ...]:
        """All predictors whose accuracy evaluations measure, in the order of `Losses.predictions`."""
        return (*self.predictors, *self.averaged)

    @property
    def means(self) -> dict[str, slice]:
        """The means over peers that are logged, by name: of which predictors in `measured`."""
        if self.peers == 1:
            return {}
        first = len(self.predictors)
        means = {"mean": slice(0, self.auxiliary), "ema/mean": slice(first, first + self.auxiliary)}
        return means if self.averaged else {"mean": means["mean"]}

    def prepare(self, classes: int) -> None:
        """Make what depends on the number of classes K, which is known once the data are.

        Called once, before the parameters go to the optimizer.
        """

    def combine(self, output: GroupOutput) -> Tensor:
        """The logits [B, K] of `combination`: an ensemble by what the method has learned."""
        raise TypeError(f"{type(self).__name__} does not define combine(output)")

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        """The loss of one batch; runs in at least single precision, whatever the network's precision.

        Args:
            output: logits [P, B, K], features [P, B, D], trunk [B, c, h, w] or None; see `GroupOutput`. The
                trunk's output alone is in the network's precision: it is large, and few methods read it.
            labels: [B]. B is 0 where a short batch leaves nothing for a rank; the loss is then 0.
            ramp: 0-dim, weight of the distillation terms in this epoch. A tensor, since a compiled step
                would be compiled anew for each value of a Python float.
        """
        raise TypeError(f"{type(self).__name__} does not define losses(output, labels, ramp)")

    def forward(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        # Under autocast einsum and softmax return bf16 even for float inputs, and divergences of nearly
        # equal distributions come out negative.
        with torch.autocast(output.logits.device.type, enabled=False):
            output = in_single(output)
            losses = self.losses(output, labels, ramp)
            if output.averages is None:
                return losses
            return losses._replace(predictions=torch.cat([losses.predictions, output.averages]))


class Distillation(Method):
    """A method whose loss is hard + alpha * ramp * soft: what all of these have in common."""

    def __init__(
        self,
        *,
        temperature: float,
        loss: str,
        alpha: float = 1.0,
        ramp_epochs: float | None = None,
        ramp_start: float = 0.0,
        detach_targets: bool = False,
        **group: Any,
    ) -> None:
        """
        Args:
            temperature: T, softens predictions and targets.
            loss: `kl` or `ce`, see `soft_loss`.
            alpha: weight of the soft loss.
            ramp_epochs, ramp_start: see `Ramp`; None: the method has no ramp.
            detach_targets: send no gradient through the targets.
            group: see `Method`.
        """
        super().__init__(**group)
        check_number("method.temperature", temperature, above=0)
        check_number("method.alpha", alpha, minimum=0)
        check_choice("method.loss", loss, ("kl", "ce"))
        check_choice("method.detach_targets", detach_targets, (True, False))
        self.temperature = temperature
        self.loss = loss
        self.alpha = alpha
        self.has_ramp = ramp_epochs is not None
        check_number("method.ramp_start", ramp_start, minimum=0, maximum=1)
        if ramp_epochs is None and ramp_start > 0:
            raise ConfigError(
                f"method.ramp_start={ramp_start}, method.ramp_epochs=null: there is no ramp that could begin"
                " later. Give method.ramp_epochs too, such as 80, or leave method.ramp_start out."
            )
        if ramp_epochs is not None:
            self.ramp = Ramp(ramp_epochs, ramp_start, self.epochs)
        self.detach_targets = detach_targets

    def sources(self, logits: Tensor) -> Tensor:
        """Logits that targets are made of, with their gradient or without. Same shape."""
        return logits.detach() if self.detach_targets else logits

    def soften(self, logits: Tensor) -> Tensor:
        """Logits as targets: log-probabilities at temperature T. Same shape."""
        return log_softened(logits, self.temperature)

    def soft_loss(self, logits: Tensor, log_targets: Tensor) -> Tensor:
        """What the predictions [..., B, K] cost against log-probabilities at temperature T, 0-dim."""
        return soft_loss(logits, log_targets, self.temperature, self.loss)

    def weighted(self, hard: Tensor, soft: Tensor, ramp: Tensor) -> Tensor:
        """The total loss, 0-dim."""
        return hard + (self.alpha * ramp if self.has_ramp else self.alpha) * soft


class Ramp:
    """The ramp of the distillation terms over a run (see `ramp_weight`)."""

    def __init__(self, ramp_epochs: float, ramp_start: float, epochs: int) -> None:
        """
        Args:
            ramp_epochs: length of the ramp; epochs, or below 1 a fraction of the run.
            ramp_start: fraction of the run after which the ramp begins. Before it the weight is 1, as in
                the authors' code (train_GL.py, `--start_consistency`).
            epochs: length of the run.
        """
        check_number("method.ramp_epochs", ramp_epochs, minimum=0)
        check_number("method.ramp_start", ramp_start, minimum=0, maximum=1)
        self.length = ramp_epochs * epochs if ramp_epochs < 1 else ramp_epochs
        self.start = ramp_start * epochs
        if self.start + self.length > epochs:
            log.warning(
                "The ramp of %g epochs does not end within the run of %d: distillation never gets its full"
                " weight. method.ramp_epochs=0.27 makes it relative to the run.",
                self.length,
                epochs,
            )

    def __call__(self, epoch: int) -> float:
        return 1.0 if epoch < self.start else ramp_weight(epoch - self.start, self.length)


def with_ensemble(logits: Tensor, auxiliary: int) -> Tensor:
    """The peers' logits and, last, the mean of the first `auxiliary` of them, [P, B, K] to [P + 1, B, K]."""
    return torch.cat([logits, logits[:auxiliary].mean(0, keepdim=True)])


def in_single(output: GroupOutput) -> GroupOutput:
    """All logits, features and maps in at least single precision; the trunk's output stays as it is."""
    return output._replace(
        logits=at_least_single(output.logits),
        features=at_least_single(output.features),
        teacher=None if output.teacher is None else at_least_single(output.teacher),
        averages=None if output.averages is None else at_least_single(output.averages),
        maps=None if output.maps is None else at_least_single(output.maps),
    )


def at_least_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
