"""What is done between Hydra and the program."""

import logging
import logging.config
from collections.abc import Iterator

import pytest
from omegaconf import DictConfig, OmegaConf

from okddip.hooks import disable_output


@pytest.fixture
def root_level() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.mark.usefixtures("root_level")
def test_a_rank_above_0_keeps_the_loggers_that_exist() -> None:
    """What they warn of goes to rank 0."""
    log = logging.getLogger("okddip.imported_before_hydra")
    config = OmegaConf.create({"hydra": {"run": {"dir": "x"}, "output_subdir": "y", "job_logging": {}}})
    assert isinstance(config, DictConfig)
    disable_output(config)
    logging.config.dictConfig(OmegaConf.to_container(config.hydra.job_logging))  # type: ignore[arg-type]
    assert not log.disabled
    assert log.isEnabledFor(logging.CRITICAL)
