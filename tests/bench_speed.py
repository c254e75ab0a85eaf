"""How fast is a step, against TRL, the released procedure and the bare model? And what does each
trick save? `python tests/bench_speed.py` writes `assets/speed.json`.

All ratios are medians over alternating repeats in one run. The student is a random Qwen3-VL; every
rollout has exactly as many tokens as the shape says, and every other first answer counts as wrong.
TRL is an extra: without it that row is left out. `--quick`: small shapes, one repeat.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from bench_memory import Peak  # noqa: E402
from cold_start import needle_rationale, tiny_policy  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import ffr  # noqa: E402
import grpo  # noqa: E402
import teacher  # noqa: E402
import train  # noqa: E402

# width, layers: of the text model; vision, depth: of the tower; size: of a frame, in pixels
HEADLINE = dict(
    width=256,
    layers=6,
    vision=128,
    depth=4,
    size=(320, 256),
    frames=16,
    G=8,
    tokens=64,
    questions=1,
)
TINY = dict(
    width=96, layers=2, vision=64, depth=1, size=(32, 32), frames=16, G=8, tokens=14, questions=4
)
MOMENTS = itertools.cycle(range(7))
GROWTH = dict(G=(2, 4, 8, 16), frames=(8, 16, 32, 64), tokens=(32, 128, 512))


class Clip:
    """A video in memory: noise, with a time for each frame."""

    path, fps = "noise", 2.0

    def __init__(self, frames: int, size: tuple, seed: int):
        noise = torch.Generator().manual_seed(seed)
        shape = (frames, size[1], size[0], 3)
        pixels = torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8).numpy()
        self.images = [Image.fromarray(frame) for frame in pixels]

    def __len__(self) -> int:
        return len(self.images)

    def seconds(self, index: int) -> float:
        return index / self.fps

    def frame(self, index: int) -> Image.Image:
        return self.images[index]


def policy(folder: str, shape: dict) -> None:
    """`tiny_policy` at this shape's size, for frames of this size."""
    words = [
        needle_rationale({"moments": [["red", "blue"]] * 8}, 1, 2),
        *ffr.SUFFIXES.values(),
        "Evidence temporal Moments Frame Crop Region Guidance look there what happens ?",
        *(f"<{k / 2 + d:.1f} seconds>" for k in range(64) for d in (0, 0.2, 0.25)),
    ]
    tiny_policy(folder, words, seed=0)
    config = transformers.AutoConfig.from_pretrained(folder)
    text, vision, width = config.text_config, config.vision_config, shape["width"]
    text.vocab_size = shape.get("vocab", text.vocab_size)  # ids beyond the words are no words
    if width != text.hidden_size:
        text.update(
            dict(
                hidden_size=width,
                intermediate_size=4 * width,
                head_dim=32,
                num_attention_heads=width // 32,
                num_key_value_heads=width // 64,
                num_hidden_layers=shape["layers"],
            )
        )
        text.rope_parameters["mrope_section"] = [6, 5, 5]
        vision.update(
            dict(
                hidden_size=shape["vision"],
                intermediate_size=4 * shape["vision"],
                depth=shape["depth"],
                num_heads=4,
                out_hidden_size=width,
                deepstack_visual_indexes=[1, 2],
            )
        )
        text.layer_types = ["full_attention"] * shape["layers"]
    torch.manual_seed(0)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    pixels = shape["size"][0] * shape["size"][1]
    for part, frames in ((processor.image_processor, 1), (processor.video_processor, 128)):
        part.size = {"shortest_edge": pixels, "longest_edge": pixels * frames}
    processor.save_pretrained(folder)


def setting(shape: dict, beta=0.0):
    """A student of this shape, its questions, and what an update needs."""
    folder = tempfile.mkdtemp()
    policy(folder, shape)
    config = train.parse(
        [
            "--model",
            folder,
            "--data",
            "none",
            "--prompt",
            "{question}",
            "--max_completion_length",
            str(shape["tokens"]),
            "--beta",
            str(beta),
            "--num_rollouts",
            str(shape["G"]),
            "--frame_pixels",
            "1000000",
            "--picture_pixels",
            "1000000",
            "--precision",
            "fp32",
        ]
    )
    accelerator = train.Accelerator(cpu=True)
    student = train.load_student(config, accelerator)
    never = student.sampling.suppressed_ids[:1]  # an end that is not sampled: lengths are as given
    student.sampling = replace(student.sampling, eos_ids=never)
    questions = []
    for k in range(shape["questions"]):
        clip = Clip(shape["frames"], shape["size"], k)
        sample = data.Sample(f"q{k}", "what happens ?", [], "red", "exact", "noise")
        question = ffr.Question(sample, clip, [*range(len(clip))], clip.images)
        questions.append(replace(question, prompt=ffr.encode(student, question)))
    optimizer = torch.optim.AdamW(student.model.parameters(), 1e-6)
    return accelerator, student, questions, optimizer


