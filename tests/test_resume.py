"""A run that is killed and resumed ends as one that was not; a full disk costs no checkpoint.

`ALL_KILLS=1 pytest -m slow tests/test_resume.py` kills it at ten steps on one process and at three
on two."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, free_port

import train

STEPS, ALL = 14, bool(os.environ.get("ALL_KILLS"))


def start(out, processes, settings, **more):
    """The training script in a process group of its own."""
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            str(free_port()),
        ]
    command += [str(ROOT / "tests" / "ranks.py"), "lively", "--out", str(out), *settings]
    return subprocess.Popen(
        command,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **more,
    )


@pytest.fixture
def settings(model_folder, samples):
    given = {
        **train.TINY,
        "model": model_folder,
        "questions_per_device": 1,
        "num_rollouts": 3,
        "data": str(Path(samples[0].path).parent / "records.jsonl"),
        "max_steps": STEPS,
        "beta": 0.04,
        "learning_rate": 1e-3,
        "save_steps": 1,
        "keep_checkpoints": 2,
    }
    given.pop("out")
    return [x for key, value in given.items() for x in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of an uninterrupted run, made once for each number of processes and rank."""
    made = {}

    def run(processes, settings):
        key = (processes, *settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            finish(start(made[key], processes, settings))
        return made[key]

    return run


def lines(out):
    file = Path(out, "metrics.jsonl")
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def finish(process):
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said[-3000:]


def same_run(a, b):
    """Weights equal byte for byte; metrics equal but for what is timed; each step once."""
    timed = ("seconds_round", "seconds_update", "teacher_seconds")
    one, two = (
        [
            {k: v for k, v in json.loads(line).items() if k not in timed}
            for line in Path(x, "metrics.jsonl").read_text().splitlines()
        ]
        for x in (a, b)
    )
    assert [row["step"] for row in one] == list(range(1, STEPS + 1)) and one == two
    assert any(row["grad_norm"] > 0 for row in one)
    weights = {"model.safetensors", "adapter_model.safetensors"}
    (own,) = weights & {file.name for file in Path(a, "model").iterdir()}
    names = (f"model/{own}", f"checkpoints/{STEPS:06d}/optimizer.bin")
    assert all(Path(a, name).read_bytes() == Path(b, name).read_bytes() for name in names)
    assert sorted(p.name for p in Path(b, "checkpoints").iterdir()) == [
        f"{STEPS - 1:06d}",
        f"{STEPS:06d}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, kills, rank",
    [(1, 10, 0), (2, 3, 0), (1, 10, 4)] if ALL else [(1, 3, 0), (2, 1, 0), (1, 1, 4)],
)
def test_killed_and_resumed_run_ends_as_the_uninterrupted_one(
    tmp_path, settings, whole_run, processes, kills, rank
):
    settings = [*settings, "--lora_rank", str(rank)]
    whole = whole_run(processes, settings)
    rng, killed = random.Random(processes), tmp_path / "killed"
    for at in sorted(rng.sample(range(STEPS), kills)):
        process = start(killed, processes, [*settings, "--resume", "True"])
        while process.poll() is None and lines(killed) < at:
            time.sleep(0.005)
        time.sleep(0.1 * rng.random())  # anywhere in a step, or in a checkpoint
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode != 0  # it was killed, not done
    finish(start(killed, processes, [*settings, "--resume", "True"]))
    same_run(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_that_ctrl_c_ends_at_step_7_goes_on_as_the_uninterrupted_one(
    tmp_path, settings, whole_run, processes
):
    settings = [*settings, "--lora_rank", "0"]
    whole = whole_run(processes, settings)
    stopped = tmp_path / "stopped"
    process = start(stopped, processes, settings)
    while process.poll() is None and lines(stopped) < 7:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=120)
    (line,) = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert process.returncode != 0 and (processes > 1 or "Traceback" not in said)
    done = lines(stopped)
    assert 7 <= done < STEPS and f"interrupted after step {done}, which is saved in" in line
    assert line.endswith("the same command with --resume True goes on")
    finish(start(stopped, processes, [*settings, "--resume", "True"]))
    same_run(whole, stopped)


@pytest.mark.slow
def test_full_disk_leaves_the_checkpoint_before_whole(tmp_path, settings):
    out = tmp_path / "out"
    finish(start(out, 1, [*settings, "--max_steps", "1"]))
    shutil.copytree(out / "checkpoints" / "000001", tmp_path / "copy")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"max_steps": STEPS}))
    most = (out / "checkpoints" / "000001" / "optimizer.bin").stat().st_size // 2

    def limit():  # what is written beyond it fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start(out, 1, [*settings, "--resume", "True"], preexec_fn=limit)
    said, _ = process.communicate(timeout=120)
    (sentence,) = [line for line in said.splitlines() if "train.py" in line]
    assert process.returncode == 1 and "Traceback" not in said
    assert "no room for a checkpoint of step 2?" in sentence and "checkpoints/000001" in sentence
    for file in (tmp_path / "copy").rglob("*"):
        assert file.read_bytes() == (out / "checkpoints" / "000001" / file.name).read_bytes()
    finish(start(out, 1, [*settings, "--resume", "True"]))


def test_run_is_neither_overwritten_nor_mixed(tmp_path, settings, monkeypatch):
    def run(*more):
        monkeypatch.setattr(
            sys, "argv", ["train.py", "--out", str(tmp_path), *settings, "--max_steps", "1", *more]
        )
        train.main()

    run()
    with pytest.raises(SystemExit, match="holds a run: --resume True"):
        run()
    with pytest.raises(SystemExit, match=r"begun with another seed \(0\), kappa \(0.3\): --resume"):
        run("--resume", "True", "--kappa", "0.2", "--seed", "1")
    run("--resume", "True", "--save_steps", "5")
    assert lines(tmp_path) == 1
