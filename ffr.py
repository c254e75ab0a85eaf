"""Find, Fix, Reason (arXiv 2604.16243, §Method): context repair of failed rollouts inside GRPO.

    x = (v, q)   `Question`: a `Sample` with its opened video and the frames the student sees
    π_θ          `Student`: the model with its processor, prompt and sampling
    τ, z         a first-pass `Rollout`, and whether its answer is right: `score.correct`
    T, c         `teacher`, a function of failed cases, and the `EvidencePatch` it returns
    τ*, τ̂        the re-answer under the patched prompt (x, c); the chosen one, τ if z = 1 else τ*
    R, R_fmt     `score.accuracy`, `score.format`;   R̃  `Rollout.reward`
    κ, λ, G      `kappa`, the patch tax; `lam`, the weight of alignment; `num_rollouts`

A τ* is on-policy under another observation: π_θ, π_old and π_ref all score it under (x, c)."""

import argparse
import hashlib
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm
from transformers.video_utils import VideoMetadata

from data import Sample, Video, fit
from grpo import Completion, Sampling, generate, prefill, with_positions
from reward import Score, alignment, asks_for, leak, robust_improvement_reward, score
from teacher import Case, EvidencePatch, TeacherError

PROMPT = """{question}
{options}
Reason first, between <think> and </think>, and cite the moments of the video, in seconds, that \
your reasoning rests on. Then answer between <answer> and </answer>. {suffix}"""
SUFFIXES = {
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is one number.",
    "regression": "The answer is one number.",
    "OCR": "The answer is the text as it is written in the video.",
    "free-form": "The answer is a short phrase.",
    "exact": "The answer is exactly the words that are asked for.",
}


@dataclass
class Student:
    """π_θ and how it sees and answers."""

    model: torch.nn.Module  # unwrapped
    processor: object
    sampling: Sampling
    config: object  # train.Config, or anything with the names that are read here
    synced: bool = False  # sharded parameters: every rank must make the same calls


@dataclass
class Question:
    """x: a sample, its video, and the student's view of it."""

    sample: Sample
    video: Video
    indices: list[int]  # original frames shown to the student
    frames: list[Image.Image]
    prompt: dict | None = None  # x as model inputs
    counts: bool = True  # False for a stand-in that must not be trained on

    @property
    def spacing(self) -> float:  # seconds between two shown frames
        first, last = (self.video.seconds(self.indices[end]) for end in (0, -1))
        return (last - first) / max(len(self.indices) - 1, 1)


@dataclass
class Rollout:
    """A response and all that its reward is made of. `prompt` is the one that it answers."""

    prompt: dict
    completion: Completion
    text: str
    score: Score
    reward: float = 0.0  # R̃
    align: float = 0.0
    patch: EvidencePatch | None = None  # c, where this is a τ*
    failed: "Rollout | None" = None  # the τ whose place this τ* took
    error: TeacherError | None = None  # why this failed τ got no patch

    @property
    def first(self) -> "Rollout":  # the unaided one in this place of the group
        return self.failed or self


def open_question(student: Student, sample: Sample) -> Question:
    """What the student sees of a sample. Raises ValueError: a broken video, too long a prompt."""
    video = Video(sample.path)
    indices = video.uniform(student.config.num_frames)
    frames = [fit(frame, student.config.frame_pixels) for frame in video.frames(indices)]
    question = Question(sample, video, indices, frames)
    return replace(question, prompt=encode(student, question))


def open_questions(student: Student, samples: list[Sample], spare: Question) -> list[Question]:
    """Open each sample. `spare` stands in for one that fails, so that processes keep in step."""
    questions = [replace(spare, counts=False)] * len(samples)
    for k, sample in enumerate(samples):
        try:
            questions[k] = open_question(student, sample)
        except ValueError as error:
            tqdm.write(f"skipped: {error}")
    return questions


