"""What `okddip --help` says of the settings."""

from pathlib import Path

from omegaconf import OmegaConf

from okddip.api import compose
from okddip.assembly import CONFIG_HOME
from okddip.help import with_comments


def line_of(key: str, text: str) -> str:
    """The only line that sets this key."""
    [line] = [line for line in text.splitlines() if line.strip().startswith(f"{key}:")]
    return line


def test_help_shows_the_comments_of_the_option_files_in_use() -> None:
    printed = OmegaConf.to_yaml(
        compose(
            ["method=kd", "methods.teacher=x.pt", "dataset=image_folder", "dataset.root=x", "task=benchmark"]
        )
    )
    text = with_comments(printed, CONFIG_HOME)
    assert OmegaConf.create(text) == OmegaConf.create(printed)  # comments alone were added
    assert line_of("repeats", text).endswith(
        "# timed samples of each measurement, of which the median is reported"
    )
    assert line_of("channels_last", text).endswith("# memory format of images and weights")
    assert "a baseline of teacher_model on the same data set and seed, trained first" in line_of(
        "teacher", text.partition("\nmethod:\n")[2]
    )  # a comment of several lines
    assert "processes that decode" not in text  # dataset=imagenet
    assert "auxiliary peers and the group leader" not in text  # method=okddip


def test_help_shows_the_comments_of_options_of_ones_own(tmp_path: Path) -> None:
    option = tmp_path / "options" / "method" / "mine.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("# Mine\n_target_: mine.Mine\nwarmth: 3  # in kelvin\n")
    printed = "method:\n  _target_: mine.Mine\n  warmth: 5\n"
    text = with_comments(printed, CONFIG_HOME, ["--config-dir", str(option.parent.parent)])
    assert line_of("warmth", text).endswith("# in kelvin")