def slow_chat(seconds: float, conversations: list, _: float) -> list:
    """A teacher that takes its time, eight requests side by side, and then points at a moment, each
    time at another, by a frame."""
    time.sleep(seconds * -(-len(conversations) // 8))
    moments = [next(MOMENTS) for _ in conversations]
    patches = [
        {"content": "look there", "key_frames": [k], "temporal_markers": [[k, k + 1]]}
        for k in moments
    ]
    return [
        (json.dumps({"error_classification": "temporal", "evidence_patch": patch}), 1)
        for patch in patches
    ]


@contextlib.contextmanager
def half_right():
    """Every other first answer is wrong; a second one is right as often."""
    score, turns = ffr.score, itertools.cycle((False, True))
    ffr.score = lambda *_: ffr.Score(float(right := next(turns)), 0.0, right)
    try:
        yield
    finally:
        ffr.score = score


def ours(accelerator, student, questions, optimizer, latency=None, clock=None):
    """One step of the training loop, without its books. `latency` None: no teacher (plain GRPO)."""
    c, began = student.view, time.perf_counter()
    ask = (
        None
        if latency is None
        else partial(
            teacher.diagnose,
            chat=partial(slow_chat, latency),
            gate=lambda *_: None,
            num_frames=2,
        )
    )
    with half_right():
        groups = ffr.find_fix_reason(student, questions, c.num_rollouts, ask, 0.3, 0.0, (0,))
    middle = time.perf_counter()
    members = ffr.flat(groups)
    assert (
        latency is None
        or sum(member.repaired is not None for member in members) == len(members) // 2
    )
    for k, member in enumerate(members):
        member.advantage = 1.0 - 2.0 * (k % 2)
    total = sum(len(member.chosen.completion.ids) for member in members)
    batch = grpo.Batch(*ffr.episodes(groups), total)
    objective = grpo.Objective(
        beta=0.0, rollouts_at_once=c.rollouts_at_once, row_tokens=c.row_tokens
    )
    grpo.update(accelerator, student.model, optimizer, batch, student.sampling, objective)
    if clock is not None:
        clock["round"], clock["update"] = middle - began, time.perf_counter() - middle
    return members


# --- baselines ---
def released(student, questions, optimizer, latency=0.0):
    """The released procedure, from its description: pixels repeated for each rollout, the teacher
    asked and each failed rollout answered again one by one, logits at every position."""
    model, G, never = student.model, student.view.num_rollouts, student.sampling
    config = transformers.GenerationConfig(
        do_sample=True,
        top_p=never.top_p,
        max_new_tokens=never.max_completion_length,
        eos_token_id=None,
        pad_token_id=never.pad_id,
        suppress_tokens=list(never.suppressed_ids),
    )
    model.eval()
    for question in questions:
        plain = {k: v for k, v in question.prompt.items() if k != "position_ids"}
        with torch.no_grad():
            out = model.generate(**plain, generation_config=config, num_return_sequences=G)
            for k in range(1, G, 2):
                time.sleep(latency)
                patch = teacher.EvidencePatch("temporal", "look there", [k], [(k, k + 1)])
                again = {
                    k: v
                    for k, v in ffr.encode(student, question, patch).items()
                    if k != "position_ids"
                }
                model.generate(**again, generation_config=config)
        tokens, length = out, plain["input_ids"].shape[1]
        batch = {key: value.repeat(G, *[1] * (value.dim() - 1)) for key, value in plain.items()}
        batch["input_ids"], zeros = tokens, torch.zeros_like(tokens[:, length:])
        batch["attention_mask"] = torch.ones_like(tokens)
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], zeros], 1)
        logp = model(**batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        logp = logp.gather(-1, tokens[:, 1:, None])[..., 0][:, length - 1 :]
        advantages = torch.tensor([1.0, -1.0]).repeat(G // 2)
        (-(logp - logp.detach()).exp() * advantages[:, None]).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()


def limit(student, optimizer, step):
    """The bare model on the same tokens with the same sharing: the calls of one step, kept with
    their inputs, made again with nothing between them but the backward and the optimizer."""
    model, calls = student.model, []
    forward, reorder = type(model).forward, grpo.OneDtypeCache.reorder_cache

    def keep(cache=None, **inputs):
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        calls.append((kept, cache is not None, torch.is_grad_enabled()))
        return forward(model, cache=cache, **inputs)

    def keep_order(cache, owner):
        calls.append(owner)
        return reorder(cache, owner)

    model.forward, grpo.OneDtypeCache.reorder_cache = keep, keep_order
    step()
    del model.forward
    grpo.OneDtypeCache.reorder_cache = reorder

    def again():
        cache = None
        for call in calls:
            if isinstance(call, torch.Tensor):  # the prompts' cache is repeated for completions
                cache.reorder_cache(call)
                continue
            inputs, cached, trained = call
            if trained:
                logits = model(**inputs).logits
                torch.nn.functional.cross_entropy(logits, logits.argmax(1)).backward()
            elif cached and "logits_to_keep" in inputs:
                cache = transformers.DynamicCache(config=model.config)
                with torch.no_grad():
                    model(**inputs, cache=cache)
            else:
                with torch.no_grad():
                    model(**inputs, cache=cache)
        optimizer.step()
        optimizer.zero_grad()

    return again


def against_trl(shape: dict, repeats: int) -> dict | None:
    """TRL's trainer and ours, plain GRPO, on the same pictures as input; seconds and peaks."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        print("no trl: that row is left out")
        return None
    accelerator, student, questions, optimizer = setting(shape)
    images = [question.video.images for question in questions]
    for k, question in enumerate(questions):
        chat = [
            {
                "role": "user",
                "content": [
                    *[{"type": "image"}] * len(images[k]),
                    {"type": "text", "text": "what happens ?"},
                ],
            }
        ]
        text = student.processor.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        inputs = student.processor(text=[text], images=images[k], return_tensors="pt")
        question.prompt = ffr.with_positions(student.model, dict(inputs))
    marks = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            marks[-1] = time.perf_counter() - marks[-1]
            ours(accelerator, student, questions, optimizer, None, clock := {})
            mine.append(clock["round"] + clock["update"])

    mine, turns = [], itertools.cycle((0.0, 1.0))
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        student.view.model, dtype=torch.float32
    )
    rows = (
        [
            {"prompt": [{"role": "user", "content": "what happens ?"}], "images": pictures}
            for pictures in images
        ]
        * 2
        * (repeats + 1)
    )
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=shape["G"] * shape["questions"],
        num_generations=shape["G"],
        max_completion_length=shape["tokens"],
        beta=0.0,
        use_cpu=True,
        bf16=False,
        max_steps=repeats + 1,
        report_to=[],
        save_strategy="no",
        top_p=0.95,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_steps=10**6,
        generation_kwargs={"min_new_tokens": shape["tokens"]},
    )

    def trainer(callbacks):
        return GRPOTrainer(
            model,
            lambda completions, **_: [next(turns) for _ in completions],
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=student.processor,
            callbacks=callbacks,
        )

    trainer([Clock()]).train()
    times = {"trl": statistics.median(marks[1:]), "ours": statistics.median(mine[1:])}
    settings.max_steps = 1
    other = trainer([])
    with Peak(model) as peak:
        other.train()
    with Peak(student.model) as own:
        ours(accelerator, student, questions, optimizer)
    return times | {
        "ratio": times["trl"] / times["ours"],
        "repeats": repeats,
        "version": version("trl"),
        "trl_peak_MB": peak.bytes / 1e6,
        "ours_peak_MB": own.bytes / 1e6,
    }


# --- measuring ---
def alternate(repeats: int, **works) -> dict[str, float]:
    """Median seconds of each, taken in turns, after one round to warm up."""
    times = {name: [] for name in works}
    for k in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def compare(shape: dict, repeats: int) -> dict:
    accelerator, student, questions, optimizer = setting(shape)
    run = partial(ours, accelerator, student, questions, optimizer)
    old = partial(released, student, questions, optimizer)
    times = alternate(
        repeats,
        ours=partial(run, 0.0),
        released=old,
        limit=limit(student, optimizer, partial(run, 0.0)),
        ours_200ms=partial(run, 0.2),
        released_200ms=partial(old, 0.2),
    )
    return times | {
        "vs_released": times["released"] / times["ours"],
        "vs_released_200ms": times["released_200ms"] / times["ours_200ms"],
        "vs_limit": times["ours"] / times["limit"],
        "repeats": repeats,
        "prompt_tokens": questions[0].prompt["input_ids"].shape[1],
    }


def savings(shape: dict, repeats: int) -> dict:
    """Seconds of a step with each trick switched off, over those with all on."""
    accelerator, student, questions, optimizer = setting(shape)
    run = partial(ours, accelerator, student, questions, optimizer, 0.0)
    generate, forward = ffr.generate, type(student.model).forward

    def unshared():
        student.view.row_tokens = 0
        run()
        student.view.row_tokens = 8192

    def reread():  # a prompt read for each of its completions, as without a cache to repeat
        def each(model, prompts, seeds, sampling):
            repeated = [prompt for prompt, own in zip(prompts, seeds) for _ in own]
            alone = [[seed] for own in seeds for seed in own]
            done = iter(generate(model, repeated, alone, sampling))
            return [[next(done)[0] for _ in own] for own in seeds]

        ffr.generate = each
        run()
        ffr.generate = generate

    def all_logits():
        def whole(*args, logits_to_keep=0, **inputs):
            out = forward(student.model, *args, **inputs)
            if isinstance(logits_to_keep, torch.Tensor):
                out.logits = out.logits[logits_to_keep]
            return out

        student.model.forward = whole
        run()
        del student.model.forward

    times = alternate(repeats, on=run, unshared=unshared, reread=reread, all_logits=all_logits)
    return {name: seconds / times["on"] for name, seconds in times.items()}


def growth(shape: dict, repeats: int) -> list[dict]:
    """Seconds and peak of a step against G, frames and completion."""
    rows = []
    for key, values in GROWTH.items():
        for value in values:
            accelerator, student, questions, optimizer = setting(shape | {key: value})
            run = partial(ours, accelerator, student, questions, optimizer, 0.0)
            seconds = alternate(repeats, step=run)["step"]
            with Peak(student.model) as peak:
                run()
            rows.append({key: value, "seconds": seconds, "peak_MB": peak.bytes / 1e6})
            print(rows[-1], flush=True)
    return rows


def profile(shape: dict, repeats: int) -> dict[str, float]:
    """Shares of a step: where the model's time goes, and what is left for python."""
    accelerator, student, questions, optimizer = setting(shape)
    spent, model = dict.fromkeys(("vision", "prefill", "decode", "scoring"), 0.0), student.model
    forward, vision = type(model).forward, model.model.visual.forward

    def timed(name, work, *args, **kwargs):
        began = time.perf_counter()
        out = work(*args, **kwargs)
        spent[name] += time.perf_counter() - began
        return out

    def whole(*args, **inputs):
        name = "scoring" if torch.is_grad_enabled() else "prefill"
        name = "decode" if inputs.get("logits_to_keep") is None else name
        before = spent["vision"]
        out = timed(name, partial(forward, model), *args, **inputs)
        spent[name] -= spent["vision"] - before
        return out

    model.forward = whole
    model.model.visual.forward = partial(timed, "vision", vision)
    spent |= {"backward": 0.0, "optimizer": 0.0}
    accelerator.backward = partial(timed, "backward", accelerator.backward)
    optimizer.step = partial(timed, "optimizer", optimizer.step)
    ours(accelerator, student, questions, optimizer, 0.0)
    spent.update(dict.fromkeys(spent, 0.0))
    began = time.perf_counter()
    for _ in range(repeats):
        ours(accelerator, student, questions, optimizer, 0.0)
    total = time.perf_counter() - began
    return {k: v / total for k, v in spent.items()} | {
        "python": 1 - sum(spent.values()) / total,
        "seconds": total / repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    repeats, shapes = 1 if quick else 5, {"headline": HEADLINE, "tiny mode": TINY}
    if quick:
        shapes = {"tiny mode": TINY}
        GROWTH.update(G=(2, 4), frames=(8,), tokens=(32,))
    names = ("torch", "transformers")
    result = {
        "machine": "two threads of an AMD EPYC, fp32",
        "shapes": shapes,
        "versions": {name: version(name) for name in names},
    }
    for name, shape in shapes.items():
        row = result[name] = compare(shape, repeats)
        row["trl"] = against_trl(shape, repeats)
        row["vs_trl"] = row["trl"] and row["trl"]["ratio"]
        row["tricks"] = savings(shape, repeats)
        row["profile"] = profile(shape, repeats)
        print(name, json.dumps(row, indent=1), flush=True)
    shape = next(iter(shapes.values()))
    result["growth"] = growth(shape, 1 if quick else 3)
    if not quick:
        Path("assets/speed.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
