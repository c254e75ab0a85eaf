"""Train a video student with Find, Fix, Reason; without `--model` a tiny one on needle videos."""

import argparse
import json
import logging
import os
import random
import shutil
import sys
import time
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from safetensors import SafetensorError
from tqdm import tqdm

import data
import ffr
import grpo
import teacher


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Settings. Defaults are FFR's Table 8 unless marked (ours)."""
    model: str = setting("", "student: folder or hub name of a video VLM; empty: tiny mode")
    data: str = setting("", "training records, .json or .jsonl in Video-R1's format")
    video_root: str = setting("", "folder the records' paths start from; empty: the file's own")
    skip: str = setting("", "list of records to leave out, as `python data.py` writes it (ours)")
    eval_data: str = setting("", "held-out records, for accuracy before and after (ours)")
    out: str = setting("runs/ffr", "folder for metrics, summary, repairs and weights (ours)")
    seed: int = setting(0, "of everything random (ours)")
    resume: bool = setting(False, "go on with the run in --out, if there is one (ours)")
    eval_only: bool = setting(False, "measure --model on --data, train nothing (ours)")
    method: Literal["ffr", "grpo"] = setting("ffr", "grpo has no teacher (ours)")
    teacher: Literal["scripted", "local", "remote"] = setting("scripted", "the teacher's brain")
    teacher_model: str = setting("", "the teacher: local folder or hub name, or the remote's name")
    teacher_url: str = setting("", "of the endpoint; its key is read from TEACHER_API_KEY (ours)")
    teacher_device: str = setting("", "of the local teacher; empty: the student's (ours)")
    teacher_workers: int = setting(8, "diagnoses at a time per process, remote (ours)")
    teacher_max_tokens: int = setting(2048, "of a reply (ours)")
    teacher_timeout: float = setting(240.0, "seconds that a diagnosis may take (ours)")
    teacher_step_timeout: float = setting(480.0, "seconds for all diagnoses of a step (ours)")
    teacher_cache: str = setting("", "folder of replies; without a url they are replayed (ours)")
    teacher_sees_answer: bool = setting(True, "False: the paper's 'no GT reference'")
    patch_pictures: bool = setting(True, "False: the paper's 'no visual context'")
    kappa: float = setting(0.3, "κ, the patch tax on a repaired rollout's reward")
    lam: float = setting(0.0, "λ, weight of alignment; 0 is the paper's equation (ours)")
    prompt: str = setting(ffr.PROMPT, "prompt with {question}, {options}, {suffix} (ours)")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "auto: bf16 autocast on a GPU")
    attention: str = setting("", "empty: transformers' choice; paper: flash_attention_2")
    gradient_checkpointing: bool = setting(False, "less memory, a second forward (ours)")
    freeze_vision: bool = setting(False, "leave the vision tower as it is (ours)")
    num_frames: int = setting(16, "frames of the video that the student sees")
    frame_pixels: int = setting(128 * 28 * 28, "at most so many pixels in each of them")
    picture_pixels: int = setting(401408, "at most so many pixels in each picture of a patch")
    max_prompt_length: int = setting(16384, "tokens; a longer prompt is an error, never cut")
    max_completion_length: int = setting(1024, "tokens")
    num_rollouts: int = setting(8, "G, rollouts per question")
    temperature: float = setting(1.0, "of sampling, and so of the policy that is trained")
    top_p: float = setting(0.95, "nucleus of sampling")
    rollouts_at_once: int = setting(0, "per forward and backward, for memory; 0: all (ours)")
    beta: float = setting(0.04, "β, weight of KL(π_θ ‖ π_ref); 0 loads no reference model")
    epsilon: float = setting(0.2, "ε of the clip (ours: the paper names none)")
    scale_rewards: Literal["group", "batch", "none"] = setting("group", "std of the advantages")
    num_updates: int = setting(1, "μ, optimizer steps per batch of rollouts (ours)")
    learning_rate: float = setting(5e-6, "peak, with a cosine to 0")
    weight_decay: float = setting(0.01, "of AdamW")
    max_grad_norm: float = setting(5.0, "gradients are clipped to this norm")
    epochs: int = setting(1, "passes over the records")
    max_steps: int = setting(0, "steps; 0: as many as the epochs have (ours)")
    questions_per_device: int = setting(1, "questions per process and step")
    save_steps: int = setting(200, "steps between checkpoints (ours)")
    keep_checkpoints: int = setting(2, "the newest ones (ours)")
    cold_start_steps: int = setting(1000, "tiny mode: supervised steps before training (ours)")


