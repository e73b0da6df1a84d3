"""The program: compose the configuration, check it, instantiate its parts, hand them to the task.

Nothing heavy is imported before the configuration is composed, so that --help and a mistyped override answer
at once.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import get_method, get_object
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from okddip import distributed
from okddip.assembly import CONFIG_HOME, Trust, make, plain, trust_of
from okddip.errors import ConfigError, Incompatible, check_number
from okddip.signals import stop_on_signals
from okddip.sweeps import sweep
from okddip.sweeps.grid import GridSweeper
from okddip.text import composed, for_terminal, show_whatever_comes
from okddip.usage import usage

if TYPE_CHECKING:
    from okddip.data.dataset import Dataset
    from okddip.methods.base import Method
    from okddip.models.backbone import Backbone
    from okddip.models.group import PeerGroup
    from okddip.tasks.train import Parts

log = logging.getLogger(__name__)

TASKS_OF_RANKS = ("okddip.tasks.train.train", "okddip.tasks.benchmark.task.benchmark")


LEAST_ROOM = 2**16  # bytes; what Hydra writes before a run begins, and more

# Keys that the program itself reads, and that can be deleted (`~optimizer.lr`)
READ = (
    *("task", "method", "model", "dataset", "optimizer", "scheduler", "trainer", "tracking", "options"),
    *("seed", "name", "trust", "options.method", "options.model", "options.dataset", "optimizer.lr"),
    *("dataset.name", "dataset.cache_dir", "trainer.epochs", "trainer.resume", "trainer.rerun"),
)


class PresetSearchPath(SearchPathPlugin):
    """Lets Hydra find the config group `multirun_presets`, which stands beside conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("okddip", f"file://{CONFIG_HOME}")


