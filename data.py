"""Video question-answering data: records, frames, and the needle videos of tiny mode.

    x = (v, q)      `Sample` (q, its options, answer y and type) and `Video` (v)
    student's view  `Video.uniform(n)`: n original frame indices; `Video.seconds(i)`: their times
    evidence        `Video.frame(i)`, at native size: what the teacher's tools look at

Sources: FFR Table 8, Video-R1's format; needle videos are ours. Needs no sibling."""

import argparse
import json
import os
import pickle
import random
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from statistics import median
from struct import pack
from subprocess import DEVNULL, PIPE, Popen

import decord
from PIL import Image, ImageDraw
from tqdm import tqdm

# Video-R1's five types, and ours: `exact`, all or nothing on the normalised string.
TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression", "exact")
# A record's fields that are read here, or known to be of no use.
FIELDS = ("problem_id", "problem", "problem_type", "solution", "path", "options")
FIELDS += ("data_type", "data_source", "process", "evidence", "moments", "cue", "look")


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
    record: dict = field(default_factory=dict)  # all but FIELDS, for a teacher's tools


def need(fine: object, problem: str) -> None:
    if not fine:
        raise DataError(problem)


def load_samples(path: str, video_root: str = "", skip: str = "") -> list[Sample]:
    """Read Video-R1 records from a `.json` list or a `.jsonl` file. `video_root` comes before each
    record's `path` (default: the data file's own folder); `skip` is the list that `python data.py`
    wrote. Raises `DataError` naming the file, the record (from 1), the field and the remedy."""
    left_out, sha = {}, digest(path)
    if skip:
        try:
            of, left_out = json.loads(Path(skip).read_text(encoding="utf-8")).values()
        except (AttributeError, ValueError) as error:
            raise DataError(f"{skip}: no skip list; python data.py {path} writes one") from error
        need(of == sha, f"{skip}: lists another {path}; run python data.py {path} again")
    samples = [s for i, s in read_records(path, video_root).items() if str(i) not in left_out]
    for broken in [s for s in samples if isinstance(s, DataError)]:
        raise broken
    return samples


def digest(path: str) -> str:
    need(Path(path).is_file(), f"{path}: no such data file; give a .json or .jsonl file")
    return sha256(Path(path).read_bytes()).hexdigest()


def read_records(path: str, video_root: str = "") -> dict[int, Sample | DataError]:
    """By every record's number, from 1, its sample or what is wrong with it."""
    file, found, seen = Path(path), {}, {}
    text = file.read_text(encoding="utf-8")
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        records = lines if file.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); mend that place") from error
    need(isinstance(records, list) and records, f"{path}: holds no records; give a list of them")
    for i, record in enumerate(records, 1):
        where = f"{path}, record {i}"
        try:
            record = json.loads(record) if isinstance(record, str) else record
            found[i] = _sample(record, where, Path(video_root or file.parent))
            first = seen.setdefault(found[i].id, i)
            need(first == i, f"problem_id of record {first}; drop one")
        except json.JSONDecodeError as error:
            found[i] = DataError(f"{where}: not valid JSON ({error}); mend that place")
        except DataError as error:
            found[i] = DataError(f"{where}: {error}")
    return found


def _sample(record: dict, where: str, root: Path) -> Sample:
    need(isinstance(record, dict), "no JSON object; each record is a dict of Video-R1's fields")
    for name in ("problem", "problem_type", "solution", "path"):
        fine = isinstance(record.get(name), str) and record[name].strip()
        need(fine, f"field '{name}' is missing or no text; add it or drop the record")
    kind, options = record["problem_type"], record.get("options") or []
    need(record.get("data_type", "video") == "video", "data_type is not 'video'; drop the record")
    need(kind in TYPES, f"unknown problem_type '{kind}'; use one of: {', '.join(TYPES)}")
    answer, end, _ = record["solution"].partition("<answer>")[2].partition("</answer>")
    need(end and answer.strip(), "solution has no <answer>…</answer>; wrap the answer in it")
    need(isinstance(options, list), "field 'options' is no list; mend it")
    need(options or kind != "multiple choice", "multiple choice without options; add 'options'")
    video = root / record["path"]
    need(video.is_file(), f"no video at {video}; mend 'path' or give --video_root")
    fault = reference_fault(answer.strip(), kind, [*map(str, options)])
    need(not fault, fault)
    truth = {k: record[k] for k in ("evidence", "moments", "cue", "look") if k in record}
    more = {name: value for name, value in record.items() if name not in FIELDS}
    return Sample(
        str(record.get("problem_id", where)),
        record["problem"],
        [*map(str, options)],
        answer.strip(),
        kind,
        str(video),
        str(record.get("data_source", "")),
        truth,
        more,
    )


