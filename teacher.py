"""The frozen teacher T, which looks at the video through tools, finds what a failed rollout missed
and returns an evidence patch.

    S_i = (x, y, τ_i)   `Case`
    c_i, e_i            `EvidencePatch` and its `error_type`
    T                   `diagnose`: one `Conversation` per case, between a `Chat` and the tools
    `Chat`              whoever replies: `remote`, `local`, `scripted`, or a function of your own

A conversation is a list of OpenAI chat messages, with pictures as JPEG in data URLs. Sources: FFR
§Find, §Fix and app. B; a patch's limits and the blind test are ours. The file needs no sibling."""

import asyncio
import base64
import inspect
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sized
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Annotated, Literal, NamedTuple
from uuid import uuid4
from weakref import WeakKeyDictionary

from PIL import Image

ERROR_TYPES = ("temporal", "spatial", "misconception")
# The limits of a patch, and of a conversation.
MAX_FRAMES = 4  # key frames, and as many moments
MAX_REGIONS, MAX_WORDS = 2, 60
MAX_SHARE = 0.25  # of the clip, for all moments together
MAX_TURNS, MAX_CALLS = 6, 4  # calls of tools in a turn
MAX_SEGMENT = 8  # frames of a segment
MAX_PIXELS = 401_408  # of a picture
MAX_REPLY = 20_000  # characters of a reply, counted from its end
MAX_TRIES = 4  # of a request to an endpoint
BAD_DATA = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Reasoning comes before the reply, and its opening tag may be missing. Calls in it do not count.
THINKING = r"^.*?(?:</think(?:ing)?>|◁/think▷)|<think>(?:(?!<think>).)*?</think>"
PICTURES = WeakKeyDictionary()  # by video: the chat parts of its frames, encoded once


@dataclass
class Case:
    """S_i, a failed rollout: its question x, the reference answer y and the response τ_i."""

    id: str
    question: str
    options: list[str]
    answer: str
    response: str
    video: Sized  # hashable, with len(), `seconds(i)` and `frame(i)`, a PIL image
    problem_type: str = "free-form"
    record: dict = field(default_factory=dict, repr=False)  # its further fields, for tools


class Region(NamedTuple):
    """A box in a frame, and a few words on what to look at there."""

    frame: int
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in 0–1
    what: str = ""

    def corners(self, image: Image.Image) -> tuple[int, int, int, int]:  # in pixels, at least one
        x1, y1, x2, y2 = (int(v * side) for v, side in zip(self.box, image.size * 2))
        return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


@dataclass
class EvidencePatch:
    """c: what the student is shown beside the unchanged question. Frames are the video's own."""

    error_type: str
    guidance: str = ""
    key_frames: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # first and last frame of moments
    regions: list[Region] = field(default_factory=list)
    show_times: bool = True  # False where the question asks for a time
    refusals: list[str] = field(default_factory=list, repr=False)  # by the gate; not shown
    transcript: list[str] = field(default_factory=list, repr=False)  # the tool calls; not shown


