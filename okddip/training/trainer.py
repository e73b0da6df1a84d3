"""The training loop: epochs of steps, evaluations and checkpoints."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from okddip import distributed
from okddip.data.dataset import Dataset
from okddip.data.loader import Batches, EvalLoader, Share, TrainLoader, seed_of
from okddip.data.streaming import StreamingLoader
from okddip.errors import ConfigError, check_choice, check_number
from okddip.methods.base import Method
from okddip.models.group import PeerGroup
from okddip.older_versions import FIRST_EPOCH
from okddip.training import checkpoint, metrics
from okddip.training.compiler import check_compiler
from okddip.training.device_errors import named_errors
from okddip.training.devices import check_device, find_device
from okddip.training.epoch import evaluate_on, refuse_broken_losses, train_on
from okddip.training.history import History, Results
from okddip.training.peers import saved_parts
from okddip.training.precision import PRECISIONS, auto_precision, is_native
from okddip.training.reporting import Tracker, log_expected_end, save_epoch
from okddip.training.schedules import Schedule
from okddip.training.step import EvalStep, ForwardStep, TrainStep, parts_of
from okddip.training.threads import MOST_THREADS

log = logging.getLogger(__name__)

GRAPH_MODES = ("reduce-overhead", "max-autotune")  # with CUDA graphs
COMPILE_MODES = ("default", *GRAPH_MODES, "max-autotune-no-cudagraphs")

SMALLEST = {  # of whole numbers
    "epochs": 1,
    "batch_size": 2,  # batch norm needs two images
    "eval_batch_size": 1,
    "eval_every": 1,
    "accumulate": 1,
}
LARGEST = 10**7
CHOICES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("channels_last", "compile", "fused", "tf32", "cudnn_benchmark"), (True, False)),
    **dict.fromkeys(("deterministic", "sync_batch_norm", "drop_last", "rerun"), (True, False)),
    "precision": ("auto", *PRECISIONS),
    "compile_mode": COMPILE_MODES,
}


@dataclass(kw_only=True, eq=False)
class Trainer:
    """Trains a group of peers on one device, or each of several ranks on its own.

    Its settings are those of conf/trainer. `resume` and `rerun` are read by others, before training begins.

    Attributes:
        device: as it is named in the configuration; then the device that was found.
        threads: of the CPU, as the configuration says; then as chosen (see `okddip.training.threads`).
        choose_gpu: see `find_device`.

    Raises:
        ConfigError: a value is out of range, or the device is not there.
    """

    epochs: int
    batch_size: int
    eval_batch_size: int
    eval_every: int
    limit_batches: int | None
    device: torch.device
    precision: str
    channels_last: bool
    compile: bool
    compile_mode: str
    fused: bool
    tf32: bool
    cudnn_benchmark: bool
    deterministic: bool
    gradient_clip: float | None
    accumulate: int
    drop_last: bool
    sync_batch_norm: bool
    resume: str | None
    rerun: bool
    threads: int | None = None
    choose_gpu: Callable[[int], int | None] = lambda gpus: None

    def __post_init__(self) -> None:
        for key, smallest in SMALLEST.items():
            value = getattr(self, key)
            check_number(f"trainer.{key}", value, minimum=smallest, maximum=LARGEST, integer=True)
        for key, choices in CHOICES.items():
            check_choice(f"trainer.{key}", getattr(self, key), choices)
        if self.limit_batches is not None:
            key = "trainer.limit_batches"
            check_number(key, self.limit_batches, minimum=1, maximum=LARGEST, integer=True)
        if self.threads is not None:
            check_number("trainer.threads", self.threads, minimum=1, maximum=MOST_THREADS, integer=True)
        if self.gradient_clip is not None:
            check_number("trainer.gradient_clip", self.gradient_clip, above=0)
        if self.resume is not None and not (isinstance(self.resume, str) and self.resume):
            raise ConfigError(f"trainer.resume={self.resume}: must be null, auto, a path or runs:/ID.")
        self.check_parts()
        if self.deterministic:  # read when the device is first used
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.device = find_device(str(self.device), self.choose_gpu)
        if self.compile:
            check_device(self.device)  # a GPU that cannot be used knows no compiler either
            check_compiler(self.device)
        on_cuda = self.device.type == "cuda"
        if self.sync_batch_norm and not on_cuda:
            raise ConfigError(
                "trainer.sync_batch_norm=true: PyTorch synchronises batch norm on CUDA only. On the CPU each"
                " rank normalises its own share of a batch."
            )
        if self.precision == "fp16" and not self.fused:
            log.warning(
                "trainer.precision=fp16, trainer.fused=false: the host waits for the device in each step, to"
                " learn whether gradients have overflowed. With trainer.fused=true it does not."
            )
        if self.precision == "auto":
            self.precision = auto_precision(self.device.type)
        if not is_native(self.precision, self.device):
            log.warning(
                f"trainer.precision={self.precision}: this processor has no {self.precision} instructions and"
                " emulates them, which takes longer than fp32."
            )

    def check_parts(self) -> None:
        """See that ranks and `accumulate` can share a batch.

        Raises:
            ConfigError: names the settings that do not go together.
        """
        parts = distributed.world_size() * self.accumulate
        if self.batch_size % parts or self.batch_size // parts < 2:
            raise ConfigError(
                f"trainer.batch_size={self.batch_size}: must be divisible by ranks x trainer.accumulate ="
                f" {distributed.world_size()} x {self.accumulate}, and leave at least 2 images for each part."
                " It counts the images of an update, over all ranks."
            )
        if self.accumulate > 1 and self.sync_batch_norm:
            raise ConfigError(
                "trainer.accumulate, trainer.sync_batch_norm: do not go together; ranks would take a short"
                " batch in different numbers of parts, and wait for each other."
            )
        if self.accumulate > 1 and self.compile and self.compile_mode in GRAPH_MODES:
            raise ConfigError(
                f"trainer.accumulate={self.accumulate}: does not go with trainer.compile_mode="
                f"{self.compile_mode}, whose CUDA graphs write over the gradients of the part before. Use"
                " compile_mode=default."
            )

    def fit(
        self,
        *,
        group: PeerGroup,
        method: Method,
        optimizer: Optimizer,
        schedule: Schedule,
        dataset: Dataset,
        tracker: Tracker,
        folder: Path,
        seed: int,
        description: dict[str, Any],
        state: dict[str, Any] | None = None,
        reported: Mapping[int, tuple[int, Results]] | None = None,
        first_number: int = 1,
    ) -> dict[str, Results]:
        """Train for all epochs, or all that are left.

        Args:
            group, method: on `device` already, in the memory format of the settings.
            optimizer: over the parameters of both.
            schedule: factor of the learning rate by epoch.
            dataset: what to train and evaluate on.
            tracker: gets the results of each epoch.
            folder: gets checkpoints and `metrics.jsonl`, from rank 0.
            seed: of permutations, augmentation and dropout.
            description: goes into each checkpoint.
            state: the checkpoint of the run's last finished epoch, to go on from.
            reported: see `History`.
            first_number: of the first epoch, for the tracker and `metrics.jsonl`; here epochs count from 0.

        Returns:
            The results of the `last` epoch and of the `best`, chosen by the validation set if there is one,
            else by the test set.

        Raises:
            ConfigError: a loss is not finite, or a file cannot be written.
        """
        self.set_backend_flags()
        self.check_training_set(dataset)
        share = own_share()
        splits = [split for split in dataset.sizes if split != "train"]
        place = (self.eval_batch_size, self.device, self.channels_last, share)
        with self.named_errors():  # the images may go to the device
            train_step = self.train_step(group, method, optimizer, dataset)
            eval_step = self.eval_step(group, method, dataset)
            train_loader = dataset.train_loader(
                *(self.batch_size, self.device, seed, self.channels_last, share),
                *(self.drop_last, method.views),
            )
            loaders = {split: dataset.eval_loader(split, *place) for split in splits}
        judge = "val" if "val" in splits else "test"
        history = History(judge, state, reported)
        parts: dict[str, Any] = {
            **saved_parts(group, method),
            "optimizer": optimizer,
            "scaler": train_step.scaler,
        }
        rates = [parameters["lr"] for parameters in optimizer.param_groups]
        ramp = torch.ones((), device=self.device)
        first_epoch = 0
        if state is not None:
            checkpoint.restore(state, **parts)
            first_epoch = state["epoch"] + 1
        started = time.monotonic()
        for epoch in range(first_epoch, self.epochs):
            for parameters, rate in zip(optimizer.param_groups, rates, strict=True):
                parameters["lr"] = rate * schedule(epoch)
            ramp.fill_(method.ramp(epoch))
            torch.manual_seed(seed_of(seed, epoch, distributed.rank(), 1))  # for dropout
            results = {"train/lr": optimizer.param_groups[0]["lr"], "train/ramp": method.ramp(epoch)}
            results |= self.train_epoch(group, method, train_step, train_loader, ramp, epoch)
            is_last = epoch + 1 == self.epochs
            if is_last or (epoch + 1) % self.eval_every == 0:
                for split, loader in loaders.items():
                    results |= self.evaluate_epoch(group, method, eval_step, loader, ramp, epoch, split)
            else:  # its last step may have ruined the weights, and no loss has told of it
                self.evaluate_epoch(group, method, eval_step, loaders[judge], ramp, epoch, judge, most=1)
            distributed.log_warnings_of_all_ranks()

            timestamp_ms, results, is_best = history.add(epoch, results)
            log.info(history.line(epoch, self.epochs, results, is_best))
            if distributed.rank() == 0:
                result = {"epoch": epoch, "timestamp_ms": timestamp_ms, "metrics": results}
                result[FIRST_EPOCH] = first_number
                trained = {name: part.state_dict() for name, part in parts.items()}
                state = {**description, **result, "history": history.kept, **trained}
                is_new = epoch not in history.reported
                save_epoch(state, folder, tracker, number=epoch + first_number, new=is_new, best=is_best)
            if epoch == first_epoch and not is_last:
                log_expected_end(started, self.epochs - 1 - epoch)
        return history.kept

    def check_training_set(self, dataset: Dataset) -> None:
        """See that the training images fill a batch, where shorter ones are left out.

        Raises:
            ConfigError: names both sizes.
        """
        if self.drop_last and dataset.sizes["train"] < self.batch_size:
            raise ConfigError(
                f"trainer.drop_last=true: {dataset.sizes['train']} training images fill no batch of"
                f" trainer.batch_size={self.batch_size}. Take smaller batches, or trainer.drop_last=false."
            )

    def train_step(
        self,
        group: PeerGroup,
        method: Method,
        optimizer: Optimizer,
        dataset: Dataset,
        *,
        average: bool = True,
    ) -> TrainStep:
        """The update of all parameters by a batch.

        Args:
            average: whether several ranks average their gradients; else each learns for itself.
        """
        forward = self.forward_step(group, method, self.train_images(dataset), diversity=False)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        return TrainStep(
            distributed.data_parallel(forward) if average else forward,
            optimizer,
            scaler,
            accumulate=self.accumulate,
            gradient_clip=self.gradient_clip,
            after_step=group.update_averages,
        )

    def eval_step(self, group: PeerGroup, method: Method, dataset: Dataset) -> ForwardStep:
        """The forward pass, the losses and the metrics of an evaluation's batch."""
        evaluated = max(size for split, size in dataset.sizes.items() if split != "train")
        images = own_share().size(min(self.eval_batch_size, evaluated))
        return self.forward_step(group, method, images, diversity=True)

    def train_images(self, dataset: Dataset) -> int:
        """How many images go through the network at once in training, those of short batches aside."""
        images = own_share().size(min(self.batch_size, dataset.sizes["train"]))
        return -(-images // parts_of(images, self.accumulate))

    def forward_step(self, group: PeerGroup, method: Method, images: int, *, diversity: bool) -> ForwardStep:
        """The forward pass, the losses and the metrics of one batch, which has so many images if full."""
        return ForwardStep(
            group,
            method,
            images=images,
            device=self.device.type,
            dtype=PRECISIONS[self.precision],
            auxiliary=method.auxiliary if diversity else None,
            compile_mode=self.compile_mode if self.compile else None,
        )

    def train_epoch(
        self,
        group: PeerGroup,
        method: Method,
        step: TrainStep,
        loader: TrainLoader | StreamingLoader,
        ramp: Tensor,
        epoch: int,
    ) -> Results:
        """One pass over the training batches: its metrics, and how many images a second it took.

        Raises:
            ConfigError: a loss is not finite.
        """
        start = time.perf_counter()
        title = f"epoch {epoch + 1}/{self.epochs}"
        with self.named_errors(), self.progress(loader.batches(epoch), len(loader), title) as batches:
            sums = train_on(group, method, step, batches, ramp, epoch)
        distributed.average_buffers(group, method, *group.averages)
        read = metrics.read(sums, method)  # waits for the device
        speed = int(sums["images"]) / (time.perf_counter() - start)
        results = {"images_per_second": speed, **read}
        return {f"train/{name}": value for name, value in results.items()}

    def evaluate_epoch(
        self,
        group: PeerGroup,
        method: Method,
        step: EvalStep,
        loader: EvalLoader | StreamingLoader,
        ramp: Tensor,
        epoch: int,
        split: str,
        most: int | None = None,
    ) -> Results:
        """The metrics of a split after an epoch.

        Args:
            most: batches; None for all.

        Raises:
            ConfigError: a loss is not finite.
        """
        length = min(len(loader), most or len(loader))
        with self.named_errors(), self.progress(loader.batches(epoch), length, split) as batches:
            sums = evaluate_on(group, method, step, batches, ramp)
        refuse_broken_losses(sums, epoch)
        return {f"{split}/{name}": value for name, value in metrics.read(sums, method).items()}

    def named_errors(self) -> AbstractContextManager[None]:
        """See `device_errors.named_errors`."""
        return named_errors(
            self.device,
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            accumulate=self.accumulate,
        )

    def set_backend_flags(self) -> None:
        """Set what PyTorch keeps for the whole process, so that a run before this one leaves no trace."""
        if self.compile:
            torch.compiler.reset()
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:  # imports the compiler
            torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.deterministic = self.deterministic
        # which algorithm is the fastest may be another one each time
        torch.backends.cudnn.benchmark = self.cudnn_benchmark and not self.deterministic
        # PyTorch's compiler and torch.export read these. Where `fp32_precision`, their newer form, was set
        # for some operators alone, reading them is an error.
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32

    @contextmanager
    def progress(self, batches: Batches, length: int, name: str) -> Iterator[Iterable[tuple[Tensor, Tensor]]]:
        """Batches up to the limit; with a progress bar in a terminal."""
        length = min(length, self.limit_batches or length)
        hidden = distributed.hide_progress_bar()
        with closing(batches):  # whatever a traceback holds: workers that decode would outlive it
            yield tqdm(islice(batches, length), desc=name, total=length, leave=False, disable=hidden)


def own_share() -> Share:
    """What this rank takes of each batch."""
    return Share(distributed.rank(), distributed.world_size())
