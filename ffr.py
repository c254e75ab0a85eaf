"""Find, Fix, Reason (arXiv 2604.16243, §Method): context repair of failed rollouts inside GRPO.

    x = (v, q)   `Question`: a `Sample` with its opened video and the frames the student sees
    π_θ          `Student`: the model with its processor, sampling and view
    τ, z         the `unaided` rollout, and whether its answer is right: `unaided.score.correct`
    T, c         `teacher`, a function of failed cases (x, y, τ), and the `patch` it gives for one
    τ*           the `repaired` rollout: the answer under the patched prompt (x, c)
    τ̂            `Member.chosen`, which is trained: τ if z = 1 (or without a patch), else τ*
    R, R_fmt     `Rollout.score.accuracy`, `Rollout.score.format`;   R̃  `Member.reward`
    κ, λ, G      `kappa`, the patch tax; `lam`, the weight of alignment (ours); `num_rollouts`

A round is `find_fix_reason`:

    first_pass          samples τ_i ~ π_old(· | x), i = 1 … G; `judge` gives z_i (by reward.py)
    find_and_fix        asks the teacher, in one call, for a patch c_i for each τ_i with z_i = 0
    reason_again        samples τ*_i ~ π_old(· | x, c_i)
    set_rewards         gives each τ̂_i its R̃_i; κ is taken off where it is a τ*_i

The caller sets the advantages; `episodes` then pairs each τ̂_i with the prompt that it answers. A
τ* is on-policy only under (x, c), so π_θ, π_old and π_ref all score it there. The file needs its
four siblings teacher.py, reward.py, grpo.py and data.py, but not train.py.
"""

import argparse
import hashlib
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import HfArgumentParser
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from data import PATIENCE, Sample, Video, fit, read_record
from grpo import (
    Completion,
    Episode,
    Sampling,
    SamplingSettings,
    batched_logps,
    generate,
    is_sharded,
    load_policy,
    load_sampling,
    with_positions,
)
from reward import (
    SUFFIXES,
    Score,
    alignment,
    answers_correctly,
    gate,
    robust_improvement_reward,
    score,
)
from teacher import Case, EvidencePatch, TeacherError, TeacherSettings, load_teacher


# --- what a round works with ---
@dataclass
class Student:
    """The student π_θ, with how it sees videos and how it samples answers."""

    model: torch.nn.Module  # unwrapped
    processor: object
    sampling: Sampling
    view: "View"


@dataclass
class Question:
    """A question x: the sample, its video, and the view of it that the student gets."""

    sample: Sample
    video: Video
    indices: list[int]  # original frames shown to the student
    frames: list[Image.Image]
    prompt: dict | None = None  # x as model inputs
    is_placeholder: bool = False  # for a record that does not open: sampled, but never trained on

    @property
    def spacing(self) -> float:
        """The mean time between two shown frames, in seconds."""
        first, last = self.video.seconds(self.indices[0]), self.video.seconds(self.indices[-1])
        return (last - first) / max(len(self.indices) - 1, 1)


@dataclass
class Rollout:
    """One answer, under one prompt."""

    prompt: dict
    completion: Completion
    text: str
    score: Score  # R, R_fmt and z


@dataclass
class Member:
    """One of a group's G members: its first answer τ, the repair τ* if there is one, and the reward
    and advantage of whichever of the two is trained (`chosen`)."""

    question: Question
    index: int  # in the group
    unaided: Rollout  # τ
    patch: EvidencePatch | None = None  # c, where τ failed and the teacher helped
    error: TeacherError | None = None  # why a failed τ got no patch
    repaired: Rollout | None = None  # τ*
    align: float = 0.0
    reward: float = 0.0  # R̃
    advantage: float = 0.0  # A_i, which the caller sets from the group's rewards
    reliance: float = 0.0  # of a repair on its patch, where it is measured

    @property
    def chosen(self) -> Rollout:
        """τ̂: the rollout that is trained, under its own prompt."""
        return self.unaided if self.repaired is None else self.repaired