class TeacherError(Exception):
    """No patch for this case. `cause` is one word for the metrics."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


Reply = tuple[str, int] | TeacherError  # the words, and how many tokens they took
Chat = Callable[[list[list[dict]], float], list[Reply]]  # conversations and seconds → their replies
Gate = Callable[[EvidencePatch, Case], str | None]  # why a patch tells y; may remove evidence


# --- Find and Fix ---
def diagnose(
    cases: list[Case],
    chat: Chat,
    gate: Gate,
    show_answer: bool = True,
    num_frames: int = 16,
    timeout: float = 480.0,
    answers_correctly: Callable[[str, Case], bool] | None = None,
    guessable: dict[tuple, bool] | None = None,
    usage: Counter | None = None,
) -> list[EvidencePatch | TeacherError]:
    """T: return for each case a patch, or why there is none, within `timeout` seconds.

    All conversations go on together, a turn at a time, and equal cases share one. `gate` may be
    reward.py's. If `answers_correctly` (does a reply answer the case?) is given, each patch takes a
    blind test, unless its question is known to be `guessable`; that dict is filled in here. `usage`
    counts refusals.
    """
    end = time.monotonic() + timeout
    ask = with_deadline(chat)
    guessable = {} if guessable is None else guessable
    if answers_correctly:
        find_guessable(cases, ask, timeout / 2, answers_correctly, guessable)

    conversations = {}
    for case in cases:
        test = None if guessable.get((case.id, case.question)) else answers_correctly
        conversations[repr(case)] = Conversation(case, gate, show_answer, num_frames, test)

    waiting = [each for each in conversations.values() if each.outcome is None]
    while waiting:
        # A turn may take half of what is left: a slow reply does not take the others' next turns.
        seconds = (end - time.monotonic()) / 2
        replies = ask([each.messages for each in waiting], seconds)
        for conversation, reply in zip(waiting, replies):
            conversation.advance(reply)
        waiting = [each for each in waiting if each.outcome is None]

    if usage is not None:
        for conversation in conversations.values():
            usage["refused"] += len(conversation.refusals)
    return [conversations[repr(case)].outcome for case in cases]


def find_guessable(cases, ask: Chat, seconds: float, answers_correctly, guessable: dict) -> None:
    """Ask each new question without a patch and without the video. If the answer is right anyway, a
    blind test would blame the patch for a lucky guess."""
    new = {}
    for case in cases:
        if (case.id, case.question) not in guessable:
            new[case.id, case.question] = case

    replies = ask([blind_messages(case, "") for case in new.values()], seconds)
    for question, reply in zip(new, replies):
        if isinstance(reply, tuple):
            guessable[question] = answers_correctly(without_thoughts(reply[0]), new[question])


class Conversation:
    """The conversation about one case. Send its `messages` to a `Chat` and hand the reply to
    `advance`, until there is an `outcome`: a patch, or the error that says why there is none.

    A reply that cannot be read, and a patch whose words give y away, are sent back once, with the
    reason. The second time the former is an error, and the latter loses its words but keeps its
    frames, times and boxes.
    """

    def __init__(self, case: Case, gate: Gate, show_answer, num_frames, answers_correctly=None):
        self.case, self.gate, self.answers_correctly = case, gate, answers_correctly
        self.outcome: EvidencePatch | TeacherError | None = None
        self.transcript: list[str] = []  # the tool calls
        self.refusals: list[str] = []  # the gate's, and the blind test's
        self.messages: list[dict] = []
        try:
            self.messages = first_messages(case, show_answer, num_frames)
        except Exception as error:  # whatever a decoder raises costs this case alone
            self.outcome = TeacherError("video", str(error))
        self.steps = self.converse(self.messages)
        next(self.steps)

    def advance(self, reply: Reply) -> None:
        try:
            self.messages = self.steps.send(reply)
        except StopIteration as end:
            self.outcome = end.value
        except Exception as error:  # of the gate, say
            self.outcome = TeacherError("raised", f"{type(error).__name__}: {error}")

    def converse(self, messages: list[dict]):
        """A generator: yields messages, is sent the reply to them, returns the outcome."""
        problems = Counter()  # by cause
        without_words = None  # what is left of a refused patch
        for turn in range(1, MAX_TURNS + 1):
            reply = yield messages
            if isinstance(reply, TeacherError):
                return without_words or reply

            text = without_thoughts(reply[0])
            calls = read_calls(text)[:MAX_CALLS]
            if calls:
                feedback = self.use_tools(calls)
            else:
                patch, problem = yield from self.take_patch(text)
                if problem is None:
                    return patch
                problems[problem.cause] += 1
                without_words = patch or without_words
                if problems[problem.cause] > 1 or turn == MAX_TURNS:
                    return without_words or problem
                request = f"{problem}. Only direct attention; reply again in that form."
                feedback = [text_part(request)]

            own = {"role": "assistant", "content": [text_part(reply[0])]}
            messages = [*messages, own, {"role": "user", "content": feedback}]
        return without_words or TeacherError("turns", f"no patch within {MAX_TURNS} turns")

    def take_patch(self, text: str):
        """Read a patch and judge it; a generator like `converse`, as the blind test may ask.
        Returns (patch, None) if it passes, else what is left without its words (or None) and the
        problem."""
        try:
            patch = parse_patch(text, self.case.video)
        except TeacherError as error:  # a new one: this one's traceback would keep all locals alive
            return None, TeacherError(error.cause, error.detail)

        reason = self.gate(patch, self.case) or (yield from self.read_blind(patch))
        problem = None
        if reason:
            self.refusals.append(reason)
            problem = TeacherError("leak", reason)
            regions = [region._replace(what="") for region in patch.regions]
            patch = replace(patch, guidance="", regions=regions)

        if is_empty(patch):
            return None, problem or TeacherError("malformed", "nothing of it may be shown")
        return replace(patch, transcript=self.transcript, refusals=self.refusals), problem

    def use_tools(self, calls: list[tuple[str, str]]) -> list[dict]:
        parts = []
        for name, arguments in calls:
            self.transcript.append(f"{name}({arguments})")
            try:
                parts += run_tool(name, arguments, self.case)
            except Exception as error:
                parts.append(text_part(f"{name} failed: {error}"))
                self.transcript[-1] += f" failed: {error}"
        return parts

    def read_blind(self, patch: EvidencePatch):
        """Take the blind test: ask the question with the patch's words, without the video. A
        generator. Returns why the words tell too much, or None."""
        words = "; ".join(filter(None, [patch.guidance, *(r.what for r in patch.regions)]))
        if self.answers_correctly and words:
            guess = yield blind_messages(self.case, words)
            if isinstance(guess, TeacherError):
                return f"it could not be read blind ({guess.cause})"
            if self.answers_correctly(without_thoughts(guess[0]), self.case):
                return "the question can be answered from the words, without the video"


# --- what the teacher is told ---
SYSTEM = """\
A student answered a question about a video wrongly. Find the one thing that it missed, and hand
back the least evidence that lets it see that; it then answers again. Errors are
- temporal: it looked at the wrong moment, missed one, or mixed up the order of events
- spatial: it looked at the right moment but missed or misread an object, a place, a detail
- misconception: it saw the right thing but misunderstood the question or reasoned wrongly
Look before you judge. To use a tool, write a line (frames are counted from 0, boxes lie in 0-1):
{tools}
When you know, reply with exactly this and no tool call:
<think>your diagnosis</think><answer>{"error_classification": "temporal", "evidence_patch":
{"content": "one or two sentences", "key_frames": [12], "temporal_markers": [[10, 14]],
"spatial_regions": [{"frame": 12, "box": [0.1, 0.2, 0.5, 0.6], "what": "a hand"}]}}</answer>
The content directs attention, it never tells the result. By what the question asks for:
- what colour, which object, what is written, who: say where or when to look, not what is there
- is it there: say which moments to go through, neither yes nor no
- how many, how much: say what counts and where it hides, no number, no sum, no "one more"
- what happens, in which order, why: say what to follow, not the action, the order or the reason
- where: say what to look for and when, no place and no side
- when, how long: say which change to wait for, no time, no "early" or "late"
Never an option's letter or text, nor which are out, nor the student's mistake turned round ("not
open" says closed). The same holds for each "what".
Bad: "The hand puts down the book." Good: "Follow the right hand until it lets go."
Bad: "There are three cups." Good: "Go through the table from end to end, behind the jug too."
Blind test: someone who has not seen the video must not be able to answer from your words."""
BLIND = """\
Answer a question about a video that you cannot see; where you cannot know it, guess.
{question}
{words}
Reply <answer>…</answer>, with the letter of an option, one number, or as few words as will do."""


def first_messages(case: Case, show_answer: bool, num_frames: int) -> list[dict]:
    """Return the opening messages: the rules, then the case with `num_frames` of its frames."""
    last = len(case.video) - 1
    known = [f"Reference answer, for you alone: {case.answer}"] if show_answer else []
    lines = [
        f"Case: {case.id}",
        f"The video has {last + 1} frames, the last at {case.video.seconds(last):.1f} s.",
        f"Question: {case.question}",
        *case.options,
        *known,
        "The student's response:",
        case.response,
        "Frames of the video:",
    ]

    content = [text_part("\n".join(lines))]
    shown = {round(k * last / max(num_frames - 1, 1)) for k in range(num_frames)}
    for index in sorted(shown):
        content += picture_parts(case.video, index)
    return [system_message(), {"role": "user", "content": content}]


def system_message() -> dict:
    tools = "\n".join(f"TOOL_CALL: {name}{signature(name)}" for name in TOOLS)
    return {"role": "system", "content": SYSTEM.replace("{tools}", tools)}


def blind_messages(case: Case, words: str) -> list[dict]:
    """Return the blind test's message: the question and a patch's `words`, but no pictures."""
    said = f"Someone who has seen it says: {words}" if words else ""
    text = BLIND.replace("{words}", said)
    text = text.replace("{question}", "\n".join([case.question, *case.options]))
    return [{"role": "user", "content": [text_part(text)]}]


def text_part(text: str) -> dict:
    return {"type": "text", "text": without_special_tokens(text)}


def without_special_tokens(text: str) -> str:
    """Break up what a tokenizer could take for a special token, and replace lone surrogates."""
    return text.encode("utf-8", "replace").decode().replace("<|", "< |")


def picture_parts(video: Sized, index: int, box: tuple | None = None) -> list[dict]:
    """Return a frame, or a crop of it at native size, as chat parts: its label and its pixels."""
    encoded = PICTURES.setdefault(video, {})
    if (index, box) not in encoded:
        image = video.frame(index)
        label = f"frame {index} ({video.seconds(index):.2f} s)"
        if box:
            image = image.crop(Region(index, box).corners(image))
            label += ", region " + " ".join(f"{v:.2f}" for v in box)
        picture = {"type": "image_url", "image_url": {"url": data_url(image)}}
        encoded[index, box] = [text_part(label), picture]
    return encoded[index, box]


def data_url(image: Image.Image) -> str:
    file = BytesIO()
    image.convert("RGB").resize(shown_size(image)).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height: MAX_PIXELS at most, and no side too thin for a model's processor."""
    shrink = max(1.0, (image.width * image.height / MAX_PIXELS) ** 0.5)
    return max(28, int(image.width / shrink)), max(28, int(image.height / shrink))


# --- the tools ---
# A tool is a function of the case and of arguments that come as text. It returns chat parts; if it
# raises, the error's sentence goes back to the teacher. To add one, write it and name it in TOOLS;
# `case.record` has the record's further fields.
def get_frame(case, frame_index):
    return picture_parts(case.video, frame_number(frame_index, case.video))


def zoom_region(case, frame_index, x1, y1, x2, y2):
    index = frame_number(frame_index, case.video)
    size = shown_size(case.video.frame(index))
    return picture_parts(case.video, index, read_box([x1, y1, x2, y2], size))


def get_temporal_segment(case, start_frame, end_frame, stride=1):
    start, end, step = (frame_number(v, case.video) for v in (start_frame, end_frame, stride))
    indices = range(start, end + 1, max(1, step))
    if not 0 < len(indices) <= MAX_SEGMENT:
        raise ValueError(f"that is {len(indices)} frames; ask for 1 to {MAX_SEGMENT}, use stride")
    return [part for index in indices for part in picture_parts(case.video, index)]


TOOLS = {tool.__name__: tool for tool in (get_frame, zoom_region, get_temporal_segment)}


def signature(name: str) -> str:
    """Return a tool's arguments as the prompt shows them: all but the case, without annotations."""
    _, *arguments = inspect.signature(TOOLS[name]).parameters.values()
    shown = [str(argument.replace(annotation=argument.empty)) for argument in arguments]
    return f"({', '.join(shown)})"


# --- reading what a teacher writes: forgiving, as models write it in many ways ---
CALLS = [
    # TOOL_CALL: get_frame(3), **Tool call:** `get_frame(3)`
    r"TOOL[_ -]?CALLS?\W*(?:functions\.)?(\w{1,40})\W{0,3}\(((?:[^()]|\([^()]*\))*)\)",
    # {"name": "get_frame", "arguments": {"frame_index": 3}}
    r"""["']name["']\s*:\s*["'](\w{1,40})["']\s*,\s*["'](?:arguments|parameters)["']\s*:"""
    r"""\s*["']?(\{(?:[^{}]|\{[^{}]*\})*\})""",
    # <tool_call>get_frame, then arguments, written as frame_index=3 by `read_calls`
    r"<tool_call>\s*(\w{1,40})\s*((?:\w{1,40}=[^,<]*,\s*)+)",
]


def without_thoughts(text: str) -> str:
    return re.sub(THINKING, "", text, flags=re.DOTALL)


def read_calls(text: str) -> list[tuple[str, str]]:
    """Return the name and the arguments of each tool call, in any of the forms of CALLS. A call of
    an unknown tool counts, so that the teacher is told, unless the reply also holds a patch."""
    text = text.replace("\\_", "_")
    text = re.sub(r"<arg_key>(\w+)</arg_key>\s*<arg_value>([^<]*)</arg_value>", r"\1=\2,", text)
    matches = [match for form in CALLS for match in re.finditer(form, text, re.IGNORECASE)]
    matches.sort(key=lambda match: match.start())
    calls = [match.groups() for match in matches]
    return [call for call in calls if call[0] in TOOLS or "evidence_patch" not in text]


def run_tool(name: str, arguments: str, case: Case) -> list[dict]:
    """Run a tool call on the original video. Its arguments are read as text, never evaluated. If
    their names are not the tool's, the numbers are taken in order. Raises ValueError."""
    if name not in TOOLS:
        raise ValueError(f"there is no tool {name}; the tools are {', '.join(TOOLS)}")

    written = re.findall(
        r"(?:[\"']?([A-Za-z]\w*)[\"']?\s*[=:]\s*)?(\"[^\"]*\"|'[^']*'|[^\s,=\[\]{}]+)", arguments
    )
    positional = [value.strip("\"'") for key, value in written if not key]
    named = {key: value.strip("\"'") for key, value in written if key}
    numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", arguments)

    for args, kwargs in ((positional, named), (numbers, {})):
        try:
            bound = inspect.signature(TOOLS[name]).bind(case, *args, **kwargs)
        except TypeError:
            continue
        return TOOLS[name](*bound.args, **bound.kwargs)
    raise ValueError(f"{name} takes {signature(name)}, not ({arguments})")


def frame_number(value, video: Sized) -> int:
    number = float(str(value).lower().removeprefix("frame"))
    if not 0 <= number < len(video):  # nan and inf too
        raise ValueError(f"there is no frame {value}, only 0 to {len(video) - 1}")
    return int(number)


def parse_patch(text: str, video: Sized) -> EvidencePatch:
    """Read the evidence in a reply; regions and moments that cannot be read are left out. Raises
    TeacherError("malformed") if nothing can be read."""
    try:
        reply = read_json(text)
        evidence = reply.get("evidence_patch", reply)
        evidence = evidence[0] if isinstance(evidence, list) else evidence
        patch = EvidencePatch("", read_words(evidence.get("content")))
        patch.key_frames = read_frames(evidence.get("key_frames"), video)
        patch.spans = read_spans(evidence.get("temporal_markers"), video)

        regions = evidence.get("spatial_regions") or []
        for region in regions if isinstance(regions, list) else [regions]:
            with suppress(Exception):  # a decoder's errors, too
                patch.regions.append(read_region(region, patch.key_frames, video))
        kind = reply.get("error_classification", evidence.get("error_classification"))
    except BAD_DATA as error:
        raise TeacherError(
            "malformed", without_special_tokens(f"{error} in: {text[-200:]}")
        ) from error
    if is_empty(patch):
        raise TeacherError("malformed", without_special_tokens(f"an empty patch: {text[-200:]}"))

    guess = "spatial" if patch.regions else "temporal"  # of a type that is not ours
    patch.error_type = next((known for known in ERROR_TYPES if known in str(kind).lower()), guess)
    return limit_patch(patch, len(video))


def is_empty(patch: EvidencePatch) -> bool:
    return not (patch.guidance or patch.key_frames or patch.spans or patch.regions)


def read_json(text: str) -> dict:
    """Return the last JSON object that holds a patch, whatever surrounds it. Raises ValueError."""
    text = re.sub(r'(\\["\\/bfnrtu])|\\', r"\1", text)  # JSON has no escapes like \' and \_
    wanted = "evidence_patch" if "evidence_patch" in text else "key_frames"
    decode = json.JSONDecoder(strict=False).raw_decode
    last_patch = None
    start = text.find("{")
    while start >= 0:
        end = start + 1
        with suppress(ValueError, RecursionError):
            value, stop = decode(text, start)
            if wanted in value:
                last_patch, end = value, stop
        start = text.find("{", end)
    return last_patch or read_yaml(text)


def read_yaml(text: str) -> dict:
    """Do the same for what is almost JSON: YAML allows single quotes, trailing commas and line
    breaks in a text. Comments, `&` and `*`, quotes in a text and missing braces are mended here."""
    try:
        import yaml  # which transformers installs
    except ImportError as error:
        raise ValueError("this is not JSON; with pyyaml installed more is read") from error

    key = re.search(r"\{[^{}]*?(?:error_classification|evidence_patch|key_frames)\W*:", text)
    body = text[key.start() if key else max(0, text.rfind("{")) : text.rfind("}") + 1]
    body = re.sub(r"/\*.*?\*/|(?<![:\w])//[^\n]*|\t|[&*](?=\w)", " ", body, flags=re.DOTALL)
    body = re.sub(r'(?<=\w )"(?=\w)|(?<=\w)"(?= \w)', "", body)
    body += "}" * (body.count("{") - body.count("}"))
    try:
        value = next(yaml.load_all(body, yaml.BaseLoader), None)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(value, dict):
        raise ValueError("there is no JSON object")
    return value


def read_words(value, most: int = MAX_WORDS) -> str:
    """Return at most `most` words, without brackets, which could spell a token of the student's."""
    if isinstance(value, dict):
        value = list(value.values())
    text = str(value or "") if isinstance(value, (str, int)) else " ".join(map(str, value or []))
    if text in ("null", "None"):
        text = ""
    text = re.sub(r"[<>\[\]]", " ", without_special_tokens(text[: 15 * most]))
    return " ".join(text.split()[:most])


def read_frames(value, video: Sized) -> list[int]:
    """Return the frames that a text, number, list or dict names: 12, "frame 12", "0:01", "3.5 s".
    One past the end means the last frame; anything else outside the video is left out."""
    clock = r"(?:(\d+):)?(\d+):(\d\d(?:\.\d+)?)"
    number = r"(?<![\d.])((?:(?<!\w)-)?\d+(?:\.\d+)?)(\s*s(?:ec(?:ond)?s?)?\b)?"
    last = len(video) - 1
    frames = []
    matches = re.findall(f"{clock}|{number}", str(frames_or_times(value)))
    for hours, minutes, seconds, index, unit in matches[:99]:
        if seconds or unit:
            at = 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds or index)
            if 0 <= at <= video.seconds(last) + 1:
                frames.append(min(range(last + 1), key=lambda k: abs(video.seconds(k) - at)))
        elif 0 <= float(index) <= last + 1:
            frames.append(min(int(float(index)), last))
    return list(dict.fromkeys(frames))


