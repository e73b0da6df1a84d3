"""Losses and gradients of two batches for each method, in as many ranks as there are.

python rank_gradients.py FILE, under torchrun or not; rank 0 writes to FILE
{case: [(loss, {parameter: gradient}), ...]}, of several ranks with accumulated gradients too.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from okddip import distributed
from okddip.assembly import CONFIG_HOME
from okddip.data.loader import Share
from okddip.main import build

CASES = (
    ("method=baseline",),
    ("method=independent",),
    ("method=kd", "methods.teacher=teacher/last.pt"),
    ("method=dml",),
    ("method=dml", "method.structure=branch", "method.target=pairwise"),
    ("method=cl_ilr",),
    ("method=one",),
    ("method=kdcl",),
    ("method=ffl",),
    ("method=pcl",),
    ("method=okddip",),
    ("method=okddip", "method.structure=network", "method.detach_targets=true"),
    ("method=okddip", "method.attention=false", "method.leader=false"),
)
ACCUMULATED = "trainer.accumulate=4"
# 37 images: a batch of 32, and one of 5, which leaves nothing for the last of 4 ranks
SMALL = (
    *("dataset=digits", "dataset.train_size=37", "trainer.batch_size=32", "trainer.epochs=1"),
    *("model=resnet8", "tracking=none", "trainer.device=cpu"),
)


def gradients(overrides: list[str]) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of each batch of an epoch, the parameters being updated between them."""
    with initialize_config_dir(str(CONFIG_HOME / "conf"), version_base="1.3"):
        parts = build(resolved(compose("config", overrides, return_hydra_config=True)))
    trainer, group, method = parts.trainer, parts.group.eval(), parts.method.eval()
    named = dict([*group.named_parameters(), *method.named_parameters()])
    taken: list[dict[str, Tensor]] = []
    parts.optimizer.register_step_pre_hook(
        lambda *_: taken.append({name: parameter.grad.clone() for name, parameter in named.items()})
    )
    share = Share(distributed.rank(), distributed.world_size())
    step = trainer.train_step(group, method, parts.optimizer, parts.dataset)
    loader = parts.dataset.train_loader(
        trainer.batch_size, trainer.device, 0, share=share, views=method.views
    )
    losses = []
    for images, labels in loader.batches(0):
        sums = step(images, labels, torch.tensor(0.5))
        distributed.sum_over_ranks(sums)
        losses.append((sums["loss"] / sums["images"]).item())
    return list(zip(losses, taken, strict=True))


def resolved(config: Any) -> Any:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    OmegaConf.resolve(config)
    return config


if __name__ == "__main__":
    gc.disable()  # which may come by in time, or not
    with distributed.process_group():
        cases = [*CASES, *((*case, ACCUMULATED) for case in CASES if distributed.world_size() > 1)]
        results = {" ".join(case): gradients([*SMALL, *case]) for case in cases}
        if distributed.rank() == 0:
            torch.save(results, sys.argv[1])
    # one that is left wants the interpreter's lock at a time when there is no interpreter: SIGABRT
    left = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in left if "gloo" in name], left
