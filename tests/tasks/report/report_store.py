"""A store with the runs of a sweep that were never trained: their metrics are given."""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import count, product
from types import MappingProxyType

import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    Run,
    RunData,
    RunInfo,
    RunInputs,
    RunTag,
)
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, open_dict

from okddip.assembly import CONFIG_HOME
from okddip.run.summary import run_params
from okddip.tracking.params import CONTEXT

EPOCHS = 12
NUMBERS = count()  # of `made_runs`


def configuration(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_HOME / "conf"), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def add_runs(
    client: MlflowClient,
    experiment_id: str,
    *overrides: str,
    last: Sequence[float],
    seeds: Sequence[int],
    status: str = "FINISHED",
    tags: Mapping[str, str] = MappingProxyType({}),
    digest: str = "",
) -> None:
    """Log a run for each seed, whose top-1 after the last epoch is given; the best is half a point more."""
    config = configuration(f"trainer.epochs={EPOCHS}", *overrides)
    method, peers = config.options.method, config.method.peers
    for seed, top1 in zip(seeds, last, strict=True):
        config.seed = seed
        params = run_params(config)
        run_id = client.create_run(
            experiment_id, tags={"method": method, "device": "cpu", **tags}
        ).info.run_id
        final = {"final/top1": top1, "best/top1": top1 + 0.5} if status == "FINISHED" else {}
        metrics = [Metric(key, value, 0, EPOCHS - 1) for key, value in final.items()]
        for epoch in range(EPOCHS):
            values = metrics_of_epoch(method, peers, top1 * (epoch + 1) / EPOCHS)
            metrics += [Metric(key, value, epoch, epoch) for key, value in values.items()]
        if digest:
            test = DatasetInput(Dataset("images", digest, "local", "{}"), [InputTag(CONTEXT, "test")])
            client.log_inputs(run_id, [test])
        client.log_batch(run_id, metrics, [Param(key, value) for key, value in params.items()])
        if status != "RUNNING":
            client.set_terminated(run_id, status)


@cache
def params_with(*overrides: str) -> dict[str, str]:
    return run_params(configuration(f"trainer.epochs={EPOCHS}", *overrides))


def made_runs(
    *overrides: str, last: Sequence[float], tags: Mapping[str, str] = MappingProxyType({})
) -> list[Run]:
    """Finished runs of seeds 0, 1, ... as a store gives them, without a store."""
    params = params_with(*overrides)
    found = []
    for seed, top1 in enumerate(last):
        number = next(NUMBERS)
        metrics = {"final/top1": top1, "best/top1": top1 + 0.5}
        metrics |= metrics_of_epoch(params["method"], int(params["method.peers"]), top1)
        known = {"method": params["method"], "device": "cpu", "version": "0.2.0", **tags}
        data = RunData(
            [Metric(key, value, 0, EPOCHS - 1) for key, value in metrics.items()],
            [Param(key, value) for key, value in (params | {"seed": str(seed)}).items()],
            [RunTag(key, value) for key, value in known.items()],
        )
        images = [
            DatasetInput(
                Dataset("images", f"{split} images", "local", "{}", profile='{"num_rows": 50000}'),
                [InputTag(CONTEXT, split)],
            )
            for split in ("train", "test")
        ]
        info = RunInfo(f"run{number}", "0", "somebody", "FINISHED", 10**12 + number, None, "active", "")
        found.append(Run(info, data, RunInputs(images)))
    return found


def made_history(run: Run, metric: str) -> pd.Series:
    """What `made_runs` logged, by epoch from 1 on: accuracy rises evenly, all else stays."""
    if metric not in run.data.metrics:
        return pd.Series(dtype=float)
    values = pd.Series(run.data.metrics[metric], index=range(1, EPOCHS + 1))
    return values * values.index / EPOCHS if metric == "test/top1" else values


def metrics_of_epoch(method: str, peers: int, top1: float) -> dict[str, float]:
    metrics = {"test/top1": top1, "train/images_per_second": 12_800 / peers}
    if peers > 1:
        metrics |= {"test/diversity": 0.1, "test/mean/top1": top1, "test/ensemble/top1": top1 + 1}
    if method == "okddip":
        metrics["test/leader/top1"] = top1
        for asks, answers in product(range(peers - 1), repeat=2):
            weight = 0.5 if asks == answers else 0.5 / (peers - 2)
            metrics[f"test/attention/{asks}/{answers}"] = weight
    return metrics
