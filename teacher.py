"""The frozen, tool-using teacher T: it finds what a failed rollout missed and returns a patch.

    S_i = (x, y, τ_i)   `Case`            T        `diagnose` around a *brain*
    c_i, e_i            `EvidencePatch`   brain    `chat(conversations) -> replies`, `Chat`

A brain gets conversations, lists of chat messages whose parts are texts or Pillow images, and
gives as many replies. All share prompt, tools, leak gate and limits: `scripted` looks the truth
up, `local` is a transformers VLM. Sources: FFR §Find, §Fix, app. B. Imports no sibling.
"""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from PIL import Image

ERROR_TYPES = ("temporal", "spatial", "misconception")
MAX_FRAMES, MAX_REGIONS, MAX_WORDS, MAX_SHARE = 4, 2, 60, 0.25  # a patch is minimal
MAX_TURNS, MAX_CALLS, MAX_SEGMENT = 6, 4, 8  # turns; per turn, tool calls; frames of a segment
PLACE = r"\b(where|(which|what) (side|part|corner)|position|location)\b"  # questions for a place
TIME = r"\b(when|(which|what) (time|second|minute|moment)|how long)\b"  # questions for a time


class Clip(Protocol):
    """What the tools need of a video. Frames are original indices; seconds are index / fps."""
    fps: float

    def __len__(self) -> int: ...
    def frame(self, index: int) -> Image.Image: ...


@dataclass
class Case:
    """S_i: one failed rollout's question x, reference y and response τ_i."""
    id: str
    question: str
    options: list[str]
    answer: str
    response: str
    video: Clip


class Region(NamedTuple):
    frame: int
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in 0–1
    what: str = ""


@dataclass
class EvidencePatch:
    """c: what the student is shown besides the unchanged question. Frames are original indices."""
    error_type: str
    guidance: str = ""
    key_frames: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # first and last frame of moments
    regions: list[Region] = field(default_factory=list)
    show_times: bool = True  # False where the question asks for a time
    refusals: list[str] = field(default_factory=list)  # why the leak gate refused earlier versions
    transcript: list[str] = field(default_factory=list)  # the tool calls that led here
    tokens: int = 0  # that the brain spent on this case

    @property
    def content(self) -> str:
        """All that the student is shown: equal patches have equal content."""
        return repr(replace(self, refusals=[], transcript=[], tokens=0))


