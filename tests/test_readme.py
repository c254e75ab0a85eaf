"""What the README says is so: names, figures, commands."""

import dataclasses
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import ffr
import grpo
import reward
import teacher
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
PIECES = (ROOT / "assets" / "pieces.md").read_text(encoding="utf-8")


def test_every_named_function_exists():
    named = re.findall(r"`(\w+)\.py::(\w+)`", README + PIECES)
    assert len(named) > 15
    for file, function in named:
        source = (ROOT / f"{file}.py").read_text(encoding="utf-8")
        assert f"def {function}(" in source, f"{file}.py::{function}"


def test_the_table_is_the_measured_one():
    first, *_ = runs = json.loads((ROOT / "assets" / "tiny.json").read_text())
    for name, value in first.items():
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        words = train.MEANINGS.get(name, "")
        line = f"  {name:20} {shown:8} {words}".rstrip()
        assert line in README.splitlines(), name
    unaided = [run["unaided_after"] for run in runs]
    told = f"{statistics.mean(unaided):.2f}, from {min(unaided):.2f} to {max(unaided):.2f}"
    assert f"over seeds 0 to {len(runs) - 1} is {told}" in " ".join(README.split())
    assert [run["seed"] for run in runs] == [0, 1, 2]


def test_leak_table_is_the_measured_one():
    found = json.loads((ROOT / "assets" / "leaks.json").read_text())
    text = (ROOT / "assets" / "leaks.md").read_text(encoding="utf-8")
    halves, words = (found, found["held_out"]), " ".join(README.split())
    totals = []
    for label, hit, among in (
        ("the answer is stated", "caught", "leaks"),
        ("clean", "refused", "clean"),
        ("the answer is only implied", "implied_caught", "implied"),
    ):
        rules, blind = (
            ", ".join(f"{half[key]} of {half[among]}" for half in halves)
            for key in (hit, f"{hit}_blind")
        )
        assert f"| {label} | {rules} | {blind} |" in text
        totals += [sum(half[key] for half in halves) for key in (among, f"{hit}_blind")]
    told = "Of {} patches that state the answer, {} are refused, of {} clean ones {} (["
    assert told.format(*totals[:4]) in words
    for label, among in (("stated", "leaks"), ("implied", "implied")):
        caught, of = (
            sum(half[f"{among}_unguessed{end}"] for half in halves) for end in ("_blind", "")
        )
        assert f"{caught} of {of} {label}" in " ".join(text.split())
    probe = found["blind_probe"]
    for share in ("question_alone", "patch", "leaking_teacher", "leaking_teacher_gated", "chance"):
        assert f"{probe[share]:.3f}" in text


def test_memory_table_is_the_computed_one():
    found = json.loads((ROOT / "assets" / "memory.json").read_text())
    text = (ROOT / "assets" / "memory.md").read_text(encoding="utf-8")
    ways = ("plain, beta 0.04", "checkpointed, beta 0.04", "checkpointed, beta 0.0")
    ways += ("LoRA, checkpointed, beta 0.04",)

    def row_of(where: str, at_once: int, pictures: int) -> list[float]:
        end = f"{at_once} at once, {pictures} pictures"
        columns = [found["GB"][f"{way}, {end}"] for way in ways]
        return [max(c[f"{where}, update"], c[f"{where}, generation"]) for c in columns]

    for where in ("one GPU", "8 GPUs, FSDP2"):
        for label, at_once, pictures in (
            ("no patches", 8, 0),
            ("patches of 1 picture", 8, 1),
            ("patches of 6 pictures", 8, 6),
            ("the same, `--rollouts_at_once 1`", 1, 6),
        ):
            cells = " | ".join(f"{value:.1f}" for value in row_of(where, at_once, pictures))
            assert f"| {where}: {label} | {cells} |" in text
    whole = [found["GB"][f"{way}, 8 at once, 0 pictures"] for way in ways]
    for name in ("weights, gradients, Adam", "reference"):
        assert f"| {name} | " + " | ".join(f"{c[name]:.1f}" for c in whole) + " |" in text

    worst = max(fit[1] for fits in found["fits"].values() for fit in fits.values())
    peaks = sum(2 * len(points) for points in found["points"].values())
    assert f"{peaks} peaks met within {math.ceil(100 * worst)} %" in " ".join(text.split())
    readme = " ".join(README.split())
    none, six = row_of("8 GPUs, FSDP2", 8, 0)[1], row_of("8 GPUs, FSDP2", 8, 6)[1]
    assert f"of a 7B ({none:.1f} GB each, {six:.1f} with six pictures in every patch" in readme
    none, one = row_of("one GPU", 8, 0)[3], row_of("one GPU", 8, 1)[3]
    assert f"a 7B ({none:.1f} GB, {one:.1f} with a picture in every patch" in readme


