"""The loop, its flags and refusals, two processes, and the leaf files on their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, scored

import data
import ffr
import grpo
import teacher
import train
from teacher import TeacherError


def train_once(config, accelerator, samples, teach, spare=None):
    shutil.rmtree(Path(config.out, "checkpoints"), ignore_errors=True)
    student = train.load_student(config, accelerator)
    spare = ffr.open_question(student, spare or samples[0])
    history = train.train(config, accelerator, student, samples, teach, placeholder=spare)
    return student, history


def decline(cases, **_):
    return [TeacherError("declined")] * len(cases)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))


def test_declining_teacher_equals_plain_grpo_bit_for_bit(
    make_config, accelerator, samples, teach, some_right
):
    changes = {"max_steps": 3, "learning_rate": 1e-3}
    plain, history = train_once(make_config(method="grpo", **changes), accelerator, samples, None)
    declined, other = train_once(make_config(**changes), accelerator, samples, decline)
    repaired, _ = train_once(make_config(**changes), accelerator, samples, teach)
    untouched = train.load_student(make_config(), accelerator)
    assert same(plain, declined) and not same(plain, repaired)
    assert [h["reward"] for h in history] == [h["reward"] for h in other]
    assert other[0]["teacher_failures"] == other[0]["teacher_declined"] == 6 * other[0]["failure"]
    assert history[0]["grad_norm"] > 0 and not same(plain, untouched)


def recorded_update(monkeypatch):
    calls, update = [], grpo.update

    def keep(*args, **kwargs):
        calls.append((*args, *kwargs.values()))
        return update(*args, **kwargs)

    monkeypatch.setattr(grpo, "update", keep)
    return calls


def recorded_rounds(monkeypatch):
    groups, round_ = [], ffr.find_fix_reason
    monkeypatch.setattr(
        ffr, "find_fix_reason", lambda *a, **k: groups.append(round_(*a, **k)) or groups[-1]
    )
    return groups


def test_the_update_gets_the_repaired_tokens_under_the_patched_prompt(
    make_config, accelerator, samples, teach, monkeypatch, some_right
):
    """Train failed ids with the repaired reward, or score without the patch: this turns red."""
    calls, groups = recorded_update(monkeypatch), recorded_rounds(monkeypatch)
    _, history = train_once(make_config(max_steps=1), accelerator, samples, teach)
    (call,) = calls
    members = ffr.flat(groups[0])
    (_, model, _, batch, sampling, *_) = call
    questions, numbers, ids, sampled, advantages, weights = zip(*batch.episodes)
    prompts = [batch.prompts[number] for number in numbers]
    assert 0 < sum(member.repaired is not None for member in members) < 6
    for prompt, tokens, member in zip(prompts, ids, members):
        assert tokens.tolist() == member.chosen.completion.ids.tolist()
        assert ("pixel_values" in prompt) == (member.repaired is not None)
        if member.repaired:
            assert tokens.tolist() != member.unaided.completion.ids.tolist()
            assert "pixel_values" not in member.unaided.prompt
    rewards = torch.tensor([member.reward for member in members]).view(2, 3)
    assert [*advantages] == grpo.group_advantages(rewards).flatten().tolist() and any(advantages)
    assert weights == (1.0,) * 6
    assert all(batch.prompts[k] is member.unaided.prompt for k, member in zip(questions, members))
    # The same policy sampled and scored: the wrong ids, prompt or pixels would show up here.
    assert history[0]["logp_gap"] < 1e-4
    for wrong in ([member.unaided.prompt for member in members], [blank(p) for p in prompts]):
        logps, _ = scored(model, wrong, ids, sampling)
        gaps = [(own - row[: len(own)]).abs().max() for own, row in zip(sampled, logps)]
        assert max(gaps) > 1e-3


def blank(prompt):
    return prompt | {"pixel_values_videos": torch.zeros_like(prompt["pixel_values_videos"])}


def test_failed_tokens_get_no_gradient(
    make_config, accelerator, samples, teach, monkeypatch, some_right
):
    """The loss is a function of the chosen completions' log-probs alone: τ of a repaired rollout,
    prompts, patches and padding are nowhere in it."""
    seen, loss = [], grpo.grpo_loss

    def keep(logps, *args, **settings):
        logps.retain_grad()
        seen.append((logps, args[3]))
        return loss(logps, *args, **settings)

    monkeypatch.setattr(grpo, "grpo_loss", keep)
    calls = recorded_update(monkeypatch)
    train_once(make_config(max_steps=1), accelerator, samples, teach)
    (logps, mask), episodes = seen[0], calls[0][3].episodes
    trained = [episode for episode in episodes if episode.advantage]  # β is 0
    trained.sort(key=lambda episode: (episode.question, episode.prompt))  # as rows are shared
    lengths = [len(episode.ids) for episode in trained]
    assert len(trained) >= 3 and logps.shape == (len(trained), max(lengths))
    assert mask.sum(1).tolist() == lengths
    for row, episode in enumerate(trained):
        want = torch.zeros(max(lengths))
        want[: lengths[row]] = -episode.advantage / sum(len(e.ids) for e in episodes)
        assert torch.allclose(logps.grad[row], want, atol=1e-7)


def test_broken_video_costs_its_record_and_is_counted(make_config, accelerator, samples, teach):
    broken = [data.Sample(**vars(s) | {"path": str(ROOT / "README.md")}) for s in samples]
    config = make_config(max_steps=1, questions_per_device=6)
    picked = train.pick(samples, 0, config, accelerator)
    one_broken = [b if s.id == picked[0].id else s for s, b in zip(samples, broken)]
    _, history = train_once(config, accelerator, one_broken, teach)
    assert history[0]["skipped"] == 1 and torch.isfinite(torch.tensor(history[0]["grad_norm"]))
    assert history[0]["sampled_tokens"] <= 5 * 3 * 2 * 16
    config = make_config(max_steps=1, questions_per_device=1, scale_rewards="batch")
    student, history = train_once(config, accelerator, broken, None, spare=samples[0])
    assert history[0]["skipped"] == 1 and history[0]["sampled_tokens"] == 0
    assert all(torch.isfinite(p).all() for p in student.model.parameters())


def test_every_record_is_seen_once_an_epoch(make_config, accelerator, samples):
    config = make_config()
    seen = [s.id for step in range(3) for s in train.pick(samples, step, config, accelerator)]
    again = [s.id for step in range(3, 6) for s in train.pick(samples, step, config, accelerator)]
    assert sorted(seen) == sorted(s.id for s in samples) == sorted(again) and seen != again


REFUSALS = {
    "data=": "--model and --data FILE go together",
    "num_rollouts=1": "--num_rollouts must be 2 or more",
    "kappa=-0.1 beta=-1": "--beta, --kappa must be 0 or more",
    "lam=0.3": "--lam must be below --kappa",
    "temperature=0": "--temperature must be above 0",
    "top_p=0": "--top_p must be in",
    "prompt={questions}": "--prompt must hold {question}",
    "questions_per_device=0 num_frames=0": "--num_frames, --questions_per_device must be 1 or more",
    "max_steps=-1": "--max_steps must be 0 or more",
    "learning_rate=-1": "--learning_rate must be 0 or more",
    "lora_rank=-1 weight_decay=-1": "--lora_rank, --weight_decay must be 0 or more",
    f"out={__file__}": "--out .*test_train.py is a file; name a folder",
    "teacher=local": "--teacher local needs --teacher_model",
    "teacher=remote": "--teacher remote needs --teacher_model",
    "teacher=remote teacher_model=m": "give --teacher_url",
}


@pytest.mark.parametrize("setting", REFUSALS)
def test_settings_that_cannot_be_meant_are_refused(make_config, setting):
    with pytest.raises(SystemExit, match=REFUSALS[setting]):
        make_config(**dict(part.split("=") for part in setting.split()))


def test_lambda_below_kappa_and_both_zero_are_fine(make_config):
    assert make_config(lam=0.29).lam == 0.29 and make_config(kappa=0, lam=0).kappa == 0


def test_a_policy_may_be_sampled_whole(make_config):
    assert make_config(top_p=1).top_p == 1


def test_defaults_are_table_8_and_tiny_gives_way_to_flags():
    config = train.parse(["--model", "m", "--data", "d"])
    table = dict(
        num_rollouts=8,
        temperature=1.0,
        top_p=0.95,
        beta=0.04,
        kappa=0.3,
        lam=0.0,
        learning_rate=5e-6,
        weight_decay=0.01,
        max_grad_norm=5.0,
        epochs=1,
        num_frames=16,
        frame_pixels=100352,
        picture_pixels=401408,
        questions_per_device=1,
        max_prompt_length=16384,
        max_completion_length=1024,
    )
    assert {name: getattr(config, name) for name in table} == table
    assert train.parse([]).lam == 0.1 and train.parse(["--lam", "0"]).lam == 0


def start(monkeypatch, config_folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(config_folder / "out"), *arguments])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code  # one sentence, exit 1
    return stop.value.code


def test_what_is_wrong_with_the_input_is_said_before_training(
    monkeypatch, tmp_path, model_folder, samples
):
    records = str(Path(samples[0].path).parent / "records.jsonl")
    base = ["--model", model_folder, "--prompt", "{question}", "--frame_pixels", "1024"]
    gone = start(monkeypatch, tmp_path, *base, "--data", str(tmp_path / "gone.json"))
    assert "gone.json: no such file" in gone
    (tmp_path / "fake.mp4").write_text("text")
    record = json.loads(Path(records).read_text().splitlines()[0]) | {"path": "fake.mp4"}
    (tmp_path / "fake.jsonl").write_text(json.dumps(record))
    fake = start(monkeypatch, tmp_path, *base, "--data", str(tmp_path / "fake.jsonl"))
    assert "fake.mp4: not a video" in fake
    long = start(monkeypatch, tmp_path, *base, "--data", records, "--max_prompt_length", "20")
    assert "over the limit of 20" in long
    evidence = {k: v for k, v in record.items() if k != "evidence"} | {"path": samples[0].path}
    (tmp_path / "bare.jsonl").write_text(json.dumps(evidence))
    bare = start(monkeypatch, tmp_path, *base, "--data", str(tmp_path / "bare.jsonl"))
    assert "no record has 'evidence'" in bare


def test_student_folders_that_cannot_train_are_refused(
    monkeypatch, tmp_path, model_folder, samples
):
    records = str(Path(samples[0].path).parent / "records.jsonl")
    shutil.copytree(model_folder, tmp_path / "bare")
    for file in (tmp_path / "bare").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    assert "no processor" in start(
        monkeypatch, tmp_path, "--model", str(tmp_path / "bare"), "--data", records
    )
    shutil.copytree(model_folder, tmp_path / "opens")
    template = tmp_path / "opens" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant\n<think>\n"))
    assert "opens <think> itself" in start(
        monkeypatch, tmp_path, "--model", str(tmp_path / "opens"), "--data", records
    )
    shutil.copytree(model_folder, tmp_path / "run" / "model")
    run = str(tmp_path / "run")
    said = start(monkeypatch, tmp_path, "--model", run, "--data", records)
    assert "no processor or no model there; a run's weights are in its model/, at its end" in said


def test_evaluation_alone_is_resumed_and_tells_accuracy_by_type_and_source(
    monkeypatch, tmp_path, model_folder, samples, some_right, capsys
):
    records = [json.loads(line) for line in open(Path(samples[0].path).parent / "records.jsonl")]
    bare = [{k: v for k, v in record.items() if k != "evidence"} for record in records]
    (tmp_path / "bare.json").write_text(json.dumps(bare))  # as real data is: no teacher looks it up
    arguments = [
        "train.py",
        "--eval_only",
        "True",
        "--model",
        model_folder,
        "--prompt",
        "{question}",
        "--frame_pixels",
        "1024",
        "--max_completion_length",
        "16",
        "--out",
        str(tmp_path),
        "--video_root",
        str(Path(samples[0].path).parent),
        "--data",
        str(tmp_path / "bare.json"),
    ]
    monkeypatch.setattr(train.evaluate, "__defaults__", (2,))  # at once
    find, asked = ffr.find_fix_reason, []

    def dies_at_the_second_batch(student, questions, *more, **settings):
        asked.append([q.sample.id for q in questions])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return find(student, questions, *more, **settings)

    monkeypatch.setattr(ffr, "find_fix_reason", dies_at_the_second_batch)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    with open(tmp_path / "evaluation.jsonl", "a") as file:
        file.write('{"id": "cut o')  # as a kill in the middle of a line leaves it
    monkeypatch.setattr(sys, "argv", [*arguments, "--resume", "True"])
    train.main()
    assert sorted(i for batch in [asked[0], *asked[2:]] for i in batch) == [s.id for s in samples]
    rows = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").open()]
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert sorted(row["id"] for row in rows) == [s.id for s in samples] and found["answered"] == 6
    right = sum(row["unaided"] for row in rows)
    assert found["all"] == found["type exact"] == found["source needle"]
    assert found["all"]["n"] == 6 and found["all"]["accuracy"] == right / 6
    assert all(row["unaided"] == (len(row["answer"]) % 3 == 0) for row in rows)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="holds an evaluation: --resume True, or remove it"):
        train.main()
    out = capsys.readouterr().out
    assert "n 6" in out and "6 records to score" in out
    manifest = json.loads((tmp_path / "evaluation.manifest.json").read_text())
    assert (
        manifest["seed"] == 0 and manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    )
    assert len(manifest["sha256"][arguments[-1]]) == 64


def test_interval_ends_where_a_score_test_of_five_percent_does():
    rows = [{"unaided": k < 15, "type": "OCR", "source": "AB"[k % 2]} for k in range(50)]
    table = train.accuracy(rows)
    assert list(table) == ["all", "type OCR", "source A", "source B"]
    assert [entry["accuracy"] for entry in table.values()] == [0.3, 0.3, 8 / 25, 7 / 25]
    for entry in table.values():  # Wilson: (share − p)² = 1.96² p (1 − p) / n at both ends
        for p in (entry["low"], entry["high"]):
            z = (entry["accuracy"] - p) / (p * (1 - p) / entry["n"]) ** 0.5
            assert abs(z) == pytest.approx(1.96) and (z > 0) == (p == entry["low"])
    for n in range(1, 200):
        none = train.accuracy([{"unaided": False, "type": "", "source": ""}] * n)["all"]
        assert f"{none['low']:.3f}" == "0.000"  # no −0.000


def test_evaluation_tells_what_it_asks_otherwise_than_the_training_did(
    make_config, accelerator, tmp_path, capsys
):
    trained = make_config(num_frames=8, prompt="{question} Go.", out=tmp_path / "run")
    train.claim_folder(trained, 1)
    config = make_config(eval_only=True, model=tmp_path / "run" / "model")
    train.compare_with_training(config, accelerator)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "Careful: --prompt '{question}', but in training '{question} Go.'",
        "Careful: --num_frames 16, but in training 8",
    ]
    for other in ("[1]", "{}", '{"num_frames": 8}', "no JSON"):  # no run's manifest: nothing to say
        (tmp_path / "run" / "manifest.json").write_text(other)
        train.compare_with_training(config, accelerator)
    assert capsys.readouterr().out == ""


def test_bf16_autocast_computes_and_fp32_weights_move(
    make_config, samples, teach, some_right, monkeypatch
):
    """The parts of a step that autocast must reach agree: sampled and scored log-probs."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # other tests keep theirs
    accelerator = train.Accelerator(cpu=True, mixed_precision="bf16")
    config = make_config(max_steps=1, learning_rate=5e-6, beta=0.04)
    student, (metrics,) = train_once(config, accelerator, samples, teach)
    before = train.load_student(config, accelerator).model.parameters()
    moved = [(a - b).abs().max() for a, b in zip(student.model.parameters(), before)]
    assert all(p.dtype == torch.float32 for p in student.model.parameters())
    assert max(moved) > 1e-6 and 1e-4 < metrics["logp_gap"] < 0.2
    assert abs(metrics["kl"]) < 1e-3  # π_ref is scored as π_θ is


