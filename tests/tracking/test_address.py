"""Addresses of stores and of their pages."""

import pytest

from okddip.tracking.address import how_to_open

PAGE = "/#/experiments/1/runs/abc?workflowType=machine_learning"


@pytest.mark.parametrize(
    ("uri", "lines"),
    [
        (
            "sqlite:///mlflow.db",
            ["mlflow ui --backend-store-uri sqlite:///mlflow.db", f"http://127.0.0.1:5000{PAGE}"],
        ),
        (
            "sqlite:////my runs/mlflow.db",
            ["mlflow ui --backend-store-uri 'sqlite:////my runs/mlflow.db'", f"http://127.0.0.1:5000{PAGE}"],
        ),
        (
            "postgresql+psycopg://me:secret@host/mlflow",
            [
                "mlflow ui --backend-store-uri postgresql+psycopg://host/mlflow",
                f"http://127.0.0.1:5000{PAGE}",
            ],
        ),
        ("https://me:secret@server:8080/", [f"https://server:8080{PAGE}"]),
    ],
)
def test_a_runs_page_can_be_opened_from_what_is_printed(uri: str, lines: list[str]) -> None:
    label, first = how_to_open(uri, "1", "abc").split(maxsplit=1)
    assert label == "MLflow"
    assert [line.strip() for line in first.splitlines()] == lines
