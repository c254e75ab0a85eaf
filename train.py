"""Train a video student with Find, Fix, Reason; without `--model` a tiny one on needle videos.

    train        the loop: `train_step`, its metrics, checkpoints, reasons to stop
    train_step   the round (`ffr.find_fix_reason`), A_i (`set_advantages`), J(θ) (`update_policy`)
    evaluate     held-out accuracy, unaided and assisted
    main         settings, accelerator, records, student, teacher; then evaluate, train, evaluate

Begin with `train_step`. What stands between `evaluate` and `main` loads, keeps and prints.
"""

import atexit
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import data
import ffr
import grpo
import teacher
from ffr import Member, Question, Student, flat
from reward import answers_correctly, gate

HOLDS_ADAPTERS = "holds adapters; merge them into their base (README)"
STEPS_WITHOUT_PATCH = 10  # that many, one after another, stop the run
NEEDLES = {"train": (512, 2), "held_out": (192, 3)}  # tiny mode's videos, seed


# --- settings: those of each file, and the run's ---
@dataclass
class RunSettings:
    """The run. Defaults are FFR's Table 8 unless marked (ours)."""

    model: Annotated[str, "student: folder or hub name of a video VLM; empty: tiny mode"] = ""
    out: Annotated[str, "folder for metrics, summary, repairs and weights (ours)"] = "runs/ffr"
    seed: Annotated[int, "of everything random (ours)"] = 0
    resume: Annotated[bool, "go on with the run in --out, if there is one (ours)"] = False
    eval_only: Annotated[bool, "measure --model on --data, train nothing (ours)"] = False
    method: Annotated[Literal["ffr", "grpo"], "grpo has no teacher (ours)"] = "ffr"
    precision: Annotated[Literal["auto", "bf16", "fp32"], "auto: bf16 autocast on a GPU"] = "auto"
    attention: Annotated[str, "empty: transformers' choice; paper: flash_attention_2"] = ""
    lora_rank: Annotated[int, "train adapters of this rank, peft's LoRA; 0: all weights (ours)"] = 0
    gradient_checkpointing: Annotated[bool, "saves memory, costs a second forward (ours)"] = False
    freeze_vision: Annotated[bool, "leave the vision tower as it is (ours)"] = False
    scale_rewards: Annotated[Literal["group", "batch", "none"], "std of the advantages"] = "group"
    learning_rate: Annotated[float, "peak, with a cosine to 0"] = 5e-6
    weight_decay: Annotated[float, "of AdamW"] = 0.01
    epochs: Annotated[int, "passes over the records"] = 1
    max_steps: Annotated[int, "steps; 0: as many as the epochs have (ours)"] = 0
    questions_per_device: Annotated[int, "questions per process and step"] = 1
    save_steps: Annotated[int, "steps between checkpoints (ours)"] = 200
    keep_checkpoints: Annotated[int, "the newest ones (ours)"] = 2
    log_with: Annotated[str, "tensorboard, wandb, …: accelerate's trackers (ours)"] = ""
    log_reliance: Annotated[bool, "also measure what a repair owes to its patch (ours)"] = False


@dataclass
class Config(
    grpo.Objective,
    grpo.SamplingSettings,
    ffr.RoundSettings,
    ffr.View,
    teacher.TeacherSettings,
    data.DataSettings,
    RunSettings,  # a dataclass begins with the fields of its last base
):
    """All settings. Each file declares its own; whoever is handed all reads what it needs."""


# Tiny mode is the same method at a small scale. Without --model these are the defaults.
TINY = dict(
    out="runs/tiny",
    prompt="{question}",
    frame_pixels=1024,
    picture_pixels=1024,
    max_completion_length=16,
    learning_rate=3e-4,
    beta=0.0,
    lam=0.1,
    questions_per_device=4,
    max_steps=400,
)
AT_LEAST_1 = ("epochs", "frame_pixels", "keep_checkpoints", "max_completion_length", "num_frames")
AT_LEAST_1 += ("num_updates", "picture_pixels", "questions_per_device", "save_steps")
AT_LEAST_0 = ("beta", "epsilon", "kappa", "lam", "learning_rate", "lora_rank", "max_steps")
AT_LEAST_0 += ("rollouts_at_once", "weight_decay")
# What may change when a run is resumed: settings without effect on training, and the teacher's,
# which may need fixing.
MAY_DIFFER = ("decode_patience", "keep_checkpoints", "log_reliance", "log_with", "out", "resume")
MAY_DIFFER += ("save_steps", "teacher_batch", "teacher_cache", "teacher_device", "teacher_model")
MAY_DIFFER += ("teacher_max_tokens", "teacher_step_timeout", "teacher_timeout", "teacher_url")
MAY_DIFFER += ("teacher_workers", "versions")


