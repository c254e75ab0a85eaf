"""What a run does for its user: Ctrl-C, checkpoints, threads, trackers, the last table."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from traceback import StackSummary
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_train import same, train_once
from torch.distributed.checkpoint.api import CheckpointException

import data
import ffr
import grpo
import reward
import teacher
import train
from reward import Score
from teacher import EvidencePatch


def interrupting(samples, at):
    """The scripted teacher; while the round waits for its replies of step `at`, Ctrl-C comes."""
    scripted = teacher.scripted({s.id: s.truth["evidence"] for s in samples})
    steps, sent = [], []

    def chat(conversations, seconds):
        if len(steps) == at and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
            time.sleep(0.3)
        return scripted(conversations, seconds)

    def ask(cases, **more):
        steps.append(cases)
        return teacher.diagnose(cases, chat, reward.gate, **more)

    return ask


SETTINGS = {"max_steps": 4, "learning_rate": 1e-3, "save_steps": 99, "keep_checkpoints": 9}


def test_ctrl_c_in_the_teachers_wait_finishes_the_step_and_the_run_goes_on_as_if_nothing_was(
    make_config, accelerator, samples, teach, some_right, tmp_path, capsys
):
    whole, history = train_once(
        make_config(**SETTINGS), train.Accelerator(cpu=True), samples, teach
    )
    for name in ("metrics.jsonl", "repairs", "model"):
        (tmp_path / name).rename(tmp_path / f"whole-{name}")
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGINT)
    told = "interrupted after step 2, which is saved in .*checkpoints/000002; .*--resume True goes"
    with pytest.raises(SystemExit, match=told):
        train_once(make_config(**SETTINGS), accelerator, samples, interrupting(samples, at=2))
    said = capsys.readouterr()
    assert (said.out + said.err).count("once more leaves at once") == 1
    assert [row["step"] for row in train.read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert signal.getsignal(signal.SIGINT) is handler  # as it was
    config, fresh = make_config(**SETTINGS, resume=True), train.Accelerator(cpu=True)
    student = train.load_student(config, fresh)
    spare = ffr.open_question(student, samples[0])
    rest = train.train(
        config, accelerator=fresh, student=student, samples=samples, teach=teach, placeholder=spare
    )
    assert same(whole, student)
    assert [row["reward"] for row in rest] == [row["reward"] for row in history]


def test_a_second_ctrl_c_leaves_at_once(make_config, accelerator, samples):
    def ask(cases, **more):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_once(make_config(**SETTINGS), accelerator, samples, ask)


def test_a_signal_that_a_launcher_passes_on_is_not_a_second_one():
    ranks = SimpleNamespace(num_processes=2, is_main_process=True)
    with train.interruptible(ranks) as interrupts:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert len(interrupts) == 1


def test_ctrl_c_in_the_last_step_keeps_it_and_leaves(make_config, samples):
    one = SETTINGS | {"max_steps": 1}
    with pytest.raises(SystemExit, match="interrupted after step 1"):
        train_once(
            make_config(**one), train.Accelerator(cpu=True), samples, interrupting(samples, at=1)
        )
    config, fresh = make_config(**one, resume=True), train.Accelerator(cpu=True)
    student = train.load_student(config, fresh)
    spare = ffr.open_question(student, samples[0])
    assert (
        len(
            train.train(
                config,
                accelerator=fresh,
                student=student,
                samples=samples,
                teach=None,
                placeholder=spare,
            )
        )
        == 1
    )
    assert train.Path(config.out, "model", "model.safetensors").is_file()


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(28, "No space left on device"), "no room for a checkpoint of step 1?"),
        (RuntimeError("unexpected pos 64 vs 0"), "no room for a checkpoint of step 1?"),
        (OSError(30, "Read-only file system"), "no checkpoint of step 1 .*Read-only file system"),
        (
            CheckpointException("save", {1: (OSError("rank 1 is lost"), StackSummary())}),
            "no checkpoint of step 1 .rank 1 is lost.; mend that",
        ),
    ],
)
def test_checkpoint_that_cannot_be_written_says_its_own_reason(
    make_config, accelerator, samples, monkeypatch, error, words
):
    def save_state(folder):
        raise error

    monkeypatch.setattr(accelerator, "save_state", save_state)
    with pytest.raises(SystemExit, match=words):
        train_once(make_config(max_steps=1), accelerator, samples, None)


def tiny_main(monkeypatch, out, *more):
    monkeypatch.setattr(train, "NEEDLES", {"train": (4, 2), "held_out": (2, 3)})
    arguments = ["train.py", "--out", str(out), "--max_steps", "1", "--num_rollouts", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, *more])
    train.main()


def test_second_tiny_run_in_a_folder_changes_no_file_there(monkeypatch, tmp_path):
    tiny_main(monkeypatch, tmp_path)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    names = {file.relative_to(tmp_path).parts[0] for file in files}
    assert {"summary.json", "model", "checkpoints", "before.jsonl", "after.jsonl"} <= names
    with pytest.raises(SystemExit, match="holds a run: --resume True, or remove it"):
        tiny_main(monkeypatch, tmp_path, "--seed", "1")
    assert files == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_folder_in_which_a_run_is_at_work_is_refused_until_that_process_ends(monkeypatch, tmp_path):
    code = (
        "import sys, train; train.lock_folder(train.Path(sys.argv[1])); print(); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    ends = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **ends) as other:
        assert other.stdout.readline() == b"\n"
        for more in ([], ["--resume", "True"]):
            with pytest.raises(SystemExit, match=f"another run is at work in {tmp_path}: choose"):
                tiny_main(monkeypatch, tmp_path, *more)
        assert [file.name for file in tmp_path.iterdir()] == ["lock"]
        other.kill()  # no farewell: the system itself takes the lock away
    tiny_main(monkeypatch, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "half", "nonsense"])
@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "model.safetensors", "optimizer.bin"])
def test_checkpoint_that_does_not_load_is_named_in_one_line(
    make_config, accelerator, samples, name, damage
):
    config = make_config(max_steps=1)
    train_once(config, accelerator, samples, None)
    file = train.newest_checkpoint(config) / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "half" else b"nonsense" * 999)
    with pytest.raises(
        SystemExit, match=r"^train.py: .*/000001 does not load \([^\n]+\); remove it, and --resume"
    ):
        train.resume(replace(config, resume=True), accelerator)


def test_tiny_mode_does_not_replace_another_run(monkeypatch, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for manifest in ({"model": "a 7B", "sha256": {}}, {}):  # or it is lost
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(SystemExit, match="holds a run: --resume True, or remove it"):
            tiny_main(monkeypatch, tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "model").mkdir()
    for other in ('{"name": "my data"}', "[1]", ""):
        (tmp_path / "manifest.json").write_text(other)
        with pytest.raises(SystemExit, match="manifest.json is not of a run: choose another"):
            tiny_main(monkeypatch, tmp_path)
        assert (tmp_path / "model").is_dir()


def test_users_number_of_threads_counts_also_behind_a_launcher(monkeypatch):
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(train, "read_launcher", lambda what: "")
    assert train.threads_per_process(2) == 3
    monkeypatch.setattr(train, "read_launcher", lambda what: "HOME=/ OMP_NUM_THREADS=2 LANG=C")
    assert train.threads_per_process(2) == 2
    monkeypatch.setattr(train, "read_launcher", lambda what: "HOME=/ MY_OMP_NUM_THREADS=2 LANG=C")
    assert [train.threads_per_process(n) for n in (1, 4, 8, 32)] == [4, 4, 2, 1]
    for nothing in ("0", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert train.threads_per_process(16) == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(train, "read_launcher", lambda what: "")
    assert train.threads_per_process(8) == 2


def launch(*arguments, **environment):
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=clean | environment, cwd=ROOT
    )


@pytest.mark.slow
def test_accelerate_launch_does_not_take_the_threads_nor_promise_processes_it_does_not_start(
    tmp_path,
):
    script = tmp_path / "threads.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train, torch\n"
        "train.make_accelerator(train.parse([]))\n"
        "print('threads', torch.get_num_threads())\n"
    )
    # The launcher sets OMP_NUM_THREADS=1 where the user has not: that is no wish of the user's.
    assert f"threads {min(4, len(os.sched_getaffinity(0)))}\n" in launch(str(script)).stdout
    two = launch("--cpu", "--num_processes", "2", "train.py", "--out", str(tmp_path / "two"))
    assert two.returncode and "train.py: on a CPU accelerate launch starts one" in two.stderr
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_tensorboard_gets_the_metrics_and_a_repair_as_a_picture(
    monkeypatch, tmp_path, model_folder, samples
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(train, "NEEDLES", {"train": (4, 2), "held_out": (2, 3)})
    arguments = ["--out", str(tmp_path), "--max_steps", "2", "--log_with", "tensorboard"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()
    (file,) = tmp_path.glob("ffr/events*")
    events = EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    rows = train.read_rows(tmp_path / "metrics.jsonl")
    for name in ("unaided", "reward", "teacher_calls", "grad_norm"):
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [1, 2]
        assert [event.value for event in scalars] == pytest.approx([row[name] for row in rows])
    pictures, files = events.Images("repair"), sorted(tmp_path.glob("repairs/*.png"))
    assert [picture.step for picture in pictures] == [1, 2] and len(files) == 2
    for picture, file in zip(pictures, files):
        assert (picture.width, picture.height) == data.Image.open(file).size


def test_a_tracker_that_is_not_installed_is_refused(make_config):
    with pytest.raises(SystemExit, match="--log_with nothing: unknown or not installed"):
        make_config(log_with="nothing")


def test_reliance_is_what_a_repair_loses_without_its_patch(
    make_config, accelerator, samples, teach, some_right, tmp_path
):
    config = make_config(max_steps=2, learning_rate=1e-3)
    plain, history = train_once(config, accelerator, samples, teach)
    (tmp_path / "metrics.jsonl").unlink()
    config.log_reliance = True
    logged, measured = train_once(config, accelerator, samples, teach)
    assert same(plain, logged)  # it only looks
    assert all(row["reliance"] == 0 for row in history)
    assert all(row["reliance"] != 0 for row in measured)


def test_reliance_by_completion_logps(student, questions, teach):
    groups = ffr.find_fix_reason(
        student,
        questions=questions[:2],
        num_rollouts=2,
        teacher=teach,
        kappa=0.3,
        lam=0.1,
        seed=(0, 0),
    )
    groups[1][1].repaired = None
    ffr.measure_reliance(student, groups)
    for member in ffr.flat(groups)[:3]:
        ids = member.repaired.completion.ids
        prompts = (member.question.prompt, member.repaired.prompt)
        bare, patched = (
            grpo.completion_logps(student.model, prompt, ids, student.sampling).mean()
            for prompt in prompts
        )
        assert member.reliance == pytest.approx(float(bare - patched), abs=1e-4)
        assert abs(member.reliance) > 1e-4
    assert groups[1][1].reliance == 0


def test_each_fourth_picture_is_of_a_repair_that_did_not_help(tmp_path, monkeypatch, student):
    def member_with(correct: bool | None) -> ffr.Member:
        rollout = ffr.Rollout({}, None, "", Score(0.0, 0.0, bool(correct)))
        return ffr.Member(question, 0, rollout, repaired=None if correct is None else rollout)

    def draw(member, kappa, lam, file):
        shown.append(member.repaired.score.correct)
        file.parent.mkdir(exist_ok=True)
        file.with_suffix(".txt").touch()

    monkeypatch.setattr(ffr, "draw_repair", draw)
    monkeypatch.setattr(train, "track_picture", lambda *_: None)
    question = ffr.Question(
        data.Sample(id="a/b", question="q", options=[], answer="x", problem_type="exact", path="v"),
        None,
        [],
        [],
    )
    config = train.replace(student.view, out=str(tmp_path))
    nobody = dict.fromkeys(train.Run._fields)
    run, shown = train.Run(**nobody | {"config": config, "steps": 8}), []
    both = [[member_with(None), member_with(False), member_with(True)]]
    for step in range(1, 9):
        train.show_repair(run, both, step)
    assert shown == [True, True, True, False] * 2  # eight in a run
    assert len([*tmp_path.glob("repairs/step-*-a_b.txt")]) == 8
    train.show_repair(run, [[member_with(None)]], step=99)
    train.show_repair(run, [[member_with(False)]], step=99)  # better than no picture
    assert shown[8:] == [False]


def test_last_table_says_what_its_figures_are_and_why_there_is_none(capsys):
    row = {"failure": 1.0, "intervention": 0.0, "fix": 0.0}
    row |= {"teacher_failures": 6, "teacher_http_402": 6}
    train.print_table(train.summarize_run([], [], [row] * 3))
    said = capsys.readouterr().out
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in said.strip().splitlines()}
    assert lines["unaided_after"] == ["None", "without --eval_data nothing was asked"]
    assert lines["failure_first"][0] == "1.000" and "first third" in lines["failure_first"][1]
    why = "no patch was given: teacher_failures 18, teacher_http_402 18"
    assert lines["fix_rate"] == ["None", why]
    assert lines["teacher_failures"] == ["18", "wrong first answers that got no patch"]


def test_evidence_may_stand_before_the_question(student, questions, monkeypatch):
    """One function says where it stands; sampled and scored log-probs stay equal, also in rows
    that a group's rollouts share."""

    def before(text, evidence):
        return [{"type": "video"}, *evidence, {"type": "text", "text": text}]

    monkeypatch.setattr(ffr, "user_turn", before)
    patches = [EvidencePatch("temporal", "look", key_frames=[k], spans=[(k, k)]) for k in (3, 9)]
    groups = ffr.find_fix_reason(
        student,
        questions=questions[:2],
        num_rollouts=2,
        teacher=lambda cases: patches * 2,
        kappa=0.3,
        lam=0.1,
        seed=(0, 0),
    )
    prompts, episodes = ffr.episodes(groups)
    text = student.processor.tokenizer.decode(prompts[2]["input_ids"][0])
    assert text.lower().index("guidance") < text.index(questions[0].sample.question.split()[0])
    for row_tokens in (8192, 0):
        logps, mask = grpo.batched_logps(
            student.model, prompts, episodes, sampling=student.sampling, row_tokens=row_tokens
        )
        for episode, own in zip(episodes, logps):
            gap = episode.sampled_logps - own[: len(episode.ids)]
            assert gap.abs().max() < 1e-4
            alone = grpo.completion_logps(
                student.model, prompts[episode.prompt], episode.ids, student.sampling
            )
            assert torch.allclose(alone, own[: len(alone)], atol=1e-4)
