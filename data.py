"""Video question-answering data: records, their videos frame by frame, and tiny mode's videos.

    x = (v, q)      `Sample` is q, with its options, answer y and type; `Video` is v
    student's view  `Video.uniform(n)`: n frame indices; `Video.seconds(i)`: when frame i is shown
    evidence        `Video.frame(i)`, at native size: what the teacher's tools look at

Frames are those that a player shows, in its order, and times count from the first of them.
Sources: FFR Table 8 and Video-R1's format; needle videos are ours. The file needs no sibling; with
reward.py beside it, reference answers are checked too.
"""

import argparse
import json
import os
import pickle
import random
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from statistics import median
from struct import pack, unpack
from subprocess import DEVNULL, PIPE, Popen
from threading import Event, Thread
from typing import Annotated

import decord
from PIL import Image, ImageDraw
from tqdm import tqdm

# Video-R1's five problem types, and ours: `exact`, all or nothing on the normalized words.
TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression", "exact")
TEXTS = ("problem", "problem_type", "solution", "path")  # the fields that a record must have
TRUTHS = ("evidence", "moments", "cue", "look")  # for a scripted teacher or a cold start
KNOWN = {*TEXTS, *TRUTHS, "problem_id", "options", "data_type", "data_source", "process"}
MANY = 1000  # videos; more than that are checked before a run, not at its start
LONG = 2000  # frames; only in longer clips does decord seek
PATIENCE = 60.0  # seconds of work that reading a clip may take


@dataclass
class DataSettings:
    """The records and their videos."""

    data: Annotated[str, "training records, .json or .jsonl in Video-R1's format"] = ""
    video_root: Annotated[str, "folder the records' paths start from; empty: the file's own"] = ""
    skip: Annotated[str, "list of records to leave out, as `python data.py` writes it (ours)"] = ""
    eval_data: Annotated[str, "held-out records, less their FILE.skip.json's (ours)"] = ""


class DataError(ValueError):
    """A file, record or video that cannot be used. The message says which one, why, and what to do.
    `cause` is the part that all faults of a kind share, by which they are counted; `rest` is what
    differs, and what to do."""

    def __init__(self, where: str, cause: str, rest: str):
        super().__init__(f"{where}: {cause}{rest}")
        self.cause, self.rest = cause, rest


# --- records ---
@dataclass
class Sample:
    """One video question."""

    id: str
    question: str
    options: list[str]
    answer: str
    problem_type: str
    path: str  # of the video file
    source: str = ""
    truth: dict = field(default_factory=dict)  # TRUTHS: for a scripted teacher or a cold start only
    record: dict = field(default_factory=dict)  # all fields that are not KNOWN, for tools


def load_samples(path: str, video_root: str = "", skip: str = "") -> list[Sample]:
    """Read Video-R1 records from a JSON list or JSON lines. Each record's `path` starts from
    `video_root`, or from the data file's own folder. `skip` is a list that `python data.py` wrote.
    Raises `DataError` for the first bad record, which names it, the field and the remedy."""
    left_out = read_skip_list(skip, path) if skip else {}
    samples = []
    for number, sample in read_records(path, video_root).items():
        if str(number) not in left_out:
            samples.append(sample)
    refuse_faults(samples, path)
    return samples


def refuse_faults(results: list, path: str) -> None:
    """Raise the first `DataError` among the results, if there is one, with their number."""
    faults = [fault for fault in results if isinstance(fault, DataError)]
    if faults:
        alike = sum(fault.cause == faults[0].cause for fault in faults)
        counts = f"{alike} such, {len(faults)} in all"
        advice = f"{counts}; `python data.py {path}` lists them for --skip"
        faults[0].args = (f"{faults[0]} ({advice})",)
        raise faults[0]