def frames_or_times(value):
    """Keep only what names frames in a dict, or else times, in seconds. All else stays as it is."""
    if isinstance(value, list):
        return [frames_or_times(item) for item in value]
    if not isinstance(value, dict):
        return value
    keys = [key for key in value if re.search("frame|index|start|end|first|last|from|to$", key)]
    keys = keys or [key for key in value if re.search("time|sec", key)]
    return [f"{value[key]} s" if re.search("time|sec", key) else value[key] for key in keys]


def read_spans(markers, video: Sized) -> list[tuple[int, int]]:
    """Return the first and the last frame of each moment. A flat pair of frames is one moment."""
    markers = markers if isinstance(markers, list) else [markers]
    named = [read_frames(marker, video) for marker in markers]
    flat = not any(isinstance(marker, (list, dict)) for marker in markers)
    if flat and [len(frames) for frames in named] == [1, 1]:
        named = [named[0] + named[1]]
    return [(min(frames), max(frames)) for frames in named if frames]


def read_region(region, key_frames: list[int], video: Sized) -> Region:
    """Return a region, whose frame, box and label may go by any of the usual names. Without a frame
    it is in the first key frame. Raises IndexError or ValueError."""
    region = region if isinstance(region, dict) else {"box": region}
    placed = any(re.search("frame|time", key) and region[key] is not None for key in region)
    frame = (read_frames(region, video) if placed else key_frames)[0]

    boxes = [region[key] for key in region if re.search("box|coord|region", key) and region[key]]
    words = region.get("what") or region.get("label") or region.get("description")
    size = shown_size(video.frame(frame))
    return Region(frame, read_box(boxes[0] if boxes else region, size), read_words(words, 8))


