"""Several processes (ranks) that train one group of peers, started by torchrun.

Without torchrun there is one rank, and everything here does nothing. PyTorch is imported where it is used, so
that the program can ask for its rank before it composes a configuration.

Ranks talk by NCCL on CUDA and by gloo on CPUs. Order and augmentation are drawn for the whole batch, of
which each rank takes its share, so the data that a run sees do not depend on the number of ranks (unless
images that cannot be read are skipped). Running statistics of batch norm are averaged over ranks after each
epoch. Rank 0 alone makes the run's folder, prints, and logs to MLflow. A rank that fails ends all of them
with its message. With `--max-restarts=3` torchrun starts a run of which a rank was killed again, and it
goes on after its last epoch; on several machines that takes TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or
torchrun gives the new ranks the addresses of the old. A run may go on, by `trainer.resume`, in another
number of ranks. A sweep does not run under torchrun.
"""

from okddip.distributed.environment import (
    check_environment,
    local_rank,
    local_world_size,
    rank,
    world_size,
)
from okddip.distributed.exchange import check_ranks_agree, from_rank_0, local_rank_0_first
from okddip.distributed.gradients import (
    average_buffers,
    data_parallel,
    is_data_parallel,
    no_sync,
    sum_over_ranks,
    weight_of_share,
)
from okddip.distributed.group import process_group
from okddip.distributed.output import hide_progress_bar, log_warnings_of_all_ranks, rank_0_speaks
from okddip.distributed.store import another_failed, torchrun_agents

__all__ = [
    "another_failed",
    "average_buffers",
    "check_environment",
    "check_ranks_agree",
    "data_parallel",
    "from_rank_0",
    "hide_progress_bar",
    "is_data_parallel",
    "local_rank",
    "local_rank_0_first",
    "local_world_size",
    "log_warnings_of_all_ranks",
    "no_sync",
    "process_group",
    "rank",
    "rank_0_speaks",
    "sum_over_ranks",
    "torchrun_agents",
    "weight_of_share",
    "world_size",
]
