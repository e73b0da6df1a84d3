"""The training loop: epochs of steps, evaluations and checkpoints."""

import datetime
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from okddip import checkpoint, distributed, metrics, sweep
from okddip.data.dataset import Dataset
from okddip.data.loader import Batches, Share, seed_of
from okddip.errors import ConfigError, check_choice, check_number
from okddip.methods.base import Method
from okddip.models.group import PeerGroup
from okddip.schedules import Schedule
from okddip.signals import heed, unstopped
from okddip.tracking import MLflow, NoTracking

log = logging.getLogger(__name__)

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# A loss that is not finite stops the run, but not by a wait for the device: what is looked at was sent by the
# device so many steps before.
STEPS_BETWEEN_CHECKS = 50


class Trainer:
    """Trains a group of peers on one device, or each of several ranks on its own.

    Its settings are those of conf/trainer.
    """

    def __init__(
        self,
        *,
        epochs: int,
        batch_size: int,
        eval_batch_size: int,
        eval_every: int,
        limit_batches: int | None,
        device: str,
        precision: str,
        channels_last: bool,
        compile: bool,
        compile_mode: str,
        fused: bool,
        tf32: bool,
        cudnn_benchmark: bool,
        gradient_clip: float | None,
        accumulate: int,
        sync_batch_norm: bool,
        resume: str | None,
        rerun: bool,
    ) -> None:
        """Check the settings and find the device.

        (`resume` is the affair of `okddip.resume`, `rerun` of `okddip.sweep`.)

        Raises:
            ConfigError: a value is out of range, or the device is not there.
        """
        for key, number in {
            "epochs": epochs,
            "eval_batch_size": eval_batch_size,
            "eval_every": eval_every,
            "limit_batches": 1 if limit_batches is None else limit_batches,
        }.items():
            check_number(f"trainer.{key}", number, minimum=1, maximum=10**7, integer=True)
        # batch norm needs two images
        check_number("trainer.batch_size", batch_size, minimum=2, maximum=10**7, integer=True)
        check_number("trainer.accumulate", accumulate, minimum=1, maximum=10**7, integer=True)
        parts = distributed.ranks() * accumulate
        if batch_size % parts or batch_size // parts < 2:
            raise ConfigError(
                f"trainer.batch_size={batch_size}: must be divisible by ranks x trainer.accumulate ="
                f" {distributed.ranks()} x {accumulate}, and leave at least 2 images for each part. It counts"
                " the images of an update, over all ranks."
            )
        for key, switch in {
            "channels_last": channels_last,
            "compile": compile,
            "fused": fused,
            "tf32": tf32,
            "cudnn_benchmark": cudnn_benchmark,
            "sync_batch_norm": sync_batch_norm,
            "rerun": rerun,
        }.items():
            check_choice(f"trainer.{key}", switch, (True, False))
        if gradient_clip is not None:
            check_number("trainer.gradient_clip", gradient_clip, above=0)
        if resume is not None and not (isinstance(resume, str) and resume):
            raise ConfigError(f"trainer.resume={resume}: must be null, auto, a path or runs:/ID.")
        check_choice("trainer.precision", precision, ("auto", *PRECISIONS))
        check_choice("trainer.compile_mode", compile_mode, COMPILE_MODES)
        if accumulate > 1 and sync_batch_norm:
            raise ConfigError(
                "trainer.accumulate, trainer.sync_batch_norm: do not go together; ranks would take a short"
                " batch in different numbers of parts, and wait for each other."
            )
        if accumulate > 1 and compile and compile_mode in ("reduce-overhead", "max-autotune"):
            raise ConfigError(
                f"trainer.accumulate={accumulate}: does not go with trainer.compile_mode={compile_mode},"
                " whose CUDA graphs write over the gradients of the part before. Use compile_mode=default."
            )
        self.epochs = epochs
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.eval_every = eval_every
        self.limit_batches = limit_batches
        self.device = find_device(device)
        on_cuda = self.device.type == "cuda"
        if sync_batch_norm and not on_cuda:
            raise ConfigError(
                "trainer.sync_batch_norm=true: PyTorch synchronises batch norm on CUDA only. On the CPU each"
                " rank normalises its own share of a batch."
            )
        if precision == "fp16" and not fused:
            log.warning(
                "trainer.precision=fp16, trainer.fused=false: the host waits for the device in each step, to"
                " learn whether gradients have overflowed. With trainer.fused=true it does not."
            )
        self.precision = ("bf16" if on_cuda else "fp32") if precision == "auto" else precision
        self.channels_last = channels_last
        self.compile = compile
        self.compile_mode = compile_mode
        self.tf32 = tf32
        self.cudnn_benchmark = cudnn_benchmark
        self.gradient_clip = gradient_clip
        self.accumulate = accumulate
        self.sync_batch_norm = sync_batch_norm

    def fit(
        self,
        *,
        group: PeerGroup,
        method: Method,
        optimizer: Optimizer,
        schedule: Schedule,
        dataset: Dataset,
        tracker: MLflow | NoTracking,
        folder: Path,
        seed: int,
        description: dict[str, Any],
        state: dict[str, Any] | None = None,
        reported: Mapping[int, tuple[int, dict[str, float]]] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Train for all epochs, or all that are left.

        Args:
            group, method: on `device` already, in the memory format of the settings.
            optimizer: over the parameters of both.
            schedule: factor of the learning rate by epoch.
            dataset: what to train and evaluate on.
            tracker: gets the metrics of each epoch.
            folder: gets checkpoints and `metrics.jsonl`, from rank 0.
            seed: of permutations, augmentation and dropout.
            description: goes into each checkpoint.
            state: the checkpoint of the run's last finished epoch, to go on from.
            reported: time (milliseconds since 1970) and metrics of epochs that were told of already. One
                that is trained again, its checkpoint being damaged, is not told of in other words.

        Returns:
            The metrics of the `last` epoch and of the `best`, chosen by the validation set if there is one,
            else by the test set.

        Raises:
            ConfigError: a loss is not finite, or a file cannot be written.
        """
        self.set_backend_flags()
        rank = distributed.rank()
        share = Share(rank, distributed.ranks())
        train_step = distributed.synchronise(
            self.forward_step(group, method, self.train_images(dataset, share), diversity=False)
        )
        eval_step = self.forward_step(group, method, self.eval_images(dataset, share), diversity=True)
        loader = dataset.train_loader(self.batch_size, self.device, seed, self.channels_last, share)
        eval_loaders = {
            split: dataset.eval_loader(split, self.eval_batch_size, self.device, self.channels_last, share)
            for split in dataset.sizes
            if split != "train"
        }
        judge = "val" if "val" in eval_loaders else "test"
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        base_rates = [parameters["lr"] for parameters in optimizer.param_groups]
        ramp = torch.ones((), device=self.device)
        history: dict[str, dict[str, float]] = {}
        first_epoch = latest = 0
        reported = reported or {}
        if state is not None:
            checkpoint.restore(state, group=group, method=method, optimizer=optimizer, scaler=scaler)
            history = state["history"]
            first_epoch = state["epoch"] + 1
            latest = state["timestamp_ms"]
        latest = max([latest, *(timestamp_ms for timestamp_ms, _ in reported.values())])
        started = time.monotonic()

        for epoch in range(first_epoch, self.epochs):
            for parameters, rate in zip(optimizer.param_groups, base_rates, strict=True):
                parameters["lr"] = rate * schedule(epoch)
            ramp.fill_(method.ramp(epoch))
            torch.manual_seed(seed_of(seed, epoch, rank, 1))  # dropout draws from the default generator

            results = {
                "train/lr": optimizer.param_groups[0]["lr"],
                "train/ramp": method.ramp(epoch),
            }
            start = time.perf_counter()
            title = f"epoch {epoch + 1}/{self.epochs}"
            with self.within_memory(), self.progress(loader.batches(epoch), len(loader), title) as batches:
                sums = self.train_epoch(group, method, train_step, optimizer, scaler, batches, ramp, epoch)
            distributed.average_buffers(group, method)
            read = metrics.read(sums, method)  # waits for the device
            results["train/images_per_second"] = int(sums["images"]) / (time.perf_counter() - start)
            results |= {f"train/{name}": value for name, value in read.items()}

            is_last = epoch + 1 == self.epochs
            is_best = False
            is_evaluated = is_last or (epoch + 1) % self.eval_every == 0
            for split, eval_loader in eval_loaders.items() if is_evaluated else ():
                every = eval_loader.batches(epoch)
                with self.within_memory(), self.progress(every, len(eval_loader), split) as batches:
                    sums = self.evaluate(group, method, eval_step, batches, ramp)
                refuse_broken_losses(sums, epoch)
                read = metrics.read(sums, method)
                results |= {f"{split}/{name}": value for name, value in read.items()}
            if not is_evaluated:  # its last step may have ruined the weights, and no loss has told of it
                every = eval_loaders[judge].batches(epoch)
                with self.within_memory(), self.progress(every, 1, judge) as batches:
                    sums = self.evaluate(group, method, eval_step, batches, ramp)
                refuse_broken_losses(sums, epoch)
            distributed.pass_on_warnings()
            # the clock may be behind that of the epochs before: another machine's, or set back
            now = max(time.time_ns() // 1_000_000, latest + 1)
            timestamp_ms, results = reported.get(epoch, (now, results))
            latest = max(latest, timestamp_ms)
            score = f"{judge}/top1"
            if score in results:
                is_best = "best" not in history or results[score] > history["best"][score]
                if is_best:
                    history["best"] = {"epoch": epoch, **results}
                history["last"] = {"epoch": epoch, **results}
            self.log_epoch(epoch, results, history, judge)
            if rank == 0:
                state = {
                    **description,
                    "epoch": epoch,
                    "timestamp_ms": timestamp_ms,
                    "metrics": results,
                    "history": history,
                    "group": group.state_dict(),
                    "method": method.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                }
                keep(state, folder, tracker, new=epoch not in reported, best=is_best)
            if epoch == first_epoch and not is_last:
                log_expected_end(started, self.epochs - 1 - epoch)
        return history

    def train_images(self, dataset: Dataset, share: Share) -> int:
        """How many images go through the network at once in training, those of short batches aside."""
        images = share.size(min(self.batch_size, dataset.sizes["train"]))
        return -(-images // parts_of(images, self.accumulate))

    def eval_images(self, dataset: Dataset, share: Share) -> int:
        """The same of an evaluation."""
        evaluated = max(size for split, size in dataset.sizes.items() if split != "train")
        return share.size(min(self.eval_batch_size, evaluated))

    def forward_step(
        self, group: PeerGroup, method: Method, images: int, *, diversity: bool
    ) -> "ForwardStep":
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
        step: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        batches: Iterable[tuple[Tensor, Tensor]],
        ramp: Tensor,
        epoch: int,
    ) -> metrics.Sums:
        """One pass over the training batches.

        Raises:
            ConfigError: a loss is not finite.
        """
        group.train()
        method.train()
        sums = broken = None
        for number, (images, labels) in enumerate(batches, 1):
            heed()
            batch_sums = self.train_step(step, optimizer, scaler, images, labels, ramp)
            sums = metrics.accumulate(sums, batch_sums)
            if number % STEPS_BETWEEN_CHECKS == 0:
                if broken is not None:
                    refuse_broken_losses({**sums, "broken": broken()}, epoch)
                broken = metrics.sent_to_host(sums["broken"])
        if sums is None:
            raise ConfigError(
                "The training set gives no batch: it needs at least two images that can be read."
            )
        distributed.sum_over_ranks(sums)
        refuse_broken_losses(sums, epoch)
        return sums

    def train_step(
        self,
        step: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        images: Tensor,
        labels: Tensor,
        ramp: Tensor,
    ) -> metrics.Sums:
        """One update of all parameters; reads nothing back from the device.

        Args:
            step: a `ForwardStep`, synchronised over ranks.
            optimizer, scaler: of the parameters, of the loss.
            images: this rank's share of a batch [B, C, H, W].
            labels: [B].
            ramp: 0-dim.

        Returns:
            Sums over the share.
        """
        parts = parts_of(len(labels), self.accumulate)
        if parts == 1 and not distributed.is_synchronised(step):
            loss, sums = step(images, labels, ramp)
            scaler.scale(loss).backward()
        else:
            sums = self.backward_in_parts(step, scaler, images, labels, ramp, parts)
        if self.gradient_clip is not None:
            scaler.unscale_(optimizer)
            parameters = [p for parameters in optimizer.param_groups for p in parameters["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return sums

    def backward_in_parts(
        self,
        step: nn.Module,
        scaler: torch.amp.GradScaler,
        images: Tensor,
        labels: Tensor,
        ramp: Tensor,
        parts: int,
    ) -> metrics.Sums:
        """The gradient of a batch of which each rank has a share, and takes it in so many parts.

        Each part's mean loss is weighted by its images, so that the gradient is that of the whole batch.
        """
        weight: Tensor | float = 1 / max(len(labels), 1)
        if distributed.is_synchronised(step):
            weight = weight * distributed.weight_of_share(len(labels), self.device)
        chunks = list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))
        sums = None
        for number, (some_images, some_labels) in enumerate(chunks, 1):
            with distributed.unsynchronised(step) if number < parts else nullcontext():
                loss, chunk_sums = step(some_images, some_labels, ramp)
                scaler.scale(loss * (weight * len(some_labels))).backward()
            sums = metrics.accumulate(sums, chunk_sums)
        assert sums is not None
        return sums

    @torch.no_grad()
    def evaluate(
        self,
        group: PeerGroup,
        method: Method,
        step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, metrics.Sums]],
        batches: Iterable[tuple[Tensor, Tensor]],
        ramp: Tensor,
    ) -> metrics.Sums:
        """One pass over the batches of a split; no batch's results are read back from the device.

        Returns:
            Sums over the split, the shares of all ranks together.
        """
        group.eval()
        method.eval()
        sums = None
        for images, labels in batches:
            heed()
            _, batch_sums = step(images, labels, ramp)
            sums = metrics.accumulate(sums, batch_sums)
        if sums is None:
            raise ConfigError("A split has no image that can be read, so there is nothing to evaluate on.")
        distributed.sum_over_ranks(sums)
        return sums

    @contextmanager
    def within_memory(self) -> Iterator[None]:
        """Name the settings that decide how much memory a batch takes, where there is not enough.

        Raises:
            ConfigError: the device's memory is full.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"trainer.batch_size={self.batch_size}, trainer.eval_batch_size={self.eval_batch_size}: the"
                f" memory of {self.device} is full ({str(error).partition('. ')[0]}). Take smaller batches,"
                f" trainer.accumulate={2 * self.accumulate} for the same updates in smaller parts, or"
                " trainer.precision=bf16."
            ) from error

    def set_backend_flags(self) -> None:
        """Set what PyTorch keeps for the whole process, so that a run before this one leaves no trace."""
        if self.compile:
            torch.compiler.reset()
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        fp32 = "tf32" if self.tf32 else "ieee"
        torch.backends.cuda.matmul.fp32_precision = fp32
        torch.backends.cudnn.conv.fp32_precision = fp32  # type: ignore[attr-defined]

    @contextmanager
    def progress(self, batches: Batches, length: int, name: str) -> Iterator[Iterable[tuple[Tensor, Tensor]]]:
        """Batches up to the limit; with a progress bar in a terminal."""
        length = min(length, self.limit_batches or length)
        hidden = distributed.no_bar()
        with closing(batches):  # whatever a traceback holds: workers that decode would outlive it
            yield tqdm(islice(batches, length), desc=name, total=length, leave=False, disable=hidden)

    def log_epoch(
        self, epoch: int, results: dict[str, float], history: dict[str, dict[str, float]], judge: str
    ) -> None:
        fields = [
            f"epoch {epoch + 1}/{self.epochs}",
            f"loss {results['train/loss']:.4f}",
            f"train {results['train/top1']:.2f} %",
        ]
        if f"{judge}/top1" in results:
            best = history["best"]
            fields.append(
                f"{judge} {results[f'{judge}/top1']:.2f} %"
                f" (best {best[f'{judge}/top1']:.2f} % in epoch {best['epoch'] + 1:.0f})"
            )
        fields += [f"lr {results['train/lr']:.4g}", f"{results['train/images_per_second']:.0f} images/s"]
        log.info("  ".join(fields))