GROUPS = {  # in --help, each from this setting on
    "model": "data and output", "method": "the teacher", "kappa": "the method",
    "precision": "the model", "num_frames": "what the student sees and may say",
    "num_rollouts": "rollouts and objective", "learning_rate": "optimization",
    "save_steps": "checkpoints and tiny mode"}
# Tiny mode is the method at another size: these become the defaults where --model is not given.
TINY = dict(out="runs/tiny", prompt="{question}", frame_pixels=1024, picture_pixels=1024,
            max_completion_length=16, learning_rate=3e-4, beta=0.0, lam=0.1,
            questions_per_device=4, max_steps=400)
NEEDLES = {"cold": (384, 1), "train": (512, 2), "held_out": (192, 3)}  # videos, seed
COLD_CUE, COLD_RELATION = 0.0, 0.1  # how often the cold start's answers are right beyond chance
FREE = ("versions", "resume", "out", "save_steps", "keep_checkpoints", "teacher_url",
        "teacher_device", "teacher_workers", "teacher_timeout", "teacher_step_timeout")


def parse(arguments: list[str]) -> Config:
    """Read the settings and refuse what cannot be meant."""
    tiny = "--model" not in [argument.split("=")[0] for argument in arguments]
    parser = argparse.ArgumentParser(
        "train.py", "train.py [--model M --data FILE] [settings]", allow_abbrev=False, description=
        f"{__doc__} Defaults, in brackets, are the paper's (Table 8); (ours) where it has none.")
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        choices = get_args(f.type) or (f.type is bool and ("True", "False")) or None
        kind = dict(type=str.capitalize, nargs="?", const="True") if f.type is bool else {}
        default, tiny_too = f.default, f"; tiny mode {TINY[f.name]}" if f.name in TINY else ""
        shown = f" [{default}{tiny_too}]" if default != "" and f.name != "prompt" else ""
        group.add_argument(
            f"--{f.name}", default=TINY.get(f.name, default) if tiny else default, choices=choices,
            help=f.metadata["help"] + shown, metavar="|".join(choices or [f.type.__name__]),
            **{"type": str if choices else f.type} | kind)
    words = {"True": True, "False": False}
    c = Config(**{k: words.get(v, v) for k, v in vars(parser.parse_args(arguments)).items()})
    for refused, why in [
        (c.model and not c.data, "--model needs --data FILE, the training records"),
        (c.eval_only and not c.model, "--eval_only needs --model, the student to measure"),
        (min(c.save_steps, c.keep_checkpoints) < 1, "--save_steps, --keep_checkpoints: 1 or more"),
        (c.num_rollouts < 2, "--num_rollouts must be 2 or more: one rollout has no group"),
        (min(c.kappa, c.lam, c.beta) < 0, "--kappa, --lam and --beta must be 0 or more"),
        (c.lam >= c.kappa > 0, "--lam must be below --kappa: help must not outrank none"),
        (c.temperature <= 0, "--temperature must be above 0: equal rollouts teach nothing"),
        (not 0 < c.top_p <= 1, "--top_p must be in (0, 1]"),
        (c.teacher != "scripted" and not c.teacher_model, "this --teacher needs --teacher_model"),
        (c.teacher == "remote" and not c.teacher_url + c.teacher_cache, "give --teacher_url"),
    ]:
        if refused:
            raise SystemExit(f"train.py: {why}")
    return c


