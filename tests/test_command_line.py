"""What is read of the command line before Hydra reads it."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import Answer

from okddip.command_line import as_typed, check_flags, check_words, overrides_and_flags, parsed
from okddip.errors import ConfigError
from okddip.version import __version__

Okddip = Callable[..., Answer]


def read(override: str, *others: str) -> object:
    """The value that Hydra reads in an override; of several that are swept, a list."""
    [quoted, *_] = as_typed([override, *others])
    found = parsed(quoted)
    assert found is not None
    return list(found.sweep_string_iterator()) if found.is_sweep_override() else found.value()


@pytest.mark.parametrize(
    "value",
    [
        *(
            "фото",
            "photos (1)",
            "multirun/lr=0.1,seed=1",
            "a=b",
            "a,b",
            "a,",
            "it's",
            "a#b&c!",
            "[old]",
            "{x}",
        ),
        *("2024", "1e5", "true", "choice(a,b)", "photos", "a b", "a:b", "a\\b", "x*", "$HOME", "-3", 'a"b'),
    ],
)
@pytest.mark.parametrize("key", ["checkpoint", "dataset.root", "+tracking.experiment", "hydra.run.dir"])
def test_the_value_of_a_place_or_a_name_is_what_was_typed(key: str, value: str) -> None:
    assert read(f"{key}={value}") == value


@pytest.mark.parametrize(
    "override", ["dataset.root=null", "dataset.root='a (1)'", r"checkpoint=lr\=0.1", "name=${seed}/x"]
)
def test_what_is_written_in_hydras_language_stays(override: str) -> None:
    assert as_typed([override]) == [override]


def test_a_tilde_is_the_home_of_places_alone() -> None:
    assert read("hydra.run.dir=~/my runs (1)") == str(Path.home() / "my runs (1)")
    assert read("name=~/x") == "~/x"


def test_commas_part_the_values_of_a_sweep_unless_a_path_has_them(tmp_path: Path) -> None:
    assert as_typed(["checkpoint=a,b", "-m"]) == ["checkpoint=a,b", "-m"]
    assert as_typed(["checkpoint=a,b", "--multi"])[0] == "checkpoint=a,b"
    assert as_typed([r"name='it\'s,odd'", "-m"])[0] == r"name='it\'s,odd'"
    assert as_typed(["dataset.root=glob(*)", "-m"])[0] == "dataset.root=glob(*)"
    assert (
        as_typed(["dataset.root=фото,b (1),c", "multirun_presets=methods"])[0]
        == "dataset.root='фото','b (1)',c"
    )
    (tmp_path / "lr=0.1,seed=1").mkdir()
    assert read("checkpoint=lr=0.1,seed=1", "-m") == "lr=0.1,seed=1"


def test_the_value_of_another_setting_is_shown_in_quotes() -> None:
    with pytest.raises(
        ConfigError, match=r"""source\.path=my \(1\): .*: 'source\.path='"'"'my \(1\)'"'"''$"""
    ):
        as_typed(["source.path=my (1)"])
    for fine in (
        "method.loss=kl,ce",
        "~seed",
        "scheduler.milestones=[0.5,0.75]",
        "optimizer.lr=interval(0,1)",
    ):
        assert as_typed([fine]) == [fine]


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("experiment=quickstart -m seed=0,1", "experiment=quickstart seed=0,1 -m"),
        ("-m seed=0 --config-dir mine method=mine", "seed=0 method=mine -m --config-dir mine"),
        ("--config-d mine method=mine", "method=mine --config-d mine"),
        ("-cd=mine method=mine", "method=mine -cd=mine"),
        ("--info seed=1", "seed=1 --info"),
        ("--info defaults seed=1 --cfg job", "seed=1 --info defaults --cfg job"),
    ],
)
def test_flags_may_stand_between_overrides(typed: str, read: str) -> None:
    overrides, flags = overrides_and_flags(typed.split())
    assert [*overrides, *flags] == read.split()


def test_flags_that_go_nowhere_are_refused() -> None:
    for arguments, message in (
        (["--experimental-rerun", "x"], "report.run=ID"),
        (["--resolve"], "--cfg job"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_flags(arguments)
    check_flags(["--cfg", "job", "--resolve"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--epochs 5", "trainer.epochs=5"),
        ("--lr=0.1", "optimizer.lr=0.1"),
        ("--batch-size 64 seed=1", "trainer.batch_size=64"),
        ("--num_epochs", "trainer.epochs=..."),
        ("--method okddip", "method=okddip"),
        ("--optimizer.lr 0.1", "optimizer.lr=0.1"),
        ("--seed=3", "seed=3"),
        ("-lr=0.1", "optimizer.lr=0.1"),
        ("--qqq 5", "Settings are given as KEY=VALUE"),
    ],
)
def test_a_flag_of_another_program_is_answered_with_the_override_to_type(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_flags(typed.split())
    assert meant in str(refused.value)
    check_flags(["-m", "--config-dir", "mine", "--multi", "-cd=mine", "--hydra-help", "-i"])


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("train", "leave the word out"),
        ("help", "okddip --help"),
        ("evaluate", "task=evaluate"),
        ("okdip", "method=okddip"),
        ("quickstart", "=quickstart"),
        ("mine", "method=mine"),
        ("qqqqq", "KEY=VALUE"),
        ("optimizer.lr = 0.01", "spaces around its equals sign: optimizer.lr=0.01"),
        ("optimizer.lr =0.01", "spaces around its equals sign: optimizer.lr=0.01"),
        ("optimizer.lr= 0.01", "spaces around its equals sign: optimizer.lr=0.01"),
        ("seed=1 =3", "=3: is no override"),
    ],
)
def test_a_word_that_is_no_override_is_answered_with_what_was_meant(
    typed: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "own" / "method").mkdir(parents=True)
    (tmp_path / "own" / "method" / "mine.yaml").touch()
    with pytest.raises(ConfigError) as refused:
        check_words(typed.split(), [tmp_path / "own"])
    assert message in str(refused.value)
    check_words(["~seed", "dataset.root=", "name=a = b", "+x=1"])


def test_the_versions_of_the_program_and_what_it_stands_on_are_printed(okddip: Okddip) -> None:
    lines = okddip("--version").out.splitlines()
    names = ("hydra-core", "torch", "mlflow")
    assert lines == [f"okddip {__version__}", *(f"{name} {version(name)}" for name in names)]


def test_a_command_with_a_path_and_a_flag_in_between_is_composed(okddip: Okddip) -> None:
    answer = okddip("dataset.root=photos (1), фото", "--cfg", "job", "seed=3", "--package", "dataset")
    assert "root: photos (1), фото" in answer.out, answer.err


@pytest.mark.parametrize(
    ("typed", "implied"),
    [
        (["model.peers=[a,b,c]"], ["method.structure=network", "method.peers=3"]),
        (["model.peers=[a,b]", "method.peers=4", "method.structure=branch"], []),  # refused later, by name
        (["-m", "model.peers=[a,b],[a,c]"], ["method.structure=network", "method.peers=2"]),
        (["-m", "model.peers=[a,b],[a,b,c]"], ["method.structure=network"]),
        (["model.peers=null"], []),
        (["model.peers=a"], []),
    ],
)
def test_networks_of_peers_say_how_many_there_are(typed: list[str], implied: list[str]) -> None:
    words = as_typed([word for part in overrides_and_flags(typed) for word in part])
    assert [word for word in words if word not in typed] == implied
    flags = [place for place, word in enumerate(words) if word.startswith("-")]
    assert flags in ([], [len(words) - 1])  # after a flag Hydra takes no override


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_several_teachers_are_a_list_and_no_path(sweep: list[str], tmp_path: Path) -> None:
    several = "method.teacher=[outputs/a/best.pt,runs:/12ab]"
    assert as_typed([several, *sweep])[0] == several
    Path("[a,b]").touch()
    assert as_typed(["method.teacher=[a,b]", *sweep])[0] == "method.teacher='[a,b]'"
