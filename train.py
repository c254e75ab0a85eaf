"""Train a video student with Find, Fix, Reason; without `--model` a tiny one on needle videos."""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors import SafetensorError
from tqdm import tqdm

import data
import ffr
import grpo
import teacher
from data import pick
from reward import accuracy, answers, describe, gate, summarize, summarize_run


@dataclass
class Config(teacher.Settings, data.Settings):
    """Settings. Defaults are FFR's Table 8 unless marked (ours)."""

    model: Annotated[str, "student: folder or hub name of a video VLM; empty: tiny mode"] = ""
    out: Annotated[str, "folder for metrics, summary, repairs and weights (ours)"] = "runs/ffr"
    seed: Annotated[int, "of everything random (ours)"] = 0
    resume: Annotated[bool, "go on with the run in --out, if there is one (ours)"] = False
    eval_only: Annotated[bool, "measure --model on --data, train nothing (ours)"] = False
    method: Annotated[Literal["ffr", "grpo"], "grpo has no teacher (ours)"] = "ffr"
    patch_pictures: Annotated[bool, "False: the paper's 'no visual context'"] = True
    kappa: Annotated[float, "κ, the patch tax on a repaired rollout's reward"] = 0.3
    lam: Annotated[float, "λ, weight of alignment; 0 is the paper's equation (ours)"] = 0.0
    prompt: Annotated[str, "prompt with {question}, {options}, {suffix} (ours)"] = ffr.PROMPT
    precision: Annotated[Literal["auto", "bf16", "fp32"], "auto: bf16 autocast on a GPU"] = "auto"
    attention: Annotated[str, "empty: transformers' choice; paper: flash_attention_2"] = ""
    lora_rank: Annotated[int, "train adapters of this rank, peft's LoRA; 0: all weights (ours)"] = 0
    gradient_checkpointing: Annotated[bool, "less memory, a second forward (ours)"] = False
    freeze_vision: Annotated[bool, "leave the vision tower as it is (ours)"] = False
    num_frames: Annotated[int, "frames of the video that the student sees"] = 16
    frame_pixels: Annotated[int, "at most so many pixels in each of them"] = 128 * 28 * 28
    picture_pixels: Annotated[int, "at most so many pixels in each picture of a patch"] = 401408
    max_prompt_length: Annotated[int, "tokens; a longer prompt is an error, never cut"] = 16384
    max_completion_length: Annotated[int, "tokens"] = 1024
    num_rollouts: Annotated[int, "G, rollouts per question"] = 8
    temperature: Annotated[float, "of sampling, and so of the policy that is trained"] = 1.0
    top_p: Annotated[float, "nucleus of sampling"] = 0.95
    rollouts_at_once: Annotated[int, "per forward and backward, for memory; 0: all (ours)"] = 0
    row_tokens: Annotated[int, "the most in a row that a group's rollouts share (ours)"] = 8192
    beta: Annotated[float, "β, weight of KL(π_θ ‖ π_ref); 0 loads no reference model"] = 0.04
    epsilon: Annotated[float, "ε of the clip (ours: the paper names none)"] = 0.2
    scale_rewards: Annotated[Literal["group", "batch", "none"], "std of the advantages"] = "group"
    num_updates: Annotated[int, "μ, optimizer steps per batch of rollouts (ours)"] = 1
    learning_rate: Annotated[float, "peak, with a cosine to 0"] = 5e-6
    weight_decay: Annotated[float, "of AdamW"] = 0.01
    max_grad_norm: Annotated[float, "gradients are clipped to this norm"] = 5.0
    epochs: Annotated[int, "passes over the records"] = 1
    max_steps: Annotated[int, "steps; 0: as many as the epochs have (ours)"] = 0
    questions_per_device: Annotated[int, "questions per process and step"] = 1
    save_steps: Annotated[int, "steps between checkpoints (ours)"] = 200
    keep_checkpoints: Annotated[int, "the newest ones (ours)"] = 2