def read_box(value, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the corners, in 0–1, of a box that is written in 0–1, in pixels of a picture of
    `size`, or, if it would not fit into that, in 0–1000. Raises ValueError."""
    if isinstance(value, dict):
        xs = [value[key] for key in value if re.match("x|left|right", key)]
        ys = [value[key] for key in value if re.match("y|top|bottom", key)]
        value = [*zip(xs, ys)]

    corners = [float(number) for number in re.findall(r"(?<!\w)-?[\d.]+", str(value))]
    if len(corners) != 4:
        raise ValueError(f"the box {value} needs four numbers")

    if max(corners) <= 1.5:  # 0–1, or a little beside it
        scale = (1, 1)
    elif corners[2] <= size[0] and corners[3] <= size[1]:
        scale = size
    else:
        scale = (1000, 1000)

    shares = [corner / side for corner, side in zip(corners, scale * 2)]
    x1, y1, x2, y2 = (1.0 if 1 < share < 1.05 else share for share in shares)
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        raise ValueError(f"the box {value} needs 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1")
    return x1, y1, x2, y2


def limit_patch(patch: EvidencePatch, num_frames: int) -> EvidencePatch:
    """Keep the evidence minimal: only the first few of everything. Moments that together exceed
    MAX_SHARE of the clip's `num_frames` shrink to their middles, each to at least one frame."""
    spans = patch.spans[:MAX_FRAMES]
    total = sum(last - first + 1 for first, last in spans)
    allowed = max(int(MAX_SHARE * num_frames), len(spans))
    shrunk = []
    for first, last in spans:
        size = last - first + 1
        if total > allowed:  # one frame, and the others in proportion
            size = 1 + (last - first) * (allowed - len(spans)) // (total - len(spans))
        start = (first + last - size + 1) // 2
        shrunk.append((start, start + size - 1))

    frames, regions = patch.key_frames[:MAX_FRAMES], patch.regions[:MAX_REGIONS]
    return replace(patch, key_frames=frames, spans=shrunk, regions=regions)


# --- what can be put around a `Chat` ---
def with_deadline(chat: Chat) -> Chat:
    """Run `chat` in a thread, for which Ctrl-C does not wait. If it raises, takes too long or gives
    the wrong number of replies, each of the conversations gets a TeacherError."""

    def ask(conversations: list, seconds: float) -> list[Reply]:
        replies = [TeacherError("timeout", "no reply in time")] * len(conversations)

        def call():
            try:
                pairs = zip(conversations, chat(conversations, seconds), strict=True)
                replies[:] = [checked(reply) for _, reply in pairs]
            except TeacherError as error:
                replies[:] = [error] * len(conversations)
            except Exception as error:
                raised = TeacherError(
                    "raised", without_special_tokens(f"{type(error).__name__}: {error}")
                )
                replies[:] = [raised] * len(conversations)

        thread = Thread(target=call, daemon=True)
        if conversations and seconds > 0:
            thread.start()
            thread.join(seconds)
        return list(replies)  # a copy, which the thread can no longer change

    return ask


def checked(reply) -> Reply:
    """Return the reply, cut to its last MAX_REPLY characters, or an error if it is no `Reply`."""
    if isinstance(reply, TeacherError):
        return reply
    try:
        return without_special_tokens(reply[0][-MAX_REPLY:]), int(reply[1])
    except Exception as error:
        problem = f"a reply is (words, tokens) or a TeacherError ({error}), not {reply!r:.200}"
        return TeacherError("raised", without_special_tokens(problem))


def cached(chat: Chat | None, folder: str, name: str, usage: Counter) -> Chat:
    """Ask `chat` only what `folder` holds no reply to. Replies are files there, named by a hash of
    `name` (who replies) and of all that was shown. Without a `chat` it is a replay, which repeats
    failures too. `usage` counts calls, hits, tokens and seconds."""

    def ask(conversations: list, seconds: float) -> list[Reply]:
        began = time.monotonic()
        keys = [
            sha256(json.dumps([name, messages]).encode()).hexdigest() for messages in conversations
        ]
        known = [load_reply(Path(folder, key)) if folder else None for key in keys]
        if chat:  # what failed before is asked again
            known = [reply if isinstance(reply, tuple) else None for reply in known]

        missing = {
            key: messages
            for key, messages, reply in zip(keys, conversations, known)
            if reply is None
        }
        replies = [TeacherError("miss", "it is not in the cache")] * len(missing)
        if chat and missing:
            # Some time is kept to store the replies and to return them.
            left = 0.97 * (seconds - time.monotonic() + began)
            replies = with_deadline(chat)([*missing.values()], left)
        fresh = dict(zip(missing, replies, strict=True))  # equal conversations are asked once
        if chat and folder:
            for key, reply in fresh.items():
                store_reply(Path(folder, key), reply)

        usage["calls"] += len(fresh) if chat else 0
        usage["hits"] += len(conversations) - len(fresh)
        usage["tokens"] += sum(reply[1] for reply in fresh.values() if isinstance(reply, tuple))
        usage["seconds"] += time.monotonic() - began
        return [fresh.get(key, reply) for key, reply in zip(keys, known)]

    return ask


def load_reply(file: Path) -> Reply | None:
    with suppress(OSError, LookupError, TypeError, ValueError):  # None: not there, or spoilt
        record = json.loads(file.read_text(encoding="utf-8"))
        return TeacherError(**record) if "cause" in record else (str(record[0]), int(record[1]))


def store_reply(file: Path, reply: Reply) -> None:
    """Keep a reply. A failure never replaces one; a full disk costs the cache, not the run."""
    if isinstance(reply, TeacherError) and load_reply(file) is not None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{uuid4().hex}")
        part.write_text(json.dumps(reply, default=vars), encoding="utf-8")
        part.replace(file)  # other processes see all of it or nothing


# --- who replies ---
def remote(url: str, model: str, key="", max_tokens=2048, workers=8, timeout=240.0) -> Chat:
    """Return a model behind an OpenAI-compatible endpoint that takes pictures. The `openai` client
    retries and waits as the server says. `key` is never told, and no other key is sent."""
    try:
        import openai
    except ImportError as error:
        raise ValueError("a remote teacher needs a client: pip install openai") from error
    key = "".join(key.split())
    limit_name = "max_tokens"  # newer models want another

    async def complete(client, messages: list[dict]) -> Reply:
        nonlocal limit_name
        create = client.chat.completions.with_raw_response.create
        send = partial(create, model=model, messages=messages)
        try:
            return read_reply(await send(**{limit_name: max_tokens}))
        except openai.BadRequestError as error:
            if limit_name not in str(error) or "max_completion_tokens" not in str(error):
                raise
        limit_name = "max_completion_tokens"
        return read_reply(await send(**{limit_name: max_tokens}))

    async def reply_to(client, messages: list[dict], slots: asyncio.Semaphore, end: float) -> Reply:
        try:
            async with slots, asyncio.timeout(min(timeout, end - time.monotonic())):
                text, tokens = await complete(client, messages)
            return hide(text), tokens
        except Exception as error:
            failure = failure_of(error)
            return TeacherError(failure.cause, hide(failure.detail)[:500])

    def hide(text: str) -> str:
        # A short key is a placeholder like "none", which any word may contain.
        return text.replace(key, "[key]") if len(key) > 7 else text

    async def reply_to_all(conversations: list, end: float) -> list[Reply]:
        slots = asyncio.Semaphore(max(workers, 1))
        nobody = openai.Omit()
        async with openai.AsyncOpenAI(
            base_url=url,
            api_key=key or "none",
            default_headers={"OpenAI-Organization": nobody, "OpenAI-Project": nobody},
            max_retries=MAX_TRIES - 1,
            timeout=None,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [see_error]}),
        ) as client:
            return await asyncio.gather(
                *(reply_to(client, messages, slots, end) for messages in conversations)
            )

    def chat(conversations: list, seconds: float) -> list[Reply]:
        return asyncio.run(reply_to_all(conversations, time.monotonic() + 0.95 * seconds))

    return chat