def load_student(c: Config, accelerator: Accelerator) -> ffr.Student:
    model, processor = grpo.load_policy(
        c.model, c.attention, c.gradient_checkpointing, c.freeze_vision)
    sampling = grpo.sampling_for(model, processor, c.temperature, c.top_p, c.max_completion_length)
    synced = accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")
    return ffr.Student(model.to(accelerator.device), processor, sampling, c, synced)


def load_teacher(c: Config, samples: list[data.Sample], device) -> partial | None:
    """The brain that the settings name, inside the protocol of teacher.py."""
    if c.method == "grpo" or c.eval_only:  # at test time there is no teacher
        return None
    chat, name, most = None, c.teacher_model, c.teacher_max_tokens
    Path(c.teacher_cache or c.out).mkdir(parents=True, exist_ok=True)  # or say so now
    if c.teacher == "scripted":
        found = {s.id: s.truth["evidence"] for s in samples if "evidence" in s.truth}
        if not found:
            raise SystemExit("train.py: no record has 'evidence' for --teacher scripted to look "
                             "up; take local or remote")
        chat = data.scripted({i: e if isinstance(e, list) else [e] for i, e in found.items()})
    elif c.teacher == "local":
        processor = transformers.AutoProcessor.from_pretrained(name)
        model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        chat = teacher.local(model.to(c.teacher_device or device).eval(), processor, most)
    elif c.teacher_url:
        key = "".join(os.environ.get("TEACHER_API_KEY", "").split())
        chat = teacher.remote(c.teacher_url, name, key, most)
        (said,) = chat([[{"role": "user", "content": "Say OK."}]], c.teacher_timeout)
        if isinstance(said, teacher.TeacherError):
            raise SystemExit(f"train.py: no teacher '{name}' at {c.teacher_url} ({said}); "
                             "without --teacher_url a --teacher_cache is replayed")
    return partial(
        teacher.diagnose, chat=chat, gate=ffr.gate, show_answer=c.teacher_sees_answer,
        num_frames=c.num_frames, timeout=c.teacher_timeout, step_timeout=c.teacher_step_timeout,
        workers=c.teacher_workers if c.teacher == "remote" else 0,
        cache=c.teacher_cache if c.teacher != "scripted" else "",
        brain=repr((c.teacher, name, most)))