# The teacher, as the round sees it: failed cases in, for each a patch or an error out. It is the
# teacher's job to keep y out of a patch (teacher.py's `diagnose`, reward.py's `gate`).
Teacher = Callable[[list[Case]], list[EvidencePatch | TeacherError]]


# --- the round: Find → Fix → Reason ---
def find_fix_reason(
    student: Student,
    questions: list[Question],
    num_rollouts: int,
    teacher: Teacher | None,
    kappa: float,
    lam: float,
    seed: tuple,
) -> list[list[Member]]:
    """Run one round for a batch of questions. Returns a group of `num_rollouts` members for each.

    Without a `teacher` this is a round of plain GRPO. Each rollout is seeded by (seed, sample id,
    index, "first" or "again"), so it does not depend on the others. The caller sets the advantages.
    """
    groups = first_pass(student, questions, num_rollouts, seed)
    if teacher is not None:
        patched = find_and_fix(groups, teacher)
        reason_again(student, questions, patched, seed)
    set_rewards(groups, kappa, lam)
    return groups


def first_pass(
    student: Student, questions: list[Question], num_rollouts: int, seed: tuple
) -> list[list[Member]]:
    """Sample τ_i ~ π_old(· | x), i = 1 … G, for each question, and verify it: z_i."""
    prompts = [question.prompt for question in questions]
    seeds = [
        [seed_of(seed, question.sample.id, index, "first") for index in range(num_rollouts)]
        for question in questions
    ]
    completions = generate(student.model, prompts, seeds, student.sampling)

    groups = []
    for question, its_completions in zip(questions, completions):
        group = []
        for index, completion in enumerate(its_completions):
            unaided = judge(student, question, question.prompt, completion)
            group.append(Member(question, index, unaided))
        groups.append(group)
    return groups


def judge(student: Student, question: Question, prompt: dict, completion: Completion) -> Rollout:
    """Decode a completion and score it: R, R_fmt, and z, which says whether the answer is right."""
    text, sample = decode(student, completion.ids), question.sample
    return Rollout(prompt, completion, text, score(text, sample.answer, sample.problem_type))


def find_and_fix(groups: list[list[Member]], teacher: Teacher) -> list[Member]:
    """Ask the teacher about all failures of the round at once: c_i = T(x, y, τ_i) where z_i = 0.
    Sets each one's `patch`, or the `error` that says why not. Returns those with a patch."""
    failures = []
    for member in flat(groups):
        if not member.unaided.score.correct and not member.question.is_placeholder:
            failures.append(member)
    if not failures:
        return []

    patched = []
    replies = teacher([case_of(member.question, member.unaided.text) for member in failures])
    for member, reply in zip(failures, replies, strict=True):
        if isinstance(reply, TeacherError):
            member.error = reply
        else:
            member.patch = reply
            patched.append(member)
    return patched


def reason_again(
    student: Student, questions: list[Question], patched: list[Member], seed: tuple
) -> None:
    """Sample τ*_i ~ π_old(· | x, c_i) for each patch, in one batch, and verify it."""
    shared = patched_prompts(student, patched)
    prompts = [prompt for prompt, _ in shared]
    seeds = []
    for _, members in shared:
        sample_id = members[0].question.sample.id
        seeds.append([seed_of(seed, sample_id, member.index, "again") for member in members])

    if is_sharded(student.model):
        # Every rank adds a patched prompt, so that all make the same calls. `zip` drops its answer.
        prompts.append(stand_in(student, questions[0]))
        seeds.append([0])
    completions = generate(student.model, prompts, seeds, student.sampling) if prompts else []

    for (prompt, members), its_completions in zip(shared, completions):
        for member, completion in zip(members, its_completions):
            member.repaired = judge(student, member.question, prompt, completion)


def patched_prompts(student: Student, patched: list[Member]) -> list[tuple[dict, list[Member]]]:
    """Return the distinct prompts (x, c_i), each with the members that answer it. Members whose
    patch makes no prompt (too long, or a frame does not decode) get an `error` instead."""
    by_key = {}
    for member in patched:
        by_key.setdefault(prompt_key(member), []).append(member)

    shared = []
    for members in by_key.values():
        try:
            prompt = encode(student, members[0].question, members[0].patch)
        except ValueError as error:
            for member in members:
                member.patch, member.error = None, TeacherError("prompt", str(error))
        else:
            shared.append((prompt, members))
    return shared