def parse(arguments: list[str]) -> Config:
    """Read the settings; exit with one sentence if they make no sense."""
    what, *_ = __doc__.splitlines()
    parser = ffr.settings_parser(
        Config.__bases__[::-1],
        tiny=TINY,
        prog="train.py",
        usage="train.py [--model M --data FILE] [settings]",
        description=f"{what} Defaults, in brackets, are the paper's (Table 8), or (ours).",
    )
    if "--model" not in [argument.split("=")[0] for argument in arguments]:
        parser.set_defaults(**TINY)
    config = Config(**vars(parser.parse_args(arguments)))
    validate(config)
    return config


def validate(config: Config) -> None:
    """Exit with one sentence if the settings make no sense."""
    too_small = [f"--{name}" for name in AT_LEAST_1 if getattr(config, name) < 1]
    negative = [f"--{name}" for name in AT_LEAST_0 if getattr(config, name) < 0]
    trackers = ["all", *(str(tracker) for tracker in get_available_trackers())]
    unknown = {*tracker_names(config)} - {*trackers}
    adapters = config.model and Path(config.model, "adapter_config.json").is_file()
    checks = [
        (bool(config.model) != bool(config.data), "--model and --data FILE go together"),
        (config.eval_data and not config.model, "--eval_data goes with --model and --data"),
        (config.eval_only and not config.model, "--eval_only needs --model, the student to ask"),
        (adapters and not config.eval_only, f"{config.model} {HOLDS_ADAPTERS}"),
        (too_small, f"{', '.join(too_small)} must be 1 or more"),
        (negative, f"{', '.join(negative)} must be 0 or more"),
        (config.num_rollouts < 2, "--num_rollouts must be 2 or more: one rollout has no group"),
        (config.lora_rank and not find_spec("peft"), "--lora_rank needs peft: pip install peft"),
        (unknown, f"--log_with {config.log_with}: unknown or not installed; here: {trackers}"),
    ]
    for refused, why in checks + ffr.checks_of_round(config):
        if refused:
            raise SystemExit(f"train.py: {why}")


def tracker_names(config: Config) -> list[str]:
    return [name for name in config.log_with.split(",") if name]


# --- the loop ---
class Run(NamedTuple):
    """What every step needs. `model` and `optimizer` are wrapped by accelerate."""

    config: Config
    accelerator: Accelerator
    student: Student
    steps: int
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    reference: torch.nn.Module | None  # π_ref


def train(config, accelerator, student: Student, samples, teach, placeholder: Question) -> list:
    """Train: in each step a round, an update and its metrics. Returns the metrics of all steps.
    `placeholder` is a question that is known to open; it stands in for records that do not."""
    steps = count_steps(config, accelerator, samples)
    run = prepare(config, accelerator, student, steps)
    done, history = resume(config, accelerator)
    bar = progress_bar(done, run.steps, accelerator)
    with interruptible(accelerator) as interrupts:
        for step in bar:
            mine = pick(samples, step, config, accelerator)
            groups, rows, figures = train_step(run, mine, teach, placeholder, step=step)
            metrics = {"step": step + 1} | summarize(rows, gather_object([figures]))
            history.append(metrics)
            report(run, metrics, groups, bar)

            failures = first_failures(rows)
            if accelerator.is_main_process:
                report_failures(history[done:], failures)
            stop = reason_to_stop(history[done:], failures)
            if any(gather_object([len(interrupts)])):  # on any process
                stop = "interrupted"
            if stop or (step + 1) % config.save_steps == 0 or step + 1 == run.steps:
                folder = save_checkpoint(config, accelerator, step + 1)
            if stop:
                end_early(accelerator, f"{stop} after step {step + 1}, which is saved in {folder}")
    save_model(run)
    return history


def train_step(run: Run, samples, teach, placeholder, step: int) -> tuple[list, list[dict], dict]:
    """Take a step: a round on this process's `samples`, its advantages and an update. Returns
    (groups, rows, figures): this process's groups and figures, and the rows of all processes."""
    config = run.config
    began = time.time()
    questions = open_questions(run.student, samples, placeholder)
    usage = Counter(calls=0, hits=0, tokens=0, seconds=0.0, refused=0)
    teach_and_count = None if teach is None else partial(teach, usage=usage)
    with run.accelerator.autocast():
        groups = ffr.find_fix_reason(
            run.student,
            questions,
            config.num_rollouts,
            teach_and_count,
            kappa=config.kappa,
            lam=config.lam,
            seed=(config.seed, step),
        )
        if config.log_reliance and teach is not None:
            ffr.measure_reliance(run.student, groups)
    counted = [member for member in flat(groups) if not member.question.is_placeholder]
    rows = gather_object([member_row(member) for member in counted])

    round_ended = time.time()
    set_advantages(groups, rows, config.scale_rewards)
    figures = update_policy(run, groups, rows, placeholder)

    figures |= {f"teacher_{name}": count for name, count in usage.items()}
    figures["seconds_round"] = round_ended - began
    figures["seconds_update"] = time.time() - round_ended
    figures["skipped"] = float(sum(question.is_placeholder for question in questions))
    repaired = [member for member in counted if member.repaired is not None]
    figures["repaired_advantage"] = sum(member.advantage for member in repaired)
    return groups, rows, figures


