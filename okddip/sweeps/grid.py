"""Hydra's sweeper of grids, in which one job that is killed or makes no sense does not stop the others."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, ConfigCompositionException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_class
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from okddip.errors import check_number
from okddip.keys import UnknownKey, check_keys
from okddip.sweeps.environment import announce_jobs
from okddip.sweeps.job import NO_RESULT
from okddip.sweeps.outcomes import Outcome
from okddip.sweeps.parent import open_parent_run
from okddip.sweeps.sweep import Sweep
from okddip.text import for_terminal

log = logging.getLogger(__name__)


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper, which runs every combination of the swept values, with three changes.

    Combinations with a setting that their options lack, but those of other combinations have, are skipped. A
    method that trains one student runs once beside others that have several numbers of peers. And the
    launcher is a `PatientLauncher`.
    """

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        # not by super(): Hydra loads its plugins' modules again, and the class is no longer the one there
        if max_batch_size is not None:
            check_number("hydra.sweeper.max_batch_size", max_batch_size, minimum=1, integer=True)
        self.max_batch_size, self.params = max_batch_size, params or {}
        self.batch_index = 0

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        assert self.launcher is not None
        self.launcher = PatientLauncher(self.launcher)

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """The jobs of the sweep in batches; opens the parent run, now that there are jobs.

        Raises:
            HydraException: an override is wrong in every combination, or nothing reads it.
        """
        assert self.config is not None  # by setup()
        assert Sweep.current is not None  # by the callback
        [combinations] = super().split_arguments(overrides, None)
        jobs, skipped = self.split_off_skipped(once_without_peers(combinations, self.trains_one_student))
        open_parent_run(Sweep.current, self.config)
        Sweep.current.jobs, Sweep.current.skipped = jobs, skipped
        announce_jobs(len(jobs))
        more = f"; {len(skipped)} combinations make no sense and are skipped" if skipped else ""
        print(f"{len(jobs)} jobs in {for_terminal(Sweep.current.folder)}{more}", flush=True)
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """That was done in `split_arguments`."""

    def trains_one_student(self, method: str) -> bool:
        """Whether the option of the override `method=OPTION` is a method of a single student."""
        assert self.config is not None
        assert self.hydra_context is not None
        try:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, [method])
            target: Any = get_class(config.method._target_) if config.method.peers == 1 else None
            return getattr(target, "most_peers", None) == 1
        except Exception:  # whatever is wrong with it, its jobs will say
            return False

    def split_off_skipped(self, combinations: Sequence[list[str]]) -> tuple[list[list[str]], list[Outcome]]:
        """The jobs; and the combinations with a setting that their options lack, but those of others have."""
        assert self.config is not None
        assert self.hydra_context is not None
        jobs: list[list[str]] = []
        errors: list[tuple[list[str], CompactHydraException]] = []
        for overrides in combinations:
            try:
                config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
                check_keys(config, config.hydra)
                jobs.append(overrides)
            except UnknownKey as error:
                errors.append((overrides, error))
            except ConfigCompositionException as error:
                if not isinstance(error.__cause__, OmegaConfBaseException):
                    raise
                errors.append((overrides, error))
        if not jobs:
            # the options of one combination may have what others lack
            raise max((error for _, error in errors), key=lambda error: getattr(error, "likeness", 0))
        skipped = []
        for number, (overrides, reason) in enumerate(errors, len(jobs)):
            key = reason.key if isinstance(reason, UnknownKey) else str(reason).splitlines()[0]
            text = f"{key}: is not a setting of the chosen options."
            skipped.append(Outcome(number, overrides, "skipped", text))
        return jobs, skipped


def once_without_peers(
    combinations: Sequence[list[str]], trains_one_student: Callable[[str], bool]
) -> list[list[str]]:
    """The combinations; one student, swept beside other methods, stands in them once, without `method.peers`.

    Args:
        combinations: of overrides.
        trains_one_student: see `GridSweeper.trains_one_student`.
    """
    methods = [next((each for each in those if each.startswith("method=")), "") for those in combinations]
    if len(set(methods)) == 1:
        return list(combinations)
    single = cache(trains_one_student)
    found: dict[tuple[str, ...], list[str]] = {}
    for overrides, method in zip(combinations, methods, strict=True):
        rest = [each for each in overrides if not each.lstrip("+").startswith("method.peers=")]
        if len(rest) < len(overrides) and single(method):
            overrides = rest
        found.setdefault(tuple(overrides), overrides)
    if len(found) < len(combinations):
        names = ", ".join(sorted(method for method in set(methods) if single(method)))
        log.info("%s: one student, so one run for all values of method.peers.", names)
    return list(found.values())


class PatientLauncher(Launcher):
    """A launcher for which a job whose process is killed does not stop the others.

    Args:
        launcher: any of Hydra's, set up.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def setup(self, **_: Any) -> None:
        """The launcher within is set up."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Launch jobs; those that are interrupted when a process of joblib is killed, again.

        Joblib ends all of its processes when one is killed, as Linux does to the largest where memory runs
        out. Jobs that had not begun are then launched together; those that were running afterwards, one at a
        time, so that the one that is killed again interrupts no other.
        """
        assert Sweep.current is not None
        first, end = initial_job_idx, initial_job_idx + len(job_overrides)
        results: list[JobReturn] = []
        interrupted: list[int] = []
        while first < end:
            try:
                results += self.launch_once(job_overrides[first - initial_job_idx :], first)
                break
            except BrokenProcessPool:
                outcomes = {each.job: each for each in Sweep.current.outcomes() if first <= each.job < end}
                if not outcomes:
                    raise
            begun = range(first, max(outcomes) + 1)
            running = [job for job in begun if job not in outcomes or outcomes[job].kind == "cut off"]
            names = ", ".join(f"#{job}" for job in running)
            log.warning("A process of joblib was killed, which interrupted all running jobs: %s.", names)
            interrupted += running
            first = begun.stop
        for job in interrupted if len(job_overrides) > 1 else ():
            with suppress(BrokenProcessPool):
                results += self.launch_once([job_overrides[job - initial_job_idx]], job)
        return results

    def launch_once(self, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
        with lost_jobs_of_submitit():
            return self.launcher.launch(job_overrides, initial_job_idx=first)


@contextmanager
def lost_jobs_of_submitit() -> Iterator[None]:
    """Let a job without a result have one within: else submitit's launcher would not wait for the others."""
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
