"""The program: compose the configuration, check it, build its parts, hand them to the task.

Nothing heavy is imported before the configuration is composed, so that --help and a mistyped override answer
at once.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from okddip import distributed
from okddip.assembly import CONFIG_HOME, check_arguments, make
from okddip.checks import check
from okddip.command_line import as_typed, check_choices, check_flags, overrides_first, usage, versions
from okddip.errors import ConfigError, check_number
from okddip.home import ensure_home
from okddip.hooks import register_plugins
from okddip.signals import stop_on_signals
from okddip.sweeps.begin import NO_CHDIR
from okddip.sweeps.environment import is_job
from okddip.sweeps.finish import finish_sweep
from okddip.sweeps.job import run_job
from okddip.sweeps.joblib import choose_gpu
from okddip.text import for_terminal, replace_unencodable_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from okddip.data.dataset import Dataset
    from okddip.methods.base import Method
    from okddip.models.backbone import Backbone
    from okddip.models.group import PeerGroup
    from okddip.run.parts import Parts
    from okddip.training.schedules import Schedule
    from okddip.training.trainer import Trainer

TASKS_OF_RANKS = ("okddip.tasks.train.train", "okddip.tasks.benchmark.task.benchmark")

register_plugins()


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
    from okddip.sweeps.teacher import open_teacher
    from okddip.sweeps.teacher_checkpoint import check_teacher, describe_teacher
    from okddip.tasks.train import train
    from okddip.tracking.tracker import NoTracking
    from okddip.training.rehearsal import check_image_size, check_memory

    trainer, schedule, make_optimizer, probe, method = make_without_data(config)
    check_memory(probe, method, trainer.device, config.options.model)
    tracker = make("tracking", config.tracking) if distributed.rank() == 0 else NoTracking()
    tracker.open()
    teacher = open_teacher(config, partial(train, build=build)) if config.method.get("teacher") else None

    with distributed.local_rank_0_first():
        dataset = make("dataset", config.dataset) if make_dataset is None else make_dataset(config.dataset)
    check_image_size(probe, dataset.image_size, config.options)
    torch.manual_seed(seed_of(config.seed, 2))
    network = None if teacher is None else check_teacher(config, teacher, dataset)
    group, method = build_group(
        config, partial(make, "model", config.model), method, dataset, trainer, network
    )
    optimizer = make_optimizer([*group.parameters(), *method.parameters()])
    known = {} if teacher is None else describe_teacher(teacher)
    return Parts(trainer, tracker, dataset, group, method, optimizer, schedule, known)


def make_without_data(
    config: DictConfig,
) -> tuple[Trainer, Schedule, Callable[..., Any], Backbone, Method]:
    """The trainer, the schedule, what makes the optimizer, a network without memory, and the method.

    Raises:
        ConfigError: a value that is not allowed, with its key.
    """
    import torch

    from okddip.data.loader import seed_of
    from okddip.data.options import check_options

    for group in ("dataset", "tracking"):  # made later
        check_arguments(group, config[group])
    trainer = make("trainer", config.trainer, choose_gpu=choose_gpu)
    schedule = make("scheduler", config.scheduler, epochs=trainer.epochs)
    check_options(config.dataset)
    make_optimizer = optimizer_factory(config)
    with torch.device("meta"):
        probe = make("model", config.model, num_classes=2, in_channels=3)
    torch.manual_seed(seed_of(config.seed, 1))
    method = make(
        "method",
        config.method,
        feature_dim=probe.feature_dim,
        trunk_channels=probe.trunk_channels,
        epochs=trainer.epochs,
    )
    return trainer, schedule, make_optimizer, probe, method


def optimizer_factory(config: DictConfig) -> Callable[..., Any]:
    """What makes the optimizer of parameters.

    Raises:
        ConfigError: it takes no such options.
    """
    import torch

    make_optimizer = make("optimizer", config.optimizer)
    check_number("optimizer.lr", config.optimizer.lr, above=0)
    try:
        make_optimizer([torch.zeros(1, requires_grad=True)])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer: {error}. See conf/optimizer and the optimizer's documentation."
        ) from error
    return make_optimizer


def build_group(
    config: DictConfig,
    make_backbone: Callable[..., Backbone],
    method: Method,
    dataset: Dataset,
    trainer: Trainer,
    teacher: Backbone | None,
) -> tuple[PeerGroup, Method]:
    """The peers and the method on the trainer's device, tried on a batch of two images.

    Raises:
        Incompatible: the model cannot take the images.
    """
    import torch

    from okddip.models.group import PeerGroup
    from okddip.training.rehearsal import rehearse

    place: dict[str, Any] = {
        "device": trainer.device,
        "memory_format": torch.channels_last if trainer.channels_last else torch.contiguous_format,
    }
    group = PeerGroup(
        partial(make_backbone, num_classes=len(dataset.classes), in_channels=dataset.channels),
        peers=method.peers,
        structure=method.structure,
        rescale=method.rescale,
        teacher=None if teacher is None else teacher.to(**place),
    )
    group.to(**place)
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
                    check_flags(sys.argv[1:])
                    sys.argv[1:] = as_typed(overrides_first(sys.argv[1:]))
                    check_choices(sys.argv[1:])
                except ConfigError as error:
                    print(error, file=sys.stderr)
                    sys.exit(1)
                if "--version" in sys.argv[1:]:
                    print(versions())
                    return
                if {"--help", "-h"} & set(sys.argv[1:]):
                    print(for_terminal(usage(CONFIG_HOME, sys.argv[1:]), lines=True))
                    rest = [part for part in sys.argv[1:] if part not in ("--help", "-h")]
                    sys.argv[1:] = ["--cfg", "job", *rest]
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