def set_advantages(groups: list[list[Member]], rows: list[dict], scale: str) -> None:
    """Set A_i within each group. The std of a batch is over the rollouts of all processes."""
    rewards = torch.tensor([[member.reward for member in group] for group in groups])
    batch_std = torch.tensor([row["reward"] for row in rows] or [0.0, 0.0]).std()
    advantages = grpo.group_advantages(rewards, scale, batch_std)  # (questions, G)
    for member, advantage in zip(flat(groups), advantages.flatten().tolist()):
        member.advantage = advantage


def update_policy(run: Run, groups: list[list[Member]], rows: list, placeholder: Question) -> dict:
    """Maximize J(θ) on the tokens of the chosen rollouts, each under its own prompt."""
    prompts, trained = ffr.episodes(groups)
    tokens = max(total(rows, "length"), 1)  # Σ|τ̂_i| of all processes
    stand_in = ffr.stand_in(run.student, placeholder) if grpo.is_sharded(run.model) else None

    figures = grpo.update(
        run.accelerator,
        run.model,
        run.optimizer,
        grpo.Batch(prompts, trained, tokens, stand_in),
        sampling=run.student.sampling,
        objective=run.config,
        reference=run.reference,
    )
    run.scheduler.step()
    return figures


def prepare(config: Config, accelerator, student: Student, steps: int) -> Run:
    """Hand the model and its optimizer to accelerate. The student keeps the unwrapped model."""
    model = student.model
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, steps)
    reference = reference_policy(config, accelerator, model)

    model, optimizer = accelerator.prepare(model, optimizer)
    # Not accelerate's wrapper, which casts all logits to fp32; `batched_logps` does it in chunks.
    student.model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.register_for_checkpointing(scheduler)
    return Run(config, accelerator, student, steps, model, optimizer, scheduler, reference)