def train(config: Config, accelerator, student, samples, teach, spare) -> list[dict]:
    """The loop; returns every step's metrics. `spare`: a question that is known to open."""
    per_step = config.questions_per_device * accelerator.num_processes
    if len(samples) < per_step:
        raise SystemExit(f"train.py: {len(samples)} records do not fill a step of {per_step}")
    steps = config.max_steps or config.epochs * (len(samples) // per_step)
    optimizer = torch.optim.AdamW(student.model.parameters(), config.learning_rate,
                                  weight_decay=config.weight_decay)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, steps)
    reference = deepcopy(student.model).eval().requires_grad_(False) if config.beta > 0 else None
    model, optimizer = accelerator.prepare(student.model, optimizer)
    student.model = accelerator.unwrap_model(model)
    accelerator.register_for_checkpointing(scheduler)
    folder = Path(config.out, "checkpoints")
    saved = max(folder.glob("[0-9]*"), default=None) if config.resume else None
    if saved:
        accelerator.load_state(str(saved))
    done, metrics_file = int(saved.name) if saved else 0, Path(config.out, "metrics.jsonl")
    history = ffr.read_rows(accelerator, metrics_file, done)
    bar = tqdm(range(done, steps), config.method, total=steps, initial=done,
               disable=not accelerator.is_main_process)
    for step in bar:
        began = time.time()
        # One round: G rollouts per question, failures repaired, τ̂ chosen
        questions = ffr.open_questions(student, pick(samples, step, config, accelerator), spare)
        spent = Counter(calls=0, hits=0, tokens=0, seconds=0.0, refused=0)
        ask = teach and partial(teach, spent=spent)
        with accelerator.autocast():
            groups = ffr.find_fix_reason(student, questions, config.num_rollouts, ask,
                                         config.kappa, config.lam, (config.seed, step))
        rollouts = [rollout for group in groups for rollout in group]
        counted = [(q, r) for q, group in zip(questions, groups) for r in group if q.counts]
        rows = gather_object([ffr.describe(q, r) for q, r in counted])
        # A_i within each group; the rows, and so the batch's std, are of all processes
        rewards = torch.tensor([[r.reward for r in group] for group in groups])  # (questions, G)
        std = torch.tensor([row["reward"] for row in rows] or [0.0, 0.0]).std()
        advantages = grpo.group_advantages(rewards, config.scale_rewards, std).flatten().tolist()
        # J(θ) on the chosen rollouts' own tokens, under their own prompts
        counts = [float(q.counts) for q in questions for _ in range(config.num_rollouts)]
        trained = [grpo.Row(r.first.prompt, r.prompt, r.completion, a * counted, counted)
                   for r, a, counted in zip(rollouts, advantages, counts)]
        middle, tokens = time.time(), max(sum(row["length"] for row in rows), 1)
        figures = grpo.update(
            accelerator, model, reference, optimizer, trained, tokens, student.sampling,
            config.epsilon, config.beta, config.num_updates, config.max_grad_norm,
            config.rollouts_at_once, ffr.stand_in(student, spare) if student.synced else None)
        scheduler.step()
        repaired = sum(a for r, a in zip(rollouts, advantages) if r.failed)
        figures |= {"seconds_round": middle - began, "seconds_update": time.time() - middle,
                    "skipped": counts.count(0.0) / config.num_rollouts,
                    **{f"teacher_{name}": count for name, count in spent.items()},
                    "repaired_advantage": repaired / max(sum(r["intervention"] for r in rows), 1)}
        metrics = {"step": step + 1} | ffr.summarize(rows, gather_object([figures]))
        history.append(metrics)
        ffr.add_rows(accelerator, metrics_file, [metrics])
        shown = len([*Path(config.out, "repairs").glob("*.txt")])
        if accelerator.is_main_process and shown * steps <= 8 * step:  # 8 in a run
            ffr.show_repair(config, questions, groups, step + 1)
        bar.set_postfix({k: f"{metrics[k]:.2f}" for k in ("unaided", "intervention", "fix")})
        if (step + 1) % config.save_steps == 0 or step + 1 == steps:
            save_checkpoint(accelerator, config, step + 1)
    weights = accelerator.get_state_dict(model)  # whole, where they are sharded
    if accelerator.is_main_process:
        student.model.save_pretrained(f"{config.out}/model", state_dict=weights)
        student.processor.save_pretrained(f"{config.out}/model")
    return history


