"""The frozen, tool-using teacher T: it finds what a failed rollout missed and returns a patch.

    S_i = (x, y, τ_i)   `Case`            T       `diagnose` around a *brain* and a *gate*
    c_i, e_i            `EvidencePatch`   brain   `Chat`: `remote`, `local`, or any such function

A conversation is OpenAI chat messages, pictures as JPEG in data URLs. FFR §Find, §Fix, app. B."""

import base64
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import mktime_tz, parsedate_tz
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import transformers
from huggingface_hub import InferenceClient
from PIL import Image

ERROR_TYPES = ("temporal", "spatial", "misconception")
TOOLS = {
    "get_frame": ("frame_index",),
    "zoom_region": ("frame_index", "x1", "y1", "x2", "y2"),
    "get_temporal_segment": ("start_frame", "end_frame", "stride"),
}
MAX_FRAMES, MAX_REGIONS, MAX_WORDS, MAX_SHARE = 4, 2, 60, 0.25  # a patch is minimal
MAX_TURNS, MAX_CALLS, MAX_SEGMENT = 6, 4, 8  # turns; per turn, tool calls; frames of a segment
MAX_PIXELS, MAX_REPLY = 401_408, 20_000  # of a picture for the teacher; characters of a reply
MAX_TRIES, BACKOFF = 4, 1.0  # of a request; seconds before the second, doubled from then on
BAD_DATA = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
PICTURES = WeakKeyDictionary()  # of a video: all its failures are shown the same
LOCK = threading.Lock()  # a video reader, and the books, serve one thread at a time


@dataclass
class Case:
    """S_i: one failed rollout's question x, reference y and response τ_i."""

    id: str
    question: str
    options: list[str]
    answer: str
    response: str
    video: Sized  # a hashable clip: len(), `seconds(i)` and `frame(i)` of an original frame


class Region(NamedTuple):
    frame: int
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in 0–1
    what: str = ""

    def corners(self, image: Image.Image) -> tuple[int, int, int, int]:  # in pixels, at least one
        x1, y1, x2, y2 = (int(v * side) for v, side in zip(self.box, image.size * 2))
        return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


@dataclass
class EvidencePatch:
    """c: what the student is shown besides the unchanged question. Frames are original indices."""

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


