"""Where a checkpoint is that a setting names: a file, a run's folder, or a run of the MLflow store."""

from pathlib import Path

from okddip.errors import ConfigError


def find_checkpoint(key: str, reference: str, tracking_uri: str | None) -> Path:
    """The file that a setting names.

    Args:
        key: of the setting, for messages.
        reference: the path of a checkpoint or of a run's folder, or `runs:/ID` of an MLflow run, whose
            `last.pt` it is, or `runs:/ID/best.pt`.
        tracking_uri: the MLflow store in which to look for runs; None: there is none.

    Raises:
        ConfigError: there is no such file or run, or the store does not answer.
    """
    if not reference.startswith("runs:/"):
        path = Path(reference).expanduser()
        path = path / "last.pt" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(
                f"{key}={reference}: there is no such checkpoint. Name a file, the folder of a run, which has"
                " last.pt, or runs:/ID."
            )
        return path
    if tracking_uri is None:
        raise ConfigError(f"{key}={reference}: needs an MLflow store; set tracking=mlflow, or name a file.")
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    from okddip.tracking.address import absolute_uri
    from okddip.tracking.store import open_store
    from okddip.tracking.waiting import first_line

    client = open_store(tracking_uri)
    run_id, _, name = reference.removeprefix("runs:/").partition("/")
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise ConfigError(
            f"{key}={reference}: {tracking_uri} has no such run ({first_line(error)})."
        ) from error
    try:
        return Path(
            download_artifacts(f"runs:/{run_id}/{name or 'last.pt'}", tracking_uri=absolute_uri(tracking_uri))
        )
    except (MlflowException, OSError) as error:
        folder = run.data.tags.get("folder")
        raise ConfigError(
            f"{key}={reference}: {tracking_uri} has this run without {name or 'last.pt'}, which is not in"
            f" {run.info.artifact_uri} ({first_line(error)}). Interrupted runs, and those with"
            " tracking.checkpoints=false, have no checkpoint there; else its artifacts were moved or removed."
            f" Name the file instead{f'; the run was in {folder}' if folder else ''}."
        ) from error
