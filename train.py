"""Train a video student with Find, Fix, Reason; without `--model` a tiny one on needle videos."""

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
from PIL import Image
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import data
import ffr
import grpo
import teacher
from ffr import Chosen, Question, Student, flat
from reward import accuracy, answers, gate

HELPLESS = 10  # steps without any patch, after which the run stops
NEEDLES = {"train": (512, 2), "held_out": (192, 3)}  # tiny mode's videos, seed


# --- settings: each room's own, and the run's ---
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
    gradient_checkpointing: Annotated[bool, "less memory, a second forward (ours)"] = False
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
    log_reliance: Annotated[bool, "what repairs owe to their patch: a forward more (ours)"] = False


@dataclass
class Config(
    grpo.Objective,
    grpo.SamplingSettings,
    ffr.Method,
    ffr.View,
    teacher.Settings,
    data.Settings,
    RunSettings,  # a dataclass begins with the fields of its last base
):
    """All settings: every room is given the whole and reads its own."""


# Tiny mode is the method at another size: these become the defaults where --model is not given.
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
# What may differ when a run is resumed: where the teacher's replies come from, and what is kept.
FREE = {"versions", "resume", "out", "save_steps", "keep_checkpoints", "decode_patience"}
FREE |= {"log_with", "log_reliance", "teacher_url", "teacher_device", "teacher_batch"}
FREE |= {"teacher_workers", "teacher_timeout", "teacher_step_timeout", "teacher_model"}
FREE |= {"teacher_max_tokens", "teacher_cache"}


def parse(arguments: list[str]) -> Config:
    """Read the settings and refuse what cannot be meant."""
    parser = ffr.settings_parser(
        Config.__bases__[::-1],
        tiny=TINY,
        prog="train.py",
        usage="train.py [--model M --data FILE] [settings]",
        description=f"{__doc__} Defaults, in brackets, are the paper's (Table 8), or (ours).",
    )
    if "--model" not in [argument.split("=")[0] for argument in arguments]:
        parser.set_defaults(**TINY)
    config = Config(**vars(parser.parse_args(arguments)))
    validate(config)
    return config


def validate(c: Config) -> None:
    """Exit with one sentence where settings cannot be meant."""
    known = ["all", *(str(tracker) for tracker in get_available_trackers())]
    sizes = {"questions_per_device", "num_updates", "num_frames", "frame_pixels", "picture_pixels"}
    sizes |= {"max_completion_length", "save_steps", "keep_checkpoints", "epochs"}
    none = [f"--{name}" for name in sorted(sizes) if getattr(c, name) < 1]
    checks = [
        (bool(c.model) != bool(c.data), "--model and --data FILE, the records, go together"),
        (c.eval_data and not c.model, "--eval_data goes with --model and --data"),
        (c.eval_only and not c.model, "--eval_only needs --model, the student to measure"),
        (none, f"{', '.join(none)} must be 1 or more"),
        (min(c.max_steps, c.rollouts_at_once) < 0, "--max_steps, --rollouts_at_once: 0 or more"),
        (min(c.learning_rate, c.epsilon) < 0, "--learning_rate and --epsilon must be 0 or more"),
        (c.num_rollouts < 2, "--num_rollouts must be 2 or more: one rollout has no group"),
        (min(c.kappa, c.lam, c.beta) < 0, "--kappa, --lam and --beta must be 0 or more"),
        (c.lora_rank and not find_spec("peft"), "--lora_rank needs peft: pip install peft"),
        ({*trackers_of(c)} - {*known}, f"--log_with {c.log_with}: pip install it; here: {known}"),
    ]
    for refused, why in checks + ffr.checks_of_round(c):
        if refused:
            raise SystemExit(f"train.py: {why}")


def trackers_of(config: Config) -> list[str]:
    return [name for name in config.log_with.split(",") if name]


