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

from data import Sample, Video, add_rows, fit, read_rows
from grpo import Completion, Episode, Sampling, generate, is_sharded
from reward import SUFFIXES, Score, alignment, robust_improvement_reward, score
from teacher import Case, EvidencePatch, TeacherError

PROMPT = """{question}
{options}
Reason first, between <think> and </think>, and cite the moments of the video, in seconds, that \
your reasoning rests on. Then answer between <answer> and </answer>. {suffix}"""


@dataclass
class Student:
    """π_θ and how it sees and answers."""

    model: torch.nn.Module  # unwrapped
    processor: object
    sampling: Sampling
    config: object  # train.Config, or anything with the names that are read here


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
    prompt_number: int = 0  # of the round's: the questions' first, then each patched one

    @property
    def first(self) -> "Rollout":  # the unaided one in this place of the group
        return self.failed or self


def open_question(student: Student, sample: Sample) -> Question:
    """What the student sees of a sample. Raises ValueError: a broken video, too long a prompt."""
    video = Video(sample.path, patience=student.config.decode_patience)
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


def with_positions(model, inputs: dict) -> dict:
    """A processor's inputs and `position_ids`, (1, L), or (3, 1, L) of time, height and width, so
    that parts can be computed apart. Raises ValueError where M-RoPE hides how it counts."""
    counter = next((part for part in model.modules() if hasattr(part, "get_rope_index")), None)
    if counter is None:
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if "mrope_section" in rope:
            raise ValueError(f"{type(model).__name__} has M-RoPE, but no `get_rope_index` to find")
        return inputs | {"position_ids": inputs["attention_mask"].cumsum(1) - 1}
    positions = counter.get_rope_index(**inputs)[0]
    if model.config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        # The weights were trained with text after a video at the largest position so far + 1; from
        # 5.3 on, transformers puts it where the frame's height and width end, inside the video.
        of_video = inputs["mm_token_type_ids"][0] == 2
        for after in (of_video[:-1] & ~of_video[1:]).nonzero()[:, 0] + 1:
            positions[..., after:] += positions[..., :after].max() + 1 - positions[0, 0, after]
    return inputs | {"position_ids": positions}


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
    Each rollout is seeded by (seed, sample, place): it does not depend on the others."""
    # τ_i ~ π_old(· | x), i = 1 … G
    seeds = [
        [_seed(seed, question.sample.id, place, "first") for place in range(num_rollouts)]
        for question in questions
    ]
    prompts = [question.prompt for question in questions]
    answers = sum(generate(student.model, prompts, seeds, student.sampling), [])
    asked = [question for question in questions for _ in range(num_rollouts)]
    chosen = [
        judge(student, q, q.prompt, k // num_rollouts, answer)
        for k, (q, answer) in enumerate(zip(asked, answers))
    ]
    # Find and Fix: c_i = T(x, y, τ_i) where z_i = 0, all failures together
    wrong = [k for k, q in enumerate(asked) if teacher and q.counts and not chosen[k].score.correct]
    verdicts = teacher([case_of(asked[k], chosen[k].text) for k in wrong]) if wrong else []
    patched = {}  # for each question and distinct patch: the prompt, and the failures that got it
    for k, verdict in zip(wrong, verdicts):
        if isinstance(verdict, TeacherError):  # τ_i stays, with its plain reward, untaxed
            chosen[k].error = verdict
            continue
        key = (k // num_rollouts, repr(verdict))
        try:
            if key not in patched:
                patched[key] = (encode(student, asked[k], verdict), [])
            patched[key][1].append((k, verdict))
        except ValueError as error:  # over the prompt limit, or a frame that does not decode
            chosen[k].error = TeacherError("prompt", str(error))
    # Reason: τ*_i ~ π_old(· | x, c_i), in one batch
    prompts = [prompt for prompt, _ in patched.values()]
    seeds = [
        [_seed(seed, asked[k].sample.id, k % num_rollouts, "again") for k, _ in failures]
        for _, failures in patched.values()
    ]
    if is_sharded(student.model) and teacher:
        prompts.append(stand_in(student, questions[0]))
        seeds.append([0])
    again = generate(student.model, prompts, seeds, student.sampling) if prompts else []
    # τ̂_i = τ_i if z_i = 1 else τ*_i
    repaired_groups = zip(patched.values(), again)
    for number, ((prompt, failures), completions) in enumerate(repaired_groups, len(questions)):
        for (k, patch), completion in zip(failures, completions):
            repaired = judge(student, asked[k], prompt, number, completion)
            spans = [tuple(map(asked[k].video.seconds, span)) for span in patch.spans]
            repaired.align = alignment(repaired.text, spans, asked[k].spacing / 2)
            repaired.patch, repaired.failed, chosen[k] = patch, chosen[k], repaired
    for r in chosen:
        repaired = r.score if r.failed else None
        r.reward = robust_improvement_reward(r.first.score, repaired, r.align, kappa, lam)
    return [chosen[k : k + num_rollouts] for k in range(0, len(chosen), num_rollouts)]


def judge(student, question: Question, prompt: dict, number: int, completion) -> Rollout:
    """Decode a completion and score it: R, R_fmt, z."""
    text = decode(student, completion.ids)
    judged = score(text, question.sample.answer, question.sample.problem_type)
    return Rollout(prompt, completion, text, judged, prompt_number=number)


def store_linears_in_bf16(model) -> None:
    """Halve frozen linear layers. Autocast casts their weights at each call, so nothing changes;
    norms and embeddings, tied ones too, it leaves in fp32, and so does this."""
    tied = model.get_input_embeddings().weight
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and not part.weight.requires_grad:
            part.to(torch.float32 if part.weight is tied else torch.bfloat16)


def token_ids(model, processor) -> dict:
    """A checkpoint's ids for `Sampling`: each EOS ends; vision and padding are suppressed."""
    tokenizer, ends = processor.tokenizer, model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    names = [f"{part}_token_id" for part in ("image", "video", "vision_start", "vision_end")]
    never = {getattr(owner, name, None) for owner in (model.config, processor) for name in names}
    never = (never | {pad_id}) - ends - {None}
    return {"eos_ids": tuple(ends), "pad_id": pad_id, "suppressed_ids": tuple(sorted(never))}