GROUPS = {
    "data": "the data",
    "teacher": "the teacher",
    "model": "student and output",
    "method": "the method",
    "precision": "the model",
    "num_frames": "what the student sees and may say",
    "num_rollouts": "rollouts and objective",
    "learning_rate": "optimization",
    "save_steps": "checkpoints",
}  # in --help, each from this setting on
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
HELLO = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
HELPLESS = 10  # steps without any patch, after which the run stops
NEEDLES = {"train": (512, 2), "held_out": (192, 3)}  # videos, seed
# May differ when a run is resumed.
FREE = {"versions", "resume", "out", "save_steps", "keep_checkpoints", "decode_patience"} | {
    f"teacher_{name}"
    for name in "url device batch workers timeout step_timeout model max_tokens cache".split()
}


def parse(arguments: list[str]) -> Config:
    """Read the settings and refuse what cannot be meant."""
    tiny = {} if "--model" in [argument.split("=")[0] for argument in arguments] else TINY
    parser = argparse.ArgumentParser(
        "train.py",
        "train.py [--model M --data FILE] [settings]",
        allow_abbrev=False,
        description=f"{__doc__} Defaults, in brackets, are the paper's (Table 8), or (ours).",
    )
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        kind, text = get_args(f.type)
        choices = ("True", "False") if kind is bool else get_args(kind)
        if f.default not in ("", ffr.PROMPT):
            text += f" [{f.default}{f'; tiny mode {TINY[f.name]}' if f.name in TINY else ''}]"
        switch = dict(type=str.capitalize, nargs="?", const="True") if kind is bool else {}
        group.add_argument(
            f"--{f.name}",
            default=tiny.get(f.name, f.default),
            choices=choices or None,
            help=text,
            metavar="|".join(choices) or kind.__name__,
            **{"type": type(f.default)} | switch,
        )
    words = {"True": True, "False": False}
    c = Config(**{k: words.get(v, v) for k, v in vars(parser.parse_args(arguments)).items()})
    for refused, why in [
        (bool(c.model) != bool(c.data), "--model and --data FILE, the records, go together"),
        (c.eval_only and not c.model, "--eval_only needs --model, the student to measure"),
        (min(c.save_steps, c.keep_checkpoints) < 1, "--save_steps, --keep_checkpoints: 1 or more"),
        (c.num_rollouts < 2, "--num_rollouts must be 2 or more: one rollout has no group"),
        (min(c.kappa, c.lam, c.beta) < 0, "--kappa, --lam and --beta must be 0 or more"),
        (c.lam >= c.kappa > 0, "--lam must be below --kappa: help must not outrank none"),
        (c.temperature <= 0, "--temperature must be above 0: equal rollouts teach nothing"),
        (not 0 < c.top_p <= 1, "--top_p must be in (0, 1]"),
        (c.lora_rank and not find_spec("peft"), "--lora_rank needs peft: pip install peft"),
        (c.teacher != "scripted" and not c.teacher_model, "this --teacher needs --teacher_model"),
        (c.teacher == "remote" and not c.teacher_url + c.teacher_cache, "give --teacher_url"),
    ]:
        if refused:
            raise SystemExit(f"train.py: {why}")
    return c


def load_policy(name: str, attention="", freeze_vision=False) -> tuple:
    """A video VLM from a folder or the hub, and its processor. Weights are fp32: bf16 ones would
    round updates of 5e-6 away. Raises ValueError, one sentence, where it cannot be trained."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(name)
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation=attention or None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        opening = processor.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
        vision = model.get_encoder("video")
        vision.requires_grad_(not freeze_vision)
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{name}: no processor or no model loads from there ({why})") from error

    lost = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    for refused, why in [
        (lost, f"weights are missing or of another shape there and would be random: {lost[:3]}"),
        (not hasattr(processor, "video_processor"), "no video processor; save one there"),
        (opening.rstrip().endswith("<think>"), "its chat template opens <think> itself"),
        (freeze_vision and vision is model, "no vision tower is found; train without freezing"),
    ]:
        if refused:
            raise ValueError(f"{name}: {why}")
    if hasattr(processor.image_processor, "crop_to_patches"):
        # InternVL's default adds a dozen enlarged crops to each picture, whatever its size.
        processor.images_kwargs = {**processor.images_kwargs, "crop_to_patches": False}
    return model, processor


def add_adapters(model, rank: int):
    """The model, frozen, with trainable adapters (LoRA) beside the linear parts of its text layers.
    They begin at 0: the policy is as it was until the first update."""
    from peft import LoraConfig, get_peft_model

    names = {module: name for name, module in model.named_modules()}
    parts = model.get_decoder().modules()
    linear = [names[part] for part in parts if isinstance(part, torch.nn.Linear)]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear))


def reference_policy(c: Config, accelerator, model):
    """π_ref, the policy before training: None at β = 0; with adapters the model itself, called
    without them; else a frozen copy. `model` is not yet the accelerator's."""
    if c.lora_rank or c.beta == 0:
        return model if c.beta > 0 else None
    reference = deepcopy(model).eval().requires_grad_(False)
    if accelerator.is_fsdp2:
        reference = fsdp2_prepare_model(accelerator, reference)
        reference.set_reshard_after_forward(True)  # no backward comes that would do it
    elif accelerator.mixed_precision == "bf16":
        ffr.store_linears_in_bf16(reference)
    return reference