def render_question(student: Student, sample: Sample, more: list = ()) -> str:
    """The prompt's text: video, question, `more` (a patch), which only prolongs the user turn."""
    fields = {
        "question": sample.question,
        "options": "\n".join(sample.options),
        "suffix": SUFFIXES[sample.problem_type],
    }
    text = re.sub(r"\{(question|options|suffix)\}", lambda m: fields[m[1]], student.config.prompt)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}, *more]}]
    return student.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def render_patch(patch: EvidencePatch, video: Video, spacing: float, pictures=True) -> list[dict]:
    """The patch as chat parts: a text, with times as Qwen3-VL's processor writes them, then key
    frames with regions drawn, and crops, at native size; without pictures, regions by corners."""

    def at(first: int, last: int) -> str:
        start, end = video.seconds(first), video.seconds(last)
        if end - start <= spacing:  # one moment of the student's view
            return f" <{(start + end) / 2:.1f} seconds>" if patch.show_times else ""
        return f" <{start:.1f} seconds> to <{end:.1f} seconds>"

    lines = [f"\n\nEvidence ({patch.error_type}):"]
    if patch.spans:
        lines.append("Moments:" + ",".join(at(*span) for span in patch.spans))
    for frame, box, what in patch.regions:
        corners = "" if pictures else " " + " ".join(f"{v:.2f}" for v in box)
        lines.append(f"Region{at(frame, frame)}{corners}: {what}".removesuffix(": "))
    if patch.guidance:
        lines.append(f"Guidance: {patch.guidance}")
    parts = [{"type": "text", "text": "\n".join(lines)}]
    drawn = {frame: video.frame(frame).copy() for frame in patch.key_frames if pictures}
    shown = [("Frame", frame, image) for frame, image in drawn.items()]
    for region in patch.regions if pictures else []:
        image = video.frame(region.frame)
        shown.append(("Crop", region.frame, image.crop(region.corners(image))))
        if region.frame in drawn:
            pen, width = ImageDraw.Draw(drawn[region.frame]), max(2, min(image.size) // 100)
            pen.rectangle(region.corners(image), outline=(255, 0, 0), width=width)
    for kind, frame, image in shown:
        text = f"\n{kind}{at(frame, frame)}:"
        parts += [{"type": "text", "text": text}, {"type": "image", "image": image}]
    return parts


def encode(student: Student, question: Question, patch: EvidencePatch | None = None) -> dict:
    """The prompt as model inputs, one row. Raises ValueError where it exceeds `max_prompt_length`
    tokens: cutting it would cut vision tokens off their pixels."""
    config, video, fps = student.config, question.video, question.video.fps
    parts = render_patch(patch, video, question.spacing, config.patch_pictures) if patch else []
    pictures = [fit(p["image"], config.picture_pixels) for p in parts if p["type"] == "image"]
    text = render_question(student, question.sample, parts)
    # Processors take index / fps for the time: only this is right at variable frame rates too.
    indices = [video.seconds(i) * fps for i in question.indices]
    metadata = VideoMetadata(len(video), fps, duration=len(video) / fps, frames_indices=indices)
    inputs = student.processor(
        text=[text],
        videos=[question.frames],
        images=pictures or None,
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    length, most = inputs["input_ids"].shape[1], config.max_prompt_length
    if length > most:
        raise ValueError(
            f"record {question.sample.id}: its prompt has {length} tokens, over the "
            f"limit of {most}; raise --max_prompt_length or lower --num_frames"
        )
    return with_positions(student.model, dict(inputs.to(student.model.device)))


# --- the round: Find → Fix → Reason ---
def find_fix_reason(
    student: Student,
    questions: list[Question],
    num_rollouts: int,
    teacher,
    kappa: float,
    lam: float,
    seed: tuple,
) -> list[list[Rollout]]:
    """One round for a batch of questions: the chosen rollouts τ̂, `num_rollouts` per question.
    `teacher` turns a list of `Case` into as many `EvidencePatch | TeacherError`; None: plain GRPO.
    A rollout's randomness is of `seed`, its sample and its place alone, whatever others become."""
    model, sampling, synced = student.model, student.sampling, student.synced
    # τ_i ~ π_old(· | x), i = 1 … G
    asked = [question for question in questions for _ in range(num_rollouts)]
    seeds = [_seed(seed, q.sample.id, k % num_rollouts, "first") for k, q in enumerate(asked)]
    read = prefill(model, [q.prompt for q in asked], sampling)
    answers = generate(model, read, seeds, sampling, synced)
    chosen = [judge(student, q, q.prompt, answer) for q, answer in zip(asked, answers)]
    # Find and Fix: c_i = T(x, y, τ_i) where z_i = 0, all failures together
    wrong = [k for k, q in enumerate(asked) if teacher and q.counts and not chosen[k].score.correct]
    verdicts = teacher([case_of(asked[k], chosen[k].text) for k in wrong]) if wrong else []
    # Reason: τ*_i ~ π_old(· | x, c_i), in one batch
    repairs, encoded = [], {}
    for k, verdict in zip(wrong, verdicts):
        if isinstance(verdict, TeacherError):  # τ_i stays, with its plain reward, untaxed
            chosen[k].error = verdict
            continue
        key = (k // num_rollouts, repr(verdict))  # equal patches share a prompt
        try:
            encoded[key] = encoded.get(key) or encode(student, asked[k], verdict)
            repairs.append((k, verdict, encoded[key]))
        except ValueError as error:  # over the prompt limit, or a frame that does not decode
            chosen[k].error = TeacherError("prompt", str(error))
    seeds = [_seed(seed, asked[k].sample.id, k % num_rollouts, "again") for k, *_ in repairs]
    patched, trunks = [x for *_, x in repairs], [asked[k].prompt for k, *_ in repairs]
    if synced and teacher:
        patched, seeds = [*patched, stand_in(student, questions[0])], [*seeds, 0]
        trunks.append(questions[0].prompt)
    again = patched and generate(
        model, prefill(model, patched, sampling, read, trunks), seeds, sampling, synced
    )
    # τ̂_i = τ_i if z_i = 1 else τ*_i
    for (k, patch, prompt), completion in zip(repairs, again):
        repaired = judge(student, asked[k], prompt, completion)
        spans = [tuple(map(asked[k].video.seconds, span)) for span in patch.spans]
        repaired.align = alignment(repaired.text, spans, asked[k].spacing / 2)
        repaired.patch, repaired.failed, chosen[k] = patch, chosen[k], repaired
    for r in chosen:
        repaired = r.score if r.failed else None
        r.reward = robust_improvement_reward(r.first.score, repaired, r.align, kappa, lam)
    return [chosen[k : k + num_rollouts] for k in range(0, len(chosen), num_rollouts)]


def judge(student: Student, question: Question, prompt: dict, completion: Completion) -> Rollout:
    """Decode a completion and score it: R, R_fmt, z."""
    text = student.processor.tokenizer.decode(completion.ids, skip_special_tokens=True)
    sample = question.sample
    return Rollout(prompt, completion, text, score(text, sample.answer, sample.problem_type))


def stand_in(student: Student, question: Question) -> dict:
    """A patched prompt, for a rank that must make a call without having a repair of its own."""
    return encode(student, question, EvidencePatch("temporal", key_frames=[0]))


def case_of(question: Question, response: str) -> Case:
    """S_i = (x, y, τ_i), what the teacher is given."""
    x = question.sample
    return Case(x.id, x.question, x.options, x.answer, response, question.video)


def gate(patch: EvidencePatch, case: Case) -> str | None:
    """Drop regions where a place is asked, times where a time is; return why words give y away."""
    asked = asks_for(case.question)
    patch.regions = [] if "place" in asked else patch.regions
    if "time" in asked:
        patch.spans, patch.show_times = [], False
    words = "; ".join([patch.guidance, *(region.what for region in patch.regions)])
    return leak(words, case.question, case.options, case.answer)


def _seed(*parts) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


def describe(question: Question, r: Rollout) -> dict:
    """A chosen rollout in the numbers that `summarize` works on."""
    frames, spans = (r.patch.key_frames, r.patch.spans) if r.patch else ([], [])
    return {
        "failure": not r.first.score.correct,
        "intervention": r.failed is not None,
        "reward": r.reward,
        "format": r.score.format,
        "truncated": not r.completion.finished,
        "length": len(r.completion.ids),
        "entropy": float(r.completion.entropy.sum()),
        "fix": r.score.correct,
        "align": r.align,
        "cause": r.error and r.error.cause,
        "patch_frames": len(frames),
        "patch_seconds": sum(b - a + 1 for a, b in spans) / question.video.fps,
        "sampled_tokens": sum(len(x.completion.ids) for x in (r, r.failed) if x),
    }


def summarize(rows: list[dict], updates: list[dict]) -> dict[str, float]:
    """A step's metrics (README, metric glossary) from every rollout and every process's update."""
    repaired = [row for row in rows if row["intervention"]]
    among = dict.fromkeys("failure intervention reward format truncated length".split(), rows)
    among |= dict.fromkeys("fix align patch_frames patch_seconds".split(), repaired)
    metrics = {k: sum(row[k] for row in part) / max(len(part), 1) for k, part in among.items()}
    metrics["entropy"] = sum(r["entropy"] for r in rows) / max(sum(r["length"] for r in rows), 1)
    metrics["sampled_tokens"] = sum(row["sampled_tokens"] for row in rows)
    for name in updates[0]:
        join = max if name in "logp_gap grad_norm seconds_round seconds_update".split() else sum
        metrics[name] = join(update[name] for update in updates)
    causes = [row["cause"] for row in rows if row["cause"]]
    asked = max(metrics["teacher_calls"] + metrics["teacher_hits"], 1)
    metrics |= {
        "unaided": 1 - metrics["failure"] if rows else 0.0,
        "teacher_failures": len(causes),
        "won_per_call": sum(row["fix"] for row in repaired) / asked,
    }
    return metrics | {f"teacher_{cause}": causes.count(cause) for cause in causes}


def draw_repair(question: Question, rollout: Rollout, kappa: float, lam: float, file: Path) -> str:
    """A repaired rollout in the order of the method, as a picture 1,200 px wide in `file`, a .png,
    and as text, in a .txt beside it and returned."""
    sample, patch, s = question.sample, rollout.patch, rollout.score
    evidence, *parts = render_patch(patch, question.video, question.spacing)
    reward = f"R {s.accuracy:.2f} + R_fmt {s.format:.2f} - kappa {kappa:.2f}"
    if lam * s.correct * rollout.align:
        reward += f" + lambda {lam:.2f} x align {rollout.align:.2f}"
    times = [f"{question.video.seconds(index):.1f} s" for index in question.indices]
    given = [(i["image"], t["text"].strip(" \n:")) for t, i in zip(parts[::2], parts[1::2])]
    asked = "\n".join([sample.question, *sample.options, f"Reference: {sample.answer}"])
    sections = [  # heading, text, pictures with their labels
        (f"Question ({sample.problem_type})", asked, []),
        ("The student sees", "", [*zip(question.frames, times)]),
        ("First answer, wrong", rollout.failed.text.strip(), []),
        ("Find: the teacher's tool calls", "\n".join(patch.transcript) or "none", []),
        ("Fix: the evidence patch", evidence["text"].strip(), given),
        (f"Reason: second answer, {['wrong', 'right'][s.correct]}", rollout.text.strip(), []),
        ("Reward", f"{reward} = {rollout.reward:.2f}", []),
    ]
    page, y = Image.new("RGB", (1200, 8000), "white"), 24
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(19)
    for heading, text, pictures in sections:
        body = "\n".join(textwrap.fill(line, 100) for line in text.splitlines())
        pen.text((24, y), heading, (20, 60, 140), ImageFont.load_default(23))
        pen.text((24, y + 30), body, "black", font, spacing=7)
        y = pen.textbbox((24, y + 30), body, font, spacing=7)[3] + 12
        width, height = (192, 100) if len(pictures) > 6 else (384, 220)
        for start in range(0, len(pictures), 1152 // width):
            for x, (image, label) in zip(range(24, 1176, width), pictures[start:]):
                pen.text((x, y), label, "gray", font)
                page.paste(ImageOps.contain(image, (width - 12, height)), (x, y + 26))
            y += height + 34
    text = "\n\n".join(f"{heading}\n{body}" for heading, body, _ in sections)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    page.crop((0, 0, page.width, y)).save(file)
    return text


def show_repair(config, questions: list[Question], groups: list, step: int) -> None:
    """Draw the step's first repair that came out right."""
    fixed = [
        (q, r) for q, group in zip(questions, groups) for r in group if r.failed and r.score.correct
    ]
    for question, rollout in fixed[:1]:
        name = re.sub(r"[^\w-]", "_", f"step-{step:04d}-{question.sample.id}") + ".png"
        draw_repair(question, rollout, config.kappa, config.lam, Path(config.out, "repairs", name))


def evaluate(accelerator, student, samples, teach, spare, name: str, at_once=64) -> list[dict]:
    """Greedy answers to held-out records: is each right unaided, and with the teacher's help where
    it was not? Rows are kept in OUT/`name`.jsonl; a run that goes on asks for the others only."""
    student = replace(student, sampling=replace(student.sampling, temperature=0.0))
    file, processes = Path(student.config.out, f"{name}.jsonl"), accelerator.num_processes
    rows = read_rows(accelerator, file)
    done = {row["id"] for row in rows}
    left = [sample for sample in samples if sample.id not in done]
    batches = range(0, len(left), at_once * processes)
    for start in tqdm(batches, name, leave=False, disable=not accelerator.is_main_process):
        mine = left[start + accelerator.process_index : start + at_once * processes : processes]
        questions = open_questions(student, mine, spare) or [replace(spare, counts=False)]
        with accelerator.autocast():
            groups = find_fix_reason(student, questions, 1, teach, 0.0, 0.0, ("evaluation",))
        fresh = gather_object(
            [
                {
                    "id": q.sample.id,
                    "type": q.sample.problem_type,
                    "source": q.sample.source,
                    "unaided": r.first.score.correct,
                    "assisted": r.score.correct,
                }
                for q, (r,) in zip(questions, groups)
                if q.counts
            ]
        )
        add_rows(accelerator, file, fresh)
        rows += fresh
    return rows


def read_rows(accelerator, file: Path, last: float = float("inf")) -> list[dict]:
    """The rows of a .jsonl file; a line that was cut off, or of a step after `last`, is dropped."""
    lines = []
    if accelerator.is_main_process and file.is_file():
        lines = [line for line in file.read_bytes().splitlines(True) if line.endswith(b"\n")]
        lines = [line for line in lines if json.loads(line).get("step", 0) <= last]
        os.truncate(file, sum(map(len, lines)))
    return broadcast_object_list([[json.loads(line) for line in lines]])[0]


def add_rows(accelerator, file: Path, rows: list[dict]) -> None:
    if accelerator.is_main_process:
        with open(file, "a", encoding="utf-8") as opened:
            opened.writelines(json.dumps(row) + "\n" for row in rows)


# --- `python ffr.py VIDEO`: why did my model get this video wrong? ---
def explain(arguments: list[str]) -> None:
    """One round on a video of one's own: prints what is repaired and draws it as OUT/why.png."""
    import train  # which imports this file

    parser = argparse.ArgumentParser(
        "ffr.py",
        allow_abbrev=False,
        description=explain.__doc__,
        epilog="Give --teacher_model, and what train.py takes.",
    )
    parser.add_argument("video", help="before any of the settings")
    for name in ("--question", "--answer", "--model"):
        parser.add_argument(name, required=True)
    parser.add_argument("--options", nargs="*", default=[], help="as 'A. a dog' 'B. a cat'")
    parser.add_argument("--problem_type", choices=SUFFIXES, help="by default as the options say")
    x, others = parser.parse_known_args(arguments)
    c = train.parse(["--teacher", "local", *others, "--model", x.model, "--data", x.video])
    kind = x.problem_type or ("multiple choice" if x.options else "free-form")
    sample = Sample("video", x.question, x.options, x.answer, kind, x.video)
    try:
        student = train.load_student(c, Accelerator(cpu=not torch.accelerator.is_available()))
        teach = train.load_teacher(c, [sample], student.model.device)
        asked = open_question(student, sample)
    except (OSError, ValueError) as error:
        raise SystemExit(f"ffr.py: {error}") from error
    (group,) = find_fix_reason(student, [asked], c.num_rollouts, teach, c.kappa, c.lam, (c.seed,))
    repairs = sorted((r for r in group if r.failed), key=lambda r: not r.score.correct)
    print(
        f"{sum(r.first.score.correct for r in group)} of {len(group)} right at first ({kind}), "
        f"{sum(r.score.correct for r in repairs)} of {len(repairs)} with a patch."
    )
    print(*dict.fromkeys(f"{r.text}\n  No patch ({r.error})" for r in group if r.error), sep="\n")
    for repair in repairs[:1]:
        text = draw_repair(asked, repair, c.kappa, c.lam, Path(c.out, "why.png"))
        print(f"{text}\n\nAs a picture: {c.out}/why.png")


if __name__ == "__main__":
    import ffr  # this file once more, as train.py knows it

    ffr.explain(sys.argv[1:])