def reference_fault(answer: str, kind: str, options: list[str]) -> str | None:
    """Why no answer can be right by a reference; None, too, where reward.py is not beside us."""
    try:
        from reward import reference_problem
    except ImportError:
        return None
    return reference_problem(answer, kind, options)


@dataclass
class Decoder:
    """decord in a process of its own: a corrupt packet can make it abort or hang, which then raises
    `DataError` for that video and not the run. Serves one thread at a time."""

    patience: float = 60.0  # seconds that a request may take
    child: Popen | None = None

    def __call__(self, path: str, indices: list[int] | None = None):
        """Frames, (n, height, width, 3) uint8; without `indices`, fps and every frame's seconds."""
        if self.child is None or self.child.poll() is not None:
            self.child = Popen(
                [sys.executable, __file__, "--decode"], stdin=PIPE, stdout=PIPE, stderr=DEVNULL
            )
        clock = threading.Timer(self.patience, self.child.kill)
        clock.start()
        try:
            pickle.dump((os.path.abspath(path), indices), self.child.stdin)
            self.child.stdin.flush()
            found = pickle.load(self.child.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.child.kill()
            self.child.wait()
            found = f"ended decord, or took it over {self.patience:.0f} s"
        finally:
            clock.cancel()
        if isinstance(found, str):
            raise DataError(f"{path}: {found}; replace the file")
        return found


def serve_decoder() -> None:
    """What the child does, until its parent is gone."""
    reader_of = lru_cache(8)(decord.VideoReader)
    while sys.stdin.buffer.peek():
        path, indices = pickle.load(sys.stdin.buffer)
        try:
            reader = reader_of(path, num_threads=1)
            if indices is None:
                times = reader.get_frame_timestamp(range(len(reader)))[:, 0]  # of starts
                found = float(reader.get_avg_fps()), (times - times[:1]).tolist()
            else:
                found = reader.get_batch(indices).asnumpy()
        except (decord.DECORDError, RuntimeError, OSError, IndexError, ValueError):
            found = "not a video that decord opens"
            found = f"frames {indices[0]} to {indices[-1]} do not decode" if indices else found
        pickle.dump(found, sys.stdout.buffer)
        sys.stdout.flush()


class Video:
    """A video, frames by their original index: teacher.py's clip. Raises `DataError` if broken."""

    def __init__(self, path: str, decoder: Decoder = Decoder()):
        self.path, self.decoder = str(path), decoder
        # frame(i): one original frame at native size; the last are kept, tools look at them again.
        self.frame = lru_cache(32)(lambda i: Image.fromarray(decoder(str(path), [i])[0]))
        self.fps, self.times = decoder(self.path)
        need(
            len(self) > 1 and 0 < self.fps < 1e4,
            f"{path}: {len(self)} frame(s) at {self.fps} fps; replace the file",
        )
        with open(path, "rb") as file:
            name, size = file.read(4), int.from_bytes(file.read(4), "little")
        cut = name == b"RIFF" and size + 8 > os.path.getsize(path)  # decord opens what is left
        need(not cut, f"{path}: an AVI that is cut short; replace the file")

    def __len__(self) -> int:
        return len(self.times)

    def seconds(self, index: int) -> float:
        return self.times[index]  # since the first frame, at variable frame rates too

    def uniform(self, num_frames: int) -> list[int]:
        """`num_frames` indices spread evenly from the first frame to the last (all if fewer)."""
        steps = min(num_frames, len(self))
        return [round(k * (len(self) - 1) / max(steps - 1, 1)) for k in range(steps)]

    def frames(self, indices: list[int]) -> list[Image.Image]:
        return [Image.fromarray(frame) for frame in self.decoder(self.path, list(indices))]


def fit(image: Image.Image, max_pixels: int) -> Image.Image:
    """Shrink an image to at most `max_pixels`, keeping its shape; smaller ones stay as they are."""
    scale = min(1.0, (max_pixels / (image.width * image.height)) ** 0.5)
    return image if scale == 1 else image.resize([max(1, int(side * scale)) for side in image.size])


def look_at(paths: list[str], num_frames: int = 1) -> dict:
    """By path, after decoding `num_frames`: number of frames and seconds, or the `DataError`."""

    def look(path: str, mine=threading.local()):  # a decoder for each thread
        try:
            video = Video(path, vars(mine).setdefault("decoder", Decoder()))
            video.frames(video.uniform(num_frames))
            return len(video), video.seconds(-1)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, tqdm(pool.map(look, paths), "videos", len(paths), leave=False)))