def load_student(c: Config, accelerator: Accelerator) -> ffr.Student:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, processor = load_policy(c.model, c.attention, c.freeze_vision)
    if getattr(model, "_hf_peft_config_loaded", False) and not c.eval_only:
        raise ValueError(f"{c.model} holds adapters; merge them into their base (README)")
    if c.lora_rank:
        torch.manual_seed(c.seed)  # half of the adapters begin at random, on all ranks alike
        model = add_adapters(model, c.lora_rank)
    if c.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if c.lora_rank and accelerator.mixed_precision == "bf16":
        ffr.store_linears_in_bf16(model)
    settings = (c.temperature, c.top_p, c.max_completion_length)
    sampling = grpo.Sampling(*settings, **ffr.token_ids(model, processor))
    return ffr.Student(model.to(accelerator.device), processor, sampling, c)


def load_teacher(c: Config, samples: list[data.Sample], device):
    """The brain that the settings name, inside the protocol of teacher.py."""
    if c.method == "grpo" or c.eval_only:  # at test time there is no teacher
        return None
    Path(c.teacher_cache or c.out).mkdir(parents=True, exist_ok=True)  # or say so now
    evidence = {s.id: s.truth["evidence"] for s in samples if "evidence" in s.truth}
    try:
        return teacher.load_teacher(c, device, gate, answers, evidence)
    except ValueError as error:
        raise SystemExit(f"train.py: {error}") from error