def torchrun(processes, *arguments, timeout=280):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        str(ROOT / "tests" / "ranks.py"),
        *map(str, arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def one_and_more(folder, tmp_path, processes, *names):
    torchrun(1, "gradient", folder, tmp_path / "one.pt", *names)
    torchrun(processes, "gradient", folder, tmp_path / "more.pt", *names)
    one, more = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "more"))
    assert (one["processes"], more["processes"]) == (1, processes)
    return one, more


def apart(a, b):
    return float((a - b).norm() / a.norm())


def test_two_processes_have_the_gradient_of_one(folder, model_folder, tmp_path):
    one, more = one_and_more(folder, tmp_path, 2, "keep")
    assert one["gradient"].norm() > 0 and apart(one["gradient"], more["gradient"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_more_processes_take_the_steps_of_one(folder, model_folder, tmp_path, processes):
    one, more = one_and_more(folder, tmp_path, processes, "keep", "sgd", "adam")
    assert apart(one["gradient"], more["gradient"]) < 1e-5
    a, b = one["sgd"]["figures"], more["sgd"]["figures"]  # loss, KL of each step
    assert len(a) == 20 and (a[0] - a[-1]).abs().min() > 1e-3
    assert (a - b).abs().max() < 1e-5
    # Adam turns rounding into steps where a gradient is next to 0: reported, not bounded tightly.
    drift = {name: apart(one[name]["weights"], more[name]["weights"]) for name in ("sgd", "adam")}
    print(f"{processes} processes: {drift}")
    assert drift["sgd"] < 1e-5 and drift["adam"] < 1e-4


def test_ranks_make_the_same_calls_whatever_fails_on_one(folder, model_folder, tmp_path):
    torchrun(2, "calls", folder, tmp_path / "calls.json")
    zero, one = json.loads((tmp_path / "calls.json").read_text())
    assert zero["repaired"] == 0 and one["repaired"] == 4
    assert zero["calls"] == one["calls"] and zero["calls"]["vision"] == 5
    assert zero["finite"] and one["finite"]


def test_local_teacher_takes_all_failures_of_a_step_in_one_batch_per_turn(
    make_config, accelerator, samples, model_folder, monkeypatch
):
    """A random model as the teacher: it says nothing of use, in one `generate` for all six, and
    again when it is asked once more."""
    config = make_config(
        teacher="local",
        teacher_model=model_folder,
        teacher_max_tokens=4,
        teacher_device="cpu",
        blind_test=False,
        max_steps=1,
    )
    batches, local = [], train.teacher.local

    def counted(*args):
        chat = local(*args)
        return lambda talks, seconds: batches.append(len(talks)) or chat(talks, seconds)

    monkeypatch.setattr(train.teacher, "local", counted)
    teach = train.load_teacher(config, samples, accelerator.device)
    _, (metrics,) = train_once(config, accelerator, samples, teach)
    assert (
        batches == [6, 6] and metrics["teacher_calls"] == 12 and metrics["teacher_malformed"] == 6
    )
    assert 0 < metrics["teacher_tokens"] <= 4 * 12 and metrics["teacher_seconds"] > 0


@pytest.mark.slow
def test_sharded_step_ends_with_equal_weights_whatever_fails_on_a_rank(
    folder, model_folder, tmp_path
):
    torchrun(2, "sharded", folder, tmp_path / "sharded.json")
    zero, one = json.loads((tmp_path / "sharded.json").read_text())
    assert zero["dtensors"] and one["dtensors"] and zero["repaired"] == 0 < one["repaired"]
    few, many = zero["gathers"]  # layers are gathered once, whatever the number of tokens
    assert 0 < few == many
    assert zero["finite"] and zero["moved"] and zero["sum"] == one["sum"]
    assert max(zero["gap"], one["gap"]) < 1e-4


def test_a_rank_whose_teacher_always_raises_does_not_hold_the_step(folder, model_folder, tmp_path):
    torchrun(2, "raises", folder, tmp_path / "raises.json")
    facts = json.loads((tmp_path / "raises.json").read_text())
    seconds = {
        name: sorted(row["seconds_round"] + row["seconds_update"] for row in rows)[1]
        for name, rows in facts.items()
    }
    assert seconds["raising"] <= 2 * seconds["normal"]
    for normal, raising in zip(facts["normal"], facts["raising"]):
        assert raising["processes"] == 2 and normal["teacher_failures"] == 0
        assert 0 < raising["teacher_raised"] == raising["teacher_failures"]
        assert raising["intervention"] > 0  # the other rank's are repaired


def test_whole_job_runs_on_two_processes(tmp_path):
    said = torchrun(
        2, "run", tmp_path, "--max_steps", 3, "--questions_per_device", 2, "--num_rollouts", 2
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["method"] == "ffr"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert all(json.loads(line)["logp_gap"] < 1e-4 for line in lines)
    assert "unaided_after" in said and said.count("unaided_after") == 1
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_tiny_modes_start_is_what_the_cold_start_is_made_from(model_folder):
    """All but the trained weights; `python tests/cold_start.py` makes them."""
    made, shipped = Path(model_folder), ROOT / "assets" / "tiny"
    for file in ("tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (made / file).read_text() == (shipped / file).read_text()
    first, other = (
        [line for line in (folder / "config.json").read_text().splitlines() if "dtype" not in line]
        for folder in (made, shipped)
    )
    assert first == other


@pytest.mark.parametrize("name", ["reward", "grpo", "teacher", "data"])
def test_leaf_files_work_alone(tmp_path, name):
    jobs = {
        "reward": "assert reward.score('<think>a</think> <answer>B</answer>', 'B', 'multiple choice')"
        " == (1.0, 1.0, True)",
        "grpo": "import torch; assert grpo.group_advantages(torch.tensor([[0., 2.]])).sum() == 0",
        "teacher": "assert teacher.diagnose([], None, lambda patch, case: None) == []",
        "data": "p = data.needle_videos('n', 1, 0); s = data.load_samples(p)[0];"
        " assert len(data.Video(s.path)) == 16",
    }
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"import {name}; {jobs[name]}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


LIMITS = {"teacher": 850, "reward": 400, "ffr": 580, "grpo": 510, "data": 630, "train": 810}


@pytest.mark.parametrize("name", LIMITS)
def test_files_keep_their_limits(name):
    """In lines of at most 100 columns, as `ruff format --line-length 100` lays a file out. Blank
    lines, which a reader needs, cost nothing."""
    lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
    written = [line for line in lines if line.strip()]
    assert len(written) <= LIMITS[name] and max(map(len, lines)) <= 100


def test_every_setting_is_read():
    files = ("train.py", "ffr.py", "teacher.py", "data.py", "grpo.py")
    source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    names = train.Config.__dataclass_fields__.keys() - grpo.Objective.__dataclass_fields__.keys()
    assert len(names) > 40
    for name in names:
        assert re.search(rf"\b(config|settings|view)\.{name}\b", source), name
    objective = (ROOT / "grpo.py").read_text(encoding="utf-8")
    for name in grpo.Objective.__dataclass_fields__:
        assert f"objective.{name}" in objective, name


def test_useless_teacher_is_told_once_and_stops_the_run_with_a_checkpoint(
    make_config, accelerator, samples, some_right, tmp_path, monkeypatch, capsys
):
    def refuses(cases, usage):
        return [teacher.TeacherError("http_402", "no credit left")] * len(cases)

    monkeypatch.setattr(train, "STEPS_WITHOUT_PATCH", 3)
    config = make_config(max_steps=9)
    with pytest.raises(SystemExit, match="helped nobody in 3 steps.*no credit left.*--resume"):
        train_once(config, accelerator, samples, refuses)
    said = capsys.readouterr()
    said = said.out + said.err
    assert said.count("teacher: http_402: no credit left") == 1
    assert said.count("teacher: no failed rollout of step") == 3
    assert [*(tmp_path / "checkpoints").iterdir()] == [tmp_path / "checkpoints" / "000003"]
    rows = train.read_rows(tmp_path / "metrics.jsonl")
    assert len(rows) == 3
    table = train.summarize_run([], [], rows)
    assert table["teacher_http_402"] == table["teacher_failures"] > 0


def test_the_newest_checkpoints_are_kept(make_config, accelerator, samples, teach, tmp_path):
    config = make_config(max_steps=4, save_steps=1, keep_checkpoints=2)
    train_once(config, accelerator, samples, teach)
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == ["000003", "000004"]


def test_fix_rate_is_the_share_of_all_repairs_that_are_right():
    """Of 100 first answers 40 are repaired, 10 rightly; of the next 100, 10, all rightly."""
    steps = [{"fix": 0.25, "intervention": 0.4}, {"fix": 1.0, "intervention": 0.1}]
    history = [step | {"failure": 0.5, "teacher_failures": 0} for step in steps]
    assert train.summarize_run([], [], history)["fix_rate"] == pytest.approx(20 / 50)


def test_teacher_that_helps_now_and_then_does_not_stop_the_run(
    make_config, accelerator, samples, some_right, monkeypatch, teach
):
    steps = []

    def every_second(cases, usage):
        steps.append(cases)
        if len(steps) % 2:
            return [teacher.TeacherError("busy")] * len(cases)
        return teach(cases)

    monkeypatch.setattr(train, "STEPS_WITHOUT_PATCH", 2)
    _, history = train_once(make_config(max_steps=5), accelerator, samples, every_second)
    assert len(history) == 5
