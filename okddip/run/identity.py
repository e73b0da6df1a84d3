"""What makes a run what it is: runs with one identity are the same run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from okddip.assembly import make
from okddip.older_versions import LATER_SETTINGS, first_name
from okddip.tracking.params import flatten

# What may differ between two runs that are the same run: where things are and how they are logged; the number
# of threads, which changes the last bits alone; and what several methods share, which counts where a method
# takes it.
IGNORED_SETTINGS = (
    *("name", "tracking.", "trainer.resume", "trainer.rerun", "trainer.threads", "task.", "methods."),
    "trust",
)
IGNORED_DATASET_SETTINGS = ("root", "cache_dir")
# As long as this variable has one value (a sweep sets it for its jobs) images are read once to compare them.
SAME_IMAGES = "OKDDIP_SWEEP_START"
FOLDER_DATASETS = ("image_folder", "imagenet")  # data sets that are whatever lies in their place


def identifying_settings(config: DictConfig | dict[str, Any]) -> dict[str, str]:
    """What makes a run what it is: the flattened configuration without places and switches."""
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    flat = flatten(cast(dict[str, Any], plain))
    later = flatten(LATER_SETTINGS)
    return {
        key: identifying_value(key, value)
        for key, value in flat.items()
        if not key.startswith(IGNORED_SETTINGS)
        and later.get(key) != value
        and not (key.startswith("dataset.") and key.rpartition(".")[2] in IGNORED_DATASET_SETTINGS)
    }


def identifying_value(key: str, value: str) -> str:
    """A setting's value without what makes no difference: which GPU it is, and where a class has moved to."""
    if key == "trainer.device":
        return value.partition(":")[0]
    return first_name(value) if key.endswith("_target_") else value


def run_identity(config: DictConfig | dict[str, Any]) -> str:
    """A short hash of `identifying_settings`: runs that are the same have the same."""
    known = identifying_settings(config)
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def dataset_digests(config: DictConfig) -> dict[str, str]:
    """Of the images that a configuration names, split by split; in a sweep they are read once.

    Raises:
        ConfigError: the data set cannot be had.
    """
    dataset, start = OmegaConf.to_yaml(config.dataset, resolve=True), os.environ.get(SAME_IMAGES)
    return _cached_digests(dataset, start) if start else _cached_digests.__wrapped__(dataset, "")


@cache
def _cached_digests(dataset: str, start_of_sweep: str) -> dict[str, str]:
    made = make("dataset", DictConfig(OmegaConf.create(dataset)))
    return {split: made.digest(split) for split in made.sizes}


def fingerprint(digests: Mapping[str, str]) -> str:
    """One word for the images of all splits."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]