class ForwardStep(nn.Module):
    """The forward pass, the losses and the metrics of one batch, compiled if the settings say so.

    Args:
        group, method: whose parameters are learned.
        images: of a full batch. Another, such as the last one of an epoch, runs uncompiled rather than being
            compiled for its size.
        device, dtype: of autocast; no dtype for none.
        auxiliary: see `metrics.count`.
        compile_mode: None for not compiled.
    """

    def __init__(
        self,
        group: PeerGroup,
        method: Method,
        *,
        images: int,
        device: str,
        dtype: torch.dtype | None,
        auxiliary: int | None,
        compile_mode: str | None,
    ) -> None:
        super().__init__()
        self.group = group
        self.method = method
        self.device = device
        self.dtype = dtype
        self.auxiliary = auxiliary
        self.compiled = compile_mode and torch.compile(self.step, mode=compile_mode, dynamic=False)
        self.images = images

    def forward(self, images: Tensor, labels: Tensor, ramp: Tensor) -> tuple[Tensor, metrics.Sums]:
        """Map images [B, C, H, W], labels [B] and ramp 0-dim to the loss, 0-dim, and sums over the batch."""
        step = self.compiled if self.compiled and 0 < len(images) == self.images else self.step
        return step(images, labels, ramp)

    def step(self, images: Tensor, labels: Tensor, ramp: Tensor) -> tuple[Tensor, metrics.Sums]:
        # without images SyncBatchNorm sends zeros of its input's type, where the other ranks send fp32
        autocast = self.dtype is not None and len(images) > 0
        with torch.autocast(self.device, dtype=self.dtype, enabled=autocast):
            output = self.group(images)
        losses = self.method(output, labels, ramp)
        return losses.total, metrics.count(losses, labels, self.auxiliary)