def test_gpu_table_is_the_measured_one():
    found = json.loads((ROOT / "assets" / "gpu.json").read_text())
    text = (ROOT / "assets" / "gpu.md").read_text(encoding="utf-8")
    whole, words = found["all weights, checkpointed"], " ".join(text.split())

    def cell(row):
        return f"{row['seconds']:.2f} s, {row['peak_GB']:.1f} GB"

    for label, way in (("all weights", whole), ("LoRA of rank 16", found["LoRA, checkpointed"])):
        cells = [cell(way[f"update, {rows}"]) for rows in ("shared rows", "rows of their own")]
        assert f"| `update`, {label}, checkpointed | {cells[0]} | {cells[1]} |" in text
    shared = cell(found["LoRA"]["update, shared rows"])
    assert f"| `update`, LoRA of rank 16 | {shared} | out of memory |" in text
    assert "out of memory" in found["LoRA"] and f"{whole['parameters'] / 1e9:.2f} B" in text
    assert f"`generate` takes {cell(whole['generate'])}" in words
    assert f"own cache, {cell(whole['bare calls of generate'])}" in words
    assert f"differ by {whole['logp_gap']:.2f} at most" in words
    lora = found["LoRA, checkpointed"]["update, shared rows"]["peak_GB"]
    assert f"a 3B ({whole['update, shared rows']['peak_GB']:.1f} GB at its peak" in README
    assert f"a 3B ({lora:.1f} GB)" in README
    seconds = (whole[name]["seconds"] for name in ("generate", "update, shared rows"))
    told = "took {:.2f} s to sample first answers and {:.2f} s for the update".format(*seconds)
    assert told in " ".join(README.split())


def test_speed_table_is_the_measured_one():
    found = json.loads((ROOT / "assets" / "speed.json").read_text())
    columns = [found["headline"], found["tiny mode"]]
    text = (ROOT / "assets" / "speed.md").read_text(encoding="utf-8")
    for start, key in (
        ("TRL's", "vs_trl"),
        ("the released", "vs_released"),
        ("ours over", "vs_limit"),
        ("the same, a teacher", "vs_released_200ms"),
    ):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
        shown = re.findall(r"\| (\d+\.\d\d)", row)
        assert shown == [f"{column[key]:.2f}" for column in columns]
    for start, key in (("without shared", "tricks"), ("profile", "profile")):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
        for column, cell in zip(columns, row.split(" | ")[1:]):
            numbers = [*map(float, re.findall(r"[\d.]+", cell))]
            scale, skip = (100, "seconds") if key == "profile" else (1, "on")
            measured = [scale * value for name, value in column[key].items() if name != skip]
            assert numbers == pytest.approx(measured, abs=0.5 if scale > 1 else 0.0051)
    words = " ".join(text.split())
    for key, last in (("G", 16), ("frames", 64), ("tokens", 512)):
        rows = [row for row in found["growth"] if key in row]
        a, b = rows[0], rows[-1]
        assert (
            b[key] == last
            and f"{a['seconds']:.1f} → {b['seconds']:.1f} s and "
            f"{a['peak_MB']:.0f} → {b['peak_MB']:.0f} MB"
            in words
        )
    first = columns[0]
    for said, key in (
        ("`GRPOTrainer` {} times without", "vs_trl"),
        ("it takes {} times as long as our step", "vs_released"),
        ("ours takes {} times as long as its model calls", "vs_limit"),
    ):
        assert said.format(f"{first[key]:.2f}") in " ".join(README.split())


def test_measured_run_shows_what_is_claimed():
    first, *_ = runs = json.loads((ROOT / "assets" / "tiny.json").read_text())
    assert first["intervention_last"] <= 0.52 * first["intervention_first"]
    assert first["unaided_after"] - first["unaided_before"] >= 0.30
    for run in runs:
        assert run["unaided_after"] - run["unaided_before"] >= 0.20
        assert run["seconds"] < 360


@pytest.mark.parametrize("name", ["assets/repair.png", "LICENSE", "requirements-dev.txt"])
def test_named_files_are_there(name):
    assert name.split("/")[-1] in README or name == "LICENSE"
    assert (ROOT / name).is_file()


def test_ci_runs_the_readme_s_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (install,) = re.findall(r"`(pip install -r requirements.txt) && pytest`", README)
    assert install in script.replace(" -q", "") and re.search(r"^pytest$", script, re.MULTILINE)


