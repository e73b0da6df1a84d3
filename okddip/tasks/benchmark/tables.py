"""The benchmark's numbers as tables for the terminal."""

import logging
from collections.abc import Sequence
from typing import Any

from okddip.text import for_terminal

log = logging.getLogger(__name__)

TITLES = {
    "input": "input pipeline",
    "forward": "forward pass",
    "train": "training step",
    "evaluate": "evaluation",
}


def heading(report: dict[str, Any]) -> list[str]:
    """What was measured, and on what."""
    compiled = ", compiled" if report["compile"] else ""
    return [
        f"{report['method']}, {report['peers']} peers ({report['structure']}), {report['model']},"
        f" {report['dataset']}; batches of {report['batch_size']} and {report['eval_batch_size']}",
        f"{report['device']}, {report['threads']} threads; {report['precision']}{compiled}; PyTorch"
        f" {report['torch']}",
        "",
    ]


def log_rank_tables(report: dict[str, Any]) -> None:
    """Print the table of several ranks."""
    titles = {
        "train": "training step",
        "train_apart": "  gradients not averaged",
        "evaluate": "evaluation",
    }
    title = f"images/s of {report['ranks']} ranks"
    rows = [*heading(report), f"{title:<28}{'':>10}{'quartiles':>20}"]
    for part, title in titles.items():
        speed = report["images_per_second"][part]
        rows.append(f"{title:<28}{speed['median']:>10,.0f}{speed['low']:>11,.0f} -{speed['high']:>7,.0f}")
    rows += [
        "",
        f"training step at {report['ratio']['train']['median']:.1%} of the speed without averaging;"
        f" {report['reduced_bytes'] / 1e6:,.1f} MB of gradients are averaged",
    ]
    log.info("\n".join(rows))


def log_tables(report: dict[str, Any]) -> None:
    """Print the tables of one process."""
    ours, reference = (report["images_per_second"][who] for who in ("okddip", "reference"))
    rows = [
        *heading(report),
        f"{'images/s':<16}{'':>10}{'quartiles':>20}{'reference':>12}{'ratio':>8}{'quartiles':>16}",
    ]
    for part, title in TITLES.items():
        speed, ratio = ours[part], report["ratio"][part]
        rows.append(
            f"{title:<16}{speed['median']:>10,.0f}{speed['low']:>11,.0f} -{speed['high']:>7,.0f}"
            f"{reference[part]['median']:>12,.0f}{ratio['median']:>8.2f}"
            f"{ratio['low']:>9.2f} -{ratio['high']:>5.2f}"
        )
    words = {"operators": "operators", "detaches": "of these detach", "host_reads": "host reads"}
    rows += ["", f"{'':<36}{'okddip':>10}{'reference':>12}"]
    for key, title in (("train_step", "training step"), ("evaluation_batch", "evaluation batch")):
        for name in ("operators", "detaches", "host_reads"):
            mine, theirs = report[key]["okddip"][name], report[key]["reference"][name]
            rows.append(f"{f'{title}, {words[name]}':<36}{mine:>10,}{theirs:>12,}")
    flops, size = report["flops"], report["memory"]
    rows += [
        "",
        f"evaluation at {report['evaluate_of_forward']['median']:.1%} of the forward pass's images/s",
        memory_line(size),
        f"training step {flops['step'] / 1e9:,.1f} GFLOP, {flops['per_second'] / 1e9:,.1f} GFLOP/s,"
        f" {flops['share_of_peak']:.1%} of a matrix product's {flops['peak_per_second'] / 1e9:,.1f}",
        step_line(report),
        *device_lines(report),
    ]
    if "cost" in report:
        rows += ["", f"{'cost':<12}{'peers':>6}{'parameters':>13}{'step, ms':>10}{'quartiles':>17}"]
        rows[-1] += f"{'MiB':>8}{'GFLOP':>8}"
    for point in report.get("cost", ()):
        step, size = point["step_seconds"], point["memory"]
        rows.append(
            f"{point['structure']:<12}{point['peers']:>6}{point['parameters']:>13,}"
            f"{1000 * step['median']:>10,.1f}{1000 * step['low']:>9,.1f} -{1000 * step['high']:>6,.1f}"
            f"{number(total_memory(size), ',.1f'):>8}{point['flops'] / 1e9:>8,.1f}"
            + (f"  {for_terminal(point['model'])}" if "model" in point else "")
        )
    for point in report.get("left_out", ()):
        rows.append(f"left out: {point['structure']}, {point['peers']} peers. {point['reason']}")
    rows += settings_table(report.get("settings", ()))
    log.info("\n".join(rows))