def set_rewards(groups: list[list[Member]], kappa: float, lam: float) -> None:
    """Set each member's R̃_i. A first answer that is kept, because it is right or got no patch,
    earns R + R_fmt. A repair earns R + R_fmt − κ, plus λ · align if it is right."""
    for member in flat(groups):
        repaired_score = None
        if member.repaired is not None:
            repaired_score = member.repaired.score
            question = member.question
            spans = [tuple(map(question.video.seconds, span)) for span in member.patch.spans]
            member.align = alignment(member.repaired.text, spans, tolerance=question.spacing / 2)

        member.reward = robust_improvement_reward(
            member.unaided.score, repaired_score, member.align, kappa, lam
        )


def episodes(groups: list[list[Member]]) -> tuple[dict, list[Episode]]:
    """Return the round as `grpo.Batch` takes it: the distinct prompts by number, and an `Episode`
    for each τ̂_i under the prompt that it answers: x, or (x, c_i) for a repair."""
    prompts = {number: group[0].question.prompt for number, group in enumerate(groups)}
    patched_numbers = {}
    trained = []
    for question_number, group in enumerate(groups):
        for member in group:
            prompt_number = question_number
            if member.repaired is not None:
                next_number = len(groups) + len(patched_numbers)
                prompt_number = patched_numbers.setdefault(prompt_key(member), next_number)
                prompts[prompt_number] = member.repaired.prompt  # (x, c_i)

            weight = float(not member.question.is_placeholder)
            episode = Episode(
                question=question_number,
                prompt=prompt_number,
                ids=member.chosen.completion.ids,
                sampled_logps=member.chosen.completion.logps,
                advantage=member.advantage * weight,
                weight=weight,
            )
            trained.append(episode)
    return prompts, trained


def prompt_key(member: Member) -> tuple[str, str]:
    """Return a key that two patched prompts share exactly if they are the same prompt."""
    return member.question.sample.id, repr(member.patch)


def flat(groups: list[list[Member]]) -> list[Member]:
    return [member for group in groups for member in group]


def seed_of(*parts) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


def decode(student: Student, ids: torch.Tensor) -> str:
    """Return a completion's text without EOS, padding and vision tokens. Other special tokens stay:
    some tokenizers have <think> and <answer> among them, and the reward looks for these."""
    sampling = student.sampling
    dropped = {*sampling.eos_ids, sampling.pad_id, *sampling.suppressed_ids}
    kept = [token for token in ids.tolist() if token not in dropped]
    return student.processor.tokenizer.decode(kept, skip_special_tokens=False)


def case_of(question: Question, response: str) -> Case:
    """Return S_i = (x, y, τ_i), which is what the teacher is given."""
    sample = question.sample
    return Case(
        id=sample.id,
        question=sample.question,
        options=sample.options,
        answer=sample.answer,
        response=response,
        video=question.video,
        problem_type=sample.problem_type,
        record=sample.record,
    )


@torch.no_grad()
def measure_reliance(student: Student, groups: list[list[Member]]) -> None:
    """Measure what each repair owes to its patch: the mean over the tokens of τ* of
    log p(τ* | x) − log p(τ* | x, c), which is below 0 if the patch made τ* likelier. Costs one
    forward pass, under the caller's autocast."""
    repaired = [member for member in flat(groups) if member.repaired is not None]
    scored = repaired or flat(groups)[:1]  # if sharded, every rank must make the call
    prompts, under_x = {}, []
    for number, member in enumerate(scored):
        prompts[number] = member.question.prompt
        under_x.append(Episode(number, number, member.chosen.completion.ids))
    logps, _ = batched_logps(student.model, prompts, under_x, student.sampling)
    for member, logps_under_x in zip(repaired, logps):  # padded to equal lengths
        sampled_logps = member.repaired.completion.logps  # under (x, c)
        owed = logps_under_x[: len(sampled_logps)] - sampled_logps
        member.reliance = owed.mean().item()