def decode(student: Student, ids: torch.Tensor) -> str:
    """A completion's text. Only ends, padding and vision tokens are dropped: some tokenizers hold
    <think> and <answer> as special tokens too, and these are what the reward looks for."""
    sampling = student.sampling
    dropped = {*sampling.eos_ids, sampling.pad_id, *sampling.suppressed_ids}
    kept = [token for token in ids.tolist() if token not in dropped]
    return student.processor.tokenizer.decode(kept, skip_special_tokens=False)


def episodes(questions: list[Question], groups: list, advantages: list[float]) -> tuple:
    """A round as `grpo.Batch` takes it: distinct prompts, and an `Episode` for each rollout, with
    its advantage. What does not count has weight 0."""
    prompts, found = {number: q.prompt for number, q in enumerate(questions)}, []
    rollouts = [(k, rollout) for k, group in enumerate(groups) for rollout in group]
    for (k, rollout), advantage in zip(rollouts, advantages):
        prompts[rollout.prompt_number] = rollout.prompt
        own = (k, rollout.prompt_number, rollout.completion.ids, rollout.completion.logps)
        counts = float(questions[k].counts)
        found.append(Episode(*own, advantage * counts, counts))
    return prompts, found


def stand_in(student: Student, question: Question) -> dict:
    """A patched prompt, for a rank that must make a call without having a repair of its own."""
    return encode(student, question, EvidencePatch("temporal", key_frames=[0]))


def case_of(q: Question, response: str) -> Case:
    """S_i = (x, y, τ_i), what the teacher is given."""
    x, video = q.sample, q.video
    return Case(x.id, x.question, x.options, x.answer, response, video, x.problem_type, x.record)


def _seed(*parts) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


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
    rows = read_rows(file) if accelerator.is_main_process else []
    rows = broadcast_object_list([rows])[0]
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
        if accelerator.is_main_process:
            add_rows(file, fresh)
        rows += fresh
    return rows


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
