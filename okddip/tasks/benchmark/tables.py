"""The benchmark's numbers as tables for the terminal."""

import logging
from typing import Any

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
        f"memory {size['model_bytes'] / 2**20:,.1f} MiB of parameters, buffers and optimizer state;"
        f" a training step adds up to {size['step_bytes'] / 2**20:,.1f} MiB",
        f"training step {flops['step'] / 1e9:,.1f} GFLOP, {flops['per_second'] / 1e9:,.1f} GFLOP/s,"
        f" {flops['share_of_peak']:.1%} of a matrix product's {flops['peak_per_second'] / 1e9:,.1f}",
    ]
    if "cost" in report:
        rows += ["", f"{'cost':<12}{'peers':>6}{'step, ms':>10}{'quartiles':>17}{'MiB':>10}{'GFLOP':>9}"]
    for point in report.get("cost", ()):
        step, size = point["step_seconds"], point["memory"]
        rows.append(
            f"{point['structure']:<12}{point['peers']:>6}{1000 * step['median']:>10,.1f}"
            f"{1000 * step['low']:>9,.1f} -{1000 * step['high']:>6,.1f}"
            f"{sum(size.values()) / 2**20:>10,.1f}{point['flops'] / 1e9:>9,.1f}"
        )
    for point in report.get("left_out", ()):
        rows.append(f"left out: {point['structure']}, {point['peers']} peers. {point['reason']}")
    log.info("\n".join(rows))