def snippet(word: str) -> str:
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", PIECES, re.DOTALL) if word in c]
    return code


def commands(word: str) -> list[list[str]]:
    """The words of each command of the README's block that holds `word`."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def test_reward_for_trl_is_the_robust_improvement_reward():
    exec(snippet("def rir"), names := {})
    right = "<think> at <3.0 seconds> it barks </think><answer>A</answer>"
    wrong = right.replace("A<", "B<")
    rewards = names["rir"](
        [right, wrong, right, wrong],
        [None, None, wrong, wrong],
        ["A"] * 4,
        ["multiple choice"] * 4,
        [[], [], [(3.0, 3.0)], [(3.0, 3.0)]],
        ids=None,
    )
    # R + R_fmt; plain; with the tax and alignment 1; with the tax
    assert rewards == pytest.approx([2.0, 1.0, 2.0 - 0.3 + 0.1, 1.0 - 0.3])


@pytest.mark.slow
def test_reward_runs_in_trls_trainer(samples, model_folder, tmp_path):
    """Two real steps: TRL hands the columns over as the snippet takes them, and takes its rewards."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    exec(snippet("def rir"), names := {})
    rewards = []

    def rir(completions, **columns):
        texts = [text[-1]["content"] if isinstance(text, list) else text for text in completions]
        rewards.append(names["rir"](texts, **columns))
        return rewards[-1]

    right = f"<think> </think><answer>{samples[0].answer}</answer>"
    columns = {"answer": samples[0].answer, "problem_type": "exact", "prompt": "what flashes ?"}
    failed = {"failed": "<think> </think><answer> </answer>", "spans": [[3.0, 3.5]]}
    rows = [columns | failed, columns | {"failed": None, "spans": []}] * 4
    settings = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        max_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
    )
    model, processor = grpo.load_policy(model_folder)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[rir],
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor.tokenizer,
    )
    trainer.train()
    # A random student is wrong and formless: 0 unaided, and as a repair less the tax.
    assert {round(reward, 6) for group in rewards for reward in group} == {0.0, -0.3}
    assert trainer.state.global_step == 2
    assert names["rir"](
        [right], failed=[None], spans=[[]], **{k: [v] for k, v in columns.items()}
    ) == [2.0]


def test_teacher_of_ones_own_needs_teacher_alone(tmp_path):
    shutil.copy(ROOT / "teacher.py", tmp_path)
    code = snippet("class Clip") + "print(patch.transcript)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "guidance='Compare the two halves.', key_frames=[12]" in done.stdout, done.stderr
    assert "['get_frame(12)']" in done.stdout


