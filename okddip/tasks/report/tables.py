"""Comparisons as plain text, Markdown, LaTeX and CSV."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from okddip.tasks.report.compare import SCORES, Comparison, Group
from okddip.tasks.report.costs import cost_of
from okddip.tasks.report.intervals import FEWEST_SEEDS, Difference
from okddip.tasks.report.measured import run_row
from okddip.tasks.report.published import LIMIT, source_text
from okddip.tasks.report.runs import device, different_peers
from okddip.text import MINUS, for_csv, for_latex, for_markdown, for_terminal

NUMERIC = ("n", "peers")
BOLD = {"last epoch": "last", "best epoch": "best", "ensemble": "ensemble"}  # columns with their scores
MEASURED = "measured with this program"
REFERENCES = {
    "baseline": "the baseline with the same model, data set and training settings, after the last epoch.",
    "default": (
        "the same method with the settings of its option file, or of most runs where none has those, after"
        " the last epoch."
    ),
}


def write_tables(comparisons: Sequence[Comparison], left_out: str, folder: Path) -> None:
    """Write `table.txt`, `table.md`, `table.tex`, `table.csv`, and `runs.csv` with a line for each run."""
    tables = [(comparison, displayed_table(comparison), footer(comparison)) for comparison in comparisons]
    remarks = [left_out] if left_out else []
    if len(comparisons) > 1:
        names = ", ".join(comparison.dataset for comparison in comparisons)
        remarks.append(f"Results on different data sets cannot be compared: a table for each of {names}.")

    paragraphs = [
        f"{for_terminal(title(c))}\n\n{text_table(table)}\n\n" + "\n".join(map(for_terminal, below))
        for c, table, below in tables
    ]
    (folder / "table.txt").write_text(
        "\n\n".join([*paragraphs, *map(for_terminal, remarks)]) + "\n", encoding="utf-8"
    )
    paragraphs = [
        f"**{for_markdown(title(c))}**\n\n{markdown_table(table, bold_cells(c))}\n\n"
        + "\n".join(f"- {for_markdown(line)}" for line in [*below, *what_bold_is(c)])
        for c, table, below in tables
    ]
    (folder / "table.md").write_text(
        "\n\n".join([*paragraphs, *map(for_markdown, remarks)]) + "\n", encoding="utf-8"
    )
    blocks = []
    for number, (c, table, below) in enumerate(tables, 1):
        narrower, footnotes = with_footnotes(c, table)
        below = [*below, *what_bold_is(c), *footnotes, *(remarks if number == len(tables) else [])]
        blocks.append(latex_table(narrower, bold_cells(c), title(c), below))
    (folder / "table.tex").write_text(
        "\n".join(["% \\usepackage{booktabs,graphicx} in the preamble", *blocks]), encoding="utf-8"
    )
    every = [(comparison, group) for comparison in comparisons for group in comparison.groups]
    write_csv([{"dataset": c.dataset, **full_precision(group)} for c, group in every], folder / "table.csv")
    lines = [row for c, group in every for row in rows_of_runs(c, group)]
    write_csv(lines, folder / "runs.csv")


def write_csv(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    pd.DataFrame(rows).map(for_csv).rename(columns=for_csv).to_csv(path, index=False, encoding="utf-8")


def title(comparison: Comparison) -> str:
    common = comparison.common
    words = [comparison.dataset]
    if common.get("train_size", "null") != "null":
        words[0] += f" ({common['train_size']} training images)"
    if "model" in common:
        words.append(common["model"])
    if common.get("peers", "1") != "1":
        words.append(f"{common['peers']} peers")
    if "epochs" in common:
        words.append("1 epoch" if common["epochs"] == "1" else f"{common['epochs']} epochs")
    return f"Test top-1 (%) on {', '.join(words)}: mean ± standard deviation over seeds"


def displayed_table(comparison: Comparison) -> pd.DataFrame:
    """The table as it is read: a row a group, all cells text."""
    displayed = {column: comparison.displayed_values(column) for column in comparison.columns}
    rows = [
        {
            **{column: displayed[column][value] for column, value in group.values.items()},
            "predictor": group.predictor,
            "n": str(len(group.runs)),
            "last epoch": mean_and_std(group.scores["last"]),
            "best epoch": mean_and_std(group.scores["best"]),
            "ensemble": mean_and_std(group.scores["ensemble"]),
            f"last {MINUS} {comparison.reference}": difference_with_interval(group.differences.get("last")),
            "training": group.cost.training,
            "kept": group.cost.inference,
            "published": ", ".join(map(str, group.published)),
            MEASURED: str(group.measured or ""),
        }
        for group in comparison.groups
    ]
    table = pd.DataFrame(rows)
    optional = ["predictor", "ensemble", f"last {MINUS} {comparison.reference}", "training", "kept"]
    return table.drop(columns=[name for name in (*optional, "published", MEASURED) if not table[name].any()])


def mean_and_std(scores: pd.Series) -> str:
    if scores.isna().any():
        return ""
    return f"{scores.mean():.2f}" + (f" ± {scores.std():.2f}" if len(scores) > 1 else "")


def difference_with_interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    how = {0: "unpaired", 1: "1 pair"}.get(difference.pairs, f"{difference.pairs} pairs")
    interval = ""
    if difference.has_interval:
        interval = f"[{signed(difference.low)}, {signed(difference.high)}]"
    elif difference.seeds < FEWEST_SEEDS:
        interval = f"[fewer than {FEWEST_SEEDS} seeds]"
    return " ".join(filter(None, (signed(difference.mean), interval, how)))


def signed(number: float) -> str:
    return f"{number:+.2f}".replace("-", MINUS)


def bold_cells(comparison: Comparison) -> dict[str, list[bool]]:
    """Which entries of which columns stand out."""
    return {column: comparison.best(scores) for column, scores in BOLD.items()}


def what_bold_is(comparison: Comparison) -> list[str]:
    if not any(map(any, bold_cells(comparison).values())):
        return []
    return [
        "Bold: the highest mean, and those within its 95% interval by Student's t, among rows with the same"
        " model, training images and epochs."
    ]


def footer(comparison: Comparison) -> list[str]:
    """What a reader must know about the columns, and the sources of published figures."""
    lines = []
    on_test = "chosen on the test set itself, so an optimistic figure"
    held_out = "chosen by images held out of the training set"
    judged = {
        "none": on_test,
        "all": held_out,
        "some": f"where validation is 0, {on_test}; elsewhere {held_out}",
    }
    lines.append(f"best epoch: {judged[comparison.held_out]}.")
    if any(group.predictor for group in comparison.groups):
        lines.append(
            "predictor: whose accuracy last and best epoch are; ensemble: the mean logits of the peers (of"
            " OKDDip the auxiliary ones) after the last epoch, which takes all of them to compute."
        )
    if any(group.settings.get(LIMIT, "null") != "null" for group in comparison.groups):
        lines.append(
            f"Where {LIMIT} is set, accuracies are of the first test images at most, which in a folder of"
            " images are those of its first classes."
        )
    lines += costs_explained(comparison)
    differences = [group.differences["last"] for group in comparison.groups if group.differences]
    if differences:
        lines.append(f"last {MINUS} {comparison.reference}: difference to {REFERENCES[comparison.reference]}")
        if any(difference.has_interval for difference in differences):
            lines.append(
                "In brackets its 95% interval by Student's t, over pairs of runs with the same seed"
                " (unpaired: Welch's, where fewer than two seeds are in both)."
            )
        elif any(difference.pairs for difference in differences):
            lines.append("Pairs are runs with the same seed.")
        if not all(difference.has_interval for difference in differences):
            lines.append(
                f"Where there is no 95% interval, it would take {FEWEST_SEEDS} seeds of each, and differences"
                " that vary."
            )
    if "teacher" in comparison.columns:
        lines.append("teacher: its model, with a word for its settings and images (the runs' tag `teacher`).")
    if comparison.named:
        lines.append(", ".join(f"{name}: {text}" for name, text in comparison.named.items()) + ".")
    lines += [line for group in comparison.groups if (line := peers_line(comparison, group))]
    if comparison.repeated:
        lines.append(
            f"Repeated runs, left out: {comparison.repeated}; of runs with the same settings and seed the"
            " newest counts."
        )
    published = [figure for group in comparison.groups for figure in group.published]
    if any(figure.marks for figure in published):
        lines.append("*: not the same setting; in brackets what is otherwise there.")
    if published:
        lines.append(
            "Published figures come from their authors' training settings, which may differ from the runs'"
            " in more than is marked."
        )
    lines += [f"[{source}] {source_text(source)}." for source in dict.fromkeys(f.source for f in published)]
    for group in comparison.groups:
        if group.measured:
            lines.append(
                f"{MEASURED}: its authors' runs with the same settings and images, {group.measured.source};"
                " device and precision may differ."
            )
    return list(dict.fromkeys(lines))


def costs_explained(comparison: Comparison) -> list[str]:
    """What the columns on costs say, and what they leave out."""
    costs = [group.cost for group in comparison.groups]
    lines = []
    if any(cost.training for cost in costs):
        devices = sorted({device(run) for group in comparison.groups for run in group.runs} - {""})
        where = f" (on {', '.join(devices)}, shared with whatever else ran there)" if devices else ""
        lines.append(
            "training: parameters of all peers and of what the method learns, and images/s in the last"
            f" epoch{where}."
        )
        if any(group.method == "kd" for group in comparison.groups):
            lines[-1] += " Of kd without what the teacher's own training took."
    if any(cost.inference for cost in costs):
        lines.append(
            "kept: parameters of the network or ensemble that has the accuracy, and its operations for one"
            " image (a multiplication and an addition are two)."
        )
    return lines


def peers_line(comparison: Comparison, group: Group) -> str:
    """Where peers differ, what each is, how many parameters it has and its accuracy; else nothing."""
    words = []
    for peer in different_peers(group.runs[0]):
        scores = pd.Series(
            [run.data.metrics.get(f"test/{peer.predictor}/top1", math.nan) for run in group.runs]
        )
        words.append(f"{peer.name}, {peer.parameters} parameters, {mean_and_std(scores)}")
    if not words:
        return ""
    return (
        f"{comparison.label(group)} of {group.settings['model']}, after the last epoch: {'; '.join(words)}."
    )


def rows_of_runs(comparison: Comparison, group: Group) -> list[dict[str, object]]:
    """Lines of `runs.csv`: what each run is, its results and its cost, and all of its settings."""
    rows = []
    for run, (seed, scores) in zip(group.runs, group.scores.iterrows(), strict=True):
        known = run_row(run)
        results = {name: scores[name] for name in (*SCORES, "ensemble")}
        cost = cost_of([run])._asdict()
        label = {"setting": comparison.label(group), "seed": seed, "predictor": group.predictor}
        rows.append({"run_id": known.pop("run_id"), **label, **results, **cost, **known})
    return rows


def full_precision(group: Group) -> dict[str, object]:
    """A group's row of the CSV file."""
    row: dict[str, object] = {
        "model": group.settings.get("model"),
        "method": group.method,
        "peers": group.settings.get("method.peers"),
        "structure": group.settings.get("method.structure"),
        **group.values,
        "predictor": group.predictor,
        "n": len(group.runs),
        "seeds": " ".join(map(str, group.scores.index)),
        "run_ids": " ".join(run.info.run_id for run in group.runs),
    }
    for name in (*SCORES, "ensemble"):
        row |= {f"{name}_mean": group.scores[name].mean(), f"{name}_std": group.scores[name].std()}
    for name in SCORES:
        difference = group.differences.get(name)
        row[f"{name}_difference"] = difference.mean if difference else None
        row |= {
            f"{name}_difference_{part}": getattr(difference, part, None) for part in ("low", "high", "pairs")
        }
    row |= group.cost._asdict()
    row["published"] = ", ".join(map(str, group.published))
    sources = dict.fromkeys(figure.source for figure in group.published)
    row["measured"] = str(group.measured or "")
    row["published_sources"] = " ".join(f"[{source}] {source_text(source)}." for source in sources)
    return row