def count_steps(config: Config, accelerator, samples: list) -> int:
    """Return the steps of the whole run. Raises ValueError if the records do not fill one."""
    per_step = config.questions_per_device * accelerator.num_processes
    if len(samples) < per_step:
        raise ValueError(f"{len(samples)} records do not fill a step of {per_step}")
    return config.max_steps or config.epochs * (len(samples) // per_step)


def progress_bar(done: int, steps: int, accelerator) -> tqdm:
    shape = "step {n} of {total} [{elapsed}<{remaining}{postfix}]"
    quiet = not accelerator.is_main_process
    return tqdm(range(done, steps), total=steps, initial=done, bar_format=shape, disable=quiet)


def pick(samples: list[data.Sample], step: int, config, accelerator) -> list[data.Sample]:
    """Return this process's samples of a step: a seeded shuffle per epoch, no partial last step."""
    count = config.questions_per_device
    per_step = count * accelerator.num_processes
    epoch, step_of_epoch = divmod(step, len(samples) // per_step)
    shuffle = torch.Generator().manual_seed(config.seed * 1000 + epoch)
    order = torch.randperm(len(samples), generator=shuffle).tolist()
    start = step_of_epoch * per_step + accelerator.process_index * count
    return [samples[i] for i in order[start : start + count]]


def open_questions(student: Student, samples: list, placeholder: Question) -> list[Question]:
    """Open each sample. If one fails, the placeholder keeps this process in step with others."""
    questions = []
    for sample in samples:
        try:
            questions.append(ffr.open_question(student, sample))
        except ValueError as error:
            tqdm.write(f"skipped: {error}")
            questions.append(replace(placeholder, is_placeholder=True))
    return questions


def first_failures(rows: list[dict]) -> dict[str, str]:
    """Return by cause the first failure of the teacher in this step, in its own words."""
    failures = {}
    for row in rows:
        if row["cause"]:
            failures.setdefault(row["cause"], f"{row['cause']}: {row['detail']}")
    return failures


def report_failures(history: list[dict], failures: dict[str, str]) -> None:
    """Print each cause when it first comes up in the run, and each step without any patch."""
    for cause, words in failures.items():
        if not any(f"teacher_{cause}" in metrics for metrics in history[:-1]):
            tqdm.write(f"teacher: {words}")
    if failures and not history[-1]["intervention"]:
        tqdm.write(f"teacher: no failed rollout of step {history[-1]['step']} got a patch")


def reason_to_stop(history: list[dict], failures: dict[str, str]) -> str | None:
    """Return why to stop: the teacher fails now, and gave no patch at all in the last
    STEPS_WITHOUT_PATCH steps that asked it. None if that is not so."""
    asked = [step for step in history if step["teacher_failures"] or step["intervention"]]
    last = asked[-STEPS_WITHOUT_PATCH:]
    helped = any(step["intervention"] for step in last)
    if not failures or helped or len(last) < STEPS_WITHOUT_PATCH:
        return None
    first, *_ = failures.values()
    return f"the teacher helped nobody in {STEPS_WITHOUT_PATCH} steps ({first}): stopped"


def end_early(accelerator, what: str) -> None:
    """End the run with one sentence."""
    accelerator.end_training()
    words = f"train.py: {what}; the same command with --resume True goes on"
    raise SystemExit(words if accelerator.is_main_process else 1)


@contextmanager
def interruptible(accelerator):
    """Yield a list, to which the first Ctrl-C only adds its time, so that the step is finished and
    saved. A second one leaves at once. (A launcher of several processes repeats the terminal's
    Ctrl-C to them, hence `echo`, and kills them after 30 seconds.)"""
    interrupts = []
    echo = 1.0 if accelerator.num_processes > 1 else 0.0  # seconds in which a launcher repeats it

    def note(signal_number, frame):
        if interrupts and time.monotonic() - interrupts[0] >= echo:
            raise KeyboardInterrupt
        if not interrupts:
            interrupts.append(time.monotonic())
            if accelerator.is_main_process:
                tqdm.write("Ctrl-C: this step is finished and saved; once more leaves at once")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


# --- metrics: a line of metrics.jsonl (README: What the metrics mean) ---
MEANS = ["unaided", "failure", "intervention", "reward", "format", "truncated", "length"]
MEANS_OF_REPAIRS = ["fix", "align", "reliance", "patch_frames", "patch_seconds"]
LARGEST = ["grad_norm", "logp_gap", "seconds_round", "seconds_update"]  # of the processes


def member_row(member: Member) -> dict:
    """Return one member's numbers, which `summarize` turns into the step's metrics."""
    patch, error = member.patch, member.error
    completion = member.chosen.completion
    again = [] if member.repaired is None else member.repaired.completion.ids
    span_frames = sum(last - first + 1 for first, last in patch.spans) if patch else 0

    return {
        "unaided": member.unaided.score.correct,
        "failure": not member.unaided.score.correct,
        "intervention": member.repaired is not None,
        "fix": member.chosen.score.correct,  # `summarize` averages it over repairs alone
        "reward": member.reward,
        "format": member.chosen.score.format,
        "align": member.align,
        "reliance": member.reliance,
        "truncated": not completion.finished,
        "length": len(completion.ids),
        "entropy": float(completion.entropy.sum()),
        "sampled_tokens": len(member.unaided.completion.ids) + len(again),
        "patch_frames": len(patch.key_frames) if patch else 0,
        "patch_seconds": span_frames / member.question.video.fps,
        "cause": error and error.cause,
        "detail": error and error.detail,
    }


def summarize(rows: list[dict], updates: list[dict]) -> dict[str, float]:
    """Return a step's metrics, from the `rows` of its members and the figures of each process."""
    repaired = [row for row in rows if row["intervention"]]
    metrics = {name: mean(rows, name) for name in MEANS}
    metrics |= {name: mean(repaired, name) for name in MEANS_OF_REPAIRS}

    for name in updates[0]:
        join = max if name in LARGEST else sum
        metrics[name] = join(update[name] for update in updates)

    turns = metrics["teacher_calls"] + metrics["teacher_hits"]
    causes = [row["cause"] for row in rows if row["cause"]]
    metrics["sampled_tokens"] = total(rows, "sampled_tokens")
    metrics["entropy"] = total(rows, "entropy") / max(total(rows, "length"), 1)
    metrics["repaired_advantage"] /= max(len(repaired), 1)
    metrics["won_per_call"] = total(repaired, "fix") / max(turns, 1)
    metrics["teacher_failures"] = len(causes)
    for cause in causes:  # these come last
        metrics[f"teacher_{cause}"] = causes.count(cause)
    return metrics


def mean(rows: list[dict], name: str) -> float:
    return total(rows, name) / max(len(rows), 1)


def total(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows)


def report(run: Run, metrics: dict, groups, bar: tqdm) -> None:
    """Write a step's metrics to the progress line, trackers and file; sometimes draw a repair."""
    bar.set_postfix({k: f"{metrics[k]:.2f}" for k in ("unaided", "intervention", "fix")}, False)
    run.accelerator.log(metrics, step=metrics["step"])
    if run.accelerator.is_main_process:
        add_rows(Path(run.config.out, "metrics.jsonl"), [metrics])
        show_repair(run, groups, metrics["step"])


def show_repair(run: Run, groups: list[list[Member]], step: int) -> None:
    """Draw a repair of the step, about eight times in a run: three that came out right, then one
    that did not, or one of the other kind if there is none."""
    folder = Path(run.config.out, "repairs")
    drawn = len([*folder.glob("*.txt")])
    due = 8 * (step - 1) / run.steps
    if drawn > due:
        return

    wanted = drawn % 4 != 3
    repairs = [member for member in flat(groups) if member.repaired is not None]
    repairs.sort(key=lambda member: member.repaired.score.correct != wanted)
    for member in repairs[:1]:
        name = re.sub(r"[^\w-]", "_", f"step-{step:04d}-{member.question.sample.id}")
        file = folder / f"{name}.png"
        ffr.draw_repair(member, run.config.kappa, run.config.lam, file)
        track_picture(run.accelerator, file, step)


def track_picture(accelerator, file: Path, step: int) -> None:
    """Send a repair's picture to the trackers that take pictures, each in its own form."""
    for tracker in accelerator.trackers:
        picture = Image.open(file)
        if tracker.name == "tensorboard":
            tracker.log_images({"repair": pil_to_tensor(picture)[None]}, step=step)
        elif tracker.name == "wandb":
            tracker.log_images({"repair": [picture]}, step=step)


# --- evaluation, and the figures of a run ---
def evaluate(
    config: Config, accelerator, student, samples, teach, placeholder, name: str, at_once=64
) -> list[dict]:
    """Answer held-out records greedily: is each right unaided, and with a patch if it was not? Rows
    are kept in OUT/`name`.jsonl, so that a resumed run asks only what is missing there."""
    student = replace(student, sampling=replace(student.sampling, temperature=0.0))
    file = Path(config.out, f"{name}.jsonl")
    rows = shared_rows(accelerator, file)
    done = {row["id"] for row in rows}
    left = [sample for sample in samples if sample.id not in done]

    processes = accelerator.num_processes
    starts = range(0, len(left), at_once * processes)
    for start in tqdm(starts, name, leave=False, disable=not accelerator.is_main_process):
        batch = left[start : start + at_once * processes]
        mine = batch[accelerator.process_index :: processes]
        questions = open_questions(student, mine, placeholder)
        questions = questions or [replace(placeholder, is_placeholder=True)]

        with accelerator.autocast():
            groups = ffr.find_fix_reason(
                student, questions, 1, teach, kappa=0.0, lam=0.0, seed=("evaluation",)
            )

        counted = [member for member in flat(groups) if not member.question.is_placeholder]
        fresh = gather_object([evaluation_row(member) for member in counted])
        if accelerator.is_main_process:
            add_rows(file, fresh)
        rows += fresh
    return rows


def evaluation_row(member: Member) -> dict:
    sample = member.question.sample
    return {
        "id": sample.id,
        "type": sample.problem_type,
        "source": sample.source,
        "answer": member.unaided.text,
        "unaided": member.unaided.score.correct,
        "assisted": member.chosen.score.correct,
    }


def accuracy(rows: list[dict]) -> dict[str, dict]:
    """Unaided accuracy with its 95 % interval (Wilson): of all rows, by type and by source."""
    groups = {"all": rows}
    for row in rows:
        for kind in ("type", "source"):
            if row[kind]:
                groups.setdefault(f"{kind} {row[kind]}", []).append(row)

    table = {}
    for name, group in groups.items():
        n, z = max(len(group), 1), 1.96
        share = mean(group, "unaided")
        middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
        low = max(middle - half, 0.0)  # it may be −1e-17
        table[name] = dict(n=len(group), accuracy=share, low=low, high=middle + half)
    return table


def summarize_run(before: list[dict], after: list[dict], history: list[dict]) -> dict:
    """Return a run's figures: held-out accuracy before and after, and its first and last third."""
    third = max(len(history) // 3, 1)  # of the steps
    first, last = history[:third], history[-third:]
    # Sums of the steps' rates: each step has as many rollouts, so their ratio is the fix rate.
    repaired = sum(row["intervention"] for row in history)
    fixed = sum(row["fix"] * row["intervention"] for row in history)

    figures = {
        "unaided_before": mean(before, "unaided") if before else None,
        "unaided_after": mean(after, "unaided") if after else None,
        "assisted_after": mean(after, "assisted") if after else None,
        "failure_first": mean(first, "failure"),
        "failure_last": mean(last, "failure"),
        "intervention_first": mean(first, "intervention"),
        "intervention_last": mean(last, "intervention"),
        "fix_rate": fixed / repaired if repaired else None,
    }

    # `teacher_failures` and its causes: `summarize` puts them last.
    for metrics in history:
        names = list(metrics)
        for name in names[names.index("teacher_failures") :]:
            figures[name] = figures.get(name, 0) + metrics[name]
    return figures


MEANINGS = {
    "unaided_before": "share of held-out questions right before training, no teacher",
    "unaided_after": "the same after training",
    "assisted_after": "the same, with a patch wherever the first answer was wrong",
    "failure_first": "share of first answers wrong, first third of training",
    "failure_last": "the same, last third",
    "intervention_first": "share of first answers that got a patch, first third",
    "intervention_last": "the same, last third",
    "fix_rate": "share of second answers right",
    "teacher_failures": "wrong first answers that got no patch",
    "seconds": "of this command",
}


def print_table(figures: dict) -> None:
    """Print the run's figures, a line each, with what it means."""
    print()
    for name, value in figures.items():
        words = MEANINGS.get(name, "")
        if isinstance(value, dict):
            words = "95 % {low:.3f} to {high:.3f}, n {n}".format(**value)
            value = value["accuracy"]
        elif value is None and name != "fix_rate":
            words = "without --eval_data nothing was asked"
        elif value is None:
            causes = [f"{key} {figures[key]}" for key in figures if key.startswith("teacher_")]
            words = f"no patch was given: {', '.join(causes)}"
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        print(f"  {name:20} {shown:8} {words}".rstrip())


# --- the student and the teacher ---
def add_adapters(model, rank: int):
    """Freeze the model and put trainable adapters (LoRA) beside the linear layers of its decoder.
    Their product begins at 0: until the first update the policy is as it was."""
    from peft import LoraConfig, get_peft_model

    names = {module: name for name, module in model.named_modules()}
    parts = model.get_decoder().modules()
    linear = [names[part] for part in parts if isinstance(part, torch.nn.Linear)]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear))


def store_linears_in_bf16(model) -> None:
    """Halve the memory of frozen linear layers. Autocast casts their weights at each call, so this
    changes no result. Norms and embeddings, tied ones too, stay in fp32, as under autocast."""
    tied = model.get_input_embeddings().weight
    for part in model.modules():
        frozen = isinstance(part, torch.nn.Linear) and not part.weight.requires_grad
        if frozen and part.weight is not tied:
            part.to(torch.bfloat16)


def reference_policy(config: Config, accelerator, model):
    """Return π_ref, the policy before training: None at β = 0; with adapters the model itself,
    which is called without them; else a frozen copy. `model` is not yet wrapped by accelerate."""
    if config.beta == 0:
        return None
    if config.lora_rank:
        return model
    reference = deepcopy(model).eval().requires_grad_(False)
    if accelerator.is_fsdp2:
        reference = fsdp2_prepare_model(accelerator, reference)
        reference.set_reshard_after_forward(True)  # no backward comes that would do it
    elif accelerator.mixed_precision == "bf16":
        store_linears_in_bf16(reference)
    return reference


def load_student(config: Config, accelerator: Accelerator) -> Student:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, processor = grpo.load_policy(config.model, config.attention, config.freeze_vision)
    if getattr(model, "_hf_peft_config_loaded", False) and not config.eval_only:
        raise ValueError(f"{config.model} {HOLDS_ADAPTERS}")
    if config.lora_rank:
        torch.manual_seed(config.seed)  # half of the adapters begin at random, on all ranks alike
        model = add_adapters(model, config.lora_rank)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.lora_rank and accelerator.mixed_precision == "bf16":
        store_linears_in_bf16(model)
    sampling = grpo.load_sampling(config, model, processor)
    return Student(model.to(accelerator.device), processor, sampling, view=config)


def load_teacher(config: Config, samples: list[data.Sample], device):
    """Return the teacher that the settings name, a function of cases, or None without a teacher."""
    if config.method == "grpo" or config.eval_only:  # at test time there is no teacher
        return None
    Path(config.teacher_cache or config.out).mkdir(parents=True, exist_ok=True)  # or say so now
    evidence = {s.id: s.truth["evidence"] for s in samples if "evidence" in s.truth}
    return teacher.load_teacher(config, device, gate, answers_correctly, evidence)


# --- what a run keeps ---
def read_rows(file: Path, last: float = float("inf")) -> list[dict]:
    """Return a file's rows up to step `last`. Later rows and an unfinished line are cut off it."""
    if not file.is_file():
        return []
    rows = []
    size = 0
    for line in file.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            row = json.loads(line)
            if row.get("step", 0) <= last:
                rows.append(row)
                size += len(line)
    os.truncate(file, size)
    return rows


def add_rows(file: Path, rows: list[dict]) -> None:
    with open(file, "a", encoding="utf-8") as opened:
        opened.writelines(json.dumps(row) + "\n" for row in rows)


def shared_rows(accelerator, file: Path, last: float = float("inf")) -> list[dict]:
    """Return `read_rows`, which the main process does for all."""
    rows = read_rows(file, last) if accelerator.is_main_process else []
    return broadcast_object_list([rows])[0]


def resume(config: Config, accelerator) -> tuple[int, list[dict]]:
    """Load the newest checkpoint, if the run is resumed. Returns the steps done, their metrics."""
    folder = newest_checkpoint(config) if config.resume else None
    if folder:
        load_checkpoint(accelerator, folder)
    done = int(folder.name) if folder else 0
    if config.resume:
        accelerator.print(f"{done} steps of {config.out} are saved, and not done again")
    return done, shared_rows(accelerator, Path(config.out, "metrics.jsonl"), done)


def load_checkpoint(accelerator, folder: Path) -> None:
    try:
        accelerator.load_state(str(folder))
    except Exception as error:  # a damaged file makes torch and pickle raise almost anything
        why = str(error).partition("\n")[0]
        advice = "remove it, and --resume True goes on from the one before it"
        raise SystemExit(f"train.py: {folder} does not load ({why}); {advice}") from error


def newest_checkpoint(config: Config) -> Path | None:
    return max(Path(config.out, "checkpoints").glob("[0-9]*"), default=None)


def save_checkpoint(config: Config, accelerator, step: int) -> Path:
    """Save weights, optimizer, schedule and random states, whole or not at all; then remove the
    oldest. (accelerate's own rotation removes them first, and may leave half of a new one.)"""
    folder = Path(config.out, "checkpoints")
    try:
        accelerator.save_state(str(folder / "part"))
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise SystemExit(
            f"train.py: {checkpoint_fault(error, step)}; mend that, and --resume True goes on from "
            f"{newest_checkpoint(config)}"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / "part").rename(folder / f"{step:06d}")
        for old in sorted(folder.glob("[0-9]*"))[: -config.keep_checkpoints]:
            shutil.rmtree(old)
    return folder / f"{step:06d}"


def checkpoint_fault(error: BaseException, step: int) -> str:
    """Say why a checkpoint could not be written. torch wraps the errors of the ranks into one."""
    causes = [cause for cause, _ in getattr(error, "failures", {}).values()]
    reason = " ".join(str((causes or [error])[0]).split())
    full = "No space|too large|quota|write failed|unexpected pos"  # the last two are torch's
    if re.search(full, reason, re.IGNORECASE):
        return f"no room for a checkpoint of step {step}? ({reason})"
    return f"no checkpoint of step {step} ({reason})"


def save_model(run: Run) -> None:
    weights = run.accelerator.get_state_dict(run.model)  # whole, where they are sharded
    if run.accelerator.is_main_process:
        folder = Path(run.config.out, "model")
        shutil.rmtree(folder, ignore_errors=True)  # weights and adapters do not mix
        run.student.model.save_pretrained(folder, state_dict=weights)
        run.student.processor.save_pretrained(folder)


def open_run(config: Config, accelerator) -> Config:
    """Prepare OUT, in tiny mode with its videos. Returns the settings, with what tiny mode adds."""
    if accelerator.is_main_process:
        claim_folder(config, accelerator.num_processes)
    if not config.model:
        config = tiny_run(config, accelerator)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("ffr", vars(config))
    return config


def lock_folder(out: Path) -> None:
    """Keep other runs out of OUT while this process lives: they would mix their files."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another run is at work in {out}: choose another --out") from None
    atexit.register(lock.release)  # which also keeps a reference to it until then


def claim_folder(config: Config, processes: int) -> None:
    """Write OUT's manifest: all that its figures depend on. A run in OUT is resumed, or refused."""
    out = Path(config.out)
    lock_folder(out)
    file = out / ("evaluation.manifest.json" if config.eval_only else "manifest.json")
    manifest = manifest_of(config, processes)
    earlier = read_manifest(file)
    if earlier is None:
        raise ValueError(f"{file} is not of a run: choose another --out")

    names = ["evaluation"] if config.eval_only else ["metrics", "before", "after"]
    begun = any(Path(out, f"{name}.jsonl").exists() for name in names)
    compared = [name for name in manifest if name not in MAY_DIFFER]
    changed = [name for name in compared if earlier.get(name) != manifest[name]]
    differ = ", ".join(f"{name} ({earlier.get(name)})" for name in changed)

    if begun and config.resume and differ:
        raise ValueError(f"{out} was begun with another {differ}: --resume needs the same")
    if begun and not config.resume:
        kind = "an evaluation" if config.eval_only else "a run"
        raise ValueError(f"{out} holds {kind}: --resume True, or remove it, or take another --out")
    file.write_text(json.dumps(manifest, indent=1) + "\n")


def manifest_of(config: Config, processes: int) -> dict:
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    files = [path for path in (config.data, config.eval_data, config.skip) if path]
    hashes = {path: data.digest(path) for path in files}
    return vars(config) | {"processes": processes, "versions": versions, "sha256": hashes}


def read_manifest(file: Path) -> dict | None:
    """Return the manifest of a run; {} if there is no such file, None if it is not of a run."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return None
    return None if manifest and "sha256" not in manifest else manifest


def compare_with_training(config: Config, accelerator) -> None:
    """Print what an evaluation asks otherwise than the run that trained the student, if one did."""
    trained = read_manifest(Path(config.model).parent / "manifest.json") or {}
    for name in ("prompt", "num_frames", "frame_pixels", "max_completion_length"):
        here = getattr(config, name)
        if trained.get(name, here) != here:
            accelerator.print(f"Careful: --{name} {here!r}, but in training {trained[name]!r}")


# --- main ---
def make_accelerator(config: Config) -> Accelerator:
    """Make the accelerator, for the devices and processes at hand. Raises ValueError."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each rank samples before it is sharded
    cpu = not torch.accelerator.is_available()  # accelerate joins CPU processes only if told so
    precision = {"auto": None if cpu else "bf16", "bf16": "bf16", "fp32": "no"}[config.precision]
    patience = timedelta(seconds=1800 + 2 * config.teacher_step_timeout)

    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=tracker_names(config) or None,
        project_dir=config.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
    )

    processes = accelerator.num_processes
    if processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError("the launcher's processes did not join; see `accelerate env`")
    if processes == 1 and re.search(r"--num.processes[ =]([2-9]|1\d)", read_launcher("cmdline")):
        raise ValueError(
            "on a CPU accelerate launch starts one process, whatever --num_processes says; "
            "`torchrun --nproc_per_node N train.py` starts N"
        )
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED") and not accelerator.is_fsdp2:
        raise ValueError("parameters are sharded by FSDP2 only: --use_fsdp --fsdp_version 2")
    if cpu:
        torch.set_num_threads(threads_per_process(processes))
    return accelerator


