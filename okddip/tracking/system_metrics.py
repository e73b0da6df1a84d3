"""The load of CPU, memory, disk, network and GPUs, logged to a run by a thread of MLflow's own."""

from typing import TYPE_CHECKING

from okddip.tracking.address import absolute_uri

if TYPE_CHECKING:  # importing MLflow takes more than a second, and `okddip --help` has no use for it
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

RETRY_SECONDS = 10.0  # how long a store that does not answer is left alone


def start_monitor(uri: str, run_id: str) -> "SystemMetricsMonitor":
    """Log the load until the monitor's `finish` is called; in a resumed run, from its last step on."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    class Monitor(SystemMetricsMonitor):
        def monitor(self) -> None:
            while not self._shutdown_event.is_set():
                super().monitor()  # gives up for good where the store does not answer once
                self._shutdown_event.wait(RETRY_SECONDS)

    monitor = Monitor(run_id, resume_logging=True, tracking_uri=absolute_uri(uri))
    monitor.start()
    return monitor