# --- the prompt, and the patch in it ---
PROMPT = """{question}
{options}
Reason first, between <think> and </think>, and cite the moments of the video, in seconds, that \
your reasoning rests on. Then answer between <answer> and </answer>. {suffix}"""


@dataclass
class View:
    """What the student sees. Defaults are FFR's Table 8 unless marked (ours)."""

    prompt: Annotated[str, "with {question}, {options} and {suffix} (ours)"] = PROMPT
    num_frames: Annotated[int, "frames of the video that the student sees"] = 16
    frame_pixels: Annotated[int, "the most pixels in each of these frames"] = 128 * 28 * 28
    picture_pixels: Annotated[int, "the most pixels in each picture of a patch"] = 401408
    patch_pictures: Annotated[bool, "False: the paper's 'no visual context'"] = True
    max_prompt_length: Annotated[int, "tokens; a longer prompt is an error, never cut"] = 16384
    decode_patience: Annotated[float, "seconds of work that a clip may take to read (ours)"] = (
        PATIENCE
    )


def open_question(student: Student, sample: Sample) -> Question:
    """Open a sample's video and build its prompt. Raises ValueError if the video is broken or the
    prompt too long."""
    view = student.view
    video = Video(sample.path, patience=view.decode_patience)
    indices = video.uniform(view.num_frames)
    frames = [fit(frame, view.frame_pixels) for frame in video.frames(indices)]
    question = Question(sample, video, indices, frames)
    return replace(question, prompt=encode(student, question))


def user_turn(text: str, evidence: list[dict]) -> list[dict]:
    """Return a user turn: video, question, evidence. The evidence comes last, so that plain and
    patched prompts begin alike and rollouts can share that part, with the video in it."""
    text += "\n\n" if evidence else ""
    return [{"type": "video"}, {"type": "text", "text": text}, *evidence]


def question_text(view: View, sample: Sample) -> str:
    """Fill in the view's prompt: the question, its options, and the form the answer should take."""
    values = {
        "question": sample.question,
        "options": "\n".join(sample.options),
        "suffix": SUFFIXES[sample.problem_type],
    }
    return re.sub(r"\{(question|options|suffix)\}", lambda match: values[match[1]], view.prompt)


def render_question(student: Student, sample: Sample, evidence: list[dict] = ()) -> str:
    """Return the prompt in the model's chat template, up to where its answer begins."""
    chat = [{"role": "user", "content": user_turn(question_text(student.view, sample), evidence)}]
    return student.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def render_patch(patch: EvidencePatch, video: Video, spacing: float, pictures=True) -> list[dict]:
    """Return the patch as parts of a chat: its text, then each picture behind its label."""
    parts = [{"type": "text", "text": patch_text(patch, video, spacing, corners=not pictures)}]
    if pictures:
        for label, image in patch_pictures(patch, video, spacing):
            parts.append({"type": "text", "text": f"\n{label}:"})
            parts.append({"type": "image", "image": image})
    return parts


def patch_text(patch: EvidencePatch, video: Video, spacing: float, corners: bool) -> str:
    """Return the patch in words: moments, regions (with `corners` if not drawn), guidance."""
    lines = [f"Evidence ({patch.error_type}):"]
    if patch.spans:
        moments = [moment_text(patch, video, spacing, *span) for span in patch.spans]
        lines.append("Moments:" + ",".join(moments))

    for frame, box, what in patch.regions:
        place = moment_text(patch, video, spacing, frame, frame)
        if corners:
            place += " " + " ".join(f"{v:.2f}" for v in box)
        lines.append(f"Region{place}: {what}".removesuffix(": "))

    if patch.guidance:
        lines.append(f"Guidance: {patch.guidance}")
    return "\n".join(lines)