def train(c: Config, accelerator, student, samples, teach, spare) -> list[dict]:
    """The loop; returns every step's metrics. `spare`: a question that is known to open."""
    per_step = c.questions_per_device * accelerator.num_processes
    if len(samples) < per_step:
        raise SystemExit(f"train.py: {len(samples)} records do not fill a step of {per_step}")
    steps = c.max_steps or c.epochs * (len(samples) // per_step)
    model = student.model
    optimizer = torch.optim.AdamW(model.parameters(), c.learning_rate, weight_decay=c.weight_decay)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, steps)
    reference = reference_policy(c, accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Else accelerate casts all logits to fp32 at once; `grpo.chosen_logps` does so in chunks.
    student.model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.register_for_checkpointing(scheduler)
    saved = max(Path(c.out, "checkpoints").glob("[0-9]*"), default=None) if c.resume else None
    if saved:
        accelerator.load_state(str(saved))
    objective = grpo.Objective(**{name: getattr(c, name) for name in vars(grpo.Objective())})
    done, metrics_file = int(saved.name) if saved else 0, Path(c.out, "metrics.jsonl")
    history = data.read_rows(metrics_file, done) if accelerator.is_main_process else []
    history = broadcast_object_list([history])[0]
    shape = "step {n} of {total} [{elapsed}<{remaining}{postfix}]"
    quiet = not accelerator.is_main_process
    bar = tqdm(range(done, steps), total=steps, initial=done, disable=quiet, bar_format=shape)
    for step in bar:
        began = time.time()
        # One round: G rollouts per question, failures repaired, τ̂ chosen
        questions = ffr.open_questions(student, pick(samples, step, c, accelerator), spare)
        spent = Counter(calls=0, hits=0, tokens=0, seconds=0.0, refused=0)
        ask = teach and partial(teach, spent=spent)
        with accelerator.autocast():
            groups = ffr.find_fix_reason(
                student, questions, c.num_rollouts, ask, c.kappa, c.lam, (c.seed, step)
            )
        chosen = [(q, r) for q, group in zip(questions, groups) for r in group]
        rows = gather_object([describe(q, r) for q, r in chosen if q.counts])
        # A_i within each group; the rows, and so the batch's std, are of all processes
        rewards = torch.tensor([[r.reward for r in group] for group in groups])  # (questions, G)
        std = torch.tensor([row["reward"] for row in rows] or [0.0, 0.0]).std()
        advantages = grpo.group_advantages(rewards, c.scale_rewards, std).flatten().tolist()
        # J(θ) on the chosen rollouts' own tokens, under their own prompts
        middle, tokens = time.time(), max(sum(row["length"] for row in rows), 1)
        prompts, trained = ffr.episodes(questions, groups, advantages)
        stand_in = ffr.stand_in(student, spare) if grpo.is_sharded(model) else None
        batch = grpo.Batch(prompts, trained, tokens, stand_in)
        figures = grpo.update(
            accelerator, model, optimizer, batch, student.sampling, objective, reference
        )
        scheduler.step()
        repaired = sum(a for (_, r), a in zip(chosen, advantages) if r.failed)
        figures |= {
            "seconds_round": middle - began,
            "seconds_update": time.time() - middle,
            "skipped": float(sum(not q.counts for q in questions)),
            **{f"teacher_{name}": count for name, count in spent.items()},
            "repaired_advantage": repaired / max(sum(r["intervention"] for r in rows), 1),
        }
        metrics = {"step": step + 1} | summarize(rows, gather_object([figures]))
        history.append(metrics)
        if accelerator.is_main_process:
            data.add_rows(metrics_file, [metrics])
            if len([*Path(c.out, "repairs").glob("*.txt")]) * steps <= 8 * step:  # 8 in a run
                ffr.show_repair(c, questions, groups, step + 1)
        bar.set_postfix({k: f"{metrics[k]:.2f}" for k in ("unaided", "intervention", "fix")}, False)
        useless = watch_teacher(history[done:], rows, accelerator.is_main_process)
        if (step + 1) % c.save_steps == 0 or step + 1 == steps or useless:
            save_checkpoint(accelerator, c, step + 1)
        if useless:
            accelerator.wait_for_everyone()
            raise SystemExit(f"train.py: {useless}; step {step + 1} is saved: mend it and --resume")
    weights = accelerator.get_state_dict(model)  # whole, where they are sharded
    if accelerator.is_main_process:
        shutil.rmtree(f"{c.out}/model", ignore_errors=True)  # weights and adapters do not mix
        student.model.save_pretrained(f"{c.out}/model", state_dict=weights)
        student.processor.save_pretrained(f"{c.out}/model")
    return history


def watch_teacher(history: list[dict], rows: list[dict], tell: bool) -> str | None:
    """Tell the first failure of each cause, and a step in which no failed rollout got a patch.
    Returns a sentence where that holds of the last HELPLESS steps that asked the teacher."""
    said = {r["cause"]: f"{r['cause']}: {r['detail']}" for r in reversed(rows) if r["cause"]}
    news = [said[cause] for cause in said if not any(f"teacher_{cause}" in m for m in history[:-1])]
    if said and not history[-1]["intervention"]:
        news.append(f"no failed rollout of step {history[-1]['step']} got a patch")
    for line in news if tell else []:
        tqdm.write(f"teacher: {line}")
    asked = [m for m in history if m["teacher_failures"] or m["intervention"]][-HELPLESS:]
    if said and len(asked) == HELPLESS and not any(m["intervention"] for m in asked):
        return f"the teacher helped nobody in {HELPLESS} steps ({[*said.values()][-1]})"


def save_checkpoint(accelerator, c: Config, step: int) -> None:
    """Weights, optimizer, schedule and random states, whole or not at all; the oldest go."""
    folder = Path(c.out, "checkpoints")
    try:
        accelerator.save_state(str(folder / "part"))
    except (OSError, RuntimeError, SafetensorError) as error:  # ends the run, on every rank
        raise SystemExit(
            f"train.py: no room for a checkpoint of step {step}? ({error}) Mend that "
            f"and --resume from {max(folder.glob('[0-9]*'), default=None)}"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / "part").rename(folder / f"{step:06d}")
        for old in sorted(folder.glob("[0-9]*"))[: -c.keep_checkpoints]:
            shutil.rmtree(old)


def open_run(c: Config, processes: int) -> None:
    """Write the manifest: all that a run's figures depend on. --resume refuses where it differs;
    without it, a run in OUT is refused (in tiny mode it is replaced)."""
    out = Path(c.out)
    file = out / ("evaluation.manifest.json" if c.eval_only else "manifest.json")
    now = vars(c) | {
        "processes": processes,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }
    now["sha256"] = {path: data.digest(path) for path in (c.data, c.eval_data, c.skip) if path}
    then = json.loads(file.read_text()) if file.is_file() and any(out.glob("*.jsonl")) else {}
    differ = ", ".join(k for k in now if k not in FREE and then.get(k) != now[k])
    if then and c.resume and differ:
        raise ValueError(f"{out} was begun with another {differ}: --resume needs the same")
    if then and c.model and not c.resume:
        raise ValueError(f"{out} holds a run: --resume it, remove it or choose another --out")
    if not c.model and not c.resume:
        for name in ("metrics.jsonl", "before.jsonl", "after.jsonl"):
            Path(out, name).unlink(missing_ok=True)
        for name in ("checkpoints", "repairs"):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=1) + "\n")