def refuse_broken(samples: list[Sample], file: str) -> None:
    """Raise DataError where a video of these does not open."""
    seen = look_at(list({sample.path: 0 for sample in samples}))
    broken = [fact for fact in seen.values() if isinstance(fact, DataError)]
    if broken:
        advice = f"({len(broken)} such; `python data.py {file}` lists them for --skip)"
        raise DataError(f"{broken[0]} {advice}")


def write_avi(path: str, frames: list[Image.Image], fps: int) -> None:
    """Write frames as a Motion-JPEG AVI: a real video file with Pillow's JPEG encoder alone."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + pack("<I", len(body)) + body

    (w, h), n, most, movie, index = frames[0].size, len(frames), 0, b"movi", b""
    for frame in frames:
        frame.convert("RGB").save(file := BytesIO(), "JPEG", quality=92)
        jpeg = file.getvalue() + b"\0" * (file.tell() % 2)
        most = max(most, len(jpeg))
        index += pack("<4sIII", b"00dc", 0x10, len(movie), len(jpeg))
        movie += chunk(b"00dc", jpeg)
    avih = chunk(b"avih", pack("<10I16x", 10**6 // fps, 0, 0, 0x10, n, 0, 1, most, w, h))
    strh = chunk(b"strh", pack("<8s12x6I8x2H", b"vidsMJPG", 1, fps, 0, n, most, 2**32 - 1, w, h))
    strf = chunk(b"strf", pack("<3I2H4sI16x", 40, w, h, 1, 24, b"MJPG", w * h * 3))
    header = b"AVI " + chunk(b"LIST", b"hdrl" + avih + chunk(b"LIST", b"strl" + strh + strf))
    Path(path).write_bytes(chunk(b"RIFF", header + chunk(b"LIST", movie) + chunk(b"idx1", index)))


# --- needle videos: one short moment answers the question ---
COLOURS = {
    "red": (215, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "cyan": (40, 210, 220),
    "pink": (245, 110, 200),
    "white": (250, 250, 250),
    "black": (9, 9, 9),
}
RELATIONS = {
    -2: "two moments before",
    -1: "one moment before",
    0: "during",
    1: "one moment after",
    2: "two moments after",
}  # the flash
MOMENTS, FRAMES_PER_MOMENT, NEEDLE_FPS, NEEDLE_SIZE = 8, 2, 2, 128


def moment_frames(moment: int) -> list[int]:
    return [moment * FRAMES_PER_MOMENT + k for k in range(FRAMES_PER_MOMENT)]


def moment_time(moment: int) -> str:
    """The time of a moment as the student's processor writes it: the mean of its frames' times."""
    return f"<{sum(moment_frames(moment)) / FRAMES_PER_MOMENT / NEEDLE_FPS:.1f} seconds>"


def needle_videos(folder: str, n: int, seed: int, relations: tuple[int, ...] = (-1, 0, 1)) -> str:
    """Write `n` needle videos and their records; returns the records' path. A moment shows a square
    of two colours, one is flashed; asked are the colours of a moment relative to the flash."""
    rng, root, margin, records = random.Random(seed), Path(folder), max(map(abs, relations)), []
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        cue, relation = rng.randrange(margin, MOMENTS - margin), rng.choice(relations)
        look, name, frames = cue + relation, f"needle-{seed}-{i:05d}", []
        scenes = [
            (rng.randrange(4, 60), rng.randrange(4, 48), *rng.choices(list(COLOURS), k=2))
            for _ in range(MOMENTS)
        ]  # left, top, ring, core
        for moment, (x, y, ring, core) in enumerate(scenes):
            for frame in moment_frames(moment):  # a square, over a bar that tells the time
                grey = Image.frombytes("L", (16, 16), rng.randbytes(256)).resize((NEEDLE_SIZE,) * 2)
                image = grey.point(lambda v: (195 if moment == cue else 85) + v // 8).convert("RGB")
                pen = ImageDraw.Draw(image)
                pen.rectangle((x, y, x + 64, y + 64), COLOURS[ring])
                pen.rectangle((x + 16, y + 16, x + 48, y + 48), COLOURS[core])
                pen.rectangle((0, NEEDLE_SIZE - 8, 8 * (frame + 1), NEEDLE_SIZE), (60, 60, 60))
                frames.append(image)
        write_avi(str(root / f"{name}.avi"), frames, NEEDLE_FPS)
        x, y, ring, core = scenes[look]
        box = [round(v / NEEDLE_SIZE, 2) for v in (x - 4, y - 4, x + 68, y + 68)]
        flash, shown = ({"key_frames": f[:1], "moment": f} for f in map(moment_frames, (cue, look)))
        evidence = [  # for a scripted teacher
            {
                "cites": f"flash {moment_time(cue)}",
                "error_type": "temporal",
                "guidance": "the flash is here",
                **flash,
            },
            {
                "cites": f"look {moment_time(look)}",
                "error_type": "misconception",
                "guidance": "count from the flash",
                **flash,
            },
            {"error_type": "spatial", "guidance": "look at the square", "region": box, **shown},
        ]
        records.append(
            {
                "problem_id": name,
                "data_source": "needle",
                "path": f"{name}.avi",
                "data_type": "video",
                "problem_type": "exact",
                "options": [],
                "problem": f"ring and core colour {RELATIONS[relation]} the flash ?",
                "solution": f"<answer>{ring} {core}</answer>",
                "evidence": evidence,
                "moments": [scene[2:] for scene in scenes],
                "cue": cue,
                "look": look,
            }
        )
    (root / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(root / "records.jsonl")


# --- the records of a step, and the rows of a run, one JSON object a line ---
def pick(samples, step: int, c, accelerator) -> list[Sample]:
    """This process's samples of a step: a seeded shuffle per epoch, less the last partial step."""
    import torch  # here alone: a decoder's process would wait for it

    count = c.questions_per_device
    epoch, k = divmod(step, len(samples) // (count * accelerator.num_processes))
    shuffle = torch.Generator().manual_seed(c.seed * 1000 + epoch)
    order = torch.randperm(len(samples), generator=shuffle).tolist()
    start = (k * accelerator.num_processes + accelerator.process_index) * count
    return [samples[i] for i in order[start : start + count]]


def read_rows(file: Path, last: float = float("inf")) -> list[dict]:
    """The rows of a file, less a line that was cut off and those of steps after `last`."""
    if not file.is_file():
        return []
    lines = [line for line in file.read_bytes().splitlines(True) if line.endswith(b"\n")]
    lines = [line for line in lines if json.loads(line).get("step", 0) <= last]
    os.truncate(file, sum(map(len, lines)))
    return [json.loads(line) for line in lines]


def add_rows(file: Path, rows: list[dict]) -> None:
    with open(file, "a", encoding="utf-8") as opened:
        opened.writelines(json.dumps(row) + "\n" for row in rows)


# --- `python data.py FILE`: what is wrong with a data set, before a run ---
def main() -> None:
    parser = argparse.ArgumentParser(description="Check data; FILE.skip.json lists what to skip.")
    parser.add_argument("file", help="records, .json or .jsonl in Video-R1's format")
    parser.add_argument("--video_root", default="", help="folder the records' paths start from")
    parser.add_argument("--num_frames", type=int, default=16, help="frames to decode of a video")
    c = parser.parse_args()
    try:
        sha, records = digest(c.file), read_records(c.file, c.video_root)
    except (OSError, ValueError) as error:
        raise SystemExit(f"data.py: {error}") from error
    seen = look_at([*{s.path: 0 for s in records.values() if isinstance(s, Sample)}], c.num_frames)
    facts = {i: seen[s.path] if isinstance(s, Sample) else s for i, s in records.items()}
    wrong = {i: str(fact) for i, fact in facts.items() if isinstance(fact, DataError)}
    fine = [s for i, s in records.items() if i not in wrong]
    for name in ("problem_type", "source"):
        counts = Counter(getattr(s, name) for s in fine).most_common()
        print(f"  {name:14}" + ", ".join(f"{value} {count}" for value, count in counts))
    for name, values in zip(("frames", "seconds"), zip(*(seen[s.path] for s in fine))):
        print(f"  {name:14}{min(values):.5g} to {max(values):.5g}, median {median(values):.5g}")
    twice = len(fine) - len({(s.path, s.question, *s.options) for s in fine})
    print(f"  {'asked again':14}{twice} (same question about the same video)")
    listed, found = Path(f"{c.file}.skip.json"), {"data": sha, "records": wrong}
    listed.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    print(
        *wrong.values(),
        f"{len(fine)} of {len(records)} records are fine; {listed} lists the "
        "others for train.py --skip",
        sep="\n",
    )


if __name__ == "__main__":
    serve_decoder() if sys.argv[1:] == ["--decode"] else main()