def test_repair_round_in_a_loop_of_ones_own_trains(tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(snippet("ffr.find_fix_reason"), names := {})
    assert len(names["group"]) == 8 and any(r.repaired for r in names["group"])
    before = grpo.load_policy("assets/tiny")[0].state_dict()
    after = names["model"].state_dict()
    assert any((before[key] != after[key]).any() for key in before)


def test_why_a_video_was_misread_is_told_and_drawn(
    samples, model_folder, tmp_path, teach, monkeypatch, capsys
):
    sample = samples[0]
    evidence = teacher.scripted({"video": sample.truth["evidence"]})
    monkeypatch.setattr(
        ffr,
        "load_teacher",
        lambda *_, **__: lambda cases: teacher.diagnose(cases, evidence, reward.gate),
    )
    ffr.explain(
        [
            sample.path,
            "--question",
            sample.question,
            "--answer",
            sample.answer,
            "--model",
            model_folder,
            "--problem_type",
            "exact",
            "--prompt",
            "{question}",
            "--out",
            str(tmp_path),
            "--frame_pixels",
            "1024",
            "--max_completion_length",
            "8",
            "--teacher",
            "scripted",
        ]
    )
    said = capsys.readouterr().out
    assert re.match(r"0 of 8 right at first \(exact\), \d of 8 with a patch\.", said)
    assert "Fix: the evidence patch" in said and "Moments: <" in said
    assert (tmp_path / "why.png").stat().st_size > 10_000


def test_the_round_and_its_command_need_no_train(samples, model_folder, tmp_path):
    """ffr.py with the four files that it stands on: README's loop and `python ffr.py VIDEO`."""
    for name in ("ffr", "teacher", "reward", "grpo", "data"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    loop = snippet("ffr.find_fix_reason") + "\nprint(sum(c.repaired is not None for c in group))"
    done = run_alone(tmp_path, "-c", loop)
    assert int(done.stdout.splitlines()[-1]) > 0
    sample = samples[0]
    given = {"question": sample.question, "answer": sample.answer, "model": model_folder}
    given |= {"teacher_model": model_folder, "prompt": "{question}", "num_frames": "4"}
    given |= {"max_completion_length": "4", "teacher_max_tokens": "4", "num_rollouts": "2"}
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    done = run_alone(tmp_path, "ffr.py", sample.path, *flags)
    assert "0 of 2 right at first (free-form), 0 of 0 with a patch." in done.stdout


def run_alone(folder, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def test_why_command_runs_and_a_useless_teacher_is_named(samples, model_folder, tmp_path):
    (command,) = commands("ffr.py clip.mp4")
    words = [samples[0].path if word == "clip.mp4" else word for word in command[1:]]
    words = [model_folder if "Qwen" in word else word for word in words]
    small = ["--num_frames", "4", "--max_completion_length", "4", "--teacher_max_tokens", "4"]
    done = run_alone(ROOT, *words, "--out", str(tmp_path), *small)
    assert "0 of 8 right at first (multiple choice), 0 of 0" in done.stdout
    assert done.stdout.count("No patch for 8 of 8: malformed") == 1 and "Loading" not in done.stderr
    assert done.stdout.endswith("Nothing was repaired, so there is no picture.\n")


@pytest.mark.slow
def test_smoke_test_of_ones_own_data_takes_three_steps(samples, model_folder, tmp_path):
    """The README's check and smoke test, on needle videos, with a student that is its teacher."""
    file = shutil.copytree(Path(samples[0].path).parent, tmp_path / "data") / "records.jsonl"
    words = {"my.jsonl": str(file), "my.jsonl.skip.json": f"{file}.skip.json"}
    words |= {"STUDENT": model_folder, "TEACHER": model_folder}
    words |= {"runs/smoke": str(tmp_path / "smoke")}
    assert "`python data.py my.jsonl`" in README
    for command in [["python", "data.py", "my.jsonl"], *commands("runs/smoke")]:
        run_alone(ROOT, *[words.get(word, word) for word in command[1:]])
    rows = (tmp_path / "smoke" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("word", ["runs/lora ", "--multi_gpu", "--use_fsdp"])
def test_every_command_to_train_has_settings_that_go_together(word, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: True)  # peft may not be here
    (command,) = commands(word)
    config = train.parse(command[command.index("train.py") + 1 :])
    assert config.teacher == "remote" and config.skip == "my.jsonl.skip.json"


def test_every_metric_is_explained(samples, make_config, accelerator, some_right, teach):
    from test_train import train_once

    _, (metrics,) = train_once(make_config(max_steps=1), accelerator, samples, teach)
    text = (ROOT / "assets" / "metrics.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert {*metrics} == {*explained} - {"teacher_CAUSE"}


def test_every_named_test_and_file_exists():
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) > 10 and all(f"def {name}(" in tests for name in named)
    for name in re.findall(r"\b((?:tests|assets)/\w+\.\w+)", README):
        assert (ROOT / name).exists(), name
    assert len(README.splitlines()) <= 300


def test_help_names_every_setting_in_a_group_with_the_papers_value(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(train.Config):
        assert f"--{f.name} " in shown
    for part in (
        "The round: --num_rollouts",
        "[0.04; tiny mode 0.0]",
        "[5e-06; tiny mode",
    ):
        assert part in shown


@pytest.mark.parametrize(
    "given, words",
    [
        ({"VIDEO": "gone.mp4"}, "no video at gone.mp4"),
        ({"teacher_model": ""}, "--teacher local needs --teacher_model"),
        ({"options": "A. x", "answer": "C"}, "the question: no answer can be right by it"),
        ({"lam": "0.3"}, "--lam must be below --kappa"),
        ({"temperature": "0"}, "--temperature must be above 0"),
        ({"teacher": "remote"}, "give --teacher_url"),
        ({"top_p": "2"}, "--top_p must be in"),
        ({"num_rollouts": "0"}, "--num_rollouts must be 1 or more"),
        ({"model": "nowhere"}, "nowhere: no processor or no model there; no such folder here"),
        (
            {"teacher_model": "nowhere"},
            "--teacher_model nowhere: no such folder, or no model there",
        ),
    ],
)
def test_why_command_refuses_in_one_sentence(samples, model_folder, tmp_path, given, words):
    settings = {"question": "q", "answer": "a", "model": model_folder, "out": str(tmp_path)}
    settings |= {"teacher_model": model_folder} | given
    video = settings.pop("VIDEO", samples[0].path)
    with pytest.raises(SystemExit, match=f"^ffr.py: {words}"):
        ffr.explain([video, *(f"--{name}={value}" for name, value in settings.items())])