def read_skip_list(file: str, path: str) -> dict[str, str]:
    """Return the numbers of the data file's records to leave out, each with its reason."""
    try:
        listed = json.loads(Path(file).read_text(encoding="utf-8"))
        sha, records = listed["data"], dict(listed["records"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(file, "no skip list", f"; python data.py {path} writes one") from error
    if sha != digest(path):
        raise DataError(file, f"no list of {path} as it is", f"; python data.py {path} writes one")
    return records


def digest(path: str) -> str:
    """Return the data file's SHA-256."""
    return sha256(read_bytes(path)).hexdigest()


def read_bytes(path: str) -> bytes:
    if not Path(path).is_file():
        raise DataError(path, "no such file", "; name a file of records, .json or .jsonl")
    return Path(path).read_bytes()


def read_records(path: str, video_root: str = "") -> dict[int, Sample | DataError]:
    """Return by number, from 1, each record's `Sample`, or the `DataError` that says why not."""
    content = read_bytes(path).removeprefix(b"\xef\xbb\xbf").strip()
    if re.match(rb'\[|{\s*\n\s*"', content):  # a list, or one record on several lines
        parsed = parse_json(content, path)
        records = parsed if isinstance(parsed, list) else [parsed]
    else:
        records = [line for line in content.split(b"\n") if line.strip()]
    if not records:
        raise DataError(path, "holds no records", "; give a list of them")
    if b"\0" in content[:64] or not re.search(rb"^\s*[\[{]", content, re.MULTILINE):
        raise DataError(path, "no JSON", "; give a list of records, or one on each line, as UTF-8")

    root = Path(video_root or Path(path).parent)
    results = {}
    first_with_id = {}  # the number of the first record with an id
    for number, record in enumerate(records, 1):
        where = f"{path}, record {number}"
        try:
            if isinstance(record, bytes):
                record = parse_json(record, where)
            sample = read_record(record, where, root)
            other = first_with_id.setdefault(sample.id, number)
            if other != number:
                raise DataError(where, "problem_id of", f" record {other}; drop one")
            results[number] = sample
        except DataError as fault:
            results[number] = fault
    return results


def parse_json(text: bytes, where: str):
    """Parse JSON. Raises `DataError` for any fault, deep nesting or numbers of 5,000 digits too."""
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise DataError(where, "not UTF-8", f" ({error}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        place = str(error).replace("line 1 column", "column")  # a record is a line by itself
        raise DataError(where, "not valid JSON", f" ({place}); mend that place") from error


def read_record(record: dict, where: str, root: Path) -> Sample:
    """Return the sample of a record. Raises `DataError` if it cannot be asked or answered."""

    def need(fine: object, cause: str, rest: str) -> None:
        if not fine:
            raise DataError(where, cause, rest)

    need(isinstance(record, dict) and {*record} & {*TEXTS}, "no JSON record", "; README shows one")
    data_type = record.get("data_type", "video")
    need(data_type == "video", "data_type is not 'video'", f" but {data_type!r}; drop the record")
    for name in TEXTS:
        fine = isinstance(record.get(name), str) and record[name].strip()
        need(fine, f"field '{name}' is missing or no text", "; add it or drop the record")

    problem_type = record["problem_type"]
    known = ", ".join(TYPES)
    need(problem_type in TYPES, "unknown problem_type", f" '{problem_type}'; use one of: {known}")

    answer, end, _ = record["solution"].partition("<answer>")[2].partition("</answer>")
    need(end and answer.strip(), "solution has no <answer>…</answer>", "; wrap the answer in it")

    options = record.get("options") or []
    need(isinstance(options, list), "field 'options' is no list", "; mend it")
    options = [str(option) for option in options]
    if problem_type == "multiple choice":
        need(options, "multiple choice without options", "; add 'options'")
        lettered = all(map(begins_with, options, "ABCDEFGHIJ"))
        need(lettered, "options without letters", "; begin them with 'A. ', 'B. ' and so on")

    video = root / record["path"]
    need(video.is_file(), "no video at", f" {video}; mend 'path' or give --video_root")
    fault = reference_fault(answer.strip(), problem_type, options)
    need(not fault, "no answer can be right by it", f". {fault}")

    return Sample(
        id=str(record.get("problem_id", where)),
        question=record["problem"],
        options=options,
        answer=answer.strip(),
        problem_type=problem_type,
        path=str(video),
        source=str(record.get("data_source", "")),
        truth={name: record[name] for name in TRUTHS if name in record},
        record={name: value for name, value in record.items() if name not in KNOWN},
    )


def begins_with(option: str, letter: str) -> bool:
    return re.match(rf"\W*{letter}\b", option, re.IGNORECASE) is not None


def reference_fault(answer: str, problem_type: str, options: list[str]) -> str | None:
    """Say why no answer can be right by a reference. None if one can, or without reward.py."""
    try:
        from reward import reference_problem
    except ImportError:
        return None
    return reference_problem(answer, problem_type, options)


# --- videos, in this process ---
class Decoder:
    """decord in a process of its own. A corrupt packet can make it abort or hang, which then costs
    the request and not the run. Serves one thread at a time."""

    child: Popen | None = None

    def __call__(self, path: str, indices: list | None = None, in_order=False, patience=PATIENCE):
        """Run `read_frames` there, or without `indices` `open_clip`. Raises `DataError`, also if
        that takes more than `patience` seconds of the process's own work, or of idling."""
        if self.child is None or self.child.poll() is not None:
            command = [sys.executable, __file__, "--decode"]
            ends = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL}
            self.child = Popen(command, start_new_session=True, **ends)  # Ctrl-C is not for it

        try:
            pickle.dump((os.path.abspath(path), indices, in_order, patience), self.child.stdin)
            self.child.stdin.flush()
            fault, result = pickle.load(self.child.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.child.kill()
            fault = ENDS.get(self.child.wait(), BROKEN)
        if fault:
            raise DataError(path, *fault)
        return result


class Video:
    """A video, by the indices of its frames, as teacher.py's tools take it. Raises `DataError` if
    it cannot be read."""

    def __init__(self, path: str, decoder: Decoder = Decoder(), patience: float = PATIENCE):
        self.path = str(path)
        self.times, in_order, self.pixel_aspect = decoder(self.path, patience=patience)
        self._read = partial(decoder, self.path, in_order=in_order, patience=patience)
        if len(self) < 2:
            raise DataError(self.path, f"{len(self)} frame(s)", "; replace the file")
        self.fps = (len(self) - 1) / self.times[-1]  # the mean, where the rate varies

    def __len__(self) -> int:
        return len(self.times)

    def seconds(self, index: int) -> float:
        return self.times[index]

    def uniform(self, num_frames: int) -> list[int]:
        """Return `num_frames` indices spread evenly from first frame to last; all, if fewer."""
        count, last = min(num_frames, len(self)), len(self) - 1
        if count == 1:
            return [0]
        return [round(k * last / (count - 1)) for k in range(count)]

    def frames(self, indices: list[int]) -> list[Image.Image]:
        """Return these frames at native size, with square pixels."""
        try:
            frames = self._read(list(indices))
        except DataError as fault:
            if fault.cause in (SLOW[0], MISSING[0]):
                raise
            # decord can fail on a batch although each frame decodes. If not, this names the frame.
            frames = [self._read([index])[0] for index in indices]

        images = []
        for frame in frames:
            image = Image.fromarray(frame)
            width = round(image.width * self.pixel_aspect)
            images.append(image.resize((width, image.height)) if width != image.width else image)
        return images

    @lru_cache(32)  # for all videos together: a frame takes megabytes, and tools look at it again
    def frame(self, index: int) -> Image.Image:
        return self.frames([index])[0]


def fit(image: Image.Image, max_pixels: int) -> Image.Image:
    """Shrink an image to at most `max_pixels` and keep its shape. A smaller one stays as it is."""
    scale = (max_pixels / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    height = min(max(1, int(image.height * scale)), max_pixels)
    width = min(max(1, int(image.width * scale)), max_pixels // height)
    return image.resize((width, height))


# --- videos, in the decoder's process ---
REENCODE = "re-encode it: ffmpeg -i IN -c:v libx264 OUT.mp4"
BROKEN = ("ended decord", ": a broken file; replace it")
SLOW = ("too slow", f" to read; raise --decode_patience, or {REENCODE}")
STUCK = ("decord waits for ever", ": a pipe, or a broken file; replace it")
MISSING = ("fewer frames decode than it counts", f"; {REENCODE}")
ENDS = {3: SLOW, 4: STUCK}  # by the process's exit status
CONTAINERS = {  # by a file's first bytes
    "MP4": rb".{4}(ftyp|moov|mdat|wide|free|skip)",
    "Matroska": rb"\x1aE\xdf\xa3",
    "AVI": rb"RIFF.{4}AVI ",
    "Flash": rb"FLV",
    "ASF": rb"\x30\x26\xb2\x75",
    "Ogg": rb"OggS",
    "MPEG program stream": rb"\0\0\x01\xba",
    "MPEG transport stream": rb"(.{4})?G.{187}(.{4})?G",
}
CODEC = rb"vmhd.*?stsd.{12}(.{4})|(V_[\w/]+)|vids(.{4})"  # in MP4, Matroska, AVI
PIXEL_ASPECT = rb"\0\0\0\x10pasp(.{4})(.{4})"  # in MP4: a pixel's width, its height


def serve_decoder() -> None:
    """Answer requests until the parent process is gone."""
    while sys.stdin.buffer.peek():
        path, indices, in_order, patience = pickle.load(sys.stdin.buffer)
        fault, result = None, None
        done = Event()
        Thread(target=end_if_stuck, args=(done, patience), daemon=True).start()
        try:
            result = read_frames(path, indices, in_order) if indices else open_clip(path)
        except DataError as error:
            fault = error.cause, error.rest
        except decord.DECORDLimitReachedError:  # it would repeat a frame
            fault = MISSING
        except (decord.DECORDError, RuntimeError, OSError, IndexError, ValueError):
            where = f" (frame {indices[0]})" if indices else ""
            fault = "frames do not decode", f"{where}; replace the file"

        done.set()
        pickle.dump((fault, result), sys.stdout.buffer)
        sys.stdout.flush()


def end_if_stuck(done: Event, patience: float, tick: float = 0.5) -> None:
    """End this process after `patience` seconds of work on a request, or as many without any work.
    CPU time is what counts: wall time would blame the clip for a busy machine."""
    began = worked = time.process_time()
    idle = 0.0
    while not done.wait(tick):
        before, worked = worked, time.process_time()
        idle = 0.0 if worked - before > tick / 100 else idle + tick
        if worked - began > patience:
            os._exit(3)
        if idle >= patience:
            os._exit(4)


def open_clip(path: str) -> tuple[list[float], bool, float]:
    """Return each frame's time, whether they must be read in order, and a pixel's aspect ratio."""
    header = read_header(path)
    container = "unknown container"  # decord may know it
    for name, magic in CONTAINERS.items():
        if re.match(magic, header, re.DOTALL):
            container = name

    if not header:
        raise DataError(path, "an empty file", "; replace it")
    if container == "MPEG transport stream":
        raise DataError(path, f"{container}: decord takes wrong frames of it", f"; {REENCODE}")
    stated_size = int.from_bytes(header[4:8], "little") + 8
    if container == "AVI" and stated_size > os.path.getsize(path):  # decord opens what is left
        raise DataError(path, "an AVI that is cut short", "; replace the file")

    try:
        reader = open_reader(path)
    except (decord.DECORDError, RuntimeError, AssertionError) as error:
        raise name_fault(path, container, header, str(error)) from error

    times = reader.get_frame_timestamp(range(len(reader)))[:, 0]  # of starts
    rising = (times[1:] > times[:-1]).all()
    if not rising or abs(times).max() > 1e6:
        raise DataError(path, f"{container}: its frames' times do not rise", f"; {REENCODE}")

    shown = times[times >= 0]  # a clip that was cut without encoding hides what comes before 0
    keys = reader.get_key_indices()
    if len(shown) < len(times):
        in_order = True
    elif len(keys) == len(times):
        in_order = False  # each frame by itself
    else:
        in_order = len(times) <= LONG or not seeks_right(path, keys)
    return (shown - shown[:1]).tolist(), in_order, pixel_aspect(header)


def name_fault(path: str, container: str, header: bytes, error: str) -> DataError:
    """Say why decord does not open a file, with its container and the codec in its header."""
    if container == "unknown container":
        return DataError(path, "not a video", "; replace the file")
    codec = re.search(CODEC, header, re.DOTALL)
    name = codec[codec.lastindex].decode("latin-1") if codec else "not found"
    if "cannot find video stream" not in error:
        return DataError(path, f"{container}, codec {name}: cut short or broken", "; replace it")
    advice = f"; pip install decord2 in its place, which reads AV1, or {REENCODE}"
    return DataError(path, f"{container}, codec {name}: decord cannot decode it", advice)


def read_header(path: str, size: int = 2**16) -> bytes:
    """Return the bytes that describe a file's streams: the first ones; of an MP4, its `moov`."""
    with open(path, "rb") as file:
        header = box = file.read(size)
        at = 0
        while re.match(CONTAINERS["MP4"], header, re.DOTALL) and len(box) >= 16:
            length, kind, long_length = unpack(">I4sQ", box[:16])
            if kind == b"moov":
                return header[:16] + box
            if length == 1:
                length = long_length
            if not 8 <= length < 2**48:  # to the file's end, or nonsense
                break
            at += length
            file.seek(at)
            box = file.read(size)
    return header


def pixel_aspect(header: bytes) -> float:
    """Return a pixel's width over its height; 1 if the file does not say."""
    pixel = re.search(PIXEL_ASPECT, header, re.DOTALL)
    if not pixel:
        return 1.0
    width, height = (int.from_bytes(side, "big") for side in pixel.groups())
    return width / height if width and height else 1.0


def open_reader(path: str) -> decord.VideoReader:
    """Return a fresh reader for each request: an idle one keeps decoding into memory, and what a
    used one returns depends on what it has read. `fault_tol` makes it fail rather than repeat a
    frame in place of a missing one."""
    return decord.VideoReader(path, num_threads=1, fault_tol=1e-6)


def seeks_right(path: str, keys: list[int]) -> bool:
    """Does decord find the same frames by seeking as in order? Tried at the first key frames. It
    seeks wrong behind open groups of pictures, which are common in HEVC."""
    tried = [key for key in keys[1:9] if key <= 500]
    if not tried:
        return True
    try:
        in_order = read_frames(path, tried, in_order=True)
    except (decord.DECORDError, RuntimeError):
        return True  # damaged there; a request for that frame will say so
    try:
        by_seeking = read_frames(path, tried, in_order=False)
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError):
        return False
    return all((one == other).all() for one, other in zip(in_order, by_seeking))


def read_frames(path: str, indices: list[int], in_order: bool):
    """Return frames, each (height, width, 3) in uint8, by their index among those shown."""
    reader = open_reader(path)
    if not in_order:
        return reader.get_batch(indices).asnumpy()

    frames = {}
    for index in range(max(indices) + 1):
        frame = reader.next()
        if index in indices:
            frames[index] = frame.asnumpy()
    return [frames[index] for index in indices]


# --- `python data.py FILE`: what is wrong with a data set, before a run ---
def open_videos(paths: list[str], num_frames: int = 1, patience: float = PATIENCE) -> dict:
    """Decode `num_frames` of each video. By path: its frames and seconds, or the `DataError`."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # the job may have fewer than the machine
        cpus = len(os.sched_getaffinity(0))
    decoders = [Decoder() for _ in range(cpus)]

    def open_video(path: str) -> tuple | DataError:
        decoder = decoders.pop()
        try:
            video = Video(path, decoder, patience)
            video.frames(video.uniform(num_frames))
            return len(video), video.seconds(-1)
        except DataError as fault:
            return fault
        finally:
            decoders.append(decoder)

    with ThreadPoolExecutor(cpus) as pool:
        results = pool.map(open_video, paths)
        return dict(zip(paths, tqdm(results, "videos", len(paths), leave=False)))


def stamp(path: str) -> list:
    """Return a file's size and time, which tell whether it has changed."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def refuse_broken(
    samples: list[Sample], file: str, skip: str = "", patience: float = PATIENCE
) -> None:
    """Raise `DataError` if a video does not open. Those that `python data.py` has opened before are
    trusted. If more than MANY others are left, that comes first: all processes wait here."""
    try:
        listed = json.loads(Path(skip or f"{file}.skip.json").read_text(encoding="utf-8"))
        trusted = dict(listed["videos"])
    except (OSError, ValueError, LookupError, TypeError):
        trusted = {}

    untried = []
    for path in {sample.path: None for sample in samples}:
        if trusted.get(os.path.abspath(path)) != stamp(path):
            untried.append(path)
    if len(untried) > MANY:
        advice = f"; run `python data.py {file}` first, then train with --skip {file}.skip.json"
        raise DataError(file, f"{len(untried)} videos were not opened before", advice)

    results = open_videos(untried, patience=patience)
    refuse_faults(list(results.values()), file)


def check(file: str, video_root: str, num_frames: int, patience: float) -> None:
    """Read every record and open every video. Writes FILE.skip.json and prints a table."""
    sha = digest(file)
    records = read_records(file, video_root)
    samples = [sample for sample in records.values() if isinstance(sample, Sample)]
    paths = list({sample.path: None for sample in samples})
    results = open_videos(paths, num_frames, patience)

    faults = {}
    usable = []
    for number, sample in records.items():
        result = sample if isinstance(sample, DataError) else results[sample.path]
        if isinstance(result, DataError):
            faults[number] = result
        else:
            usable.append(sample)

    opened = [path for path in results if not isinstance(results[path], DataError)]
    skip_list = {
        "data": sha,
        "records": {number: str(fault) for number, fault in faults.items()},
        "videos": {os.path.abspath(path): stamp(path) for path in opened},
    }
    written = Path(f"{file}.skip.json")
    written.write_text(json.dumps(skip_list, indent=1, ensure_ascii=False), encoding="utf-8")

    examples = {fault.cause: fault for fault in reversed(faults.values())}
    counts = Counter(fault.cause for fault in faults.values())
    for cause, count in counts.most_common():
        print(f"  {f'{count} not fine':14}e.g. {examples[cause]}")
    if not usable:
        raise DataError(file, "no record is fine", "; mend it as the lines above say")
    print_table(usable, [results[sample.path] for sample in usable])
    print(f"{len(usable)} of {len(records)} records are fine.")
    if faults:
        print(f"`train.py --data {file} --skip {written}` leaves the others out, nothing to edit.")


def print_table(samples: list[Sample], lengths: list[tuple]) -> None:
    """Describe the records that are fine. `lengths` are their videos', in frames and seconds."""
    for name in ("problem_type", "source"):
        counts = Counter(getattr(sample, name) for sample in samples).most_common()
        print(f"  {name:14}" + ", ".join(f"{value or '(none)'} {count}" for value, count in counts))
    for name, values in zip(("frames", "seconds"), zip(*lengths)):
        print(f"  {name:14}{min(values):.5g} to {max(values):.5g}, median {median(values):.5g}")
    questions = {(sample.path, sample.question, *sample.options) for sample in samples}
    print(f"  {'repeated':14}{len(samples) - len(questions)} (same question, same video)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check data; FILE.skip.json lists what to skip.")
    parser.add_argument("file", help="records, .json or .jsonl in Video-R1's format")
    parser.add_argument("--video_root", default="", help="folder the records' paths start from")
    parser.add_argument("--num_frames", type=int, default=16, help="frames to decode of a video")
    parser.add_argument(
        "--decode_patience", type=float, default=PATIENCE, help="seconds a clip may take"
    )
    given = parser.parse_args()
    try:
        check(given.file, given.video_root, given.num_frames, given.decode_patience)
    except (OSError, ValueError) as error:
        raise SystemExit(f"data.py: {error}") from error


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
RELATIONS = {  # to the flash
    -2: "two moments before",
    -1: "one moment before",
    0: "during",
    1: "one moment after",
    2: "two moments after",
}
MOMENTS, FRAMES_PER_MOMENT, NEEDLE_FPS, NEEDLE_SIZE = 8, 2, 2, 128


def moment_frames(moment: int) -> list[int]:
    return [moment * FRAMES_PER_MOMENT + k for k in range(FRAMES_PER_MOMENT)]


def moment_time(moment: int) -> str:
    """Return a moment's time as the student's processor writes it: the mean of its frames'."""
    return f"<{sum(moment_frames(moment)) / FRAMES_PER_MOMENT / NEEDLE_FPS:.1f} seconds>"


def needle_videos(folder: str, n: int, seed: int, relations: tuple[int, ...] = (-1, 0, 1)) -> str:
    """Write `n` needle videos and their records; returns the records' path. Each moment shows a
    two-coloured square, and at one moment the background flashes. The question asks for the colours
    at the flash, or at a moment before or after it, by `relations`."""
    rng = random.Random(seed)
    root = Path(folder)
    margin = max(abs(relation) for relation in relations)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "records.jsonl", "w") as file:
        for i in range(n):
            name = f"needle-{seed}-{i:05d}"
            cue = rng.randrange(margin, MOMENTS - margin)
            relation = rng.choice(relations)

            scenes = [draw_scene(rng) for _ in range(MOMENTS)]
            frames = []
            for moment, scene in enumerate(scenes):
                for frame in moment_frames(moment):
                    frames.append(paint_frame(rng, scene, frame, flashed=moment == cue))
            write_avi(str(root / f"{name}.avi"), frames, NEEDLE_FPS)

            record = needle_record(name, cue, relation, scenes)
            file.write(json.dumps(record) + "\n")
    return str(root / "records.jsonl")


def draw_scene(rng: random.Random) -> tuple[int, int, str, str]:
    """Draw at random what a moment shows: left and top of its square, colours of ring and core."""
    left, top = rng.randrange(4, 60), rng.randrange(4, 48)
    ring, core = rng.choices(list(COLOURS), k=2)
    return left, top, ring, core


def paint_frame(rng: random.Random, scene: tuple, frame: int, flashed: bool) -> Image.Image:
    """Paint a frame: the square over noise, brighter if flashed, and a bar that shows the time."""
    x, y, ring, core = scene
    brightness = 195 if flashed else 85
    noise = Image.frombytes("L", (16, 16), rng.randbytes(256))
    noise = noise.resize((NEEDLE_SIZE, NEEDLE_SIZE))
    image = noise.point(lambda value: brightness + value // 8).convert("RGB")
    pen = ImageDraw.Draw(image)
    pen.rectangle((x, y, x + 64, y + 64), COLOURS[ring])
    pen.rectangle((x + 16, y + 16, x + 48, y + 48), COLOURS[core])
    pen.rectangle((0, NEEDLE_SIZE - 8, 8 * (frame + 1), NEEDLE_SIZE), (60, 60, 60))
    return image


def needle_record(name: str, cue: int, relation: int, scenes: list[tuple]) -> dict:
    """Return the record that asks for the colours `relation` moments after the flash at `cue`."""
    _, _, ring, core = scenes[cue + relation]
    return {
        "problem_id": name,
        "data_source": "needle",
        "path": f"{name}.avi",
        "data_type": "video",
        "problem_type": "exact",
        "options": [],
        "problem": f"ring and core colour {RELATIONS[relation]} the flash ?",
        "solution": f"<answer>{ring} {core}</answer>",
        "evidence": needle_evidence(cue, cue + relation, scenes),
        "moments": [scene[2:] for scene in scenes],
        "cue": cue,
        "look": cue + relation,
    }


def needle_evidence(cue: int, look: int, scenes: list[tuple]) -> list[dict]:
    """Return a scripted teacher's evidence: where the flash is, how to count, where to look."""
    x, y, _, _ = scenes[look]
    corners = (x - 4, y - 4, x + 68, y + 68)
    box = [round(corner / NEEDLE_SIZE, 2) for corner in corners]
    flash = {"key_frames": moment_frames(cue)[:1], "moment": moment_frames(cue)}
    shown = {"key_frames": moment_frames(look)[:1], "moment": moment_frames(look)}
    return [
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


# --- the AVI writer ---
def write_avi(path: str, frames: list[Image.Image], fps: int) -> None:
    """Write frames as a Motion-JPEG AVI, a real video file, with no more than Pillow's encoder."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + pack("<I", len(body)) + body

    movie, index, largest = b"movi", b"", 0
    for frame in frames:
        file = BytesIO()
        frame.convert("RGB").save(file, "JPEG", quality=92)
        jpeg = file.getvalue() + b"\0" * (file.tell() % 2)  # of even length
        index += pack("<4sIII", b"00dc", 0x10, len(movie), len(jpeg))
        movie += chunk(b"00dc", jpeg)
        largest = max(largest, len(jpeg))

    count, (width, height) = len(frames), frames[0].size
    times = (10**6 // fps, 0, 0, 0x10, count, 0, 1, largest, width, height)
    main_header = chunk(b"avih", pack("<10I16x", *times))
    rates = (1, fps, 0, count, largest, 2**32 - 1, width, height)
    stream_header = chunk(b"strh", pack("<8s12x6I8x2H", b"vidsMJPG", *rates))
    picture = (40, width, height, 1, 24, b"MJPG", width * height * 3)
    stream_format = chunk(b"strf", pack("<3I2H4sI16x", *picture))
    stream = chunk(b"LIST", b"strl" + stream_header + stream_format)
    header = chunk(b"LIST", b"hdrl" + main_header + stream)
    body = b"AVI " + header + chunk(b"LIST", movie) + chunk(b"idx1", index)
    Path(path).write_bytes(chunk(b"RIFF", body))


if __name__ == "__main__":
    if sys.argv[1:] == ["--decode"]:
        serve_decoder()
    else:
        main()
