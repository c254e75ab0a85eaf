"""The README's commands that train, each run for a step on a CPU: in its own words, except for paths,
sizes, and the launcher's devices."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, free_port
from test_readme import README, commands, run_alone
from test_remote import endpoint, server  # noqa: F401  (fixtures)

pytestmark = pytest.mark.slow
SMALL = "--max_steps 1 --num_rollouts 2 --num_frames 4 --max_completion_length 4".split()
SMALL += "--frame_pixels 1024 --picture_pixels 1024 --prompt {question}".split()


@pytest.fixture
def adapted(samples, model_folder, tmp_path, endpoint):  # noqa: F811
    """A function that replaces the README's models, files and server in the words of a command."""
    records = str(Path(samples[0].path).parent / "records.jsonl")
    run_alone(ROOT, "data.py", records)
    names = {"my.jsonl": records, "my.jsonl.skip.json": f"{records}.skip.json"}
    names |= {"held_out.jsonl": records, "http://HOST:8000/v1": endpoint.url}

    def adapt(words: list[str]) -> list[str]:
        adapted = [names.get(word, word) for word in words]
        adapted = [model_folder if word.startswith("Qwen/") else word for word in adapted]
        return [re.sub("^runs/", f"{tmp_path}/", word) for word in adapted]

    return adapt


def steps_in(folder) -> list[dict]:
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_adapters_are_trained_with_a_remote_teacher_and_then_measured(adapted, tmp_path):
    pytest.importorskip("peft", reason="pip install -r requirements-dev.txt")
    (command,) = commands("runs/lora ")
    run_alone(ROOT, *adapted(command[1:]), *SMALL)
    (metrics,) = steps_in(tmp_path / "lora")
    assert metrics["intervention"] == 1 and metrics["teacher_failures"] == 0
    assert (tmp_path / "lora" / "model" / "adapter_model.safetensors").is_file()

    (command,) = re.findall(r"`python (train\.py --eval_only .*?)`", README)
    run_alone(ROOT, *adapted(shlex.split(command)), *SMALL[4:])
    figures = json.loads((tmp_path / "lora-eval" / "evaluation.json").read_text())
    assert figures["all"]["n"] == figures["records"] == 6


@pytest.mark.parametrize("word", ["--multi_gpu", "--use_fsdp"])
def test_several_processes_train_as_the_launcher_would_start_them(word, adapted, tmp_path):
    """`accelerate launch` starts one process on a CPU, so torchrun starts two, in the environment
    that the launcher's own flags make. (accelerate shards nothing on a CPU: of FSDP2 this holds the
    flags and the settings; `ranks.py sharded` holds the step.)"""
    (command,) = commands(word)
    place = command.index("train.py")
    given = launch_command_parser().parse_args(command[2 : place + 1])
    given.num_machines, given.num_processes, given.main_process_port = 1, 2, free_port()
    given.mixed_precision, given.dynamo_backend = given.mixed_precision or "no", "no"
    environment = os.environ | prepare_multi_gpu_env(given) | {"OMP_NUM_THREADS": "1"}
    if word == "--use_fsdp":
        assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port())]
    words = adapted(command[place:])
    done = subprocess.run(
        [*launcher, *words, *SMALL],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = Path(words[words.index("--out") + 1])
    (metrics,) = steps_in(out)
    assert metrics["intervention"] == 1 and metrics["teacher_failures"] == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["processes"] == 2
    weights = "adapter_model" if "--lora_rank" in words else "model"
    assert (out / "model" / f"{weights}.safetensors").is_file()


def test_wrapped_classes_are_the_families_own():
    (qwen2,) = re.findall(r"--fsdp_transformer_layer_cls_to_wrap (\S+)", README)
    (qwen3,) = re.findall(r"for Qwen3-VL\s+`(\S+)`", README)
    for family, names in (("qwen2_5_vl", qwen2), ("qwen3_vl", qwen3)):
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        assert all(hasattr(module, name) for name in names.split(",")) and "," in names


def test_two_nodes_flags_are_the_launchers():
    (flags,) = re.findall(r"`(--num_machines 2\s+--machine_rank R .*?)`", README, re.DOTALL)
    given = launch_command_parser().parse_args(
        [*shlex.split(flags.replace(" R ", " 1 ")), "--num_processes", "16", "train.py"]
    )
    assert (given.num_machines, given.machine_rank, given.main_process_ip) == (2, 1, "HOST")