def text_table(table: pd.DataFrame) -> str:
    """Aligned columns, numbers to the right."""
    columns = []
    for name in table:
        entries = [for_terminal(entry) for entry in (name, *table[name])]
        width = max(map(len, entries))
        entries.insert(1, "-" * width)
        columns.append([entry.rjust(width) if name in NUMERIC else entry.ljust(width) for entry in entries])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def markdown_table(table: pd.DataFrame, bold: Mapping[str, Sequence[bool]]) -> str:
    rules = ["---:" if name in NUMERIC else "---" for name in table]
    escaped = with_bold(table.map(for_markdown), bold, "**{}**".format)
    rows = [[for_markdown(name) for name in table], rules, *escaped.values.tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_bold(
    escaped: pd.DataFrame, bold: Mapping[str, Sequence[bool]], mark: Callable[[str], str]
) -> pd.DataFrame:
    """A table with some entries marked."""
    marked = escaped.copy()
    for name, chosen in bold.items():
        if name in marked:
            marked[name] = [
                mark(entry) if yes else entry for entry, yes in zip(escaped[name], chosen, strict=True)
            ]
    return marked


def with_footnotes(comparison: Comparison, table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """A table whose published figures have their sources and marks in footnotes, for narrow pages."""
    footnotes: dict[str, int] = {}
    entries = []
    for group in comparison.groups:
        figures = []
        for figure in group.published:
            number = footnotes.setdefault(figure.provenance, len(footnotes) + 1)
            figures.append(f"{figure.value} ({number})")
        entries.append(", ".join(figures))
    if not footnotes:
        return table, []
    lines = [f"({number}) [{provenance}]." for provenance, number in footnotes.items()]
    return table.assign(published=entries), lines


def latex_table(
    table: pd.DataFrame, bold: Mapping[str, Sequence[bool]], caption: str, below: Sequence[str]
) -> str:
    """A floating table with the rules of booktabs, made smaller where it is wider than the page."""
    # \boldmath, since the sign between mean and deviation is set as a formula
    escaped = with_bold(table.map(for_latex), bold, "\\textbf{{\\boldmath {}}}".format)
    escaped = escaped.rename(columns=for_latex)
    alignment = "".join("r" if name in NUMERIC else "l" for name in table)
    rows = [list(escaped.columns), *escaped.values.tolist()]
    head, *body = (" & ".join(row) + " \\\\" for row in rows)
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{for_latex(caption)}}}",
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            f"\\begin{{tabular}}{{{alignment}}}",
            *("\\toprule", head, "\\midrule", *body, "\\bottomrule"),
            "\\end{tabular}}",
            *("", "\\smallskip", "\\begin{minipage}{\\linewidth}\\footnotesize"),
            "\n\n".join(map(for_latex, below)),
            "\\end{minipage}",
            "\\end{table}\n",
        ]
    )
