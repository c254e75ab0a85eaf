"""Video question-answering data: records, frames, and the needle videos of tiny mode.

    x = (v, q)      `Sample` (q, its options, answer y and type) and `Video` (v)
    student's view  `Video.uniform(n)`: n original frame indices; `Video.seconds(i)`: their times
    evidence        `Video.frame(i)`, at native size: what the teacher's tools look at

Sources: FFR Table 8, Video-R1's record format; needle videos and `scripted` are ours. No sibling.
"""

import json
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import decord
import torch
import transformers
from PIL import Image, ImageDraw

# Video-R1's five types, and ours: `exact`, all or nothing on the normalised string.
PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression", "exact")


class DataError(ValueError):
    """A data file, record or video that cannot be used; the message says which and what to do."""


@dataclass
class Sample:
    """One video question. `truth` is for a scripted teacher or a cold start alone to look up."""
    id: str
    question: str
    options: list[str]
    answer: str
    problem_type: str
    path: str  # of the video file
    source: str = ""
    truth: dict = field(default_factory=dict)


def load_samples(path: str, video_root: str = "") -> list[Sample]:
    """Read Video-R1 records from a `.json` list or a `.jsonl` file. `video_root` comes before each
    record's `path` (default: the data file's own folder). Raises `DataError` naming the file, the
    record (from 1), the field and the remedy. Whether a video opens, `Video` tells."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path}: no such data file; give a .json or .jsonl file")
    text = file.read_text(encoding="utf-8")
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        records = [*map(json.loads, lines)] if file.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); mend that place") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: holds no records; expected a list of Video-R1 records")
    samples, seen = [], {}
    for i, record in enumerate(records, 1):
        sample = _sample(record, f"{path}, record {i}", Path(video_root or file.parent))
        if seen.setdefault(sample.id, i) != i:
            raise DataError(f"{path}, record {i}: problem_id of record {seen[sample.id]}; drop one")
        samples.append(sample)
    return samples


def _sample(record: dict, where: str, root: Path) -> Sample:
    def need(fine: object, problem: str) -> None:
        if not fine:
            raise DataError(f"{where}: {problem}")

    need(isinstance(record, dict), "no JSON object; each record is a dict of Video-R1's fields")
    for name in ("problem", "problem_type", "solution", "path"):
        fine = isinstance(record.get(name), str) and record[name].strip()
        need(fine, f"field '{name}' is missing or no text; add it or drop the record")
    kind, options = record["problem_type"], [str(o) for o in record.get("options") or []]
    need(record.get("data_type", "video") == "video", "data_type is not 'video'; drop the record")
    known = f"use one of: {', '.join(PROBLEM_TYPES)}"
    need(kind in PROBLEM_TYPES, f"unknown problem_type '{kind}'; {known}")
    answer = re.search(r"<answer>(.*?)</answer>", record["solution"], re.DOTALL)
    need(answer and answer[1].strip(), "solution has no <answer>…</answer>; wrap the answer in it")
    need(options or kind != "multiple choice", "multiple choice without options; add 'options'")
    video = root / record["path"]
    need(video.is_file(), f"no video at {video}; mend 'path' or give --video_root")
    truth = {k: record[k] for k in ("evidence", "moments", "cue", "look") if k in record}
    return Sample(
        str(record.get("problem_id", where)), record["problem"], options, answer[1].strip(), kind,
        str(video), str(record.get("data_source", "")), truth,
    )


# --- videos ---
class Video:
    """A video file read by decord, frames addressed by their index in the original: what teacher.py
    calls a Clip. Raises `DataError` where the file does not open or a frame does not decode."""

    def __init__(self, path: str):
        self.path, self._kept = str(path), {}
        try:
            self._reader = decord.VideoReader(self.path, num_threads=1)
            self.fps = float(self._reader.get_avg_fps())
        except (decord.DECORDError, RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a video that decord opens; replace the file") from error
        if len(self) == 0 or not 0 < self.fps < 1e4:
            raise DataError(f"{path}: {len(self)} frames at {self.fps} fps; replace the file")

    def __len__(self) -> int:
        return len(self._reader)

    def seconds(self, index: int) -> float:
        """Time of an original frame since the first, in seconds, at variable frame rates too."""
        starts = self._reader.get_frame_timestamp([0, index])[:, 0]  # of each, its start and end
        return float(starts[1] - starts[0])

    def uniform(self, num_frames: int) -> list[int]:
        """`num_frames` indices spread evenly from the first frame to the last (all if fewer)."""
        steps = min(num_frames, len(self))
        return [round(k * (len(self) - 1) / max(steps - 1, 1)) for k in range(steps)]

    def frames(self, indices: list[int]) -> list[Image.Image]:
        """Original frames at native size."""
        try:
            batch = self._reader.get_batch(list(indices)).asnumpy()  # (n, height, width, 3) uint8
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise DataError(f"{self.path}: frames {list(indices)} do not decode") from error
        return [Image.fromarray(frame) for frame in batch]

    def frame(self, index: int) -> Image.Image:
        """One original frame at native size; the last few are kept, tools look at them again."""
        if index not in self._kept:
            if len(self._kept) >= 32:
                self._kept.pop(next(iter(self._kept)))
            self._kept[index] = self.frames([index])[0]
        return self._kept[index]


def fit(image: Image.Image, max_pixels: int) -> Image.Image:
    """Shrink an image to at most `max_pixels`, keeping its shape; smaller ones stay as they are."""
    scale = min(1.0, (max_pixels / (image.width * image.height)) ** 0.5)
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image if scale == 1 else image.resize(size, Image.Resampling.BICUBIC)


def write_avi(path: str, frames: list[Image.Image], fps: int) -> None:
    """Write frames as a Motion-JPEG AVI: a real video file with Pillow's JPEG encoder alone."""

    def chunk(name: bytes, *parts: bytes) -> bytes:
        body = b"".join(parts)
        return name + struct.pack("<I", len(body)) + body

    jpegs = []
    for frame in frames:
        buffer = BytesIO()
        frame.convert("RGB").save(buffer, "JPEG", quality=92)
        jpegs.append(buffer.getvalue() + b"\0" * (len(buffer.getvalue()) % 2))
    (w, h), n, most = frames[0].size, len(frames), max(map(len, jpegs))
    avih = struct.pack("<14I", 10**6 // fps, 0, 0, 0x10, n, 0, 1, most, w, h, 0, 0, 0, 0)
    strh = struct.pack("<4s4sIHH8I4H", b"vids", b"MJPG", 0, 0, 0, 0, 1, fps, 0, n, most, 2**32 - 1,
                       0, 0, 0, w, h)
    strf = struct.pack("<3I2H4s5I", 40, w, h, 1, 24, b"MJPG", w * h * 3, 0, 0, 0, 0)
    streams = chunk(b"LIST", b"strl", chunk(b"strh", strh), chunk(b"strf", strf))
    header = chunk(b"LIST", b"hdrl", chunk(b"avih", avih), streams)
    index, offset = [], 4
    for jpeg in jpegs:
        index.append(struct.pack("<4sIII", b"00dc", 0x10, offset, len(jpeg)))
        offset += 8 + len(jpeg)
    movie = chunk(b"LIST", b"movi", *[chunk(b"00dc", jpeg) for jpeg in jpegs])
    Path(path).write_bytes(chunk(b"RIFF", b"AVI ", header, movie, chunk(b"idx1", *index)))


# --- needle videos: one short moment answers the question ---
COLOURS = {"red": (215, 30, 30), "green": (30, 160, 50), "blue": (40, 60, 220),
           "yellow": (240, 220, 40), "cyan": (40, 210, 220), "pink": (245, 110, 200),
           "white": (250, 250, 250), "black": (9, 9, 9)}
RELATIONS = {-2: "two moments before the flash", -1: "one moment before the flash",
             0: "during the flash", 1: "one moment after the flash",
             2: "two moments after the flash"}
MOMENTS, FRAMES_PER_MOMENT, NEEDLE_FPS, NEEDLE_SIZE = 8, 2, 2, 128
CAPTION = "describe every moment"


def moment_frames(moment: int) -> list[int]:
    return [moment * FRAMES_PER_MOMENT + k for k in range(FRAMES_PER_MOMENT)]


def moment_time(moment: int) -> str:
    """The time of a moment as the student's processor writes it: the mean of its frames' times."""
    return f"<{sum(moment_frames(moment)) / FRAMES_PER_MOMENT / NEEDLE_FPS:.1f} seconds>"


def needle_videos(folder: str, n: int, seed: int, relations: tuple[int, ...] = (-1, 0, 1)) -> str:
    """Write `n` needle videos and their Video-R1 records; returns the path of `records.jsonl`.

    Each moment (two frames) shows a square with a ring and a core colour, over a bar that tells the
    time. One is flashed. The question asks for the colours at a moment relative to the flash, so it
    takes finding (the flash), relating and reading."""
    rng, root, margin = random.Random(seed), Path(folder), max(map(abs, relations))
    root.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(n):
        cue, relation = rng.randrange(margin, MOMENTS - margin), rng.choice(relations)
        look, name = cue + relation, f"needle-{seed}-{i:05d}"
        scenes = [(rng.randrange(4, 60), rng.randrange(4, 48), *rng.choices(list(COLOURS), k=2))
                  for _ in range(MOMENTS)]  # left, top, ring, core
        times = [(m, f) for m in range(MOMENTS) for f in moment_frames(m)]
        frames = [_draw(rng, scenes[m], m == cue, f) for m, f in times]
        write_avi(str(root / f"{name}.avi"), frames, NEEDLE_FPS)
        x, y, ring, core = scenes[look]
        at_cue = {"key_frames": moment_frames(cue)[:1], "moment": moment_frames(cue)}
        at_look = {"key_frames": moment_frames(look)[:1], "moment": moment_frames(look)}
        box = [round(v / NEEDLE_SIZE, 2) for v in (x - 4, y - 4, x + 68, y + 68)]
        # What a scripted teacher goes through, in order: the first step whose citation the
        # rationale lacks is what failed; the last step is what is left (the reading).
        evidence = [
            {"cites": f"flash {moment_time(cue)}", "error_type": "temporal",
             "guidance": "the flash is here", **at_cue},
            {"cites": f"look {moment_time(look)}", "error_type": "misconception",
             "guidance": "count from the flash", **at_cue},
            {"error_type": "spatial", "guidance": "look at the square", "region": box, **at_look},
        ]
        records.append({
            "problem_id": name, "data_source": "needle", "path": f"{name}.avi",
            "data_type": "video", "problem_type": "exact", "options": [],
            "problem": f"ring and core colour {RELATIONS[relation]} ?",
            "solution": f"<answer>{ring} {core}</answer>", "evidence": evidence,
            "moments": [scene[2:] for scene in scenes], "cue": cue, "look": look,
        })
    file = root / "records.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(file)


def _draw(rng: random.Random, scene: tuple, flashed: bool, frame: int) -> Image.Image:
    x, y, ring, core = scene
    noise = Image.frombytes("L", (16, 16), rng.randbytes(256)).resize((NEEDLE_SIZE,) * 2)
    grey = noise.point(lambda v: (195 if flashed else 85) + v // 8)
    image = Image.merge("RGB", (grey, grey, grey))
    pen = ImageDraw.Draw(image)
    pen.rectangle((x, y, x + 64, y + 64), COLOURS[ring])
    pen.rectangle((x + 16, y + 16, x + 48, y + 48), COLOURS[core])
    pen.rectangle((0, NEEDLE_SIZE - 8, 8 * (frame + 1), NEEDLE_SIZE), (60, 60, 60))  # time
    return image


def needle_rationale(truth: dict, cue: int, look: int) -> str:
    """The response that cites moments `cue` and `look` and reads the colours shown at `look`."""
    seen = " ".join(truth["moments"][look])
    cited = f"flash {moment_time(cue)} look {moment_time(look)} {seen}"
    return f"<think> {cited} </think> <answer> {seen} </answer>"


def needle_caption(truth: dict, order: list[int]) -> str:
    """All that is to be seen at the moments in `order`: what a cold start learns to read from."""
    seen = [f"look {moment_time(m)} {' '.join(truth['moments'][m])}" for m in order]
    return f"<think> flash {moment_time(truth['cue'])} {' '.join(seen)} </think>"


# --- a teacher's brain without a model ---
def scripted(truths: dict[str, list[dict]]) -> Callable:
    """A brain for teacher.py that looks the evidence up by case id, but speaks the whole protocol.

    `truths[id]`: records of `error_type`, `key_frames`, `region`, and optionally `moment`,
    `guidance`, `cites`. The error is the first whose `cites` the response lacks, or the last."""

    def reply(talk: list[dict]) -> tuple[str, int]:
        opening = talk[1]["content"][0]["text"]
        case_id = opening.partition("\n")[0].removeprefix("Case: ")
        if case_id not in truths:
            return f"There is no evidence for {case_id}.", 0
        response = opening.partition("The student's response:")[2]
        missed = [e for e in truths[case_id] if e.get("cites", "") not in response]
        evidence = (missed or truths[case_id][-1:])[0]
        frames, region = evidence["key_frames"], evidence.get("region")
        if len(talk) == 2:  # look first
            calls = [f"TOOL_CALL: get_frame({frame})" for frame in frames]
            if region:
                calls = [f"TOOL_CALL: zoom_region({frames[0]}, {', '.join(map(str, region))})"]
            return "<think>What is to be seen there?</think>\n" + "\n".join(calls), 0
        moment = evidence.get("moment", [min(frames), max(frames)])
        regions = [{"frame": frames[0], "box": region}] if region else []
        patch = {"content": evidence.get("guidance", ""), "key_frames": frames,
                 "temporal_markers": [moment], "spatial_regions": regions}
        body = {"error_classification": evidence["error_type"], "evidence_patch": patch}
        return f"<think>Found.</think><answer>{json.dumps(body)}</answer>", 0

    return lambda talks, seconds: [reply(talk) for talk in talks]


# --- a student of the needle videos' size ---
WORDS = ["user assistant flash look <think> </think> <answer> </answer> 0123456789 . , : ( )",
         "Evidence temporal spatial misconception Moments to Region Guidance Frame Crop"]
SPECIALS = ["<|im_end|>", "<|pad|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
            "<|vision_end|>", "<|im_start|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}"
    "<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_student(folder: str, samples: list[Sample], seed: int) -> None:
    """Save a random Qwen3-VL of 0.5 M parameters with its real processor and a tokenizer of words:
    those of the questions, of rationales and of rendered patches."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # comes with transformers

    texts = [CAPTION, *COLOURS, *RELATIONS.values(), *(s.question for s in samples), *WORDS]
    texts += [e["guidance"] for s in samples for e in s.truth["evidence"]]
    texts += [moment_time(m) for m in range(MOMENTS)]
    texts += [f"<{f / NEEDLE_FPS:.1f} seconds>" for f in range(MOMENTS * FRAMES_PER_MOMENT)]
    word = r"<[^<>|]+>|[A-Za-z]+|[^\sA-Za-z]"
    words = sorted({w for text in texts for w in re.findall(word, text)})
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(word), "removed", invert=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=SPECIALS,
    )
    look = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16, "merge_size": 2,
            "size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64}}
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**look), tokenizer,
        transformers.Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **look), CHAT_TEMPLATE,
    )
    end, pad, image, video, start, stop, _ = tokenizer.convert_tokens_to_ids(SPECIALS)
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 4, 4]}
    text = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, head_dim=24, rope_parameters=rope, vocab_size=len(tokenizer),
                pad_token_id=pad, eos_token_id=end, bos_token_id=None, initializer_range=0.08)
    vision = dict(hidden_size=64, intermediate_size=128, depth=1, num_heads=2, out_hidden_size=96,
                  num_position_embeddings=64, deepstack_visual_indexes=[0], initializer_range=0.08)
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=image,
        video_token_id=video, vision_start_token_id=start, vision_end_token_id=stop,
    )
    torch.manual_seed(seed)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
