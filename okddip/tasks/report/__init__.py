"""Tables and figures over many runs, and the command that reproduces one."""

from okddip.tasks.report.task import make, report

__all__ = ["make", "report"]