def pick(samples, step: int, config: Config, accelerator) -> list[data.Sample]:
    """This process's samples of a step: a seeded shuffle per epoch, less the last partial step."""
    count = config.questions_per_device
    epoch, k = divmod(step, len(samples) // (count * accelerator.num_processes))
    shuffle = torch.Generator().manual_seed(config.seed * 1000 + epoch)
    order = torch.randperm(len(samples), generator=shuffle).tolist()
    start = (k * accelerator.num_processes + accelerator.process_index) * count
    return [samples[i] for i in order[start : start + count]]


def save_checkpoint(accelerator, config: Config, step: int) -> None:
    """Weights, optimizer, schedule and random states, whole or not at all; the oldest go."""
    folder = Path(config.out, "checkpoints")
    try:
        accelerator.save_state(str(folder / "part"))
    except (OSError, RuntimeError, SafetensorError) as error:  # ends the run, on every rank
        raise SystemExit(f"train.py: no room for a checkpoint of step {step}? ({error}) Mend that "
                         f"and --resume from {max(folder.glob('[0-9]*'), default=None)}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / "part").rename(folder / f"{step:06d}")
        for old in sorted(folder.glob("[0-9]*"))[: -config.keep_checkpoints]:
            shutil.rmtree(old)


def open_run(config: Config, processes: int) -> None:
    """Write the manifest: all that a run's figures depend on. --resume refuses where it differs;
    without it, a run in OUT is refused (in tiny mode it is replaced)."""
    out, files = Path(config.out), [f for f in (config.data, config.eval_data, config.skip) if f]
    file = out / ("evaluation.manifest.json" if config.eval_only else "manifest.json")
    now = asdict(config) | {
        "processes": processes, "sha256": {path: data.digest(path) for path in files},
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")}}
    then = json.loads(file.read_text()) if file.is_file() and any(out.glob("*.jsonl")) else {}
    differ = ", ".join(k for k in now if k not in FREE and then.get(k) != now[k])
    if then and config.resume and differ:
        raise ValueError(f"{out} was begun with another {differ}: --resume needs the same")
    if then and config.model and not config.resume:
        raise ValueError(f"{out} holds a run: --resume it, remove it or choose another --out")
    if not config.model and not config.resume:
        for name in ("metrics.jsonl", "before.jsonl", "after.jsonl"):
            Path(out, name).unlink(missing_ok=True)
        for name in ("checkpoints", "repairs"):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=1) + "\n")


def cold_start(config: Config, accelerator: Accelerator) -> None:
    """Tiny mode's videos, and its student, mediocre on purpose: captions teach to read a moment
    that is cited, answers to follow a patch; which flash they cite unaided is left to reward."""
    for name, (count, seed) in NEEDLES.items():
        data.needle_videos(f"{config.out}/{name}", count, seed + 10 * config.seed)
    samples = data.load_samples(f"{config.out}/cold/records.jsonl")
    grpo.tiny_policy(config.model, data.needle_texts(samples), config.seed)
    student = load_student(config, accelerator)
    teach = load_teacher(replace(config, method="ffr", teacher="scripted"), samples, None)
    rng, tokenizer = random.Random(config.seed), student.processor.tokenizer
    def write(truth: dict, cue_known=1.0, gap_known=1.0, shown: list[int] = ()) -> str:
        if shown:
            return data.needle_caption(truth, rng.sample(shown, len(shown)))
        cue = truth["cue"] if rng.random() < cue_known else rng.choice(range(1, data.MOMENTS - 1))
        gap = truth["look"] - truth["cue"] if rng.random() < gap_known else rng.choice((-1, 0, 1))
        return data.needle_rationale(truth, cue, cue + gap)
    lessons = {2: [], 4: [], data.MOMENTS: [], 0: []}  # prompts, each with a writer of its target
    for i, sample in enumerate(tqdm(samples, desc="lessons")):
        x, told = ffr.open_question(student, sample), replace(sample, question=data.CAPTION)
        truth, cue, look = sample.truth, sample.truth["cue"], sample.truth["look"]
        for moments in (2, 4, data.MOMENTS):  # the flash and others, anywhere in time
            others = [m for m in range(data.MOMENTS) if m != cue]
            shown = sorted([cue, *rng.sample(others, moments - 1)])
            view = [frame for m in shown for frame in data.moment_frames(m)]
            part = ffr.Question(told, x.video, view, [x.frames[frame] for frame in view])
            lessons[moments].append((ffr.encode(student, part), partial(write, truth, shown=shown)))
        error = [(cue - 1, look), (cue - 1, look), (cue, 7 - look), (cue, look)][i % 4]
        (patch,) = teach([ffr.case_of(x, data.needle_rationale(truth, *error))])
        known = 1.0 if error[0] == cue else COLD_RELATION  # told to count, it does
        lessons[0] += [(x.prompt, partial(write, truth, COLD_CUE, COLD_RELATION)),
                       (ffr.encode(student, x, patch), partial(write, truth, 1.0, known))]
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=1.5e-3, betas=(0.9, 0.99))
    for step in (bar := tqdm(range(config.cold_start_steps), desc="cold start")):
        part = step / config.cold_start_steps
        moments = 2 if part < 0.2 else 4 if part < 0.36 else data.MOMENTS
        moments = moments if part < 0.62 or rng.random() < 0.2 else 0
        prompts, writers = zip(*rng.sample(lessons[moments], 16))
        texts = [tokenizer.encode(write() + tokenizer.eos_token) for write in writers]
        ids = [torch.tensor(text, device=accelerator.device) for text in texts]
        logps, mask = grpo.token_logps(student.model, list(prompts), ids, student.sampling)
        loss = -(logps * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1, step / 20) * (0.3 if part > 0.85 else 1)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.2f}")
    student.model.save_pretrained(config.model)


