"""Video question-answering data: records, frames, and the synthetic needle videos of tiny mode.

    x = (v, q)      `Sample` (q, its options, answer y and type) and `Video` (v)
    student's view  `Video.uniform(n)`: n original frame indices; `Video.seconds(i)`: their times
    evidence        `Video.frame(i)`, at native size: what the teacher's tools look at

Sources: FFR Table 8 (16 frames, 128·28·28 pixels each), Video-R1's record format. The needle videos
(`needle_videos`) and their cold-start rationales are ours. This file imports no sibling.
"""

import json
import random
import re
import struct
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import decord
import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

# Video-R1's five types, and ours: `exact` is all or nothing on the normalised string.
PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression", "exact")


class DataError(ValueError):
    """A data file, a record or a video that cannot be used; the message says which and what to do."""


@dataclass
class Sample:
    """One video question. `truth` holds what only a scripted teacher or a cold start may look up."""

    id: str
    question: str
    options: list[str]
    answer: str
    problem_type: str
    path: str  # of the video file
    source: str = ""
    truth: dict = field(default_factory=dict)


# --- records --------------------------------------------------------------------------------------


def load_samples(path: str, video_root: str = "") -> list[Sample]:
    """Read Video-R1 records from a `.json` list or a `.jsonl` file.

    `video_root` is joined before each record's `path` (default: the data file's own folder).
    Raises `DataError` naming the file, the record (from 1), the field and the remedy. Whether each
    video opens is `check_videos`' business.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path}: no such data file; give a .json or .jsonl file with --data")
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); mend that line") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: holds no records; expected a list of Video-R1 records")
    root = Path(video_root) if video_root else file.parent
    samples, seen = [], {}
    for i, record in enumerate(records, 1):
        sample = _sample(record, f"{path}, record {i}", root)
        if seen.setdefault(sample.id, i) != i:
            raise DataError(f"{path}, record {i}: its problem_id is record {seen[sample.id]}'s too")
        samples.append(sample)
    return samples


def _sample(record: dict, where: str, root: Path) -> Sample:
    if not isinstance(record, dict):
        raise DataError(f"{where}: is no JSON object; each record is a dict of Video-R1 fields")
    for name in ("problem", "problem_type", "solution", "path"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise DataError(f"{where}: field '{name}' is missing or no text; add it or drop the record")
    if record.get("data_type", "video") != "video":
        raise DataError(f"{where}: data_type '{record['data_type']}' is not 'video'; drop the record")
    kind = record["problem_type"]
    if kind not in PROBLEM_TYPES:
        known = ", ".join(PROBLEM_TYPES)
        raise DataError(f"{where}: unknown problem_type '{kind}'; use one of: {known}")
    answer = re.search(r"<answer>(.*?)</answer>", record["solution"], re.DOTALL)
    if answer is None or not answer[1].strip():
        raise DataError(f"{where}: solution has no <answer>…</answer>; wrap the answer in that tag")
    options = record.get("options") or []
    if kind == "multiple choice" and not options:
        raise DataError(f"{where}: multiple choice without options; add the field 'options'")
    video = root / record["path"]
    if not video.is_file():
        raise DataError(f"{where}: no video at {video}; mend 'path' or give --video_root")
    return Sample(
        id=str(record.get("problem_id", where.rsplit(" ", 1)[1])),
        question=record["problem"],
        options=[str(option) for option in options],
        answer=answer[1].strip(),
        problem_type=kind,
        path=str(video),
        source=str(record.get("data_source", "")),
        truth={k: record[k] for k in ("evidence", "moments", "cue", "look") if k in record},
    )


def check_videos(samples: list[Sample]) -> None:
    """Open every distinct video once; raises `DataError` for the first that does not open."""
    for path in dict.fromkeys(sample.path for sample in samples):
        Video(path)


# --- videos ---------------------------------------------------------------------------------------


class Video:
    """A video file read by decord. Frames are addressed by their index in the original.

    Satisfies the teacher's protocol: `len(video)`, `video.fps`, `video.frame(i)`.
    Raises `DataError` where the file cannot be opened or a frame cannot be decoded.
    """

    def __init__(self, path: str):
        self.path, self._kept = str(path), {}
        try:
            # One thread: the calls are short, and decord's pool per reader outlives its use.
            self._reader = decord.VideoReader(self.path, num_threads=1)
            self.fps = float(self._reader.get_avg_fps())
        except (decord.DECORDError, RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a video that decord can open; replace the file") from error
        if len(self) == 0 or not 0 < self.fps < 1e4:
            raise DataError(f"{path}: a video of {len(self)} frames at {self.fps} fps; replace it")

    def __len__(self) -> int:
        return len(self._reader)

    def seconds(self, index: int) -> float:
        """Time of an original frame, in seconds."""
        return index / self.fps

    def uniform(self, num_frames: int) -> list[int]:
        """`num_frames` indices spread evenly from the first frame to the last (all if fewer)."""
        last = len(self) - 1
        steps = min(num_frames, len(self))
        return [round(k * last / max(steps - 1, 1)) for k in range(steps)]

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
    scale = (max_pixels / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def write_avi(path: str, frames: list[Image.Image], fps: int) -> None:
    """Write frames as a Motion-JPEG AVI: a real video file with Pillow's JPEG encoder alone."""
    width, height = frames[0].size
    jpegs = []
    for frame in frames:
        buffer = BytesIO()
        frame.convert("RGB").save(buffer, "JPEG", quality=92)
        jpegs.append(buffer.getvalue() + b"\0" * (len(buffer.getvalue()) % 2))

    def chunk(name: bytes, *parts: bytes) -> bytes:
        body = b"".join(parts)
        return name + struct.pack("<I", len(body)) + body

    n, largest = len(frames), max(map(len, jpegs))
    avih = struct.pack("<14I", 1_000_000 // fps, 0, 0, 0x10, n, 0, 1, largest, width, height, *[0] * 4)
    strh = struct.pack("<4s4sIHHIIIIIIII4H", b"vids", b"MJPG", 0, 0, 0, 0, 1, fps, 0, n, largest,
                       2**32 - 1, 0, 0, 0, width, height)  # fmt: skip
    strf = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", width * height * 3, *[0] * 4)
    strl = chunk(b"LIST", b"strl", chunk(b"strh", strh), chunk(b"strf", strf))
    header = chunk(b"LIST", b"hdrl", chunk(b"avih", avih), strl)
    index, offset = [], 4
    for jpeg in jpegs:
        index.append(struct.pack("<4sIII", b"00dc", 0x10, offset, len(jpeg)))
        offset += 8 + len(jpeg)
    movie = chunk(b"LIST", b"movi", *[chunk(b"00dc", jpeg) for jpeg in jpegs])
    Path(path).write_bytes(chunk(b"RIFF", b"AVI ", header, movie, chunk(b"idx1", *index)))


# --- needle videos: one short moment answers the question --------------------------------------------

COLOURS = {
    "red": (215, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "cyan": (40, 210, 220),
    "pink": (245, 110, 200),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
RELATIONS = {
    -2: "two moments before the flash",
    -1: "one moment before the flash",
    0: "during the flash",
    1: "one moment after the flash",
    2: "two moments after the flash",
}
MOMENTS, FRAMES_PER_MOMENT, NEEDLE_FPS, NEEDLE_SIZE = 8, 2, 2, 128


def moment_time(moment: int) -> str:
    """The time of a moment as the student's processor writes it: the mean of its frames' times."""
    return f"<{(moment * FRAMES_PER_MOMENT + 0.5) / NEEDLE_FPS:.1f} seconds>"


def needle_videos(
    folder: str, n: int, seed: int, relations: tuple[int, ...] = (-1, 0, 1)
) -> str:
    """Write `n` needle videos and their Video-R1 records; returns the path of `records.jsonl`.

    Each moment (two frames) shows a square with a ring and a core colour at a random place, over a
    bar that tells the time. One moment is flashed. The question asks for both colours at a moment
    given relative to the flash, so it takes finding (the flash), relating and reading.
    """
    rng = random.Random(seed)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    margin = max(map(abs, relations))
    records = []
    for i in range(n):
        relation = rng.choice(relations)
        cue = rng.randrange(margin, MOMENTS - margin)
        look = cue + relation
        scene = [_scene(rng) for _ in range(MOMENTS)]
        frames = [
            _draw(rng, scene[m], flashed=m == cue, time=(m * FRAMES_PER_MOMENT + k + 1))
            for m in range(MOMENTS)
            for k in range(FRAMES_PER_MOMENT)
        ]
        name = f"needle-{seed}-{i:05d}"
        write_avi(str(root / f"{name}.avi"), frames, NEEDLE_FPS)
        x, y, side, ring, core = scene[look]
        box = [round(v / NEEDLE_SIZE, 2) for v in (x - 4, y - 4, x + side + 4, y + side + 4)]
        cue_frames, look_frames = (
            [m * FRAMES_PER_MOMENT, (m + 1) * FRAMES_PER_MOMENT - 1] for m in (cue, look)
        )
        # What a scripted teacher goes through, in order: the first step whose citation the
        # rationale lacks is what failed; the last step is what is left (the reading).
        evidence = [
            {"cites": f"flash {moment_time(cue)}", "error_type": "temporal",
             "key_frames": cue_frames[:1], "moment": cue_frames, "guidance": "the flash is here"},
            {"cites": f"look {moment_time(look)}", "error_type": "misconception",
             "key_frames": cue_frames[:1], "moment": cue_frames, "guidance": "count from the flash"},
            {"error_type": "spatial", "key_frames": look_frames[:1], "moment": look_frames,
             "region": box, "guidance": "look at the square"},
        ]  # fmt: skip
        records.append({
            "problem_id": name, "data_source": "needle", "path": f"{name}.avi",
            "data_type": "video", "problem_type": "exact",
            "problem": f"ring and core colour {RELATIONS[relation]} ?",
            "options": [], "solution": f"<answer>{ring} {core}</answer>", "evidence": evidence,
            "moments": [[s[3], s[4]] for s in scene], "cue": cue, "look": look,
        })  # fmt: skip
    file = root / "records.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(file)


def _scene(rng: random.Random) -> tuple:
    side = 64
    x, y = rng.randrange(4, NEEDLE_SIZE - side - 4), rng.randrange(4, NEEDLE_SIZE - side - 16)
    return x, y, side, rng.choice(list(COLOURS)), rng.choice(list(COLOURS))


def _draw(rng: random.Random, scene: tuple, flashed: bool, time: int) -> Image.Image:
    x, y, side, ring, core = scene
    noise = Image.frombytes("L", (16, 16), rng.randbytes(256)).resize((NEEDLE_SIZE,) * 2)
    grey = noise.point(lambda v: (195 if flashed else 85) + v // 8)
    image = Image.merge("RGB", (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    draw.rectangle((x, y, x + side, y + side), COLOURS[ring])
    inset = side // 4
    draw.rectangle((x + inset, y + inset, x + side - inset, y + side - inset), COLOURS[core])
    draw.rectangle((0, NEEDLE_SIZE - 8, NEEDLE_SIZE * time // (MOMENTS * FRAMES_PER_MOMENT), NEEDLE_SIZE), (60, 60, 60))
    return image


def needle_rationale(truth: dict, cue: int, look: int) -> str:
    """The response that cites moments `cue` and `look` and reads the colours shown at `look`."""
    ring, core = truth["moments"][look]
    cited = f"flash {moment_time(cue)} look {moment_time(look)} {ring} {core}"
    return f"<think> {cited} </think> <answer> {ring} {core} </answer>"


def needle_caption(truth: dict, order: list[int]) -> str:
    """All that is to be seen at the moments in `order`: what a cold start learns to read from."""
    seen = [f"look {moment_time(m)} {' '.join(truth['moments'][m])}" for m in order]
    return f"<think> flash {moment_time(truth['cue'])} {' '.join(seen)} </think>"


# --- a student of the needle videos' size -----------------------------------------------------------

CAPTION = "describe every moment"
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>", "<|pad|>"]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}"
    "<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_student(folder: str, samples: list[Sample], seed: int) -> None:
    """Save a random Qwen3-VL of 0.5 M parameters with its real processor and a tokenizer of words:
    those of the questions, of rationales and of rendered patches."""
    guidance = {e["guidance"] for s in samples for e in s.truth["evidence"]}
    texts = [CAPTION, *COLOURS, *RELATIONS.values(), *guidance, *(s.question for s in samples)]
    texts += [moment_time(m) for m in range(MOMENTS)]
    texts += [f"<{k / NEEDLE_FPS:.1f} seconds>" for k in range(MOMENTS * FRAMES_PER_MOMENT)]
    texts += ["user assistant flash look <think> </think> <answer> </answer> 0123456789.,:()"]
    texts += ["Evidence temporal spatial misconception Moments to Region Guidance Frame Crop at"]
    word = r"<[^<>|]+>|[A-Za-z]+|[^\sA-Za-z]"
    words = sorted({w for text in texts for w in re.findall(word, text)})
    vocabulary = {w: i for i, w in enumerate(["<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(word), "removed", invert=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=SPECIALS,
    )  # fmt: skip
    look = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16, "merge_size": 2,
            "size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64}}  # fmt: skip
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**look),
        video_processor=transformers.Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **look),
        tokenizer=tokenizer, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    start, end, vision_start, vision_end, image, video, pad = (
        tokenizer.convert_tokens_to_ids(SPECIALS)
    )  # fmt: skip
    text = dict(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=24, initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 4, 4]},
        pad_token_id=pad, eos_token_id=end, bos_token_id=None,
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=96,
        num_position_embeddings=64, deepstack_visual_indexes=[0], initializer_range=0.08,
    )  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=image,
        video_token_id=video, vision_start_token_id=vision_start, vision_end_token_id=vision_end,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