def threads_per_process(processes: int) -> int:
    """Return the user's OMP_NUM_THREADS, else a process's share of the cores, at most 4. accelerate
    launch sets that variable anew, so the user's is read from the launcher."""
    environment = " ".join(f"{name}={value}" for name, value in os.environ.items())
    users = re.search(r"\bOMP_NUM_THREADS=([1-9]\d*)", read_launcher("environ") or environment)
    if users:
        return int(users[1])
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # what a container leaves of them, on Linux
        cores = len(os.sched_getaffinity(0))
    return max(1, min(4, cores // processes))


def read_launcher(what: str) -> str:
    """Return the launcher's "cmdline" or "environ" at its start; "" without a launcher."""
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    file = Path(f"/proc/{os.getppid()}/{what}")
    if not launched or not file.exists():
        return ""
    return file.read_text(errors="replace").replace("\0", " ")


def tiny_run(config: Config, accelerator) -> Config:
    """Write tiny mode's needle videos. Returns its settings, with these and the shipped student."""
    accelerator.print("Tiny mode (see README, --help). Ignore accelerate's notice, if any.")
    if accelerator.is_main_process:
        for name, (count, seed) in NEEDLES.items():
            data.needle_videos(f"{config.out}/{name}", count, seed + 10 * config.seed)
    return replace(
        config,
        model=str(Path(__file__).parent / "assets" / "tiny"),
        data=f"{config.out}/train/records.jsonl",
        eval_data=f"{config.out}/held_out/records.jsonl",
    )


def load_records(config: Config, accelerator) -> tuple[list, list]:
    """Load the training and the held-out records, whose videos all open."""
    samples = data.load_samples(config.data, config.video_root, config.skip)
    held_out = []
    if config.eval_data:
        listed = f"{config.eval_data}.skip.json"
        skip = listed if Path(listed).is_file() else ""
        held_out = data.load_samples(config.eval_data, config.video_root, skip)
    if accelerator.is_main_process:
        data.refuse_broken(samples, config.data, config.skip, config.decode_patience)
        data.refuse_broken(held_out, config.eval_data, patience=config.decode_patience)
    if config.eval_only:
        compare_with_training(config, accelerator)
        accelerator.print(f"{len(samples)} records to score")
    else:
        count_steps(config, accelerator, samples)  # too few are refused before any work
        accelerator.print(f"{len(samples)} records to train on, {len(held_out)} held out")
    return samples, held_out


def open_placeholder(student: Student, samples: list[data.Sample]) -> Question:
    """Open the question with the longest text. It stands in for records that fail to open later,
    and shows now whether prompts keep to their limit."""
    return ffr.open_question(student, max(samples, key=lambda s: len(s.question + str(s.options))))


def finish(config: Config, accelerator, figures: dict) -> None:
    """Keep and print the run's figures."""
    if accelerator.is_main_process:
        name = "evaluation.json" if config.eval_only else "summary.json"
        Path(config.out, name).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print_table(figures)
    accelerator.end_training()  # a rank that exits inside the process group may abort


def main() -> None:
    began = time.time()
    config = parse(sys.argv[1:])
    try:
        accelerator = make_accelerator(config)
        config = open_run(config, accelerator)
        samples, held_out = load_records(config, accelerator)
        student = load_student(config, accelerator)
        teach = load_teacher(config, samples + held_out, accelerator.device)
        placeholder = open_placeholder(student, samples)
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: {error}") from error

    if config.eval_only:
        rows = evaluate(config, accelerator, student, samples, None, placeholder, name="evaluation")
        figures = {"records": len(samples), "answered": len(rows)} | accuracy(rows)
    else:
        before = evaluate(config, accelerator, student, held_out, None, placeholder, name="before")
        history = train(config, accelerator, student, samples, teach, placeholder)
        after = evaluate(config, accelerator, student, held_out, teach, placeholder, name="after")
        figures = summarize_run(before, after, history)
        figures |= {"seconds": round(time.time() - began, 1), "seed": config.seed}
        figures |= {"method": config.method, "processes": accelerator.num_processes}
    finish(config, accelerator, figures)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "train.py: left at once; --resume True goes on from the newest checkpoint, if any"
        ) from None