def main() -> None:
    c, began = parse(sys.argv[1:]), time.time()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each rank samples before it is sharded
    cpu = not torch.accelerator.is_available()  # only if told so does accelerate join CPU processes
    precision = {"auto": None if cpu else "bf16", "bf16": "bf16", "fp32": "no"}[c.precision]
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=1800 + 2 * c.teacher_step_timeout))
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[patience])
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise SystemExit("train.py: the launcher's processes did not join; see `accelerate env`")
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED") and not accelerator.is_fsdp2:
        raise SystemExit(
            "train.py: parameters are sharded by FSDP2 only: --use_fsdp --fsdp_version 2"
        )
    if cpu:  # the launchers leave one thread to each process
        torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // accelerator.num_processes)))
    try:
        if accelerator.is_main_process:
            open_run(c, accelerator.num_processes)
        if not c.model:
            ours = [f"{name} {getattr(c, name)} ({getattr(Config, name)})" for name in TINY]
            accelerator.print("Tiny mode; in brackets, with --model:", *ours[2:], sep="\n  ")
            c = replace(
                c,
                model=str(Path(__file__).parent / "assets" / "tiny"),
                data=f"{c.out}/train/records.jsonl",
                eval_data=f"{c.out}/held_out/records.jsonl",
            )
            for name, (count, seed) in NEEDLES.items() if accelerator.is_main_process else ():
                data.needle_videos(f"{c.out}/{name}", count, seed + 10 * c.seed)
        accelerator.wait_for_everyone()
        samples = data.load_samples(c.data, c.video_root, c.skip)
        held_out = c.eval_data and data.load_samples(c.eval_data, c.video_root) or []
        if accelerator.is_main_process:
            data.refuse_broken(samples, c.data, c.skip, c.decode_patience)
            data.refuse_broken(held_out, c.eval_data, patience=c.decode_patience)
        student = load_student(c, accelerator)
        teach = load_teacher(c, samples + held_out, accelerator.device)
        longest = max(samples, key=lambda s: len(s.question) + sum(map(len, s.options)))
        spare = ffr.open_question(student, longest)  # a prompt over the limit ends the run here
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: {error}") from error
    if c.eval_only:
        rows = ffr.evaluate(accelerator, student, samples, None, spare, "evaluation")
        figures = {"records": len(samples), "answered": len(rows)} | accuracy(rows)
    else:
        before = ffr.evaluate(accelerator, student, held_out, None, spare, "before")
        history = train(c, accelerator, student, samples, teach, spare)
        after = ffr.evaluate(accelerator, student, held_out, teach, spare, "after")
        figures = summarize_run(before, after, history) | {
            "seconds": round(time.time() - began, 1),
            "seed": c.seed,
            "method": c.method,
            "processes": accelerator.num_processes,
        }
    if accelerator.is_main_process:
        file = Path(c.out, "evaluation.json" if c.eval_only else "summary.json")
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print()
        for name, value in figures.items():
            if isinstance(value, dict):
                value = "{accuracy:.3f}   95 % {low:.3f} to {high:.3f}, n {n}".format(**value)
            print(f"  {name:20}", f"{value:.3f}" if isinstance(value, float) else value)
    accelerator.end_training()  # a rank that exits inside the process group may abort


if __name__ == "__main__":
    main()