class CheckOutputFolder(Callback):
    """Refuses an output folder that cannot be written before Hydra fails on it with a stack of frames.

    Hydra logs and ignores exceptions of callbacks; this is before any job, so leaving costs no other job.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if distributed.rank() > 0:
            write_nothing(config)
        else:
            self.check("hydra.run.dir", config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if distributed.ranks() > 1:
            print(
                "A sweep does not run under torchrun: start torchrun for each run, or give the jobs a machine"
                " each with hydra/launcher=submitit_slurm.",
                file=sys.stderr,
            )
            raise SystemExit(1)
        self.check("hydra.sweep.dir", config)

    def check(self, key: str, config: DictConfig) -> None:
        HydraConfig.instance().set_config(config)  # for ${hydra:...} in the folder's name
        try:
            folder = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            print(f"{key}: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(LEAST_ROOM))
                file.flush()
                os.fsync(file.fileno())  # some file systems find out only now that they are full
        except OSError as error:
            reason = error.strerror or str(error)
            print(
                f"{key}={folder}: the output folder cannot be written ({reason}). Name another one.",
                file=sys.stderr,
            )
            raise SystemExit(1) from None


def write_nothing(config: DictConfig) -> None:
    """Keep Hydra from making a folder and a log file on a rank that is not the first."""
    with open_dict(config), read_write(config):
        config.hydra.run.dir = "."
        config.hydra.output_subdir = None
        config.hydra.job_logging = {"version": 1, "root": {"level": "CRITICAL"}}


Plugins.instance().register(PresetSearchPath)
# Hydra takes sweepers of this name space alone, where the distribution has no folder
Plugins.instance().class_name_to_class["hydra_plugins.okddip.GridSweeper"] = GridSweeper


@hydra.main(version_base="1.3", config_path=str(CONFIG_HOME / "conf"), config_name="config")
def main(config: DictConfig) -> Any:
    """Run the task of a composed configuration; returns what the task returns (a sweeper optimizes it)."""
    show_whatever_comes()  # also in joblib's processes
    with stop_on_signals():
        if HydraConfig.get().job.chdir:
            raise ConfigError(sweep.NO_CHDIR)
        target = OmegaConf.select(config, "task._target_")
        try:
            task = partial(get_method(target), build=build)
        except Exception as error:
            raise ConfigError(f"task._target_={target}: is no function ({error}). See conf/task.") from error
        if sweep.is_job():
            return sweep.job(config, check, task)
        with distributed.process_group():
            if distributed.ranks() > 1 and target not in TASKS_OF_RANKS:
                raise ConfigError(f"{target}: this task takes one process; start it without torchrun.")
            check(config)
            return task(config)


def check(config: DictConfig) -> None:
    """Resolve the configuration, and check what no part of it checks itself.

    Raises:
        ConfigError: an interpolation leads nowhere, or a value is not allowed.
    """
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from None
    if missing := OmegaConf.missing_keys(config):
        keys = ", ".join(sorted(missing))
        raise ConfigError(f"{keys}: not given. Add {sorted(missing)[0]}=... to the command.")
    # what was written as \\${...} is one interpolation more when it is read again
    plain(OmegaConf.to_container(config), "", "configuration")
    for key in READ:
        parent, _, name = key.rpartition(".")
        section = OmegaConf.select(config, parent) if parent else config
        if not isinstance(section, DictConfig) or name not in section:
            raise ConfigError(f"{key}: is not in the configuration, and no run does without it.")
    check_ablation(config)
    if config.trainer.rerun and config.trainer.resume is not None:
        raise ConfigError(
            f"trainer.rerun=true, trainer.resume={config.trainer.resume}: the one trains anew, the other goes"
            " on. Leave one out; a sweep with trainer.rerun=true that was cut off goes on when given again."
        )
    check_number("seed", config.seed, minimum=0, integer=True)
    if not isinstance(config.name, str) or not config.name.strip():
        raise ConfigError(f"name={config.name}: must be text, the run's name.")


def check_ablation(config: DictConfig) -> None:
    """See that the method has the switches that an option of the group `ablation` sets.

    Raises:
        Incompatible: it has not.
    """
    known = HydraConfig.get()
    if (ablation := known.runtime.choices.get("ablation")) is None:
        return
    try:
        method = get_object(config.method._target_)
        makers = method.__mro__ if isinstance(method, type) else [method]
        taken = {name for maker in makers for name in inspect.signature(maker).parameters}
    except Exception:
        return  # the method cannot be made, and says so itself
    added = {key.partition("=")[0] for key in known.overrides.task if key.startswith("+")}
    strange = [key for key in config.method if key not in taken and not str(key).startswith("_")]
    if strange and f"+method.{strange[0]}" not in added:
        raise Incompatible(
            f"ablation={ablation}: sets method.{strange[0]}, which method={config.options.method} has not."
            " Choose method=okddip."
        )


def build(config: DictConfig) -> Parts:
    """Instantiate what a configuration describes.

    What can be refused is refused before any data is read.

    Raises:
        ConfigError: a value that is not allowed, with its key.
    """
    import torch

    from okddip.data.loader import seed_of
    from okddip.data.options import check_options
    from okddip.models.group import PeerGroup
    from okddip.sweeps.teacher import described
    from okddip.tasks.train import Parts
    from okddip.tracking.tracker import NoTracking
    from okddip.training.rehearsal import check_memory, rehearse

    trainer = make("trainer", config.trainer, choose_gpu=sweep.gpu_in_turn)
    schedule = make("scheduler", config.scheduler, epochs=trainer.epochs)
    check_options(config.dataset)
    make_optimizer = make("optimizer", config.optimizer)
    check_number("optimizer.lr", config.optimizer.lr, above=0)
    try:
        make_optimizer([torch.zeros(1, requires_grad=True)])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer: {error}. See conf/optimizer and the optimizer's documentation."
        ) from error
    make_backbone = partial(make, "model", config.model)
    with torch.device("meta"):
        probe = make_backbone(num_classes=2, in_channels=3)
    torch.manual_seed(seed_of(config.seed, 1))
    method = make(
        "method",
        config.method,
        feature_dim=probe.feature_dim,
        trunk_channels=probe.trunk_channels,
        epochs=trainer.epochs,
    )
    check_memory(probe, method, trainer.device, config.options.model)
    tracker = make("tracking", config.tracking) if distributed.rank() == 0 else NoTracking()
    tracker.open()
    teacher = None
    if reference := config.method.get("teacher"):
        if reference == "auto":
            from okddip.sweeps.teacher import provide

            reference = provide(config, build)
        teacher = distributed.from_rank_0(lambda: read_teacher(config, reference))

    with distributed.first_on_this_machine():
        dataset = make("dataset", config.dataset)
    if min(dataset.image_size) < probe.minimum_size:
        raise Incompatible(
            f"model={config.options.model}: takes images of at least {probe.minimum_size} pixels a side, and"
            f" those of dataset={config.options.dataset} have {'x'.join(map(str, dataset.image_size))}."
            " Choose another model, or set dataset.image_size where the data set has it."
        )
    place = {
        "device": trainer.device,
        "memory_format": torch.channels_last if trainer.channels_last else torch.contiguous_format,
    }
    torch.manual_seed(seed_of(config.seed, 2))
    group = PeerGroup(
        partial(make_backbone, num_classes=len(dataset.classes), in_channels=dataset.channels),
        peers=method.peers,
        structure=method.structure,
        rescale=method.rescale,
        teacher=None if teacher is None else check_teacher(config, teacher, dataset).to(**place),
    )
    group.to(**place)
    method.to(trainer.device)
    rehearse(
        group,
        method,
        (dataset.channels, *dataset.image_size),
        f"model={config.options.model}{f' ({name})' if (name := config.model.get('name')) else ''}"
        f" with dataset={config.options.dataset}",
    )
    if trainer.sync_batch_norm and distributed.ranks() > 1:
        group, method = map(torch.nn.SyncBatchNorm.convert_sync_batchnorm, (group, method))
    optimizer = make_optimizer([*group.parameters(), *method.parameters()])
    known = {} if teacher is None else described(teacher)
    return Parts(trainer, tracker, dataset, group, method, optimizer, schedule, known)


def restore(state: dict[str, Any], trust: Trust, source: object) -> tuple[PeerGroup, Method]:
    """The group and the method that a checkpoint holds, on the CPU.

    Args:
        state: of the checkpoint.
        trust: what its configuration may name.
        source: the checkpoint, for messages.

    Raises:
        ConfigError: its configuration names parts that are not trusted, or that its weights do not fit.
    """
    from okddip.models.group import PeerGroup
    from okddip.training import checkpoint

    trust.check(state["config"], source)
    config = OmegaConf.create(state["config"])
    make_backbone = partial(
        make, "model", config.model, num_classes=len(state["classes"]), in_channels=state["channels"]
    )
    probe = make_backbone()
    method = make(
        "method",
        config.method,
        feature_dim=probe.feature_dim,
        trunk_channels=probe.trunk_channels,
        epochs=config.trainer.epochs,
    )
    group = PeerGroup(make_backbone, method.peers, method.structure, method.rescale)
    checkpoint.restore(state, group=group, method=method)
    return group, method


def read_teacher(config: DictConfig, reference: str) -> dict[str, Any]:
    """The checkpoint of a teacher, if it names nothing but parts that may be built.

    Raises:
        ConfigError: it does, or there is no such checkpoint.
    """
    from okddip.training import checkpoint

    path = checkpoint.find("method.teacher", reference, config.tracking.get("uri"))
    state = checkpoint.load(path)
    trust_of(config).check(state["config"], path)
    checkpoint.warn_of_other_version(state, path)
    return state


def check_teacher(config: DictConfig, state: dict[str, Any], dataset: Dataset) -> Backbone:
    """The trained network of a checkpoint, if it knows the classes of the data set.

    Images of another size are warned about: the network has learned from others, and may be asked of them.

    Raises:
        ConfigError: it was trained on other classes or channels or with another normalisation, cannot take
            images so small, or cannot be restored.
    """
    for what, theirs, ours in (
        ("classes", composed(state["classes"]), composed(dataset.classes)),
        ("image channels", state["channels"], dataset.channels),
    ):
        if theirs != ours:
            raise ConfigError(
                f"method.teacher={config.method.teacher}: was trained on {what} {theirs},"
                f" and dataset={config.options.dataset} has {ours}. Name a teacher trained on this data set."
            )
    for mean, std, learned_mean, learned_std in zip(
        dataset.mean, dataset.std, state["mean"], state["std"], strict=True
    ):
        # statistics of parts of one training set differ by less
        if max(abs(mean - learned_mean), abs(std - learned_std)) > 0.1 * learned_std:
            raise Incompatible(
                f"method.teacher={config.method.teacher}: learned from images normalised by mean"
                f" {rounded(state['mean'])} and std {rounded(state['std'])}, and"
                f" dataset={config.options.dataset} normalises by {rounded(dataset.mean)} and"
                f" {rounded(dataset.std)}: it would see other images than it knows."
                " Set dataset.mean and dataset.std to the teacher's."
            )
    if list(dataset.image_size) != state["image_size"]:
        log.warning(
            "method.teacher=%s: was trained on images of %dx%d, and those of dataset=%s have %dx%d.",
            *(config.method.teacher, *state["image_size"]),
            *(config.options.dataset, *dataset.image_size),
        )
    try:
        group, method = restore(state, trust_of(config), f"method.teacher={config.method.teacher}")
    except ConfigError as error:
        raise ConfigError(f"method.teacher={config.method.teacher}: {error}") from error
    teacher = group.extract(method.kept)
    if min(dataset.image_size) < teacher.minimum_size:
        raise Incompatible(
            f"method.teacher={config.method.teacher}: takes images of at least {teacher.minimum_size} pixels"
            f" a side, and those of dataset={config.options.dataset} have"
            f" {'x'.join(map(str, dataset.image_size))}. Name a teacher trained on such images."
        )
    return teacher


def rounded(numbers: Sequence[float]) -> str:
    return f"[{','.join(f'{number:.4g}' for number in numbers)}]"


def check_choices(overrides: list[str]) -> None:
    """Refuse `group=null` and `group=[1]` by name, which in Hydra end in a stack of frames.

    Raises:
        ConfigError: names the group and what is allowed.
    """
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        if not group or not (CONFIG_HOME / "conf" / group).is_dir():
            continue
        try:
            chosen = OverridesParser.create().parse_override(override)
        except HydraException:
            continue  # Hydra says what is wrong
        if chosen.is_sweep_override():
            continue
        names = chosen.value()
        if not all(isinstance(name, str) for name in (names if isinstance(names, list) else [names])):
            raise ConfigError(f"{group}={value}: must be an option of conf/{group}, or be left out.")


def with_filter_quoted(overrides: Sequence[str]) -> list[str]:
    """Overrides in which the value of `report.where` is a string to Hydra, though it was typed as it is."""
    from okddip.tasks.report.command import as_override

    quoted = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "report.where":
            try:
                OverridesParser.create().parse_override(override)
            except HydraException:
                override = f"{key}={as_override(value)}"
        quoted.append(override)
    return quoted


def cli() -> None:
    """The console command: a run, a sweep or help."""
    show_whatever_comes()
    with stop_on_signals():
        try:
            with distributed.rank_0_speaks():
                try:
                    distributed.check_environment()
                    check_choices(sys.argv[1:])
                    if any(argument.startswith("report.where=") for argument in sys.argv[1:]):
                        sys.argv[1:] = with_filter_quoted(sys.argv[1:])
                except ConfigError as error:
                    print(error, file=sys.stderr)
                    sys.exit(1)
                if {"--help", "-h"} & set(sys.argv[1:]):
                    print(for_terminal(usage(CONFIG_HOME, sys.argv[1:]), lines=True))
                    rest = [part for part in sys.argv[1:] if part not in ("--help", "-h")]
                    sys.argv[1:] = ["--cfg", "job", *rest]
                main()
        except BaseException as error:
            sweep.end(error)
            raise
        if not sweep.end():
            sys.exit(1)


if __name__ == "__main__":
    cli()
