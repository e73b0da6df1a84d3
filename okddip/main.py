"""The program: compose the configuration, check it, build its parts, hand them to the task.

Nothing heavy is imported before the configuration is composed, so that --help and a mistyped override answer
at once.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from okddip import distributed
from okddip.assembly import CONFIG_HOME, PEERS, backbone_factories, check_arguments, make
from okddip.checks import check
from okddip.command_line import for_hydra, versions
from okddip.errors import ConfigError, check_number
from okddip.help import print_help
from okddip.home import ensure_home
from okddip.hooks import register_plugins, short_errors
from okddip.signals import stop_on_signals
from okddip.sweeps.begin import NO_CHDIR
from okddip.sweeps.environment import is_job
from okddip.sweeps.finish import finish_sweep
from okddip.sweeps.job import run_job
from okddip.sweeps.joblib import choose_gpu
from okddip.text import replace_unencodable_output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from okddip.data.dataset import Dataset
    from okddip.methods.base import Method
    from okddip.models.backbone import Backbone
    from okddip.models.group import PeerGroup
    from okddip.run.parts import Parts
    from okddip.training.schedules import Schedule
    from okddip.training.trainer import Trainer

TASKS_OF_RANKS = ("okddip.tasks.train.train", "okddip.tasks.benchmark.task.benchmark")

register_plugins()
# PyTorch reads it when it is imported: see `okddip.training.threads`
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@hydra.main(version_base="1.3", config_path=str(CONFIG_HOME / "conf"), config_name="config")
def main(config: DictConfig) -> Any:
    """Run the task of a composed configuration; returns what the task returns (a sweeper optimizes it)."""
    replace_unencodable_output()  # also in joblib's processes
    with stop_on_signals():
        if HydraConfig.get().job.chdir:
            raise ConfigError(NO_CHDIR)
        target = OmegaConf.select(config, "task._target_")
        try:
            task = partial(get_method(target), build=build)
        except Exception as error:
            raise ConfigError(f"task._target_={target}: is no function ({error}). See conf/task.") from error
        if is_job():
            return run_job(config, check, task)
        with distributed.process_group():
            if distributed.world_size() > 1 and target not in TASKS_OF_RANKS:
                raise ConfigError(f"{target}: this task takes one process; start it without torchrun.")
            check(config)
            return task(config)


def build(config: DictConfig, make_dataset: Callable[[DictConfig], Dataset] | None = None) -> Parts:
    """Instantiate what a configuration describes.

    What can be refused is refused before any data is read.

    Args:
        config: resolved.
        make_dataset: from the node `dataset` to the data set, if not as it says.

    Raises:
        ConfigError: a value that is not allowed, with its key.
    """
    import torch

    from okddip.data.loader import seed_of
    from okddip.run.parts import Parts
    from okddip.sweeps.teacher import open_teachers
    from okddip.sweeps.teacher_checkpoint import check_teacher, describe_teachers
    from okddip.tasks.train import train
    from okddip.tracking.tracker import NoTracking
    from okddip.training.devices import check_device
    from okddip.training.peers import parameter_groups
    from okddip.training.rehearsal import check_image_size, check_memory

    trainer, schedule, make_optimizer, probes, method = make_without_data(config)
    check_device(trainer.device)
    check_memory(probes, method, trainer.device, config.options.model)
    tracker = make("tracking", config.tracking) if distributed.rank() == 0 else NoTracking()
    tracker.open()
    teachers = open_teachers(config, partial(train, build=build)) if config.method.get("teacher") else []

    with distributed.local_rank_0_first():
        dataset = make("dataset", config.dataset) if make_dataset is None else make_dataset(config.dataset)
    models = config.model.get(PEERS) or [config.options.model]
    check_image_size(probes, models, dataset.image_size, config.options.dataset)
    torch.manual_seed(seed_of(config.seed, 3))
    method.prepare(len(dataset.classes))
    torch.manual_seed(seed_of(config.seed, 2))
    networks = [check_teacher(config, reference, teacher, dataset) for reference, teacher in teachers]
    with trainer.named_errors():
        group, method = build_group(config, method, dataset, trainer, networks)
    optimizer = make_optimizer(parameter_groups(group, method))
    known = describe_teachers([teacher for _, teacher in teachers])
    return Parts(trainer, tracker, dataset, group, method, optimizer, schedule, known)


def make_without_data(
    config: DictConfig,
) -> tuple[Trainer, Schedule, Callable[..., Any], list[Backbone], Method]:
    """The trainer, the schedule, what makes the optimizer, networks without memory, and the method.

    Raises:
        ConfigError: a value that is not allowed, with its key.
    """
    import torch

    from okddip.data.loader import seed_of
    from okddip.data.options import check_options
    from okddip.models.backbone import dimensions_of

    for group in ("dataset", "tracking"):  # made later
        check_arguments(group, config[group])
    trainer = make("trainer", config.trainer, choose_gpu=choose_gpu)
    schedule = make("scheduler", config.scheduler, epochs=trainer.epochs)
    check_options(config.dataset)
    with torch.device("meta"):
        probes = [make_one() for make_one in backbone_factories(config.model, num_classes=2, in_channels=3)]
    torch.manual_seed(seed_of(config.seed, 1))
    method = make("method", config.method, **dimensions_of(probes), epochs=trainer.epochs)
    return trainer, schedule, optimizer_factory(config, trainer.device, method.weight_decay), probes, method


def optimizer_factory(config: DictConfig, device: Any, own_decay: float | None) -> Callable[..., Any]:
    """What makes the optimizer of parameters, tried with two.

    Args:
        config: resolved.
        device: of the training.
        own_decay: the weight decay of what the method itself learns; None for that of all.

    Raises:
        ConfigError: it takes no such options, no weight decay for a part, or no step as those of a training.
    """
    import torch

    make_optimizer = make("optimizer", config.optimizer)
    check_number("optimizer.lr", config.optimizer.lr, above=0)
    peers, own = (torch.zeros(1, requires_grad=True) for _ in range(2))
    if device.type == "cpu":  # there is an option whose step takes parameters on a GPU
        peers.grad, own.grad = torch.zeros(2, 1)
    groups = [{"params": [peers]}, {"params": [own], "weight_decay": own_decay}]
    try:
        tried = make_optimizer([peers, own] if own_decay is None else groups)
        tried.step()
    except Exception as error:  # any optimizer may be named, and betas=[] is an IndexError
        reason = str(error).partition("\n")[0]
        given = ", ".join(f"{name!s}={value}" for name, value in config.optimizer.items())
        raise ConfigError(
            f"optimizer: {reason}, with {given}. See conf/optimizer and the optimizer's documentation."
        ) from error
    if own_decay is not None and "weight_decay" not in tried.defaults:
        raise ConfigError(f"method.weight_decay={own_decay}: {type(tried).__name__} has none; give null.")
    return make_optimizer


def build_group(
    config: DictConfig,
    method: Method,
    dataset: Dataset,
    trainer: Trainer,
    teachers: Sequence[Backbone],
) -> tuple[PeerGroup, Method]:
    """The peers and the method on the trainer's device, tried on a batch of two images.

    Raises:
        Incompatible: the model cannot take the images.
    """
    import torch

    from okddip.training.peers import make_group
    from okddip.training.rehearsal import rehearse

    place: dict[str, Any] = {
        "device": trainer.device,
        "memory_format": torch.channels_last if trainer.channels_last else torch.contiguous_format,
    }
    factories = backbone_factories(
        config.model, num_classes=len(dataset.classes), in_channels=dataset.channels
    )
    group = make_group(factories, method, [teacher.to(**place) for teacher in teachers], **place)
    method.to(trainer.device)
    name = f" ({config.model.name})" if config.model.get("name") else ""
    names = f"model={config.options.model}{name} with dataset={config.options.dataset}"
    rehearse(group, method, (dataset.channels, *dataset.image_size), names)
    if trainer.sync_batch_norm and distributed.world_size() > 1:
        group, method = map(torch.nn.SyncBatchNorm.convert_sync_batchnorm, (group, method))
    return group, method


def cli() -> None:
    """The console command: a run, a sweep or help."""
    replace_unencodable_output()
    with stop_on_signals():
        try:
            with distributed.rank_0_speaks():
                try:
                    ensure_home()
                    distributed.check_environment()
                    sys.argv[1:] = for_hydra(sys.argv[1:])
                except ConfigError as error:
                    print(error, file=sys.stderr)
                    sys.exit(1)
                if "--version" in sys.argv[1:]:
                    print(versions())
                    return
                if {"--help", "-h"} & set(sys.argv[1:]):
                    print_help(main)
                    return
                with short_errors():
                    main()
        except BaseException as error:
            finish_sweep(write_report, error)
            raise
        if not finish_sweep(write_report):
            sys.exit(1)


def write_report(*arguments: Any) -> None:
    """Print the table of a sweep's runs, and write it with its figures; see `tasks.report`."""
    from okddip.tasks.report.task import make

    make(*arguments)


if __name__ == "__main__":
    cli()
