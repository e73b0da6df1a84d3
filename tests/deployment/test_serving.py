"""An export in MLflow's format, served."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from exported_networks import Okddip, Trained
from PIL import Image

import okddip as package
from okddip.data.sources import digits


@pytest.mark.slow
def test_a_server_classifies_a_real_image(okddip: Okddip, trained: Trained, tmp_path: Path) -> None:
    trained()
    answer = okddip("task=export", "checkpoint=run", "export.formats=[safetensors,mlflow]", "export.out=out")
    assert answer.code == 0, answer.err
    source = digits()
    file = io.BytesIO()
    Image.fromarray(source.test.images[0, ..., 0].numpy()).save(file, "PNG")
    image = np.asarray(Image.open(file))[None, ..., None]  # [1, 16, 16, 1]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "out/mlflow"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (tmp_path / "server.log").open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server, tmp_path / "server.log")
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": image.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            [prediction] = json.load(response)["predictions"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    loaded = package.load("out")
    assert [prediction["label"]] == loaded.predict(image)
    expected = loaded.predict_proba(image)[0].tolist()
    assert prediction["probabilities"] == pytest.approx(expected, abs=1e-5)


def wait_for(url: str, server: subprocess.Popen, output: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert server.poll() is None, output.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(output.read_text())