def moment_text(patch, video: Video, spacing: float, first: int, last: int) -> str:
    """Return a space and the time of frames `first` to `last`, as Qwen3-VL writes times: a range if
    longer than the student's frame spacing, else one time. Return "" if the patch withholds times,
    because the question asks for one."""
    if not patch.show_times:
        return ""
    start, end = video.seconds(first), video.seconds(last)
    if end - start > spacing:
        return f" <{start:.1f} seconds> to <{end:.1f} seconds>"
    return f" <{(start + end) / 2:.1f} seconds>"


def patch_pictures(patch: EvidencePatch, video: Video, spacing: float) -> list[tuple]:
    """Return (label, picture) for each key frame, with its regions drawn, and for each region, cut
    out. All are at native size."""
    frames = {frame: video.frame(frame).copy() for frame in patch.key_frames}
    crops = []
    for region in patch.regions:
        image = video.frame(region.frame)
        corners = region.corners(image)
        time = moment_text(patch, video, spacing, region.frame, region.frame)
        crops.append((f"Crop{time}", image.crop(corners)))
        if region.frame in frames:
            width = max(2, min(image.size) // 100)
            pen = ImageDraw.Draw(frames[region.frame])
            pen.rectangle(corners, outline=(255, 0, 0), width=width)

    pictures = []
    for frame, image in frames.items():
        time = moment_text(patch, video, spacing, frame, frame)
        pictures.append((f"Frame{time}", image))
    return pictures + crops


def encode(student: Student, question: Question, patch: EvidencePatch | None = None) -> dict:
    """Turn the prompt into model inputs, one row. Raises ValueError if it exceeds
    `max_prompt_length` tokens, since cutting it would separate vision tokens from their pixels."""
    view, video = student.view, question.video
    evidence = []
    if patch is not None:
        evidence = render_patch(patch, video, question.spacing, view.patch_pictures)
    pictures = [fit(part["image"], view.picture_pixels) for part in evidence if "image" in part]

    # Processors compute a frame's time as index / fps. Real times may differ: give time · fps.
    nominal_indices = [video.seconds(index) * video.fps for index in question.indices]
    duration = len(video) / video.fps
    inputs = student.processor(
        text=[render_question(student, question.sample, evidence)],
        videos=[question.frames],
        images=pictures or None,
        video_metadata=[
            VideoMetadata(len(video), video.fps, duration=duration, frames_indices=nominal_indices)
        ],
        do_sample_frames=False,
        return_tensors="pt",
    )

    length = inputs["input_ids"].shape[1]
    if length > view.max_prompt_length:
        raise ValueError(
            f"record {question.sample.id}: its prompt has {length} tokens, over the limit of "
            f"{view.max_prompt_length}; raise --max_prompt_length or lower --num_frames"
        )
    return with_positions(student.model, dict(inputs.to(student.model.device)))


def stand_in(student: Student, question: Question) -> dict:
    """Return a small patched prompt. If parameters are sharded every rank adds one, so that all
    make the same calls."""
    return encode(student, question, EvidencePatch("temporal", key_frames=[0]))


# --- a repair as a picture ---
def draw_repair(member: Member, kappa: float, lam: float, file: Path) -> str:
    """Draw a repair in the order of the method, 1,200 px wide, as the .png `file`. The same as text
    is written to a .txt beside it, and returned."""
    sections = repair_sections(member, kappa, lam)
    text = "\n\n".join(f"{heading}\n{body}" for heading, body, _ in sections)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    draw_page(sections).save(file)
    return text


def repair_sections(member: Member, kappa: float, lam: float) -> list[tuple]:
    """Return (heading, text, labelled pictures) for each step of a repair."""
    question, patch, repaired = member.question, member.patch, member.repaired
    sample, second_score = question.sample, repaired.score
    problem = "\n".join([sample.question, *sample.options, f"Reference: {sample.answer}"])
    times = [f"{question.video.seconds(index):.1f} s" for index in question.indices]
    with_pictures = "pixel_values" in repaired.prompt
    evidence = patch_text(patch, question.video, question.spacing, corners=not with_pictures)
    pictures = patch_pictures(patch, question.video, question.spacing) if with_pictures else []

    reward = f"R {second_score.accuracy:.2f} + R_fmt {second_score.format:.2f} - kappa {kappa:.2f}"
    if lam * second_score.correct * member.align:
        reward += f" + lambda {lam:.2f} x align {member.align:.2f}"
    verdict = "right" if second_score.correct else "wrong"

    return [
        (f"Question ({sample.problem_type})", problem, []),
        ("The student sees", "", [*zip(times, question.frames)]),
        ("First answer, wrong", member.unaided.text.strip(), []),
        ("Find: the teacher's tool calls", "\n".join(patch.transcript) or "none", []),
        ("Fix: the evidence patch", evidence, pictures),
        (f"Reason: second answer, {verdict}", repaired.text.strip(), []),
        ("Reward", f"{reward} = {member.reward:.2f}", []),
    ]


def draw_page(sections: list[tuple]) -> Image.Image:
    """Lay out headings, texts and rows of labelled pictures, one below the other."""
    page = Image.new("RGB", (1200, 8000), "white")
    pen = ImageDraw.Draw(page)
    font, heading_font = ImageFont.load_default(19), ImageFont.load_default(23)
    y = 24
    for heading, text, pictures in sections:
        body = "\n".join(textwrap.fill(line, 100) for line in text.splitlines())
        below = (24, y + 30)
        pen.text((24, y), heading, (20, 60, 140), heading_font)
        pen.text(below, body, "black", font, spacing=7)
        y = pen.textbbox(below, body, font, spacing=7)[3] + 12

        width, height = (192, 100) if len(pictures) > 6 else (384, 220)
        columns = 1152 // width
        for k, (label, image) in enumerate(pictures):
            row, column = divmod(k, columns)
            x, top = 24 + width * column, y + (height + 34) * row
            pen.text((x, top), label, "gray", font)
            page.paste(ImageOps.contain(image, (width - 12, height)), (x, top + 26))
        y += (height + 34) * -(-len(pictures) // columns)
    return page.crop((0, 0, page.width, y))


# --- `python ffr.py VIDEO`: why did my model get this video wrong? ---
@dataclass
class RoundSettings:
    """The round. Defaults are FFR's Table 8 unless marked (ours)."""

    num_rollouts: Annotated[int, "G, rollouts per question"] = 8
    kappa: Annotated[float, "κ, the patch tax on a repaired rollout's reward"] = 0.3
    lam: Annotated[float, "λ, weight of alignment; 0 is the paper's equation (ours)"] = 0.0


@dataclass
class Query:
    """The question that is answered wrong."""

    question: Annotated[str, "as the student is asked it"]
    answer: Annotated[str, "the right one"]
    model: Annotated[str, "the student: folder or hub name of a video VLM"]
    options: Annotated[list[str], "as 'A. a dog' 'B. a cat'"] = field(default_factory=list)
    problem_type: Annotated[Literal[("", *SUFFIXES)], "by default as the options say"] = ""
    out: Annotated[str, "folder for why.png and why.txt"] = "runs/why"
    seed: Annotated[int, "of what is sampled"] = 0


def settings_parser(classes: list, tiny={}, defaults={}, **options) -> HfArgumentParser:
    """Return a parser for settings dataclasses. Each becomes a group of --help, titled with the
    first sentence of its docstring. A field's help text is its annotation, then in brackets its
    default (of `defaults`, or its own) and its default in tiny mode."""
    for settings_class in classes:
        settings_class._argument_group_name = settings_class.__doc__.partition(".")[0]
        hints = get_type_hints(settings_class, include_extras=True)
        for setting in fields(settings_class):
            (help_text,) = hints[setting.name].__metadata__
            default = defaults.get(setting.name, setting.default)
            if default not in ("", PROMPT, MISSING):
                in_tiny_mode = f"; tiny mode {tiny[setting.name]}" if setting.name in tiny else ""
                help_text += f" [{default}{in_tiny_mode}]"
            setting.metadata = {"help": help_text}

    options |= {"allow_abbrev": False, "formatter_class": argparse.HelpFormatter}
    parser = HfArgumentParser(classes, **options)
    parser.set_defaults(**defaults)
    return parser


def explain(arguments: list[str]) -> None:
    """Run one round on a video of your own. Prints what is repaired and draws it as OUT/why.png."""
    config = read_query(arguments)
    try:
        sample = sample_of(config)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        student = load_student(config)
        teach = load_teacher(config, student.model.device, gate, answers_correctly, evidence={})
        question = open_question(student, sample)
    except (OSError, ValueError) as error:
        raise SystemExit(f"ffr.py: {error}") from error

    (group,) = find_fix_reason(
        student,
        [question],
        config.num_rollouts,
        teach,
        kappa=config.kappa,
        lam=config.lam,
        seed=(config.seed,),
    )
    repairs = [member for member in group if member.repaired is not None]
    repairs.sort(key=lambda member: not member.repaired.score.correct)  # a right one first
    right = sum(member.unaided.score.correct for member in group)
    fixed = sum(member.repaired.score.correct for member in repairs)
    print(f"{right} of {len(group)} right at first ({sample.problem_type}), ", end="")
    print(f"{fixed} of {len(repairs)} with a patch.")

    for text, count in Counter(member.unaided.text for member in group if member.error).items():
        print(f"\n{count} of {len(group)}, wrong and without a patch:\n{text}")
    for error, count in Counter(str(member.error) for member in group if member.error).items():
        print(f"\nNo patch for {count} of {len(group)}: {error}")

    if repairs:
        file = Path(config.out, "why.png")
        print(draw_repair(repairs[0], config.kappa, config.lam, file))
        print(f"\nAs a picture, one of {len(repairs)} repairs: {file}")
    else:
        print("Nothing was repaired, so there is no picture.")


def read_query(arguments: list[str]) -> argparse.Namespace:
    """Read the command's settings; exit with one sentence if they make no sense."""
    classes = [Query, View, RoundSettings, SamplingSettings, TeacherSettings]
    usage = "ffr.py VIDEO --question Q --answer A --model M --teacher_model T [settings]"
    words = {"usage": usage, "description": explain.__doc__}
    parser = settings_parser(classes, defaults={"teacher": "local"}, prog="ffr.py", **words)
    parser.add_argument("video", help="before any of the settings")
    config = parser.parse_args(arguments)
    checks = [
        (not Path(config.video).is_file(), f"no video at {config.video}"),
        (config.num_rollouts < 1, "--num_rollouts must be 1 or more"),
    ]
    for refused, why in checks + checks_of_round(config):
        if refused:
            raise SystemExit(f"ffr.py: {why}")
    return config


def checks_of_round(config) -> list[tuple]:
    """Return (is it refused, why) for each rule on settings that train.py has, too."""
    nameless = config.teacher != "scripted" and not config.teacher_model
    nowhere = config.teacher == "remote" and not config.teacher_url + config.teacher_cache
    return [
        (config.lam >= config.kappa > 0, "--lam must be below --kappa: help must not outrank none"),
        (Path(config.out).is_file(), f"--out {config.out} is a file; name a folder"),
        (config.temperature <= 0, "--temperature must be above 0: equal rollouts teach nothing"),
        (not 0 < config.top_p <= 1, "--top_p must be in (0, 1]"),
        ("{question}" not in config.prompt, "--prompt must hold {question}"),
        (nameless, f"--teacher {config.teacher} needs --teacher_model"),
        (nowhere, "give --teacher_url"),
    ]


def load_student(config) -> Student:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, processor = load_policy(config.model)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    sampling = load_sampling(config, model, processor)
    return Student(model.to(device), processor, sampling, view=config)


def sample_of(config) -> Sample:
    """Read the question as a record of a data set, with all checks. Raises ValueError."""
    guess = "multiple choice" if config.options else "free-form"
    record = {
        "problem_id": "video",
        "path": config.video,
        "problem_type": config.problem_type or guess,
        "problem": config.question,
        "options": config.options,
        "solution": f"<answer>{config.answer}</answer>",
    }
    return read_record(record, "the question", Path())


if __name__ == "__main__":
    explain(sys.argv[1:])
