"""Several processes (ranks) that train one group of peers, started by torchrun.

Without torchrun there is one rank, and everything here does nothing. PyTorch is imported where it is used, so
that the program can ask for its rank before it composes a configuration.
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
