"""Whether a run that is to be resumed is the run that the command describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from okddip.assembly import backbone_factories, make
from okddip.data.dataset import Dataset
from okddip.errors import ConfigError
from okddip.models.backbone import dimensions_of
from okddip.run.folder import Run
from okddip.run.identity import identifying_settings
from okddip.text import listed

LENGTH = "trainer.epochs"  # the one setting that may differ: a run can be lengthened


def check_is_last(reference: str, name: str) -> None:
    """Refuse to resume from another checkpoint of a run than its last.

    Raises:
        ConfigError: says what to give instead.
    """
    if name != "last.pt":
        run = reference.rpartition("/")[0] or "."
        raise ConfigError(
            f"trainer.resume={reference}: a run is resumed from its last epoch, and {name} is of another."
            f" Give trainer.resume={run} to resume the run. To train on from this epoch in a new run, copy"
            " the file to another folder and name the copy."
        )


def check_same_settings(config: DictConfig, state: dict[str, Any], place: Path) -> None:
    """Refuse to resume under other settings than the checkpoint's. A longer run is allowed.

    Raises:
        ConfigError: lists what differs.
    """
    theirs, ours = identifying_settings(state["config"]), identifying_settings(config)
    differences = [
        f"  {key}: {theirs.get(key, 'absent')} there, {ours.get(key, 'absent')} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
        and not (key == LENGTH and theirs.get(key, "").isdecimal() and int(ours[key]) > int(theirs[key]))
    ]
    if differences:
        raise ConfigError(
            f"trainer.resume={config.trainer.resume}: {place} was made with other settings, so resuming it"
            " would mix two runs:\n"
            + "\n".join(differences)
            + "\nGive the same settings (trainer.epochs may grow), or begin a new run without trainer.resume."
        )
    check_same_schedule(config, state, place)


def check_same_schedule(config: DictConfig, state: dict[str, Any], place: Path) -> None:
    """Refuse to lengthen a run whose finished epochs depend on its length.

    They do where learning rate or ramp depend on it: cosine, and fractions of the run.

    Raises:
        ConfigError: says what depends on the length.
    """
    if state.get("lengths"):  # of a version that lengthened such runs all the same
        raise ConfigError(
            f"{place}: okddip {state['version']} lengthened this run, although its learning rate or ramp"
            " depend on its length. It can be evaluated and exported, but not resumed; begin a new run"
            " without trainer.resume."
        )
    before, now = int(state["config"]["trainer"]["epochs"]), int(config.trainer.epochs)
    if before == now:
        return
    finished = range(state["epoch"] + 1)
    rates, weights = zip(*(schedules(config, epochs) for epochs in (before, now)), strict=True)
    causes = {
        "learning rate": any(rates[0](epoch) != rates[1](epoch) for epoch in finished),
        "ramp": any(weights[0](epoch) != weights[1](epoch) for epoch in finished),
    }
    if any(causes.values()):
        what = " and ".join(name for name, differs in causes.items() if differs)
        raise ConfigError(
            f"trainer.epochs={now}: {place} was begun with trainer.epochs={before}, which sets its"
            f" {what}, so its finished epochs are not those of a run of {now}. Begin a new run without"
            " trainer.resume; with scheduler.milestones, scheduler.warmup_epochs and method.ramp_epochs in"
            " epochs instead of fractions it can be lengthened later."
        )


def schedules(config: DictConfig, epochs: int) -> tuple[Any, Any]:
    """Learning rate and ramp by epoch, as they would be in a run of so many epochs."""
    with torch.device("meta"):
        probes = [make_one() for make_one in backbone_factories(config.model, num_classes=2, in_channels=3)]
    method = make("method", config.method, **dimensions_of(probes), epochs=epochs)
    return make("scheduler", config.scheduler, epochs=epochs), method.ramp


def check_same_data(run: Run, dataset: Dataset, digests: Mapping[str, str]) -> None:
    """Refuse to resume with other images than those that the checkpoint has learned from.

    Args:
        run: may be a new one.
        dataset: of the configuration.
        digests: of its splits.

    Raises:
        ConfigError: names what differs.
    """
    if run.state is None:
        return
    theirs = {"classes": run.state["classes"], **run.state.get("digests", digests)}
    ours = {"classes": list(dataset.classes), **digests}
    if different := [name for name in ours if theirs.get(name) != ours[name]]:
        root = run.state["config"]["dataset"].get("root")
        raise ConfigError(
            f"{run.folder.path}: this run was trained on other data ({', '.join(different)} differ; its"
            f" dataset.root is {root}, with classes {listed(theirs['classes'], 5)}; here they are"
            f" {listed(ours['classes'], 5)}), so resuming it would mix two runs. Name the data set that it"
            " was begun with, or begin a new run: leave trainer.resume out."
        )


def same_but_for_length(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two checkpoints have the same settings, apart from the length of their run."""
    first, second = (identifying_settings(state["config"]) | {LENGTH: ""} for state in (one, other))
    return first == second