async def see_error(response) -> None:
    """Let the client see the code of an error that a server sends with status 200."""
    await response.aread()
    with suppress(*BAD_DATA):
        body = response.json()
        error = body.get("error") or body["choices"][0].get("error")
        if response.is_success and error:
            code = str(error.get("code"))
            response.status_code = int(code) if re.fullmatch("[45]..", code) else 400


def failure_of(error: Exception) -> TeacherError:
    """Return the cause of what a request raised, and the server's own words, without HTML tags."""
    import openai

    cause, detail = "malformed", str(error)
    if isinstance(error, TeacherError):
        cause, detail = error.cause, error.detail
    elif isinstance(error, TimeoutError):
        cause, detail = "timeout", "no reply in time"
    elif isinstance(error, openai.APIStatusError):
        cause, detail = f"http_{error.status_code}", error.response.text
    elif isinstance(error, openai.APIConnectionError):
        cause, detail = "connection", f"{error} {error.__cause__!r}"
    detail = re.sub(r"<style.*?</style>|<[^>]*>", " ", detail, flags=re.DOTALL)
    return TeacherError(cause, detail)


def read_reply(response) -> Reply:
    """Return the words of an endpoint's reply, whichever field they are in. Raises TeacherError."""
    try:
        completion = response.parse()
        choice, usage = completion.choices[0], completion.usage
        message = choice.message
        content = message.content
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content)
        thoughts = (getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
        text = next((text for text in (content, *thoughts) if text and text.strip()), "")
        for call in message.tool_calls or []:
            text += f"\nTOOL_CALL: {call.function.name}({call.function.arguments})"
    except BAD_DATA as error:
        raise TeacherError("malformed", f"no message in: {response.text}") from error

    finish, refusal = str(choice.finish_reason).lower(), getattr(message, "refusal", None)
    if refusal:
        raise TeacherError("refusal", refusal)
    if finish in ("length", "max_tokens"):
        raise TeacherError("length", f"raise --teacher_max_tokens; cut after: {text[-200:]}")
    if finish in ("content_filter", "safety"):
        raise TeacherError("content_filter", response.text)
    return text, int(getattr(usage, "total_tokens", None) or 0)


def local(model, processor, max_tokens=2048, batch=8) -> Chat:
    """Return a transformers vision-language model, which reads `batch` conversations at a time."""

    def generate(conversations: list, seconds: float) -> list[Reply]:
        inputs = processor.apply_chat_template(
            [[as_parts(message) for message in messages] for messages in conversations],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device)

        limits = {"max_new_tokens": max_tokens, "max_time": 0.8 * seconds}
        out = model.generate(**inputs, **limits, do_sample=False)
        out = out[:, inputs["input_ids"].shape[1] :]
        used = (out != processor.tokenizer.pad_token_id).sum(1).tolist()
        return [*zip(processor.batch_decode(out, skip_special_tokens=True), used)]

    def reply_to(conversations: list, end: float) -> list[Reply]:
        """Halve a batch that fails, for lack of memory perhaps: only what fails alone is lost."""
        if time.monotonic() > end:
            return [TeacherError("timeout", "no time is left")] * len(conversations)
        try:
            return generate(conversations, end - time.monotonic())
        except Exception as error:
            failed = TeacherError("raised", f"{type(error).__name__}: {error}")
        if len(conversations) == 1:
            return [failed]
        half = len(conversations) // 2
        return reply_to(conversations[:half], end) + reply_to(conversations[half:], end)

    def chat(conversations: list, seconds: float) -> list[Reply]:
        end = time.monotonic() + seconds
        replies = []
        for start in range(0, len(conversations), batch):
            replies += reply_to(conversations[start : start + batch], end)
        return replies

    return chat


def as_parts(message: dict) -> dict:
    """Return a message with its content as a list of parts, as chat templates want it."""
    content = message["content"]
    return message | {"content": [text_part(content)] if isinstance(content, str) else content}


def scripted(truths: dict[str, dict | list[dict]]) -> Chat:
    """Return a `Chat` that looks the evidence up by case id, but speaks the whole protocol.
    `truths[id]` is a dict with `error_type`, `key_frames`, `region` and optionally `moment`,
    `guidance`, `cites`, or a list of them: the first whose `cites` is not in the response is taken,
    or else the last."""

    def reply(messages: list[dict]) -> tuple[str, int]:
        case_id, _, case = messages[1]["content"][0]["text"].removeprefix("Case: ").partition("\n")
        if case_id not in truths:
            return f"There is no evidence for {case_id}.", 0

        response = case.partition("The student's response:")[2]
        entries = truths[case_id] if isinstance(truths[case_id], list) else [truths[case_id]]
        missed = [entry for entry in entries if entry.get("cites", "") not in response]
        evidence = missed[0] if missed else entries[-1]
        frames, region = evidence["key_frames"], evidence.get("region")

        if len(messages) == 2:  # the first turn: look, as a model should
            if region:
                calls = [f"TOOL_CALL: zoom_region({frames[0]}, {', '.join(map(str, region))})"]
            else:
                calls = [f"TOOL_CALL: get_frame({frame})" for frame in frames]
            return "<think>What is to be seen there?</think>\n" + "\n".join(calls), 0

        patch = {
            "content": evidence.get("guidance", ""),
            "key_frames": frames,
            "temporal_markers": [evidence.get("moment", [min(frames), max(frames)])],
            "spatial_regions": [{"frame": frames[0], "box": region}] if region else [],
        }
        body = {"error_classification": evidence["error_type"], "evidence_patch": patch}
        return f"<think>Found.</think><answer>{json.dumps(body)}</answer>", 0

    return lambda conversations, seconds: [reply(messages) for messages in conversations]


def try_out(chat: Chat, num_frames: int, seconds: float) -> None:
    """Try the chat once, with as many pictures as a case has. Raises TeacherError if they are not
    taken, or the reply is neither a tool call nor a patch."""
    picture = {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (56, 56)))}}
    asked = text_part("Case: hello\nThis is a trial: reply at once, that frame 0 shows it all.")
    user = {"role": "user", "content": [asked, *[picture] * num_frames]}
    (reply,) = with_deadline(chat)([[system_message(), user]], seconds)
    if isinstance(reply, TeacherError):
        raise reply
    if not read_calls(reply[0]) and "evidence_patch" not in reply[0]:
        raise TeacherError("malformed", f"neither a tool call nor a patch: {reply[0][-300:]}")