def memory_line(size: dict[str, int]) -> str:
    """What is kept, and what a step adds where that is known."""
    line = f"memory {size['model_bytes'] / 2**20:,.1f} MiB of parameters, buffers and optimizer state"
    if "step_bytes" not in size:
        return line
    return f"{line}; a training step adds up to {size['step_bytes'] / 2**20:,.1f} MiB"


def step_line(report: dict[str, Any]) -> str:
    """How long a training step takes, and how much memory its operators read and write."""
    seconds, size = report["step"]["seconds"]["median"], report["bytes"]
    line = f"training step {1000 * seconds:,.2f} ms; operators read and write {size['step'] / 1e9:,.2f} GB"
    if "share_of_copy" not in size:
        return f"{line}, before they are compiled"
    line += f", {size['step'] / seconds / 1e9:,.1f} GB/s,"
    return f"{line} {size['share_of_copy']:.1%} of a copy's {size['copy_per_second'] / 1e9:,.1f}"


def device_lines(report: dict[str, Any]) -> list[str]:
    """What a GPU does in a training step; no line where that is not known."""
    step, size = report["step"], report["memory"]
    lines = []
    if "waiting" in step:
        lines.append(
            f"the GPU runs nothing in {step['idle']:.1%} of the step, and waits for the host in"
            f" {step['waiting']:.1%}; it runs {step['kernels']:,.0f} kernels, which the host starts by"
            f" {step['launches']:,.0f} calls"
        )
    if "peak_bytes" in size:
        lines.append(
            f"memory at its peak, all that this process keeps: {size['peak_bytes'] / 2**20:,.1f} MiB of"
            f" tensors, {size['reserved_bytes'] / 2**20:,.1f} MiB taken from the device"
        )
    return lines


def settings_table(points: Sequence[dict[str, Any]]) -> list[str]:
    """One row for each of the trainer's settings; `-` for what is not measured there."""
    measured = [point for point in points if "step" in point]
    rows = []
    if measured:
        rows = [
            "",
            f"{'training step':<18}{'ms':>9}{'quartiles':>19}{'images/s':>11}{'speed':>7}{'waits':>8}"
            f"{'kernels':>9}{'calls':>7}{'MiB':>9}{'FLOP/s':>8}{'bytes/s':>9}{'first, s':>10}",
        ]
    for point in measured:
        step, seconds = point["step"], point["step"]["seconds"]
        speed = measured[0]["step"]["seconds"]["median"] / seconds["median"]
        peak = point["memory"].get("peak_bytes")
        rows.append(
            f"{point['setting']:<18}{1000 * seconds['median']:>9,.2f}"
            f"{1000 * seconds['low']:>10,.2f} -{1000 * seconds['high']:>7,.2f}"
            f"{point['images_per_second']['median']:>11,.0f}{speed:>6.2f}x"
            f"{number(step.get('waiting'), '.1%'):>8}{number(step.get('kernels'), ',.0f'):>9}"
            f"{number(step.get('launches'), ',.0f'):>7}{number(peak and peak / 2**20, ',.0f'):>9}"
            f"{point['flops']['share_of_peak']:>8.1%}{number(point['bytes'].get('share_of_copy'), '.1%'):>9}"
            f"{point['first_step_seconds']:>10,.1f}"
        )
    if measured:
        rows.append(
            "FLOP/s beside a matrix product, bytes/s beside a copy (caches hold some); waits: of the GPU for"
            " the host; calls: that start kernels; first: step, with compiling from nothing"
        )
    return rows + [
        f"left out: {point['setting']}. {point['reason']}" for point in points if "reason" in point
    ]


def total_memory(size: dict[str, int]) -> float | None:
    """MiB of what is kept and what a step adds; None where the latter is not known."""
    return (size["model_bytes"] + size["step_bytes"]) / 2**20 if "step_bytes" in size else None


def number(value: float | None, form: str) -> str:
    """A number as `form` says; `-` where there is none."""
    return "-" if value is None else format(value, form)