# --- the loop ---
def train(config, accelerator, student: Student, samples, teach, spare: Question) -> list[dict]:
    """Step by step a round, an update and its metrics; returns the metrics of all steps. `spare` is
    a question that is known to open, for records that do not."""
    run = prepare(config, accelerator, student, steps_of(config, accelerator, samples))
    done, history = resume(config, accelerator)
    bar = progress_bar(done, run.steps, accelerator)
    with interruptible(accelerator) as interrupts:
        for step in bar:
            mine = pick(samples, step, config, accelerator)
            groups, rows, figures = train_step(run, mine, teach, spare, step=step)
            metrics = {"step": step + 1} | summarize(rows, gather_object([figures]))
            history.append(metrics)
            report(run, metrics, groups, bar)

            end = watch_teacher(history[done:], rows, accelerator.is_main_process)
            if any(gather_object([len(interrupts)])):
                end = "interrupted"
            if end or (step + 1) % config.save_steps == 0 or step + 1 == run.steps:
                folder = save_checkpoint(config, accelerator, step + 1)
            if end:
                words = f"train.py: {end} after step {step + 1}, which is saved in {folder}; "
                words += "the same command with --resume True goes on"
                accelerator.end_training()
                raise SystemExit(words if accelerator.is_main_process else 1)
    save_model(run)
    return history


def train_step(run, samples, teach, spare, step: int) -> tuple[list, list[dict], dict]:
    """A round on this process's `samples`, its advantages, an update. Returns this process's groups
    and figures, and the rows that describe the rollouts of all."""
    config, began = run.config, time.time()
    questions = open_questions(run.student, samples, spare)
    spent = Counter(calls=0, hits=0, tokens=0, seconds=0.0, refused=0)
    ask = None if teach is None else partial(teach, spent=spent)
    with run.accelerator.autocast():
        groups = ffr.find_fix_reason(
            run.student,
            questions,
            config.num_rollouts,
            ask,
            kappa=config.kappa,
            lam=config.lam,
            seed=(config.seed, step),
        )
        if config.log_reliance and teach is not None:
            ffr.measure_reliance(run.student, groups)
    counted = [chosen for chosen in flat(groups) if chosen.question.counts]
    rows = gather_object([describe(chosen) for chosen in counted])

    middle = time.time()
    set_advantages(groups, rows, config.scale_rewards)
    figures = update(run, groups, rows, spare)
    figures |= {f"teacher_{name}": count for name, count in spent.items()}
    figures["seconds_round"] = middle - began
    figures["seconds_update"] = time.time() - middle
    figures["skipped"] = float(sum(not question.counts for question in questions))
    figures["repaired_advantage"] = sum(c.advantage for c in counted if c.repaired is not None)
    return groups, rows, figures


def set_advantages(groups: list[list[Chosen]], rows: list[dict], scale: str) -> None:
    """A_i within each group; the std of a batch is of all processes' rollouts that count."""
    rewards = torch.tensor([[chosen.reward for chosen in group] for group in groups])
    batch_std = torch.tensor([row["reward"] for row in rows] or [0.0, 0.0]).std()
    advantages = grpo.group_advantages(rewards, scale, batch_std)  # (questions, G)
    for chosen, advantage in zip(flat(groups), advantages.flatten().tolist()):
        chosen.advantage = advantage


def update(run, groups: list[list[Chosen]], rows: list[dict], spare: Question) -> dict:
    """J(θ) on the chosen rollouts' own tokens, under their own prompts."""
    prompts, trained = ffr.episodes(groups)
    tokens = max(total(rows, "length"), 1)  # Σ|τ̂_i| of all processes
    stand_in = ffr.stand_in(run.student, spare) if grpo.is_sharded(run.model) else None
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


class Run(NamedTuple):
    """What every step works with; `model` and `optimizer` are the accelerator's."""

    config: Config
    accelerator: Accelerator
    student: Student
    steps: int
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    reference: torch.nn.Module | None  # π_ref