# --- the teacher that the settings name ---
@dataclass
class TeacherSettings:
    """The teacher."""

    teacher: Annotated[Literal["scripted", "local", "remote"], "who replies as the teacher"] = (
        "scripted"
    )
    teacher_model: Annotated[str, "the teacher: local folder, hub name, or the remote's name"] = ""
    teacher_url: Annotated[str, "of the endpoint; its key is read from TEACHER_API_KEY (ours)"] = ""
    teacher_device: Annotated[str, "of the local teacher; empty: the student's (ours)"] = ""
    teacher_batch: Annotated[int, "conversations at a time, local (ours)"] = 8
    teacher_workers: Annotated[int, "requests at a time per process, remote (ours)"] = 8
    teacher_max_tokens: Annotated[int, "of a reply (ours)"] = 2048
    teacher_timeout: Annotated[float, "seconds that a reply may take, remote (ours)"] = 240.0
    teacher_step_timeout: Annotated[float, "seconds for all diagnoses of a step (ours)"] = 480.0
    teacher_cache: Annotated[str, "folder of replies; without a url they are replayed (ours)"] = ""
    teacher_sees_answer: Annotated[bool, "False: the paper's 'no GT reference'"] = True
    blind_test: Annotated[bool, "a model reads each patch's words without the video (ours)"] = True


