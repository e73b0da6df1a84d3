"""Which of the ranks this process is, as torchrun says in the environment."""

import os
import socket
from pathlib import Path

from okddip.errors import ConfigError

# Set by torchrun, and needed by each of several processes
REQUIRED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """Which of the ranks this is; rank 0 alone logs, prints and writes."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def world_size() -> int:
    """How many ranks train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Which of the ranks on its machine this is; it takes the CUDA device of that number."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def check_environment() -> None:
    """Refuse an environment in which ranks would wait for each other in vain.

    Raises:
        ConfigError: names the variables.
    """
    if world_size() == 1:
        return
    if missing := [name for name in REQUIRED if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={world_size()}: asks for several processes, but {', '.join(missing)} are not set."
            " Start with torchrun, which sets them; or, for one process, unset WORLD_SIZE."
        )
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    agents_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if local_world_size() < world_size() and restarts and agents_store:
        raise ConfigError(
            f"--max-restarts={restarts}: on several machines torchrun would give restarted ranks the"
            " addresses of the previous ones, for which they would wait. Set"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all machines, or leave --max-restarts out."
        )


def torchrun_agent() -> str:
    """The torchrun process that started this rank; the same after a restart of ranks."""
    parent = os.getppid()
    try:  # process IDs are used again
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):  # not Linux
        started = ""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "-".join(["torchrun", run_id, socket.gethostname(), str(parent), started]).replace(" ", "_")
