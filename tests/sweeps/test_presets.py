"""Presets and ablations: whole sweeps, each job of which has a name of its own."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import quick_first
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from sweep_helpers import Okddip

from okddip.assembly import CONFIG_HOME

PRESETS = sorted(path.stem for path in (CONFIG_HOME / "multirun_presets").glob("*.yaml"))


JOBS = {
    "quickstart": 10 * 2,
    "methods": 10 * 3,
    "peer_counts": 6 * 3,
    "ablations": 11 * 3,
    "temperature": 6 * 3,
    "paper_cifar10": 5 * 7 * 3,
    "paper_cifar100": 5 * 7 * 3,
    "cifar10_5k_ablations": 6 * 3,
    "cifar10_5k_cost": 2 * 2 * 2 * 3,
    "cifar10_short": 10 * 3,
    "cifar10_5k": 10 * 3,
    "ablations_pcl": 6 * 3,
    "ablations_ffl": 5 * 3,
    "targets_kdcl": 3 * 3,
    "pcl_cifar10": 5 * 7 * 3,
    "pcl_cifar100": 5 * 7 * 3,
}


ABLATIONS = sorted(path.stem for path in (CONFIG_HOME / "conf" / "ablation").glob("*.yaml"))
NOT_OF_OKDDIP = {
    **dict.fromkeys(("no_ensemble", "no_mean_teacher", "shared_views"), "pcl"),
    **dict.fromkeys(("no_fusion_to_peers", "no_ensemble_to_fusion"), "ffl"),
}


def jobs_of(preset: str, *overrides: str) -> list[list[str]]:
    """The jobs of a preset with overrides, split as Hydra does it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_HOME / "conf"), version_base="1.3"):
        config = compose("config", [f"multirun_presets={preset}"], return_hydra_config=True)
    assert config.hydra.mode.name == "MULTIRUN"
    lines = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
    parsed = OverridesParser.create().parse_overrides([*lines, *overrides])
    return BasicSweeper.split_arguments(parsed, None)[0]


@pytest.mark.parametrize("preset", quick_first(*sorted(PRESETS, key="quickstart".__ne__)))
def test_a_preset_is_a_whole_sweep_whose_jobs_have_names_of_their_own(
    configured: Callable[..., DictConfig], preset: str
) -> None:
    split = jobs_of(preset)
    assert len(split) == JOBS[preset]
    names = set()
    for job in split[:30]:
        config = configured(f"multirun_presets={preset}", *job)
        names.add(config.name)
        if config.options.method == "kd":
            assert config.method.teacher == "auto"
    assert len(names) == min(len(split), 30)


def test_what_the_command_line_says_replaces_what_a_preset_says() -> None:
    jobs = jobs_of("methods", "seed=7", "method=okddip,one", "model=resnet20")
    assert sorted(jobs) == [
        ["method=okddip", "seed=7", "model=resnet20"],
        ["method=one", "seed=7", "model=resnet20"],
    ]


@pytest.mark.parametrize("option", [option for option in ABLATIONS if option != "full"])
def test_an_ablation_changes_one_setting_of_its_method(
    configured: Callable[..., DictConfig], option: str
) -> None:
    def method(*overrides: str) -> dict[str, Any]:
        config = configured(f"method={NOT_OF_OKDDIP.get(option, 'okddip')}", *overrides)
        resolved = OmegaConf.to_container(config.method, resolve=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    full, ablated = method("ablation=full"), method(f"ablation={option}")
    assert full == method()
    assert len([key for key in full if full[key] != ablated[key]]) == 1
    assert full.keys() == ablated.keys()


def test_help_shows_groups_once_and_sweeps_with_a_line_each(okddip: Okddip) -> None:
    answer = okddip("--help", "method=one", "seed=5")
    assert answer.code == 0
    assert "  tracking   mlflow none" in answer.out
    assert re.search(r"^  quickstart +All methods, two seeds", answer.out, flags=re.MULTILINE)
    assert "conf/" not in answer.out
    assert "seed: 5" in answer.out
    for preset in PRESETS:
        [line] = [line for line in answer.out.splitlines() if line.startswith(f"  {preset} ")]
        assert len(line) <= 120