def load_chat(config, device, evidence: dict) -> Chat | None:
    """Return the `Chat` that the settings name, or None to replay the cache. Raises ValueError if
    it cannot work."""
    name = config.teacher_model
    if config.teacher == "scripted":
        if not evidence:
            raise ValueError("no record has 'evidence' to look up; take a local or remote teacher")
        return scripted(evidence)

    if config.teacher == "local":
        import transformers

        try:
            processor = transformers.AutoProcessor.from_pretrained(name)
            model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"--teacher_model {name}: no such folder, or no model there ({error})"
            ) from error
        model = model.to(config.teacher_device or device).eval()
        return local(model, processor, config.teacher_max_tokens, config.teacher_batch)

    if not config.teacher_url:
        return None
    chat = remote(
        config.teacher_url,
        name,
        key=os.environ.get("TEACHER_API_KEY", ""),
        max_tokens=config.teacher_max_tokens,
        workers=config.teacher_workers,
        timeout=config.teacher_timeout,
    )
    try:
        try_out(chat, config.num_frames, config.teacher_timeout)
    except TeacherError as error:
        raise ValueError(
            f"no teacher '{name}' at {config.teacher_url} ({error}); it must take "
            f"{config.num_frames} pictures in a request (or lower --num_frames), a context that "
            "holds them, and write patches; without --teacher_url a --teacher_cache is replayed"
        ) from error
    return chat


def load_teacher(
    config, device, gate: Gate, answers_correctly: Callable, evidence: dict
) -> Callable[..., list[EvidencePatch | TeacherError]]:
    """Return `diagnose` as a function of the cases alone, the rest taken from the settings; its
    `usage` counts calls and tokens. A scripted teacher is neither cached nor blind-tested."""
    chat = load_chat(config, device, evidence)
    guessable = {}
    is_scripted = config.teacher == "scripted"
    folder = "" if is_scripted else config.teacher_cache
    test = answers_correctly if config.blind_test and not is_scripted else None
    name = repr((config.teacher, config.teacher_model, config.teacher_max_tokens))

    def teach(cases: list[Case], usage: Counter | None = None) -> list:
        usage = Counter() if usage is None else usage
        return diagnose(
            cases,
            cached(chat, folder, name, usage),
            gate,
            show_answer=config.teacher_sees_answer,
            num_frames=config.num_frames,
            timeout=config.teacher_step_timeout,
            answers_correctly=test,
            guessable=guessable,
            usage=usage,
        )

    return teach
