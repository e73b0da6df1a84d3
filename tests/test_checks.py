"""Checks of a composed configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer
from hydra.conf import ConfigSourceInfo
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from okddip.assembly import make
from okddip.checks import check
from okddip.errors import ConfigError

Configured = Callable[..., DictConfig]
Okddip = Callable[..., Answer]
REFUSED = ("--config-dir", "own", "experiment=mine", "tracking=none")


@pytest.mark.parametrize("task", ["train", "evaluate", "export", "benchmark", "report"])
def test_the_programs_own_keys_are_known(configured: Configured, task: str) -> None:
    given = [] if task in ("train", "benchmark", "report") else ["checkpoint=x"]
    check(configured(f"task={task}", *given, "+mine.of_the_command.line=1"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimiser": {"lr": 0.2}}, "optimiser: is not a setting.*Did you mean optimizer?"),
        ({"epochs": 3}, "epochs: is not a setting.*Did you mean trainer.epochs?"),
        ({"methods": {"temprature": 4}}, "methods.temprature: .*Did you mean method.temperature?"),
        ({"methods": {"ramp_epoch": 4}}, "methods.ramp_epoch: .*Did you mean methods.ramp_epochs?"),
        ({"report": {"were": "x"}}, "report.were: .*Did you mean report.where?"),
        ({"task": {"out": "x"}}, "task.out: .*Did you mean "),
        ({"options": {"modell": "x"}}, "options.modell: .*Did you mean options.model?"),
        ({"quite": {"another": 1}}, r"quite: .*reads by \$\{quite\}"),
        ({"experiment": {"seed": 1}}, "experiment=None: .*begin with the line `# @package _global_`"),
        ({"ablation": {"seed": 1}}, "ablation=None: "),
    ],
)
def test_a_key_that_nothing_reads_is_refused_with_the_one_that_is_meant(
    configured: Configured, content: dict[str, object], message: str
) -> None:
    config = configured("task=report")
    with open_dict(config):
        config.merge_with(content)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        check(config)


def test_a_key_of_ones_own_is_one_that_an_option_file_reads(configured: Configured, tmp_path: Path) -> None:
    config = configured()
    with open_dict(config):
        config.merge_with({"my": {"rate": 0.2}, "optimizer": {"lr": "${my.rate}"}, "methods": {"width": 3}})
    folder = tmp_path / "own" / "method"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("width: ${methods.width}\n")
    with pytest.raises(ConfigError, match=r"methods\.width"):
        check(config)
    check(configured("+scheduler@mine=cosine"))
    # another method of the sweep reads it
    sources = HydraConfig.get().runtime.config_sources
    OmegaConf.set_readonly(sources, False)
    sources.append(ConfigSourceInfo(str(tmp_path / "own"), "file", "command-line"))
    check(config)


@pytest.mark.parametrize(
    ("group", "wrong", "meant"),
    [
        ("trainer", "epoch", "epochs"),
        ("scheduler", "milestone", "milestones"),
        ("method", "temprature", "temperature"),
    ],
)
def test_a_part_names_the_option_that_is_meant(
    configured: Configured, group: str, wrong: str, meant: str
) -> None:
    node = configured("dataset=digits")[group]
    with open_dict(node):
        node[wrong] = 3
    given = {"method": {"feature_dim": 8, "trunk_channels": 8, "epochs": 3}, "scheduler": {"epochs": 3}}
    with pytest.raises(
        ConfigError, match=rf"{group}\.{wrong}: is no option of .* Did you mean {group}\.{meant}\?"
    ):
        make(group, node, **given.get(group, {}))


@pytest.mark.parametrize("before", ["", "\ufeff# @package _global_\n", "# Mine\n# @package _global_\n"])
def test_an_experiment_that_would_be_ignored_is_refused(okddip: Okddip, tmp_path: Path, before: str) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(f"{before}seed: 1\n")
    answer = okddip(*REFUSED)
    assert answer.code == 1
    assert "experiment=mine: its settings would stand under `experiment`" in answer.err