def parts_of(images: int, accumulate: int) -> int:
    """In how many parts images are taken: of two at least, as batch norm cannot normalise a single value."""
    return max(1, min(accumulate, images // 2))


def find_device(name: str) -> torch.device:
    """The device a setting names; `auto` is CUDA if there is one, else the CPU.

    `auto` and `cuda` are different GPUs for ranks, and for the jobs of a sweep that run side by side.

    Raises:
        ConfigError: there is no such device.
    """
    several = distributed.ranks() > 1
    if name == "auto":
        if torch.cuda.is_available():
            return find_device("cuda")
        log.info("No CUDA device: training on the CPU.")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"trainer.device={name}: must be auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"trainer.device={name}: must be auto, cpu, cuda or cuda:N.")
    if several and device.type == "cuda":
        if device.index is not None:
            raise ConfigError(f"trainer.device={name}: each rank takes a device of its own; give cuda.")
        device = torch.device("cuda", distributed.local_rank())
        if distributed.local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"trainer.device={name}: rank {distributed.rank()} finds no device of its own, PyTorch sees"
                f" {torch.cuda.device_count()}. Start as many processes as there are devices"
                " (torchrun --nproc-per-node), or use trainer.device=cpu."
            )
        torch.cuda.set_device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"trainer.device={name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here."
            " Use trainer.device=cpu or trainer.device=auto."
        )
    if device.type == "cuda" and device.index is None:
        index = sweep.gpu_in_turn(torch.cuda.device_count())
        if index is not None:
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)  # for what names no device, like page-locked memory
    return device


