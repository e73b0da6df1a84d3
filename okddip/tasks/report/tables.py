"""Comparisons as plain text, Markdown, LaTeX and CSV."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from okddip.tasks.report.compare import SCORES, Comparison, Difference, Group
from okddip.tasks.report.published import source_text
from okddip.text import for_csv, for_latex, for_markdown, for_terminal

NUMERIC = ("n", "peers")
REFERENCES = {
    "baseline": "the baseline with the same model, data set and training settings, after the last epoch.",
    "default": (
        "the same method with the settings of its option file, or of most runs where none has those, after"
        " the last epoch."
    ),
}


def write_tables(comparisons: Sequence[Comparison], left_out: str, folder: Path) -> None:
    """Write `table.txt`, `table.md`, `table.tex` and `table.csv`."""
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
        f"**{for_markdown(title(c))}**\n\n{markdown_table(table)}\n\n"
        + "\n".join(f"- {for_markdown(line)}" for line in below)
        for c, table, below in tables
    ]
    (folder / "table.md").write_text(
        "\n\n".join([*paragraphs, *map(for_markdown, remarks)]) + "\n", encoding="utf-8"
    )
    blocks = []
    for number, (c, table, below) in enumerate(tables, 1):
        narrower, footnotes = with_footnotes(c, table)
        below = [*below, *footnotes, *(remarks if number == len(tables) else [])]
        blocks.append(latex_table(narrower, title(c), below))
    (folder / "table.tex").write_text(
        "\n".join(["% \\usepackage{booktabs,graphicx} in the preamble", *blocks]), encoding="utf-8"
    )
    numbers = [{"dataset": c.dataset, **full_precision(group)} for c in comparisons for group in c.groups]
    pd.DataFrame(numbers).map(for_csv).rename(columns=for_csv).to_csv(
        folder / "table.csv", index=False, encoding="utf-8"
    )


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
            "n": str(len(group.runs)),
            "last epoch": mean_and_std(group.scores["last"]),
            "best epoch": mean_and_std(group.scores["best"]),
            f"last - {comparison.reference}": difference_with_interval(group.differences.get("last")),
            "published": ", ".join(map(str, group.published)),
        }
        for group in comparison.groups
    ]
    table = pd.DataFrame(rows)
    optional = [f"last - {comparison.reference}", "published"]
    return table.drop(columns=[name for name in optional if not table[name].any()])


def mean_and_std(scores: pd.Series) -> str:
    return f"{scores.mean():.2f}" + (f" ± {scores.std():.2f}" if len(scores) > 1 else "")


def difference_with_interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    how = {0: "unpaired", 1: "1 pair"}.get(difference.pairs, f"{difference.pairs} pairs")
    if math.isnan(difference.low):
        return f"{difference.mean:+.2f} {how}"
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}] {how}"


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
    differences = [group.differences["last"] for group in comparison.groups if group.differences]
    if differences:
        lines.append(f"last - {comparison.reference}: difference to {REFERENCES[comparison.reference]}")
        if any(not math.isnan(difference.low) for difference in differences):
            lines.append(
                "In brackets its 95% interval by Student's t, over pairs of runs with the same seed"
                " (unpaired: Welch's, where fewer than two seeds are in both)."
            )
        elif any(difference.pairs for difference in differences):
            lines.append("Pairs are runs with the same seed.")
        if any(math.isnan(difference.low) for difference in differences):
            lines.append(
                "Where there is no 95% interval, it would take two seeds of each, and differences that vary."
            )
    if "teacher" in comparison.columns:
        lines.append("teacher: its model, with a word for its settings and images (the runs' tag `teacher`).")
    if comparison.named:
        lines.append(", ".join(f"{name}: {text}" for name, text in comparison.named.items()) + ".")
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
    return lines


def full_precision(group: Group) -> dict[str, object]:
    """A group's row of the CSV file."""
    row: dict[str, object] = {
        "model": group.settings.get("model"),
        "method": group.method,
        "peers": group.settings.get("method.peers"),
        "structure": group.settings.get("method.structure"),
        **group.values,
        "n": len(group.runs),
        "seeds": " ".join(map(str, group.scores.index)),
        "run_ids": " ".join(run.info.run_id for run in group.runs),
    }
    for name in SCORES:
        row |= {f"{name}_mean": group.scores[name].mean(), f"{name}_std": group.scores[name].std()}
    for name in SCORES:
        difference = group.differences.get(name)
        values = difference if difference else [None] * len(Difference._fields)
        names = [f"{name}_difference", *(f"{name}_difference_{part}" for part in ("low", "high", "pairs"))]
        row |= dict(zip(names, values, strict=True))
    row["published"] = ", ".join(map(str, group.published))
    sources = dict.fromkeys(figure.source for figure in group.published)
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


def markdown_table(table: pd.DataFrame) -> str:
    rules = ["---:" if name in NUMERIC else "---" for name in table]
    rows = [[str(name) for name in table], rules, *table.values.tolist()]
    return "\n".join(f"| {' | '.join(map(for_markdown, row))} |" for row in rows)


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


def latex_table(table: pd.DataFrame, caption: str, below: Sequence[str]) -> str:
    """A floating table with the rules of booktabs, made smaller where it is wider than the page."""
    escaped = table.map(for_latex).rename(columns=for_latex)
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
