"""Hydra's sweeper of grids, which loses no job for another's sake."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import ConfigCompositionException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from okddip.errors import ConfigError, check_number
from okddip.sweeps.job import NO_RESULT
from okddip.sweeps.outcomes import Outcome
from okddip.sweeps.sweep import announce_jobs, current_outcomes

log = logging.getLogger(__name__)


class GridSweeper(Sweeper):
    """Every combination of the swept values, apart from those that make no sense.

    Args:
        max_batch_size: jobs that the launcher gets at once; None gives it all.
        params: what is swept, `{"seed": "0,1"}`; the command line comes on top.

    Raises:
        ConfigError: the launcher's processes are killed before any job begins.
        HydraException: an override cannot be, with whatever it is combined.
    """

    def __init__(self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None) -> None:
        if max_batch_size is not None:
            check_number("hydra.sweeper.max_batch_size", max_batch_size, minimum=1, integer=True)
        self.max_batch_size = max_batch_size
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.loader = config, hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        lines = [*(f"{key}={values}" for key, values in self.params.items()), *arguments]
        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(lines)
        [jobs] = BasicSweeper.split_arguments(overrides, None)
        assert self.config is not None  # by setup()
        senseless = self.senseless(jobs)
        jobs = [job for number, job in enumerate(jobs) if number not in senseless]
        announce_jobs(self.config, jobs, list(senseless.values()))
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")

        results: list[Sequence[JobReturn]] = []
        size = self.max_batch_size or max(1, len(jobs))
        for first in range(0, len(jobs), size):
            results.append(self.launch(jobs[first : first + size], first))
            for result in results[-1]:
                _ = result.return_value  # raises what kept Hydra from calling the job
        return results

    def senseless(self, jobs: Sequence[list[str]]) -> dict[int, Outcome]:
        """The jobs, by their place, with a setting that is not there as they choose, but is in others."""
        assert self.config is not None
        found: dict[int, Outcome] = {}
        first: ConfigCompositionException | None = None
        for number, job in enumerate(jobs):
            try:
                self.loader.load_sweep_config(self.config, job)
            except ConfigCompositionException as error:
                if not isinstance(error.__cause__, OmegaConfBaseException):
                    raise
                first = first or error
                key = str(error).splitlines()[0].removeprefix("Could not override").strip(" .'")
                found[number] = Outcome(0, job, "skipped", f"{key}: is no setting of the options chosen.")
        if first is not None and len(found) == len(jobs):
            raise first
        return found

    def launch(self, jobs: Sequence[list[str]], first: int) -> list[JobReturn]:
        """Launch jobs with the numbers from `first` on; those that a killed process breaks off, again.

        Joblib ends all of its processes when one is killed, as Linux does to the largest where memory runs
        out. What has not begun then is launched anew; what was running goes on afterwards, a job at a time,
        and is given up if it is killed alone.
        """
        assert self.launcher is not None
        try:
            with lost_jobs_of_submitit():
                return list(self.launcher.launch(jobs, initial_job_idx=first))
        except BrokenProcessPool:
            known = {outcome.job: outcome for outcome in current_outcomes()}
        numbers = range(first, first + len(jobs))
        begun = [number for number in numbers if number in known]
        if not begun:
            raise ConfigError(
                "hydra/launcher=joblib: its processes are killed before a job begins. Is there memory for"
                " hydra.launcher.n_jobs of them?"
            )
        broken_off = [
            number
            for number in range(first, begun[-1] + 1)
            if number not in known or known[number].kind == "cut off"
        ]
        names = ", ".join(f"#{number}" for number in broken_off)
        log.warning("A process of joblib was killed, and with it all that ran: %s.", names)
        results = {
            number: JobReturn(overrides=job, status=JobStatus.COMPLETED, _return_value=NO_RESULT)
            for number, job in zip(numbers, jobs, strict=True)
        }
        for number, outcome in known.items():
            if number in results and outcome.value is not None:
                results[number].return_value = outcome.value
        if rest := jobs[begun[-1] + 1 - first :]:
            results |= dict(enumerate(self.launch(rest, begun[-1] + 1), begun[-1] + 1))
        if len(jobs) > 1:
            for number in broken_off:
                [results[number]] = self.launch([jobs[number - first]], number)
        return [results[number] for number in numbers]


@contextmanager
def lost_jobs_of_submitit() -> Iterator[None]:
    """Let a job without a result be one within: submitit's launcher would wait for no other after it."""
    if find_spec("submitit") is None:
        yield
        return
    from submitit.core.core import Job
    from submitit.core.utils import UncompletedJobError

    wait = Job.results

    def results(job: Job) -> list[JobReturn]:
        try:
            return wait(job)
        except UncompletedJobError:
            log.warning("Job %s has no result; see %s.", job.job_id, job.paths.stderr)
            return [JobReturn(status=JobStatus.COMPLETED, _return_value=NO_RESULT)]

    Job.results = results  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Job.results = wait  # type: ignore[method-assign]