def refuse_broken_losses(sums: metrics.Sums, epoch: int) -> None:
    """Stop a run whose losses are not finite; waits for the device.

    Raises:
        ConfigError: names the losses and the epoch.
    """
    if broken := metrics.broken_losses(sums):
        raise ConfigError(
            f"Epoch {epoch + 1}: {', '.join(broken)} is not finite. A lower optimizer.lr,"
            " scheduler.warmup_epochs or trainer.gradient_clip may help. The last checkpoint, if there is"
            " one, is of an epoch before."
        )


def keep(state: dict[str, Any], folder: Path, tracker: MLflow | NoTracking, *, new: bool, best: bool) -> None:
    """Write down and log what an epoch has come to.

    In this order a run cut off anywhere here is resumed with no metric missing or doubled: the checkpoint has
    what a lost line said, and the tracker is told again from the file.

    Args:
        state: the checkpoint.
        folder: gets it and, where the epoch is `new` in it, a line in `metrics.jsonl`.
        tracker: is told of the metrics.
        best: whether it is the best checkpoint so far.

    Raises:
        ConfigError: a file cannot be written.
    """
    epoch = {"epoch": state["epoch"], "timestamp_ms": state["timestamp_ms"]}
    with unstopped():
        checkpoint.save(state, folder, best=best)
        if new:
            checkpoint.append_line(folder / "metrics.jsonl", json.dumps(epoch | state["metrics"]))
    tracker.log(state["metrics"], state["epoch"], state["timestamp_ms"])


def log_expected_end(started: float, epochs: int) -> None:
    """Say when the run will end, going by its first epoch here, when `epochs` are left.

    `started` is of the monotonic clock, in seconds.
    """
    seconds = (time.monotonic() - started) * epochs
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    log.info(
        "expected end %s, in %s",
        end.strftime("%Y-%m-%d %H:%M:%S"),
        datetime.timedelta(seconds=round(seconds)),
    )