class TeacherError(Exception):
    """No patch for this case. `cause` is one word for the metrics."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}")
        self.cause = cause


class Reply(NamedTuple):
    text: str
    tokens: int = 0


Chat = Callable[[list[list[dict]]], list[Reply | TeacherError]]

SYSTEM = """\
A student model answered a question about a video wrongly. You can look at the video. Find the one
thing it missed, and hand back the smallest piece of evidence from the video that lets it see that.
The student answers again itself: you never answer for it. The error is one of
- temporal: it looked at the wrong moment, missed one, or mixed up the order of events
- spatial: it looked at the right moment but missed or misread an object, a place, a detail
- misconception: it saw the right thing but misunderstood the question or reasoned wrongly
Look before you judge. To use a tool, write a line (frames are counted from 0, boxes lie in 0-1):
TOOL_CALL: get_frame(frame_index)
TOOL_CALL: zoom_region(frame_index, x1, y1, x2, y2)
TOOL_CALL: get_temporal_segment(start_frame, end_frame, stride=1)
When you know, reply with exactly this and no tool call:
<think>your diagnosis</think><answer>{"error_classification": "temporal", "evidence_patch":
{"content": "what to look for, one or two sentences", "key_frames": [12], "temporal_markers":
[[10, 14]], "spatial_regions": [{"frame": 12, "box": [0.1, 0.2, 0.5, 0.6], "what": "a hand"}]}}
</answer>
The content directs attention, it never tells the result:
- what colour, object or text: say where or when to look, not what is there
- is it there, how many: say which moments to go through, neither yes or no nor a number
- what happens, in which order: say what to follow, not the action or the order
- no option letter, no option text, no ruling out of options
Bad: "The hand puts down the book." Good: "Follow the right hand until it lets go."
Bad: "There are three cups." Good: "Go through the table from left to right, near the end too."
Blind test: someone who has not seen the video must not be able to answer from your words."""


def first_messages(case: Case, show_answer: bool, num_frames: int) -> list[dict]:
    """The opening: the rules, then the case with `num_frames` frames spread over the clip."""
    last = len(case.video) - 1
    lines = [f"Case: {case.id}", f"The video has {last + 1} frames at {case.video.fps:g} fps."]
    lines += [f"Question: {case.question}", *case.options]
    lines += [f"Reference answer, for you alone: {case.answer}"] if show_answer else []
    lines += ["The student's response:", case.response, "Frames of the video:"]
    content = [_text("\n".join(lines))]
    for k in sorted({round(k * last / max(num_frames - 1, 1)) for k in range(num_frames)}):
        content += _picture(case.video, k)
    return [{"role": "system", "content": [_text(SYSTEM)]}, {"role": "user", "content": content}]


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _picture(video: Clip, index: int, box: tuple | None = None) -> list[dict]:
    """A frame, or a crop of it, at native size: its label and its pixels as chat parts."""
    image, label = video.frame(index), f"frame {index} ({index / video.fps:.2f} s)"
    if box is not None:
        x1, y1, x2, y2 = (int(v * side) for v, side in zip(box, image.size * 2))
        image = image.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
        label += ", region " + " ".join(f"{v:.2f}" for v in box)
    return [_text(label), {"type": "image", "image": image}]


# --- the tools ---
TOOLS = {"get_frame": ("frame_index",), "zoom_region": ("frame_index", "x1", "y1", "x2", "y2"),
         "get_temporal_segment": ("start_frame", "end_frame", "stride")}


def run_tool(name: str, arguments: str, video: Clip) -> list[dict]:
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
    start, end = _index(values["start_frame"], video), _index(values["end_frame"], video)
    indices = range(start, end + 1, max(1, _index(values["stride"], video)))
    if not 0 < len(indices) <= MAX_SEGMENT:
        raise ValueError(f"that is {len(indices)} frames; ask for 1 to {MAX_SEGMENT}, use stride")
    return [part for index in indices for part in _picture(video, index)]


def _index(value, video: Clip) -> int:
    if not 0 <= float(value) < len(video):  # nan and inf too; ValueError, TypeError: no number
        raise ValueError(f"there is no frame {value}, only 0 to {len(video) - 1}")
    return int(float(value))


def _box(values) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = map(float, values)
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        raise ValueError(f"the box {values} needs 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1")
    return x1, y1, x2, y2


# --- the reply and its limits ---
def parse_patch(text: str, case: Case) -> EvidencePatch:
    """Read the teacher's JSON and cut it to size. Raises TeacherError("malformed")."""
    tagged = re.search(r"<answer>(.*)</answer>", text, re.DOTALL)
    try:
        reply = json.loads(tagged[1] if tagged else text[text.find("{") : text.rfind("}") + 1])
        evidence, video = reply["evidence_patch"], case.video
        patch = EvidencePatch(str(reply["error_classification"]).strip().lower())
        patch.guidance = " ".join(str(evidence.get("content") or "").split()[:MAX_WORDS])
        frames = [_index(k, video) for k in evidence.get("key_frames") or []]
        patch.key_frames = list(dict.fromkeys(frames))[:MAX_FRAMES]
        for start, end in evidence.get("temporal_markers") or []:
            patch.spans.append(tuple(sorted((_index(start, video), _index(end, video)))))
        for r in (evidence.get("spatial_regions") or [])[:MAX_REGIONS]:
            what = " ".join(str(r.get("what") or "").split()[:8])
            patch.regions.append(Region(_index(r["frame"], video), _box(r["box"]), what))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise TeacherError("malformed", str(e)) from e
    if patch.error_type not in ERROR_TYPES:
        raise TeacherError("malformed", f"error_classification '{patch.error_type}'")
    # Together the spans are at most MAX_SHARE of the clip, or they shrink to their middles.
    keep = MAX_SHARE * len(video) / max(sum(b - a + 1 for a, b in patch.spans), 1)
    if keep < 1:
        sizes = [(a + b, max(1, int((b - a + 1) * keep))) for a, b in patch.spans]
        patch.spans = [((twice - n + 1) // 2, (twice + n - 1) // 2) for twice, n in sizes]
    # A patch does not answer: no place where a place is asked, no time where a time is asked.
    if re.search(PLACE, case.question, re.I):
        patch.regions = []
    if re.search(TIME, case.question, re.I):
        patch.spans, patch.show_times = [], False
    if not (patch.guidance or patch.key_frames or patch.spans or patch.regions):
        raise TeacherError("malformed", "an empty patch")
    return patch


NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def leak(patch: EvidencePatch, case: Case) -> str | None:
    """Why the patch's words give the answer away, or None. Knows y even where T is not shown it."""
    words = " ".join([patch.guidance, *(region.what for region in patch.regions)])
    answers = {_plain(case.answer)}
    letter = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", case.answer.strip())
    if letter and case.options:
        if re.search(rf"\b{letter[1].upper()}\b(?! [a-z])|\boption {letter[1]}\b", words, re.I):
            return "it names the option"
        own = [o for o in case.options if re.match(rf"\W*{letter[1]}\b", o, re.I)]
        answers = {_plain(re.sub(r"^\W*\w\W+", "", option)) for option in own}
    for pair in ({str(number), word} for number, word in enumerate(NUMBERS)):
        answers |= pair if answers & pair else set()
    if re.search(r"\b(correct|right) (answer|option|choice)\b|\banswer is\b", words, re.I):
        return "it speaks of the answer"
    if any(f" {answer} " in f" {_plain(words)} " for answer in answers):
        return "it contains the answer"
    return None


def _plain(text: str) -> str:
    """Case-folded words without articles and punctuation, one space between."""
    words = re.findall(r"\w+(?:\.\d+)?", text.casefold())
    return " ".join(word for word in words if word not in ("a", "an", "the")) or text.strip()


# --- Find and Fix: all failures of a step together ---
def diagnose(
    cases: list[Case], chat: Chat, show_answer: bool = True, num_frames: int = 16,
    timeout: float | None = None,
) -> list[EvidencePatch | TeacherError]:
    """Run the tool loop for all cases together, one `chat` call per turn for those still open.

    A turn calls tools, whose pictures are handed back, or closes with the JSON. A patch that leaks
    is asked for once more with the reason, then reduced to its frames, times and regions. Whatever
    goes wrong with a case becomes its `TeacherError`, `timeout` seconds of silence too."""
    results, talks, drafts = {}, {}, [EvidencePatch("") for _ in cases]
    for i, case in enumerate(cases):
        try:
            talks[i] = first_messages(case, show_answer, num_frames)
        except (ValueError, RuntimeError, OSError) as error:
            results[i] = TeacherError("video", str(error))
    for _ in range(MAX_TURNS):
        waiting = [i for i in talks if i not in results]
        replies = _ask(chat, [talks[i] for i in waiting], timeout) if waiting else []
        for i, reply in zip(waiting, replies):
            try:
                if not isinstance(reply, Reply):
                    fault = TeacherError("protocol", f"{type(reply).__name__} is no Reply")
                    raise reply if isinstance(reply, TeacherError) else fault
                drafts[i].tokens += reply.tokens
                outcome = _turn(reply.text, cases[i], drafts[i])
            except TeacherError as error:
                results[i] = error
                continue
            if isinstance(outcome, EvidencePatch):
                results[i] = outcome
            else:
                talks[i].append({"role": "assistant", "content": [_text(reply.text)]})
                talks[i].append({"role": "user", "content": outcome})
    late = TeacherError("turns", f"no patch within {MAX_TURNS} turns")
    return [results.get(i, late) for i in range(len(cases))]


def _turn(text: str, case: Case, draft: EvidencePatch) -> EvidencePatch | list[dict]:
    """One reply: a patch that passed the gate, or the parts to answer the teacher with. `draft`
    keeps what the finished patch tells of its making."""
    calls = re.findall(r"TOOL_CALL:\s*(\w+)\s*\(([^()]*)\)", text)[:MAX_CALLS]
    parts = []
    for name, arguments in calls:
        try:
            parts += run_tool(name, arguments, case.video)
            draft.transcript.append(f"{name}({arguments})")
        except (ValueError, RuntimeError, OSError) as error:
            parts.append(_text(f"{name} failed: {error}"))
            draft.transcript.append(f"{name}({arguments}) failed: {error}")
    if calls:
        return parts
    patch = parse_patch(text, case)
    reason = leak(patch, case)
    if reason is not None:
        draft.refusals.append(reason)
        if len(draft.refusals) == 1:
            return [_text(f"Refused: {reason}. Only direct attention; reply again in that form.")]
        patch.guidance, patch.regions = "", [r._replace(what="") for r in patch.regions]
        if not (patch.key_frames or patch.spans or patch.regions):
            raise TeacherError("leak", reason)
    return replace(patch, transcript=draft.transcript, refusals=draft.refusals, tokens=draft.tokens)


def _ask(chat: Chat, talks: list[list[dict]], timeout: float | None) -> list:
    """Call the brain in a thread, so that one that hangs costs no more than `timeout` seconds."""
    replies = []

    def call():
        try:
            replies.extend(chat(talks))
        except Exception as error:  # whatever a brain raises costs its cases, never the run
            replies[:] = [TeacherError("raised", f"{type(error).__name__}: {error}")] * len(talks)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        return [TeacherError("timeout", f"no reply within {timeout} s")] * len(talks)
    if len(replies) != len(talks):
        return [TeacherError("protocol", "not one reply per conversation")] * len(talks)
    return replies


# --- brains ---
def scripted(truths: dict[str, list[dict]]) -> Chat:
    """A brain without a model: it looks the evidence up by case id, but speaks the whole protocol.

    `truths[id]`: records of `error_type`, `key_frames`, `region`, and optionally `moment`,
    `guidance`, `cites`. The error is the first whose `cites` the response lacks, or the last."""

    def reply(talk: list[dict]) -> Reply | TeacherError:
        opening = talk[1]["content"][0]["text"]
        case_id = opening.partition("\n")[0].removeprefix("Case: ")
        if case_id not in truths:
            return TeacherError("unknown", f"no evidence for {case_id}")
        response = opening.partition("The student's response:")[2]
        missed = [e for e in truths[case_id] if e.get("cites", "") not in response]
        evidence = (missed or truths[case_id][-1:])[0]
        frames, region = evidence["key_frames"], evidence.get("region")
        if len(talk) == 2:  # look first
            calls = [f"TOOL_CALL: get_frame({frame})" for frame in frames]
            if region:
                calls = [f"TOOL_CALL: zoom_region({frames[0]}, {', '.join(map(str, region))})"]
            return Reply("<think>What is to be seen there?</think>\n" + "\n".join(calls))
        moment = evidence.get("moment", [min(frames), max(frames)])
        regions = [{"frame": frames[0], "box": region}] if region else []
        patch = {"content": evidence.get("guidance", ""), "key_frames": frames,
                 "temporal_markers": [moment], "spatial_regions": regions}
        body = {"error_classification": evidence["error_type"], "evidence_patch": patch}
        return Reply(f"<think>Found.</think><answer>{json.dumps(body)}</answer>")

    return lambda talks: [reply(talk) for talk in talks]


def local(model, processor, max_tokens: int = 1024) -> Chat:
    """A brain that is a transformers vision-language model; all conversations go in one batch."""

    @torch.no_grad()
    def chat(talks: list[list[dict]]) -> list[Reply | TeacherError]:
        tokenizer, render = processor.tokenizer, processor.apply_chat_template
        texts = [render(talk, tokenize=False, add_generation_prompt=True) for talk in talks]
        parts = [part for talk in talks for message in talk for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        tokenizer.padding_side = "left"
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        out = out[:, inputs["input_ids"].shape[1] :]
        used = (out != tokenizer.pad_token_id).sum(1).tolist()
        return [*map(Reply, tokenizer.batch_decode(out, skip_special_tokens=True), used)]

    return chat
