"""Fixtures: needle videos and a tiny random student, made once. `-m slow` runs what needs extras."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Another process that uses the cores makes spinning threads crawl; one thread is never far behind.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from cold_start import needle_texts, tiny_policy  # noqa: E402

import data  # noqa: E402
import ffr  # noqa: E402
import grpo  # noqa: E402
import reward  # noqa: E402
import teacher  # noqa: E402
import train  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs minutes or extras; run with -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def free_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def sampled(student, prompts, seeds, sampling=None):
    """A completion of each prompt, from a seed of its own."""
    groups = grpo.generate(
        student.model, prompts, [[seed] for seed in seeds], sampling or student.sampling
    )
    return [completion for (completion,) in groups]


def scored(model, prompts, ids, sampling):
    """`logps, mask` of a completion of each prompt, in rows of their own."""
    episodes = [grpo.Episode(k, k, tokens) for k, tokens in enumerate(ids)]
    return grpo.batched_logps(model, prompts, episodes, sampling)


@pytest.fixture(autouse=True)
def one_thread():
    """`train.main` sets the number of threads, and with it the last bits of what comes after."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def samples(folder):
    return data.load_samples(data.needle_videos(str(folder / "needles"), 6, seed=5))


@pytest.fixture(scope="session")
def model_folder(folder, samples):
    tiny_policy(str(folder / "model"), needle_texts(samples), seed=0)
    return str(folder / "model")


@pytest.fixture
def clip(tmp_path):
    """A file of 12 frames at 4 fps, each of one colour."""
    frames = [Image.new("RGB", (64, 32), (k * 20, 0, 255 - k * 20)) for k in range(12)]
    data.write_avi(str(tmp_path / "v.avi"), frames, fps=4)
    return tmp_path / "v.avi"


@pytest.fixture
def make_config(model_folder, samples, tmp_path):
    """Settings as the parser makes them, on the tiny random student and the needle videos."""

    def make(**changes):
        records = str(Path(samples[0].path).parent / "records.jsonl")
        given = {
            **train.TINY,
            "model": model_folder,
            "data": records,
            "out": str(tmp_path),
            "questions_per_device": 2,
            "num_rollouts": 3,
            "max_steps": 2,
            "eval_data": records,
        }
        given |= changes
        return train.parse([x for key, v in given.items() for x in (f"--{key}", str(v))])

    return make


@pytest.fixture
def accelerator():
    return train.Accelerator(cpu=True)


@pytest.fixture
def student(make_config, accelerator):
    return train.load_student(make_config(), accelerator)


@pytest.fixture
def questions(student, samples):
    return [ffr.open_question(student, sample) for sample in samples]


@pytest.fixture
def teach(samples):
    """The scripted teacher inside the whole protocol."""
    chat = teacher.scripted({s.id: s.truth["evidence"] for s in samples})
    return lambda cases, **more: teacher.diagnose(cases, chat, reward.gate, **more)


@pytest.fixture
def some_right(monkeypatch):
    """A verifier that finds a random student right now and then, by its text alone: without unequal
    rewards every advantage, and so every gradient, would be 0."""

    def score(text, answer, kind):
        return ffr.Score(float(len(text) % 3 == 0), float(len(text) % 2), len(text) % 3 == 0)

    monkeypatch.setattr(ffr, "score", score)
