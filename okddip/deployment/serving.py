"""The MLflow model of an exported network.

MLflow copies this file into the model's folder and runs it from there, with the exported program beside it:
serving needs torch and mlflow, and no okddip.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel


class ServedNetwork(PythonModel):
    """Pixels uint8 [N, H, W, C] to a table of N rows: `label`, and `probabilities` of all classes."""

    def load_context(self, context: Any) -> None:
        """Load the program, uint8 [N, H, W, C] to probabilities [N, K], and the names of the classes."""
        self.program = torch.export.load(context.artifacts["program"]).module()
        self.classes = json.loads(Path(context.artifacts["description"]).read_text(encoding="utf-8"))[
            "classes"
        ]

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Classify a batch of images."""
        with torch.inference_mode():
            probabilities = self.program(torch.tensor(model_input, dtype=torch.uint8))  # [N, K]
        labels = [self.classes[index] for index in probabilities.argmax(-1).tolist()]
        return pd.DataFrame({"label": labels, "probabilities": probabilities.double().tolist()})


mlflow.models.set_model(ServedNetwork())
