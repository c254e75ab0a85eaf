"""Train a video student with Find, Fix, Reason: `accelerate launch train.py`.

Without `--model` this is tiny mode: needle videos, a tiny random Qwen3-VL with a cold start, and
the same loop, processor, chat template, tool protocol and loss as `--model PATH --data FILE` has.
"""

import json
import logging
import os
import random
import re
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

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
    eval_data: str = setting("", "held-out records, for accuracy before and after (ours)")
    out: str = setting("runs/ffr", "folder for metrics, summary, repairs and weights (ours)")
    seed: int = setting(0, "of everything random (ours)")

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
    num_frames: int = setting(16, "frames of the video that the student sees")
    frame_pixels: int = setting(128 * 28 * 28, "at most so many pixels in each of them")
    picture_pixels: int = setting(401408, "at most so many pixels in each picture of a patch")
    max_prompt_length: int = setting(16384, "tokens; a longer prompt is an error, never cut")
    max_completion_length: int = setting(1024, "tokens")

    num_rollouts: int = setting(8, "G, rollouts per question")
    temperature: float = setting(1.0, "of sampling, and so of the policy that is trained")
    top_p: float = setting(0.95, "nucleus of sampling")
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
    log_with: str = setting("", "an accelerate tracker, e.g. tensorboard (ours)")
    cold_start_steps: int = setting(1000, "tiny mode: supervised steps before training (ours)")


# Tiny mode is the method at another size: these become the defaults where --model is not given.
TINY = {
    "out": "runs/tiny", "prompt": "{question}", "frame_pixels": 1024, "picture_pixels": 1024,
    "max_completion_length": 16, "learning_rate": 3e-4, "beta": 0.0, "lam": 0.1,
    "questions_per_device": 8, "max_steps": 130,
}
NEEDLES = {"cold": (384, 1), "train": (512, 2), "held_out": (192, 3)}  # videos, seed
COLD_CUE, COLD_RELATION = 0.05, 0.7  # how often the cold start's answers are right beyond chance
SHOWN, EVALUATED = 8, 64  # repairs drawn over a run; questions per batch of an evaluation


