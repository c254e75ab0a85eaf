"""The remote teacher against a server that is not ours: `transformers serve` with a tiny model."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import free_port
from test_train import train_once

import teacher
import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(model_folder, tmp_path_factory):
    if importlib.util.find_spec("fastapi") is None:
        pytest.skip("pip install -r requirements-dev.txt")
    port = free_port()
    log = open(tmp_path_factory.mktemp("serve") / "log", "w+")
    command = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
    server = subprocess.Popen(
        [command, "serve", "--device", "cpu", "--port", str(port)],
        stdout=log,
        stderr=log,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    for _ in range(120):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            break
        except OSError:
            assert server.poll() is None, Path(log.name).read_text()[-3000:]
            time.sleep(1)
    yield f"http://127.0.0.1:{port}/v1"
    server.terminate()
    server.wait(20)


def test_a_server_not_ours_takes_conversations_with_pictures(
    served, model_folder, make_config, accelerator, samples, monkeypatch
):
    """The tiny model's nonsense has no end, so each reply is cut: the wire is what is tested."""
    config = make_config(
        teacher="remote",
        teacher_url=served,
        teacher_model=model_folder,
        teacher_max_tokens=8,
        teacher_workers=2,
        max_steps=1,
    )
    with pytest.raises(ValueError, match="length"):
        train.load_teacher(config, samples, "cpu")  # a teacher that could help nobody
    monkeypatch.setattr(teacher, "try_out", lambda chat, num_frames, seconds: None)
    teach = train.load_teacher(config, samples, "cpu")
    _, (metrics,) = train_once(config, accelerator, samples, teach)
    assert metrics["failure"] > 0 and metrics["teacher_calls"] > 0
    assert metrics["teacher_failures"] == metrics["teacher_length"] == 6 * metrics["failure"]


def test_its_errors_are_ours(served):
    talk = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    (error,) = teacher.remote(served, "/no/such/model", "")([talk], 20.0)
    assert isinstance(error, teacher.TeacherError) and error.cause.startswith("http_")