def prepare(config: Config, accelerator, student: Student, steps: int) -> Run:
    """Hand the model to accelerate; the student keeps it unwrapped."""
    model = student.model
    rate, decay = config.learning_rate, config.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, steps)
    reference = reference_policy(config, accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Else accelerate casts all logits to fp32 at once; `grpo.chosen_logps` does so in chunks.
    student.model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.register_for_checkpointing(scheduler)
    return Run(config, accelerator, student, steps, model, optimizer, scheduler, reference)


def steps_of(config: Config, accelerator, samples: list) -> int:
    per_step = config.questions_per_device * accelerator.num_processes
    if len(samples) < per_step:
        raise ValueError(f"{len(samples)} records do not fill a step of {per_step}")
    return config.max_steps or config.epochs * (len(samples) // per_step)


def progress_bar(done: int, steps: int, accelerator) -> tqdm:
    shape = "step {n} of {total} [{elapsed}<{remaining}{postfix}]"
    quiet = not accelerator.is_main_process
    return tqdm(range(done, steps), total=steps, initial=done, bar_format=shape, disable=quiet)


def pick(samples: list[data.Sample], step: int, config, accelerator) -> list[data.Sample]:
    """This process's samples of a step: a seeded shuffle per epoch, less the last partial step."""
    count = config.questions_per_device
    per_step = count * accelerator.num_processes
    epoch, step_of_epoch = divmod(step, len(samples) // per_step)
    shuffle = torch.Generator().manual_seed(config.seed * 1000 + epoch)
    order = torch.randperm(len(samples), generator=shuffle).tolist()
    start = step_of_epoch * per_step + accelerator.process_index * count
    return [samples[i] for i in order[start : start + count]]


def open_questions(student: Student, samples: list, spare: Question) -> list[Question]:
    """Open each sample. `spare` stands in for one that fails, so that processes keep in step."""
    questions = []
    for sample in samples:
        try:
            questions.append(ffr.open_question(student, sample))
        except ValueError as error:
            tqdm.write(f"skipped: {error}")
            questions.append(replace(spare, counts=False))
    return questions


def watch_teacher(history: list[dict], rows: list[dict], tell: bool) -> str | None:
    """Tell the first failure of each cause, and a step in which no failed rollout got a patch.
    Returns a sentence where that holds of the last HELPLESS steps that asked the teacher."""
    words = {}  # of each cause, those of its first failure in this step
    for row in rows:
        if row["cause"]:
            words.setdefault(row["cause"], f"{row['cause']}: {row['detail']}")
    news = []
    for cause, said in words.items():
        if not any(f"teacher_{cause}" in metrics for metrics in history[:-1]):
            news.append(said)
    if words and not history[-1]["intervention"]:
        news.append(f"no failed rollout of step {history[-1]['step']} got a patch")
    for line in news if tell else []:
        tqdm.write(f"teacher: {line}")

    asked = [row for row in history if row["teacher_failures"] or row["intervention"]][-HELPLESS:]
    helped = any(metrics["intervention"] for metrics in asked)
    if words and len(asked) == HELPLESS and not helped:
        return f"the teacher helped nobody in {HELPLESS} steps ({[*words.values()][0]}): stopped"
    return None


@contextmanager
def interruptible(accelerator):
    """Yields a list. A first Ctrl-C only puts its time there, so that the step can be finished and
    saved; a second one leaves at once. (A launcher of several processes passes on what the terminal
    has sent to them already, and kills them after 30 seconds.)"""
    interrupts = []
    echo = 1.0 if accelerator.num_processes > 1 else 0.0  # seconds in which a launcher passes it on

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


# --- metrics: what stands in metrics.jsonl (README, glossary) ---
MEANS = ["unaided", "failure", "intervention", "reward", "format", "truncated", "length"]
MEANS_OF_REPAIRS = ["fix", "align", "reliance", "patch_frames", "patch_seconds"]
LARGEST = ["grad_norm", "logp_gap", "seconds_round", "seconds_update"]  # of the processes


def describe(chosen: Chosen) -> dict:
    """A chosen rollout in the numbers that `summarize` works on."""
    patch, error, completion = chosen.patch, chosen.error, chosen.rollout.completion
    again = [] if chosen.repaired is None else chosen.repaired.completion.ids
    frames = sum(last - first + 1 for first, last in patch.spans) if patch else 0
    return {
        "unaided": chosen.unaided.score.correct,
        "failure": not chosen.unaided.score.correct,
        "intervention": chosen.repaired is not None,
        "fix": chosen.rollout.score.correct,
        "reward": chosen.reward,
        "format": chosen.rollout.score.format,
        "align": chosen.align,
        "reliance": chosen.reliance,
        "truncated": not completion.finished,
        "length": len(completion.ids),
        "entropy": float(completion.entropy.sum()),
        "sampled_tokens": len(chosen.unaided.completion.ids) + len(again),
        "patch_frames": len(patch.key_frames) if patch else 0,
        "patch_seconds": frames / chosen.question.video.fps,
        "cause": error and error.cause,
        "detail": error and error.detail,
    }


def summarize(rows: list[dict], updates: list[dict]) -> dict[str, float]:
    """A step's metrics, from `rows` of its rollouts and `updates`, the figures of its processes."""
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
    """A step's metrics to the progress line, the trackers and metrics.jsonl; a picture now and
    then."""
    bar.set_postfix({k: f"{metrics[k]:.2f}" for k in ("unaided", "intervention", "fix")}, False)
    run.accelerator.log(metrics, step=metrics["step"])
    if run.accelerator.is_main_process:
        add_rows(Path(run.config.out, "metrics.jsonl"), [metrics])
        show_repair(run, groups, metrics["step"])


def show_repair(run: Run, groups: list[list[Chosen]], step: int) -> None:
    """Draw a repair that came out right, eight in a run; each fourth picture is of one that did
    not. Where a step has none of the kind, one of the other is drawn."""
    folder = Path(run.config.out, "repairs")
    drawn = len([*folder.glob("*.txt")])
    if drawn * run.steps > 8 * (step - 1):
        return

    wanted = drawn % 4 != 3
    repairs = [chosen for chosen in flat(groups) if chosen.repaired is not None]
    repairs.sort(key=lambda chosen: chosen.repaired.score.correct != wanted)
    for chosen in repairs[:1]:
        name = re.sub(r"[^\w-]", "_", f"step-{step:04d}-{chosen.question.sample.id}")
        file = folder / f"{name}.png"
        ffr.draw_repair(chosen, run.config.kappa, run.config.lam, file)
        track_picture(run.accelerator, file, step)


def track_picture(accelerator, file: Path, step: int) -> None:
    """Give a repair's picture to the trackers that take pictures, each in the form it wants."""
    for tracker in accelerator.trackers:
        picture = Image.open(file)
        if tracker.name == "tensorboard":
            tracker.log_images({"repair": pil_to_tensor(picture)[None]}, step=step)
        elif tracker.name == "wandb":
            tracker.log_images({"repair": [picture]}, step=step)


# --- evaluation and a run in figures ---
def evaluate(
    config: Config, accelerator, student, samples, teach, spare, name: str, at_once=64
) -> list[dict]:
    """Greedy answers to held-out records: is each right unaided, and with the teacher's help where
    it was not? Rows are kept in OUT/`name`.jsonl; a run that goes on asks for the others only."""
    student = replace(student, sampling=replace(student.sampling, temperature=0.0))
    file, processes = Path(config.out, f"{name}.jsonl"), accelerator.num_processes
    rows = shared_rows(accelerator, file)
    done = {row["id"] for row in rows}
    left = [sample for sample in samples if sample.id not in done]
    starts = range(0, len(left), at_once * processes)
    for start in tqdm(starts, name, leave=False, disable=not accelerator.is_main_process):
        batch = left[start : start + at_once * processes]
        mine = batch[accelerator.process_index :: processes]
        questions = open_questions(student, mine, spare) or [replace(spare, counts=False)]
        with accelerator.autocast():
            groups = ffr.find_fix_reason(
                student, questions, 1, teach, kappa=0.0, lam=0.0, seed=("evaluation",)
            )
        counted = [chosen for chosen in flat(groups) if chosen.question.counts]
        fresh = gather_object([evaluation_row(chosen) for chosen in counted])
        if accelerator.is_main_process:
            add_rows(file, fresh)
        rows += fresh
    return rows


def evaluation_row(chosen: Chosen) -> dict:
    sample = chosen.question.sample
    return {
        "id": sample.id,
        "type": sample.problem_type,
        "source": sample.source,
        "unaided": chosen.unaided.score.correct,
        "assisted": chosen.rollout.score.correct,
    }


def summarize_run(before: list[dict], after: list[dict], history: list[dict]) -> dict:
    """A run in figures: held-out accuracy before and after, and its first and last third."""
    third = max(len(history) // 3, 1)  # of the steps
    first, last = history[:third], history[-third:]
    repairs = sum(row["intervention"] for row in history)
    fixed = sum(row["fix"] * row["intervention"] for row in history)
    figures = {
        "unaided_before": mean(before, "unaided") if before else None,
        "unaided_after": mean(after, "unaided") if after else None,
        "assisted_after": mean(after, "assisted") if after else None,
        "failure_first": mean(first, "failure"),
        "failure_last": mean(last, "failure"),
        "intervention_first": mean(first, "intervention"),
        "intervention_last": mean(last, "intervention"),
        "fix_rate": fixed / repairs if repairs else None,
    }
    for row in history:
        names = list(row)
        for name in names[names.index("teacher_failures") :]:  # and after it those by cause
            figures[name] = figures.get(name, 0) + row[name]
    return figures


MEANINGS = {
    "unaided_before": "held-out questions answered right before training",
    "unaided_after": "and after it",
    "assisted_after": "and with a patch where the answer was wrong",
    "failure_first": "first answers that are wrong, first third of the steps",
    "failure_last": "and last third",
    "intervention_first": "patches over first answers, first third",
    "intervention_last": "and last third",
    "fix_rate": "second answers that are right",
    "teacher_failures": "wrong answers that got no patch",
    "seconds": "with both evaluations",
}


def print_table(figures: dict) -> None:
    """The run's figures, with a word on each."""
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
    """The model, frozen, with trainable adapters (LoRA) beside the linear parts of its text layers.
    They begin at 0: the policy is as it was until the first update."""
    from peft import LoraConfig, get_peft_model

    names = {module: name for name, module in model.named_modules()}
    parts = model.get_decoder().modules()
    linear = [names[part] for part in parts if isinstance(part, torch.nn.Linear)]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear))


def store_linears_in_bf16(model) -> None:
    """Halve frozen linear layers. Autocast casts their weights at each call, so nothing changes;
    norms and embeddings, tied ones too, it leaves in fp32, and so does this."""
    tied = model.get_input_embeddings().weight
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and not part.weight.requires_grad:
            part.to(torch.float32 if part.weight is tied else torch.bfloat16)


def reference_policy(config: Config, accelerator, model):
    """π_ref, the policy before training: None at β = 0; with adapters the model itself, called
    without them; else a frozen copy. `model` is not yet the accelerator's."""
    if config.lora_rank or config.beta == 0:
        return model if config.beta > 0 else None
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
        raise ValueError(f"{config.model} holds adapters; merge them into their base (README)")
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
    """The brain that the settings name, inside the protocol of teacher.py."""
    if config.method == "grpo" or config.eval_only:  # at test time there is no teacher
        return None
    Path(config.teacher_cache or config.out).mkdir(parents=True, exist_ok=True)  # or say so now
    evidence = {s.id: s.truth["evidence"] for s in samples if "evidence" in s.truth}
    try:
        return teacher.load_teacher(config, device, gate, answers, evidence)
    except ValueError as error:
        raise SystemExit(f"train.py: {error}") from error


# --- what a run keeps ---
def read_rows(file: Path, last: float = float("inf")) -> list[dict]:
    """The rows of a file up to step `last`; later ones and a line that was cut off leave it."""
    if not file.is_file():
        return []
    rows, size = [], 0
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
    """`read_rows` by the main process, for every process."""
    rows = read_rows(file, last) if accelerator.is_main_process else []
    return broadcast_object_list([rows])[0]


def resume(config: Config, accelerator) -> tuple[int, list[dict]]:
    """Load the newest checkpoint, if the run goes on: the steps done, and their metrics."""
    folder = newest_checkpoint(config) if config.resume else None
    if folder:
        accelerator.load_state(str(folder))
    done = int(folder.name) if folder else 0
    return done, shared_rows(accelerator, Path(config.out, "metrics.jsonl"), done)


def newest_checkpoint(config: Config) -> Path | None:
    return max(Path(config.out, "checkpoints").glob("[0-9]*"), default=None)


def save_checkpoint(config: Config, accelerator, step: int) -> Path:
    """Weights, optimizer, schedule and random states, whole or not at all; the oldest go. (The
    accelerator's own rotation removes old ones first, and can leave half of a new one.)"""
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
    """What kept a checkpoint from being written; torch wraps the errors of ranks into one."""
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
    """Prepare OUT, and tiny mode's videos there; returns the settings with what tiny mode adds."""
    if accelerator.is_main_process:
        write_manifest(config, accelerator.num_processes)
    if not config.model:
        config = tiny_run(config, accelerator)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("ffr", vars(config))
    return config


def write_manifest(config: Config, processes: int) -> None:
    """Write what a run's figures depend on into OUT. Where that holds a run, --resume refuses other
    settings, and without it only a tiny run is replaced, by a tiny run."""
    out = Path(config.out)
    file = out / ("evaluation.manifest.json" if config.eval_only else "manifest.json")
    now = vars(config) | {"processes": processes}
    now["versions"] = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    files = [path for path in (config.data, config.eval_data, config.skip) if path]
    now["sha256"] = {path: data.digest(path) for path in files}

    then = read_manifest(file)
    rows = ["evaluation"] if config.eval_only else ["metrics", "before", "after"]
    begun = any(Path(out, f"{name}.jsonl").exists() for name in rows)
    differ = ", ".join(name for name in now if name not in FREE and then.get(name) != now[name])
    if begun and config.resume and differ:
        raise ValueError(f"{out} was begun with another {differ}: --resume needs the same")
    replaces = not config.resume and not config.model and then.get("model") == ""
    if begun and not config.resume and not replaces:
        raise ValueError(f"{out} holds a run: --resume it, remove it or choose another --out")
    if replaces:
        print(f"train.py: {out} holds a tiny run; this one replaces it")
        remove_tiny_run(out)
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=1) + "\n")


