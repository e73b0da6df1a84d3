"""The task `report`, and what the end of a sweep calls."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING
from urllib.parse import quote

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from okddip.errors import ConfigError
from okddip.tasks.report import figures, reproduce, runs, tables
from okddip.tasks.report.compare import SCORES, Comparison, compare
from okddip.text import for_markdown, for_terminal
from okddip.tracking.params import MAX_TAG_LENGTH
from okddip.tracking.store import open_store
from okddip.trust import trust_of

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from okddip.run.parts import Parts

NOTE = "mlflow.note.content"  # the tag that MLflow shows as a run's description, in Markdown
HEADING = "### Report"


def report(config: DictConfig, build: Callable[[DictConfig], "Parts"]) -> None:
    """Print the table of the runs that `report.sweep` and `report.where` choose; write it and its figures.

    Args:
        config: resolved; `tracking` says where the runs are.
        build: of other tasks; nothing is instantiated here.

    Raises:
        ConfigError: the store does not answer, no finished run matches, or the filter is not understood.
    """
    asked = config.report
    uri = config.tracking.get("uri")
    if uri is None:
        raise ConfigError(
            "task=report: reads runs from an MLflow store; set tracking=mlflow and tracking.uri."
        )
    client = open_store(uri)
    if asked.run is not None:
        print(reproduce.reproducing_command(client, str(asked.run), trust_of(config)))
        return
    found = runs.find_runs(client, uri, config.tracking.experiment, asked.sweep, asked.where)
    folder = Path(asked.out or Path(HydraConfig.get().runtime.output_dir) / "report").expanduser()
    make(client, found, folder)


def make(
    client: "MlflowClient", found: Sequence["Run"], folder: Path, parent_run_id: str | None = None
) -> Path:
    """Print the table of runs; write tables (text, Markdown, LaTeX, CSV) and figures (PNG, PDF) to a folder.

    Args:
        client: of the store that holds the runs.
        found: any runs; the parents of sweeps are passed over, unfinished runs are left out and counted.
        folder: created if absent.
        parent_run_id: a run that gets the folder's files as artifacts, in `report/`, and in its description.

    Returns:
        `folder`.

    Raises:
        ConfigError: none of the runs is a finished training run, or the folder cannot be written.
    """
    chosen, left_out = runs.finished_runs(found)
    if not chosen:
        raise ConfigError(f"There is no finished run to report on among {len(found)}. {left_out}".rstrip())
    comparisons = compare(chosen)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tables.write_tables(comparisons, left_out, folder)
        # whatever becomes of figures, and in one piece for `okddip task=report | head`
        table = (folder / "table.txt").read_text(encoding="utf-8")
        print(f"{table}\nTables and figures: {for_terminal(folder)}", flush=True)
        figures.write_figures(client, comparisons, folder)
    except OSError as error:
        raise ConfigError(
            f"report.out={folder}: the report cannot be written ({error.strerror}). Name another folder."
        ) from error
    if parent_run_id is not None:
        client.log_artifacts(parent_run_id, str(folder), "report")
        update_description(client, parent_run_id, folder)
        log_best_setting(client, parent_run_id, comparisons)
    return folder


def log_best_setting(client: "MlflowClient", run_id: str, comparisons: Sequence[Comparison]) -> None:
    """Log as a tag which setting of a sweep is best after the last epoch, and its mean accuracies as metrics.

    It is best on images held out of training where all runs have them, else on the test images. The metrics
    are named as those of its runs, so that one column of MLflow's table has both.
    """
    groups = [(group, comparison) for comparison in comparisons for group in comparison.groups]
    held_out = all("val/top1" in run.data.metrics for group, _ in groups for run in group.runs)
    judge = "val/top1" if held_out else "final/top1"
    best, comparison = max(groups, key=lambda each: fmean(run.data.metrics[judge] for run in each[0].runs))
    words = [comparison.label(best)]
    if len({group.settings["model"] for group, _ in groups}) > 1:
        words.append(best.settings["model"])
    if len(comparisons) > 1:
        words.append(comparison.dataset)
    client.set_tag(run_id, "best.setting", " on ".join(words)[:MAX_TAG_LENGTH])
    for score, metric in SCORES.items():
        client.log_metric(run_id, metric, best.scores[score].mean(), step=0)


def update_description(client: "MlflowClient", run_id: str, folder: Path) -> None:
    """Show the report that a run has as artifacts in its description too, below what stands there."""
    note = client.get_run(run_id).data.tags.get(NOTE, "").partition(HEADING)[0]
    table = (folder / "table.md").read_text(encoding="utf-8")
    figures = [
        f"![{for_markdown(path.stem)}](get-artifact?path=report/{quote(path.name)}&run_uuid={run_id})"
        for path in sorted(
            folder.glob("*.png"), key=lambda path: (not path.name.startswith("headline"), path)
        )
    ]
    for parts in (
        [table, *figures],
        [table],
        ["Too long to stand here: `report/table.md` of the artifacts."],
    ):
        text = "\n\n".join([f"{note.rstrip()}\n\n{HEADING}".lstrip(), *parts])
        if len(text) <= MAX_TAG_LENGTH:
            break
    client.set_tag(run_id, NOTE, text)