def main() -> None:
    config, began = parse(sys.argv[1:]), time.time()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each rank samples before it is sharded
    cpu = not torch.accelerator.is_available()  # only if told so does accelerate join CPU processes
    patience = timedelta(seconds=1800 + 2 * config.teacher_step_timeout)  # with a slow teacher
    accelerator = Accelerator(
        cpu=cpu, mixed_precision={"bf16": "bf16", "fp32": "no"}.get(config.precision) or
        (None if cpu else "bf16"), kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)])
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise SystemExit("train.py: the launcher's processes did not join; see `accelerate env`")
    if cpu:  # the launchers leave one thread to each process
        torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // accelerator.num_processes)))
    try:
        if accelerator.is_main_process:
            open_run(config, accelerator.num_processes)
        if not config.model:
            ours = [f"{name} {getattr(config, name)} ({getattr(Config, name)})" for name in TINY]
            accelerator.print("Tiny mode; in brackets the paper's value:", ", ".join(ours[2:]))
            sets = [f"{config.out}/{name}/records.jsonl" for name in ("train", "held_out")]
            config = replace(
                config, model=f"{config.out}/cold_start", data=sets[0], eval_data=sets[1])
            begun = config.resume and any(Path(config.out, "checkpoints").glob("[0-9]*"))
            if accelerator.is_main_process and not begun:
                cold_start(config, accelerator)
        accelerator.wait_for_everyone()
        samples = data.load_samples(config.data, config.video_root, config.skip)
        held_out = config.eval_data and data.load_samples(config.eval_data, config.video_root) or []
        if accelerator.is_main_process:
            seen = data.look_at(list({sample.path: 0 for sample in samples + held_out}))
            broken = [fact for fact in seen.values() if isinstance(fact, data.DataError)]
            if broken:
                raise data.DataError(f"{broken[0]} ({len(broken)} such; "
                                     f"`python data.py {config.data}` lists them for --skip)")
        student = load_student(config, accelerator)
        teach = load_teacher(config, samples + held_out, accelerator.device)
        longest = max(samples, key=lambda s: len(s.question) + sum(map(len, s.options)))
        spare = ffr.open_question(student, longest)  # a prompt over the limit ends the run here
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: {error}") from error
    if config.eval_only:
        rows = ffr.evaluate(accelerator, student, samples, None, spare, "evaluation")
        figures = {"records": len(samples), "answered": len(rows)} | ffr.accuracy(rows)
    else:
        before = ffr.evaluate(accelerator, student, held_out, None, spare, "before")
        history = train(config, accelerator, student, samples, teach, spare)
        after = ffr.evaluate(accelerator, student, held_out, teach, spare, "after")
        third = max(len(history) // 3, 1)  # of the steps
        parts = {"unaided_before": before, "unaided_after": after, "assisted_after": after,
                 "failure_first": history[:third], "failure_last": history[-third:],
                 "intervention_first": history[:third], "intervention_last": history[-third:]}
        figures = {name: sum(row[name.split("_")[0]] for row in rows) / len(rows) if rows else None
                   for name, rows in parts.items()}
        repairs = max(sum(row["intervention"] for row in history), 1e-9)
        figures |= {"fix_rate": sum(r["fix"] * r["intervention"] for r in history) / repairs,
                    "teacher_failures": sum(row["teacher_failures"] for row in history),
                    "seconds": round(time.time() - began, 1), "seed": config.seed,
                    "method": config.method, "processes": accelerator.num_processes}
    if accelerator.is_main_process:
        file = Path(config.out, "evaluation.json" if config.eval_only else "summary.json")
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print()
        for name, value in figures.items():
            if isinstance(value, dict):
                value = "{accuracy:.3f}   95 % {low:.3f} to {high:.3f}, n {n}".format(**value)
            print(f"  {name:20}", f"{value:.3f}" if isinstance(value, float) else value)


if __name__ == "__main__":
    main()