def read_manifest(file: Path) -> dict:
    """The settings of the run that OUT holds; {} where it holds none."""
    try:
        then = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        then = None
    if then is None or (then and "sha256" not in then):
        raise ValueError(f"{file} is not of a run: choose another --out")
    return then


def remove_tiny_run(out: Path) -> None:
    """Remove what tiny mode writes, so that an interrupted run leaves no mixture of two. The
    manifest goes last: as long as it is there, the next run removes the rest."""
    for name in ("checkpoints", "repairs", "model", "ffr", *NEEDLES):  # ffr: a tracker's
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("summary.json", "metrics.jsonl", "before.jsonl", "after.jsonl", "manifest.json"):
        Path(out, name).unlink(missing_ok=True)


# --- main ---
def make_accelerator(config: Config) -> Accelerator:
    """The accelerator, for the devices and processes that there are. Raises ValueError."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each rank samples before it is sharded
    cpu = not torch.accelerator.is_available()  # only if told so does accelerate join CPU processes
    precision = {"auto": None if cpu else "bf16", "bf16": "bf16", "fp32": "no"}[config.precision]
    patience = timedelta(seconds=1800 + 2 * config.teacher_step_timeout)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=trackers_of(config) or None,
        project_dir=config.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
    )
    processes = accelerator.num_processes
    if processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError("the launcher's processes did not join; see `accelerate env`")
    if processes == 1 and re.search(r"--num.processes[ =]([2-9]|1\d)", of_launcher("cmdline")):
        raise ValueError(
            "on a CPU accelerate launch starts one process, whatever --num_processes says; "
            "`torchrun --nproc_per_node N train.py` starts N"
        )
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED") and not accelerator.is_fsdp2:
        raise ValueError("parameters are sharded by FSDP2 only: --use_fsdp --fsdp_version 2")
    if cpu:
        torch.set_num_threads(threads_of(processes))
    return accelerator


def threads_of(processes: int) -> int:
    """Threads of each process: the user's OMP_NUM_THREADS, else what the machine has, up to 4."""
    environment = " ".join(f"{name}={value}" for name, value in os.environ.items())
    users = re.search(r"\bOMP_NUM_THREADS=([1-9]\d*)", of_launcher("environ") or environment)
    if users:
        return int(users[1])
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # what a container leaves of them, on Linux
        cores = len(os.sched_getaffinity(0))
    return max(1, min(4, cores // processes))


def of_launcher(what: str) -> str:
    """A launcher's "cmdline" or "environ", which it changes for its children; "" without one."""
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    file = Path(f"/proc/{os.getppid()}/{what}")
    if not launched or not file.exists():
        return ""
    return file.read_text(errors="replace").replace("\0", " ")


def tiny_run(config: Config, accelerator) -> Config:
    """Tiny mode's settings: the shipped cold start, and needle videos, which are written here."""
    ours = [f"{name} {getattr(config, name)} ({getattr(Config, name)})" for name in TINY]
    accelerator.print("Tiny mode. (A notice above is accelerate's: its defaults are right here.)")
    accelerator.print("In brackets, with --model:", *ours[2:], sep="\n  ")
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
    """Training and held-out records, all of whose videos open."""
    samples = data.load_samples(config.data, config.video_root, config.skip)
    held_out = []
    if config.eval_data:
        held_out = data.load_samples(config.eval_data, config.video_root)
    if accelerator.is_main_process:
        data.refuse_broken(samples, config.data, config.skip, config.decode_patience)
        data.refuse_broken(held_out, config.eval_data, patience=config.decode_patience)
    if not config.eval_only:
        steps_of(config, accelerator, samples)  # too few are refused before any work
    return samples, held_out


def open_spare(student: Student, samples: list[data.Sample]) -> Question:
    """A question that opens, of the longest text: is its prompt within the limit?"""
    return ffr.open_question(student, max(samples, key=lambda s: len(s.question + str(s.options))))


def finish(config: Config, accelerator, figures: dict) -> None:
    if accelerator.is_main_process:
        name = "evaluation.json" if config.eval_only else "summary.json"
        Path(config.out, name).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print_table(figures)
    accelerator.end_training()  # a rank that exits inside the process group may abort


def main() -> None:
    began, config = time.time(), parse(sys.argv[1:])
    try:
        accelerator = make_accelerator(config)
        config = open_run(config, accelerator)
        samples, held_out = load_records(config, accelerator)
        student = load_student(config, accelerator)
        teach = load_teacher(config, samples + held_out, accelerator.device)
        spare = open_spare(student, samples)
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: {error}") from error

    if config.eval_only:
        rows = evaluate(config, accelerator, student, samples, None, spare, name="evaluation")
        figures = {"records": len(samples), "answered": len(rows)} | accuracy(rows)
    else:
        before = evaluate(config, accelerator, student, held_out, None, spare, name="before")
        history = train(config, accelerator, student, samples, teach, spare)
        after = evaluate(config, accelerator, student, held_out, teach, spare, name="after")
        figures = summarize_run(before, after, history)
        figures |= {"seconds": round(time.time() - began, 1), "seed": config.seed}
        figures |= {"method": config.method, "processes": accelerator.num_processes}
    finish(config, accelerator, figures)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "train.py: left at once; --resume True goes on from what is saved"
        ) from None