Reply = tuple[str, int] | TeacherError  # its words, and how many tokens they took
Chat = Callable[[list[list[dict]], float], list[Reply]]  # conversations, seconds it may take
Gate = Callable[[EvidencePatch, Case], str | None]  # why it gives y away; may take things out of it
SYSTEM = """\
A student answered a question about a video wrongly. Find the one thing that it missed, and hand
back the least evidence that lets it see that; it then answers again. Errors are
- temporal: it looked at the wrong moment, missed one, or mixed up the order of events
- spatial: it looked at the right moment but missed or misread an object, a place, a detail
- misconception: it saw the right thing but misunderstood the question or reasoned wrongly
Look before you judge. To use a tool, write a line (frames are counted from 0, boxes lie in 0-1):
TOOL_CALL: get_frame(frame_index)
TOOL_CALL: zoom_region(frame_index, x1, y1, x2, y2)
TOOL_CALL: get_temporal_segment(start_frame, end_frame, stride=1)
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


def first_messages(case: Case, show_answer: bool, num_frames: int) -> list[dict]:
    """The opening: the rules, then the case with `num_frames` frames spread over the clip."""
    last, end = len(case.video) - 1, case.video.seconds(len(case.video) - 1)
    known = [f"Reference answer, for you alone: {case.answer}"] if show_answer else []
    lines = [
        f"Case: {case.id}",
        f"The video has {last + 1} frames, the last at {end:.1f} s.",
        f"Question: {case.question}",
        *case.options,
        *known,
        "The student's response:",
        case.response,
        "Frames of the video:",
    ]
    shown = sorted({round(k * last / max(num_frames - 1, 1)) for k in range(num_frames)})
    content = [_text("\n".join(lines)), *(x for k in shown for x in _picture(case.video, k))]
    return [{"role": "system", "content": [_text(SYSTEM)]}, {"role": "user", "content": content}]


def _text(text: str) -> dict:
    return {"type": "text", "text": _plain(text)}


def _plain(text: str) -> str:
    """Without what some tokenizer could take for a special token, and without lone surrogates."""
    return text.encode("utf-8", "replace").decode().replace("<|", "< |")


def _picture(video: Sized, index: int, box: tuple | None = None) -> list[dict]:
    """A frame, or a crop of it at native size, of MAX_PIXELS at most: its label and its pixels."""
    if (index, box) not in (made := PICTURES.setdefault(video, {})):
        image, label = video.frame(index), f"frame {index} ({video.seconds(index):.2f} s)"
        if box:
            image = image.crop(Region(index, box).corners(image))
            label += ", region " + " ".join(f"{v:.2f}" for v in box)
        shrink = max(1.0, (image.width * image.height / MAX_PIXELS) ** 0.5)
        image = image.convert("RGB").resize([max(28, int(side / shrink)) for side in image.size])
        image.save(file := BytesIO(), "JPEG", quality=90)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        made[index, box] = [_text(label), {"type": "image_url", "image_url": {"url": url}}]
    return made[index, box]


def run_tool(name: str, arguments: str, video: Sized) -> list[dict]:
    """Execute a tool call on the original video; returns labels and images as chat parts. Arguments
    are read as numbers, never evaluated. Raises ValueError, a sentence for the teacher."""
    if name not in TOOLS:
        raise ValueError(f"there is no tool {name}; the tools are {', '.join(TOOLS)}")
    names, values = TOOLS[name], {"stride": 1} if name == "get_temporal_segment" else {}
    for position, text in enumerate(filter(None, map(str.strip, arguments.split(",")))):
        key, _, value = text.rpartition("=")
        values[key.strip() or "".join(names[position : position + 1])] = value
    if set(values) != set(names):
        raise ValueError(f"{name} takes ({', '.join(names)})")
    if name != "get_temporal_segment":
        box = _box([values[corner] for corner in names[1:]]) if name == "zoom_region" else None
        return _picture(video, _index(values["frame_index"], video), box)
    start, end, stride = (_index(values[key], video) for key in names)
    indices = range(start, end + 1, max(1, stride))
    if not 0 < len(indices) <= MAX_SEGMENT:
        raise ValueError(f"that is {len(indices)} frames; ask for 1 to {MAX_SEGMENT}, use stride")
    return [part for index in indices for part in _picture(video, index)]


def _index(value, video: Sized) -> int:
    if not 0 <= float(value) < len(video):  # nan and inf too; ValueError, TypeError: no number
        raise ValueError(f"there is no frame {value}, only 0 to {len(video) - 1}")
    return int(float(value))


def _box(values) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = map(float, values)
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        raise ValueError(f"the box {values} needs 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1")
    return x1, y1, x2, y2


def parse_patch(text: str, video: Sized) -> EvidencePatch:
    """Read the teacher's JSON and cut it to size. Raises TeacherError("malformed")."""
    body = text.rpartition("<answer>")[2]

    def words(value, most: int) -> str:  # without brackets that spell a student's special token
        value = re.sub(r"[<>\[\]]", " ", _plain(str(value or "")))[: 15 * most]
        return " ".join(value.split()[:most])

    try:
        reply = json.loads(body[body.find("{") : body.rfind("}") + 1])
        evidence, kind = reply["evidence_patch"], str(reply["error_classification"]).lower()
        patch = EvidencePatch(next(error_type for error_type in ERROR_TYPES if error_type in kind))
        patch.guidance = words(evidence.get("content"), MAX_WORDS)
        frames, spans = evidence.get("key_frames") or [], evidence.get("temporal_markers") or []
        if isinstance(frames, str) or str in map(type, spans := spans[:MAX_FRAMES]):
            raise TypeError("a text where a list of frames belongs")
        patch.key_frames = list(dict.fromkeys(_index(k, video) for k in frames))[:MAX_FRAMES]
        patch.spans = [tuple(sorted((_index(a, video), _index(b, video)))) for a, b in spans]
        patch.regions = [
            Region(_index(r["frame"], video), _box(r["box"]), words(r.get("what"), 8))
            for r in (evidence.get("spatial_regions") or [])[:MAX_REGIONS]
        ]
    except (*BAD_DATA, StopIteration) as error:
        raise TeacherError("malformed", _plain(str(error))) from error
    # Together the spans are at most MAX_SHARE of the clip, or they shrink to their middles.
    keep = min(1.0, MAX_SHARE * len(video) / max(sum(b - a + 1 for a, b in patch.spans), 1))
    sizes = [(a + b, max(1, int((b - a + 1) * keep))) for a, b in patch.spans]
    return replace(patch, spans=[((ab - n + 1) // 2, (ab + n - 1) // 2) for ab, n in sizes])


# --- Find and Fix: all failures of a step together ---
def diagnose(
    cases: list[Case],
    chat: Chat | None,
    gate: Gate,
    show_answer=True,
    num_frames=16,
    timeout=300.0,
    step_timeout=900.0,
    workers=0,
    cache="",
    brain="",
    spent: Counter | None = None,
) -> list[EvidencePatch | TeacherError]:
    """A patch for each case, or why there is none. With `workers` 0 all cases share one batch per
    turn, else so many go at a time. One may take `timeout` seconds, all `step_timeout`. `cache`: a
    folder of replies by all the brain is shown and by `brain`, its name; no `chat`: replay."""
    end, spent, found = time.monotonic() + step_timeout, Counter() if spent is None else spent, {}
    loops = {repr(case): _tool_loop(case, gate, show_answer, num_frames, spent) for case in cases}

    def work(keys: list[str]) -> None:
        stop, replies = min(end, time.monotonic() + timeout), dict.fromkeys(keys)
        while replies:
            talks = {}
            for key, reply in replies.items():
                step = loops[key].throw if isinstance(reply, TeacherError) else loops[key].send
                try:
                    with LOCK:
                        talks[key] = step(reply)
                except (StopIteration, TeacherError) as last:  # the loop returned, or gave up
                    found[key] = getattr(last.with_traceback(None), "value", last)
            replies = dict(zip(talks, _ask([*talks.values()], chat, stop, cache, brain, spent)))

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        list(pool.map(work, [[key] for key in loops] if workers else [[*loops]]))
    return [found[repr(case)] for case in cases]


def _tool_loop(case: Case, gate: Gate, show_answer: bool, num_frames: int, spent: Counter):
    """One conversation, as a generator: yields it, is sent or thrown the reply, returns the patch.
    One that leaks is asked for once more with the reason, then cut to frames, times, regions."""
    transcript, refusals = [], []
    try:
        talk = first_messages(case, show_answer, num_frames)
    except (ValueError, RuntimeError, OSError) as error:
        raise TeacherError("video", str(error)) from error
    for turn in range(MAX_TURNS):
        (text, _), back = (yield talk), []
        calls = re.findall(r"TOOL_CALL:\s*(\w+)\s*\(([^()]*)\)", text)[:MAX_CALLS]
        for name, arguments in calls:
            transcript.append(f"{name}({arguments})")
            try:
                back += run_tool(name, arguments, case.video)
            except (*BAD_DATA, OSError) as error:
                back.append(_text(f"{name} failed: {error}"))
                transcript[-1] += f" failed: {error}"
        if not calls:
            patch = parse_patch(text, case.video)
            if reason := gate(patch, case):
                refusals.append(reason)
                spent["refused"] += 1
                patch.guidance, patch.regions = "", [r._replace(what="") for r in patch.regions]
            if reason is None or len(refusals) > 1 or turn + 1 == MAX_TURNS:
                if patch.guidance or patch.key_frames or patch.spans or patch.regions:
                    return replace(patch, transcript=transcript, refusals=refusals)
                raise TeacherError("leak" if reason else "malformed", reason or "an empty patch")
            back = [_text(f"Refused: {reason}. Only direct attention; reply again in that form.")]
        talk += [{"role": "assistant", "content": [_text(text)]}, {"role": "user", "content": back}]
    raise TeacherError("turns", f"no patch within {MAX_TURNS} turns")


def _ask(talks: list, chat, end: float, cache: str, brain: str, spent: Counter) -> list[Reply]:
    """The next reply of each conversation: from the cache, else from the brain."""
    keys = [cache and sha256(json.dumps([brain, talk]).encode()).hexdigest() for talk in talks]
    replies = [_load(Path(cache, key)) if cache else None for key in keys]
    asked, began = [i for i, reply in enumerate(replies) if reply is None], time.monotonic()
    fresh = [TeacherError("timeout" if chat else "miss", "no reply in time")] * len(asked)

    def call():
        try:
            said = zip(asked, chat([talks[i] for i in asked], end - began), strict=True)
            fresh[:] = [
                reply
                if isinstance(reply, TeacherError)
                else (_plain(reply[0][:MAX_REPLY]), int(reply[1]))
                for _, reply in said
            ]
        except Exception as error:  # whatever a brain raises costs its cases, never the run
            raised = _plain(f"{type(error).__name__}: {error}")
            fresh[:] = [TeacherError("raised", raised)] * len(asked)

    if chat and asked and end > began:
        thread = threading.Thread(target=call, daemon=True)  # one that hangs costs only its time
        thread.start()
        thread.join(end - began)
    for i, replies[i] in zip(asked, list(fresh)):  # a copy: what comes later is too late
        if cache and chat:
            with suppress(OSError):  # a full disk costs the cache, not the run
                _store(Path(cache, keys[i]), replies[i])
    with LOCK:
        tokens = sum(replies[i][1] for i in asked if isinstance(replies[i], tuple))
        spent.update(
            calls=len(asked) if chat else 0,
            hits=len(talks) - len(asked),
            tokens=tokens,
            seconds=time.monotonic() - began,
        )
    return replies


def _load(file: Path) -> Reply | None:
    with suppress(OSError, LookupError, TypeError, ValueError):  # None: not there, or spoilt
        record = json.loads(file.read_text(encoding="utf-8"))
        return TeacherError(**record) if "cause" in record else (str(record[0]), int(record[1]))


def _store(file: Path, reply: Reply) -> None:
    if isinstance(reply, tuple) or _load(file) is None:  # a failure does not take a reply's place
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{threading.get_ident()}.{time.time_ns()}")
        part.write_text(json.dumps(reply, default=vars), encoding="utf-8")
        part.replace(file)  # other processes see all of it or nothing


def remote(url: str, model: str, key: str = "", max_tokens: int = 2048) -> Chat:
    """A brain behind an OpenAI-compatible endpoint that takes images. `key` stays in here."""
    secret = key if key[7:] else "\0"  # a placeholder is no secret, and may be part of any word

    def complete(talk: list[dict], end: float) -> Reply:
        for attempt in range(MAX_TRIES):
            left = max(end - time.monotonic(), 0.01)
            # Without a key the client would send the user's own hub token to this endpoint.
            client = InferenceClient(base_url=url, api_key=key or "none", timeout=0.9 * left)
            try:
                out = client.chat_completion(talk, model=model, max_tokens=max_tokens)
                text = out.choices[0].message.content.replace(secret, "[key]")
                return text, int(out.usage and out.usage.total_tokens or 0)
            except Exception as error:  # the client's own kinds are those of its HTTP library
                fault = inner = error
            while (response := getattr(inner, "response", None)) is None and inner.__context__:
                inner = inner.__context__  # the client may fail at an error's body
            status, now = getattr(response, "status_code", 0), time.time()
            cause = (
                f"http_{status}"
                if status
                else "malformed"
                if isinstance(fault, BAD_DATA)
                else "timeout"
                if isinstance(fault, TimeoutError)
                else "connection"
            )
            wait = BACKOFF * 2**attempt * (1 + now % 1)
            with suppress(*BAD_DATA):  # where the endpoint says it, in seconds or as a date
                said = response.headers["retry-after"]
                wait = float(said) if said.isdecimal() else mktime_tz(parsedate_tz(said)) - now
            again = cause in ("timeout", "connection") or status == 429 or status >= 500
            if not again or attempt + 1 == MAX_TRIES or wait > end - time.monotonic():
                return TeacherError(cause, str(fault).replace(secret, "[key]"))
            time.sleep(max(wait, 0.0))

    return lambda talks, seconds: [*map(complete, talks, [time.monotonic() + seconds] * len(talks))]


def local(model, processor, max_tokens: int = 2048) -> Chat:
    """A brain that is a transformers vision-language model; all conversations go in one batch."""

    def chat(talks: list[list[dict]], seconds: float) -> list[Reply]:
        inputs = processor.apply_chat_template(
            talks,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device)
        out = model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, max_time=0.8 * seconds
        )[:, inputs["input_ids"].shape[1] :]
        used = (out != processor.tokenizer.pad_token_id).sum(1).tolist()
        return [*zip(processor.batch_decode(out, skip_special_tokens=True), used)]

    return chat


def load_teacher(c, device, gate: Gate, scripted: Chat) -> Callable:
    """`diagnose` with the brain that settings `c` name. Raises ValueError where none answers."""
    kind, name, most = c.teacher, c.teacher_model, c.teacher_max_tokens
    chat = scripted if kind == "scripted" else None
    if kind == "local":
        processor = transformers.AutoProcessor.from_pretrained(name)
        model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        chat = local(model.to(c.teacher_device or device).eval(), processor, most)
    elif kind == "remote" and c.teacher_url:
        key = "".join(os.environ.get("TEACHER_API_KEY", "").split())
        chat = remote(c.teacher_url, name, key, most)
        (said,) = chat([[{"role": "user", "content": "Say OK."}]], c.teacher_timeout)
        if isinstance(said, TeacherError):
            raise ValueError(
                f"no teacher '{name}' at {c.teacher_url} ({said}); "
                "without --teacher_url a --teacher_cache is replayed"
            )
    return partial(
        diagnose,
        chat=chat,
        gate=gate,
        show_answer=c.teacher_sees_answer,
        num_frames=c.num_frames,
        timeout=c.teacher_timeout,
        step_timeout=c.teacher_step_timeout,
        workers=c.teacher_workers if kind == "remote" else 0,
        cache=c.teacher_cache if kind != "scripted" else "",
        brain=repr((kind, name, most)),
    )