def parse(arguments: list[str]) -> Config:
    """Read the settings and refuse what cannot be meant."""
    parser = HfArgumentParser(Config, allow_abbrev=False)
    if not any(re.match("--model(=|$)", argument) for argument in arguments):
        parser.set_defaults(**TINY)
    c = parser.parse_args_into_dataclasses(arguments)[0]
    for refused, why in [
        (c.model and not c.data, "--model needs --data FILE, the training records"),
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


def load_student(config: Config, accelerator: Accelerator) -> ffr.Student:
    """Model and processor from a folder or the hub. Weights are fp32: bf16 weights would round
    updates of 5e-6 away (for speed, `accelerate launch --mixed_precision bf16`)."""
    name = config.model
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: {name}: no processor loads from there ({error})") from error
    if not hasattr(processor, "video_processor") or not processor.chat_template:
        raise SystemExit(f"train.py: {name}: no video processor or chat template; save them there")
    hello = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    if ffr.render_chat(processor, hello).rstrip().endswith("<think>"):
        raise SystemExit(f"train.py: {name}: its chat template opens <think> itself, so the format "
                         "reward would be 0 for ever; take that out of the template")
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
    sampling = grpo.sampling_for(
        model, processor, config.temperature, config.top_p, config.max_completion_length
    )
    synced = accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")
    return ffr.Student(model.to(accelerator.device), processor, sampling, config, synced)


def load_teacher(config: Config, samples: list[data.Sample], device) -> Callable | None:
    """The brain that the settings name, inside the protocol of teacher.py."""
    if config.method == "grpo":
        return None
    name, most = config.teacher_model, config.teacher_max_tokens
    Path(config.teacher_cache or config.out).mkdir(parents=True, exist_ok=True)  # or say so now
    if config.teacher == "local":
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        chat = teacher.local(model.to(config.teacher_device or device).eval(), processor, most)
    elif config.teacher == "remote":
        chat, key = None, "".join(os.environ.get("TEACHER_API_KEY", "").split())
        if config.teacher_url:
            chat = teacher.remote(config.teacher_url, name, key, most)
            (said,) = chat([[{"role": "user", "content": "Say OK."}]], config.teacher_timeout)
            if isinstance(said, teacher.TeacherError):
                raise SystemExit(f"train.py: no teacher '{name}' at {config.teacher_url} ({said}); "
                                 "without --teacher_url a --teacher_cache is replayed")
    else:
        found = {s.id: s.truth["evidence"] for s in samples if "evidence" in s.truth}
        if not found:
            raise SystemExit("train.py: no record has 'evidence' for --teacher scripted to look up")
        chat = data.scripted({i: e if isinstance(e, list) else [e] for i, e in found.items()})
    return partial(
        teacher.diagnose, chat=chat, gate=ffr.gate, show_answer=config.teacher_sees_answer,
        num_frames=config.num_frames, timeout=config.teacher_timeout,
        step_timeout=config.teacher_step_timeout,
        workers=config.teacher_workers if config.teacher == "remote" else 0,
        cache=config.teacher_cache if config.teacher != "scripted" else "",
        brain=repr((config.teacher, name, most)),
    )


# --- training ---
def train(config: Config, accelerator, student, samples, teach, spare) -> list[dict]:
    """The loop; returns every step's metrics. `spare`: a question that is known to open."""
    per_step = config.questions_per_device * accelerator.num_processes
    if len(samples) < per_step:
        raise SystemExit(f"train.py: {len(samples)} records do not fill a step of {per_step}")
    steps = config.max_steps or config.epochs * (len(samples) // per_step)
    params = student.model.parameters()
    optimizer = torch.optim.AdamW(params, config.learning_rate, weight_decay=config.weight_decay)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, steps)
    reference = deepcopy(student.model).eval().requires_grad_(False) if config.beta > 0 else None
    model, optimizer = accelerator.prepare(student.model, optimizer)
    bar = tqdm(total=steps, desc=config.method, disable=not accelerator.is_main_process)
    history, shown = [], 0
    for step in range(steps):
        began = time.time()
        # One round: G rollouts per question, failures repaired, τ̂ chosen
        questions = ffr.open_questions(student, pick(samples, step, config, accelerator), spare)
        spent = Counter(calls=0, hits=0, tokens=0, seconds=0.0, refused=0)
        ask = teach and partial(teach, spent=spent)
        groups = ffr.find_fix_reason(student, questions, config.num_rollouts, ask, config.kappa,
                                     config.lam, (config.seed, step))
        rollouts = [rollout for group in groups for rollout in group]
        weights = [float(q.counts) for q in questions for _ in range(config.num_rollouts)]
        counted = [(q, r) for q, group in zip(questions, groups) for r in group if q.counts]
        rows = gather_object([ffr.describe(q, r) for q, r in counted])
        # A_i within each group; the rows, and so the batch's std, are of all processes
        rewards = torch.tensor([[r.reward for r in group] for group in groups])  # (questions, G)
        batch_std = torch.tensor([row["reward"] for row in rows] or [0.0, 0.0]).std()
        advantages = grpo.group_advantages(rewards, config.scale_rewards, batch_std)
        advantages = advantages.flatten().tolist()
        # J(θ) on the chosen rollouts' own tokens, under their own prompts
        middle, tokens = time.time(), max(sum(row["length"] for row in rows), 1)
        figures = grpo.update(
            accelerator, model, reference, optimizer, [r.prompt for r in rollouts],
            [r.completion for r in rollouts], advantages, weights, tokens, student.sampling,
            config.epsilon, config.beta, config.num_updates, config.max_grad_norm,
            ffr.stand_in(student, spare) if student.synced else None,
        )
        scheduler.step()
        repaired = sum(a for r, a in zip(rollouts, advantages) if r.failed)
        figures |= {"seconds_round": middle - began, "seconds_update": time.time() - middle,
                    "skipped": weights.count(0.0) / config.num_rollouts,
                    **{f"teacher_{name}": count for name, count in spent.items()},
                    "repaired_advantage": repaired / max(sum(r["intervention"] for r in rows), 1)}
        metrics = {"step": step + 1} | ffr.summarize(rows, gather_object([figures]))
        history.append(metrics)
        accelerator.log(metrics, step=step + 1)
        if accelerator.is_main_process:
            with open(f"{config.out}/metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            if shown * steps <= step * SHOWN:
                shown += ffr.show_repair(config, questions, groups, step + 1)
        line = "unaided {unaided:.2f} helped {intervention:.2f} fixed {fix:.2f}"
        bar.set_postfix_str(line.format(**metrics))
        bar.update()
        if (step + 1) % config.save_steps == 0 or step + 1 == steps:
            accelerator.save_state(f"{config.out}/checkpoint")
    bar.close()
    return history


def pick(samples, step: int, config: Config, accelerator) -> list[data.Sample]:
    """This process's samples of a step: a seeded shuffle per epoch, less the last partial step."""
    count = config.questions_per_device
    epoch, k = divmod(step, len(samples) // (count * accelerator.num_processes))
    shuffle = torch.Generator().manual_seed(config.seed * 1000 + epoch)
    order = torch.randperm(len(samples), generator=shuffle).tolist()
    start = (k * accelerator.num_processes + accelerator.process_index) * count
    return [samples[i] for i in order[start : start + count]]


def evaluate(accelerator, student, samples, teach, spare) -> dict[str, float]:
    """Greedy accuracy on held-out records: unaided, and with the teacher's help where it failed."""
    student = replace(student, sampling=replace(student.sampling, temperature=0.0))
    processes, rows = accelerator.num_processes, []
    mine = samples[accelerator.process_index :: processes]
    for start in range(0, -(-len(samples) // processes), EVALUATED):
        questions = ffr.open_questions(student, mine[start : start + EVALUATED], spare)
        questions = questions or [replace(spare, counts=False)]  # to keep in step
        groups = ffr.find_fix_reason(student, questions, 1, teach, 0.0, 0.0, ("evaluation",))
        rows += [ffr.describe(q, group[0]) for group, q in zip(groups, questions) if q.counts]
    right = [(not row["failure"], row["fix"]) for row in gather_object(rows)]
    return dict(zip(("unaided", "assisted"), (sum(r) / len(r) for r in zip(*right))))


# --- tiny mode ---
def cold_start(config: Config, accelerator: Accelerator) -> None:
    """Write tiny mode's videos, and its student after a supervised start, mediocre on purpose.

    Captions of 2, then 4, then all moments teach to read a moment that is cited; answers teach the
    form of a rationale and to follow a patch. Without one the flash they cite is mostly a guess
    (right with COLD_CUE + chance): that, above all, is left to learn from reward."""
    for name, (count, seed) in NEEDLES.items():
        data.needle_videos(f"{config.out}/{name}", count, seed + 10 * config.seed)
    samples = data.load_samples(f"{config.out}/cold/records.jsonl")
    data.tiny_student(config.model, samples, config.seed)
    student = load_student(config, accelerator)
    teach = load_teacher(replace(config, method="ffr"), samples, accelerator.device)
    rng, tokenizer = random.Random(config.seed), student.processor.tokenizer
    cues = sorted({s.truth["cue"] for s in samples})
    relations = sorted({s.truth["look"] - s.truth["cue"] for s in samples})

    def caption(truth: dict, shown: list[int]) -> str:
        return data.needle_caption(truth, rng.sample(shown, len(shown)))

    def answer(truth: dict, cue_known: float, relation_known: float) -> str:
        cue = truth["cue"] if rng.random() < cue_known else rng.choice(cues)
        relation = truth["look"] - truth["cue"]
        relation = relation if rng.random() < relation_known else rng.choice(relations)
        return data.needle_rationale(truth, cue, cue + relation)

    lessons = {2: [], 4: [], data.MOMENTS: [], 0: []}  # prompts, each with a writer of its target
    for i, sample in enumerate(tqdm(samples, desc="lessons")):
        x, truth = ffr.open_question(student, sample), sample.truth
        cue, look = truth["cue"], truth["look"]
        for moments in (2, 4, data.MOMENTS):  # the flash and others, anywhere in time
            others = [m for m in range(data.MOMENTS) if m != cue]
            shown = sorted([cue, *rng.sample(others, moments - 1)])
            view = [frame for m in shown for frame in data.moment_frames(m)]
            told = replace(sample, question=data.CAPTION)
            part = ffr.Question(told, x.video, view, [x.frames[frame] for frame in view])
            lessons[moments].append((ffr.encode(student, part), partial(caption, truth, shown)))
        error = [(cue - 1, look), (cue - 1, look), (cue, 7 - look), (cue, look)][i % 4]
        (patch,) = teach([ffr.case_of(x, data.needle_rationale(truth, *error))])
        known = 1.0 if error == (cue, look) else COLD_RELATION
        lessons[0].append((x.prompt, partial(answer, truth, COLD_CUE, COLD_RELATION)))
        lessons[0].append((ffr.encode(student, x, patch), partial(answer, truth, 1.0, known)))
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=1.5e-3, betas=(0.9, 0.99))
    bar = tqdm(range(config.cold_start_steps), desc="cold start")
    for step in bar:
        part = step / config.cold_start_steps
        moments = 2 if part < 0.2 else 4 if part < 0.36 else data.MOMENTS
        moments = moments if part < 0.62 or rng.random() < 0.2 else 0
        prompts, writers = zip(*rng.sample(lessons[moments], 16))
        texts = [writer() + tokenizer.eos_token for writer in writers]
        ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
        logps, _, mask = grpo.token_logps(student.model, list(prompts), ids, student.sampling)
        loss = -(logps * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1, step / 20) * (0.3 if part > 0.85 else 1)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.2f}")
    student.model.save_pretrained(config.model)


# --- the run ---
def main() -> None:
    config = parse(sys.argv[1:])
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    began = time.time()
    cpu = not torch.accelerator.is_available()  # only if told so does accelerate join CPU processes
    patience = timedelta(seconds=1800 + 2 * config.teacher_step_timeout)  # with a slow teacher
    accelerator = Accelerator(cpu=cpu, log_with=config.log_with or None, project_dir=config.out,
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)])
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise SystemExit("train.py: the launcher's processes did not join; see `accelerate env`")
    if accelerator.device.type == "cpu":  # the launchers leave one thread to each process
        torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // accelerator.num_processes)))
    if accelerator.is_main_process:
        shutil.rmtree(f"{config.out}/repairs", ignore_errors=True)
        Path(config.out, "repairs").mkdir(parents=True)
        Path(config.out, "metrics.jsonl").write_text("")
    if not config.model:
        ours = [f"{name} {getattr(config, name)} ({getattr(Config, name)})" for name in TINY]
        text = f"Tiny mode; in brackets the paper's value, Table 8: {', '.join(ours[2:])}."
        accelerator.print(textwrap.fill(text, 79))
        sets = [f"{config.out}/{name}/records.jsonl" for name in ("train", "held_out")]
        config = replace(config, model=f"{config.out}/cold_start", data=sets[0], eval_data=sets[1])
        if accelerator.is_main_process:
            cold_start(config, accelerator)
        accelerator.wait_for_everyone()
    try:
        samples = data.load_samples(config.data, config.video_root)
        held_out = config.eval_data and data.load_samples(config.eval_data, config.video_root) or []
        for path in dict.fromkeys(sample.path for sample in samples + held_out):
            data.Video(path)  # raises where the file is no video
        student = load_student(config, accelerator)
        teach = load_teacher(config, samples + held_out, accelerator.device)
        longest = max(samples, key=lambda s: len(s.question) + sum(map(len, s.options)))
        spare = ffr.open_question(student, longest)  # a prompt over the limit ends the run here
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: {error}") from error
    accelerator.init_trackers("ffr", asdict(config))
    before = evaluate(accelerator, student, held_out, None, spare)
    history = train(config, accelerator, student, samples, teach, spare)
    after = evaluate(accelerator, student, held_out, teach, spare)
    accelerator.end_training()
    if accelerator.is_main_process:
        student.model.save_pretrained(f"{config.out}/model")
        student.processor.save_pretrained(f"{config.out}/model")
        report(config, history, before, after, time.time() - began, accelerator.num_processes)


def report(config: Config, history, before, after, seconds: float, processes: int) -> None:
    """Write summary.json and print it as a small table; thirds are of the training's steps."""
    third = max(len(history) // 3, 1)
    thirds = {"first": history[:third], "last": history[-third:]}
    repairs = sum(row["intervention"] for row in history)
    summary = {
        "unaided_before": before.get("unaided"), "unaided_after": after.get("unaided"),
        "assisted_after": after.get("assisted"),
        **{f"{name}_{part}": sum(row[name] for row in rows) / third
           for name in ("failure", "intervention") for part, rows in thirds.items()},
        "fix_rate": sum(r["fix"] * r["intervention"] for r in history) / max(repairs, 1e-9),
        "teacher_failures": sum(row["teacher_failures"] for row in history),
        "seconds": round(seconds, 1), "seed": config.seed, "method": config.method,
        "processes": processes,
    }
    Path(config.out, "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print()
    for name, value in {**summary, "pictures": f"{config.out}/repairs/"}.items():
        print(f"  {name:20} {value:.3f}" if isinstance(value, float) else f"  {name:20} {value}")


if __name__ == "__main__":
    main()
