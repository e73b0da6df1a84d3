"""Checks of a composed configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer, quick_first
from hydra.conf import ConfigSourceInfo
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict

import okddip
from okddip.api import overrides_of
from okddip.assembly import make
from okddip.checks import check
from okddip.errors import ConfigError
from okddip.hooks import register_plugins
from okddip.keys import check_keys, missing_option

Configured = Callable[..., DictConfig]
Okddip = Callable[..., Answer]
REFUSED = ("--config-dir", "own", "experiment=mine", "tracking=none")


@pytest.mark.parametrize("task", ["train", "evaluate", "export", "benchmark", "report"])
def test_the_programs_own_keys_are_known(configured: Configured, task: str) -> None:
    given = [] if task in ("train", "benchmark", "report") else ["checkpoint=x"]
    check(configured(f"task={task}", *given))


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
    ("typed", "meant"),
    [
        (["lr=0.1"], "Did you mean optimizer.lr=0.1?"),
        (["epochs=5"], "Did you mean trainer.epochs=5?"),
        (["peers=3", "seed=1"], "Did you mean method.peers=3?"),
        (["trainer.epoch=3"], "Did you mean trainer.epochs=3?"),
        (["method=baseline", "method.struct=branch"], "Did you mean method.structure=branch?"),
        (["optimizer=adamw", "optimizer.amsgrad=true"], "AdamW takes it: +optimizer.amsgrad=true"),
        (["nothing.alike=1"], "okddip --help"),
        (["~lr"], "~lr: "),
        (["first=1", "epochs=5"], "epochs=5"),
        (["method=okdip"], "method=okdip: there is no such option. Did you mean method=okddip?"),
        (["+experiment=quickstrat"], "Did you mean experiment=quickstart?"),
    ],
)
def test_hydra_answers_a_mistyped_key_or_option_with_the_one_that_is_meant(
    configured: Configured, typed: list[str], meant: str
) -> None:
    register_plugins()
    with pytest.raises(ConfigError) as refused:
        configured(*typed)
    assert meant in str(refused.value)
    assert "To append" not in str(refused.value)


@pytest.mark.parametrize(
    "swept", quick_first("+lr=0.1,0.2", "lr=0.1,0.2", "hydra.sweeper.params={+lr:'0.1,0.2'}")
)
def test_a_sweep_over_a_key_that_nothing_reads_is_refused_before_its_first_job(
    okddip: Okddip, swept: str
) -> None:
    answer = okddip("-m", swept, "tracking=none")
    assert answer.code == 1
    assert "Did you mean optimizer.lr" in answer.err
    assert "no jobs" in answer.out


@pytest.mark.parametrize("added", ["+lr=0.5", "++lr=0.5"])
def test_a_key_that_the_command_adds_is_refused_where_nothing_reads_it(
    configured: Configured, added: str
) -> None:
    with pytest.raises(ConfigError, match=r"lr: is not a setting.* Did you mean optimizer\.lr\?"):
        check(configured(added))
    for reader in ("optimizer.lr=${lr}", "hydra.run.dir=outputs/${lr}", "task._target_=mine.train"):
        config = configured(added, reader)
        check_keys(config, HydraConfig.get())


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.peers=[resnet8,resnt20]"],
            "[resnet8,resnt20]: resnt20 is no option of conf/model. Did you mean resnet20",
        ),
        (["model.peers=[resnet8]"], "model.peers=[resnet8]: must be a list of two or more"),
        (["model.peers=resnet8"], "model.peers=resnet8: must be a list of two or more"),
        (
            ["model.peers=[resnet8,resnet20]", "method.peers=4"],
            "method.peers=4: model.peers=[resnet8,resnet20] names 2",
        ),
        (
            ["model.peers=[resnet8,resnet20]", "method.structure=branch"],
            "method.structure=branch: networks of different",
        ),
        (
            ["model.peers=[resnet8,resnet20]", "model.depth=14"],
            "model.depth=14: is not read beside model.peers",
        ),
        (
            ["model.peers=[resnet8,resnet20]", "model=resnet8"],
            "model=resnet8: is not read beside model.peers",
        ),
        (["model.peers=[resnet8,resnet20]", "method=one"], "method=one: its peers share a trunk"),
        (["model.peers=[resnet8,resnet20]", "method=baseline"], "method=baseline: trains 1 network"),
        (
            ["model.peers=[resnet8,wrn20_8]", "method=ffl"],
            "maps of all peers, and those of these networks have different",
        ),
    ],
)
def test_what_contradicts_the_networks_of_peers_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        okddip.compose(["method=dml", "tracking=none", *overrides])
    assert message in str(refused.value)


def test_settings_of_a_model_in_an_experiment_are_refused_beside_networks_of_peers(
    okddip: Okddip, tmp_path: Path
) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    mine = tmp_path / "own" / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\nmodel:\n  depth: 14\n  peers: [resnet8, resnet20]\n")
    answer = okddip(*REFUSED, "method=dml")
    assert answer.code == 1
    assert "model.depth=14: is not read beside model.peers=[resnet8,resnet20]" in answer.err


def test_networks_of_peers_settle_how_many_there_are_and_what_they_share() -> None:
    config = okddip.compose(["method=okddip", "model.peers=[resnet8,resnet8,resnet20]"])
    assert (config.method.peers, config.method.structure) == (3, "network")
    assert config.name == "okddip3-seed0-network-2xresnet8+resnet20-cifar10"
    config.model.peers = ["resnet8", "resnet14", "resnet20"]
    assert config.options.model == "resnet8+resnet14+resnet20"


@pytest.mark.slow
def test_a_configuration_with_networks_of_its_own_composes_to_itself() -> None:
    config = okddip.compose(["method=okddip", "model.peers=[resnet8,resnet8,resnet20]", "seed=3"])
    stored = OmegaConf.to_container(config, resolve=True)
    assert isinstance(stored, dict)
    del stored["command"]  # of a run in a store, say
    again = okddip.compose(overrides_of(stored))  # type: ignore[arg-type]
    assert (again.model.peers, again.name) == (stored["model"]["peers"], stored["name"])
    config.model.peers = ["resnet8", "resnet14", "resnet20"]
    again = okddip.compose(overrides_of(config))
    assert again.model.peers == ["resnet8", "resnet14", "resnet20"]
    assert again.name == "okddip3-seed3-network-resnet8+resnet14+resnet20-cifar10"


def test_a_reference_to_nothing_is_refused_beside_a_key_that_the_command_adds(configured: Configured) -> None:
    with pytest.raises(ConfigError, match="NOBODY"):
        check(configured("dataset=digits", "trainer.device=${oc.env:NOBODY}", "+method.foo=1"))


@pytest.mark.parametrize(
    ("group", "option"),
    [("hydra/launcher", "joblib"), ("hydra/launcher", "submitit_slurm"), ("hydra/sweeper", "optuna")],
)
def test_an_option_of_an_extra_that_is_not_installed_says_what_to_install(group: str, option: str) -> None:
    error = MissingConfigException("", f"{group}/{option}", ["basic", "grid"])
    said = missing_option(error, [f"{group}={option}"])
    assert str(said).startswith(f"{group}={option}: needs packages of the extra `sweep`.")
    assert "pip install '.[sweep]'" in str(said)
