"""Records and their errors, real video files, and the needle videos' truth."""

import json
import os
import pickle
import struct
import subprocess
import sys
from io import BufferedReader, BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data

GOOD = {
    "problem_id": 1,
    "problem": "What?",
    "problem_type": "numerical",
    "path": "v.avi",
    "data_type": "video",
    "options": [],
    "solution": "<answer>3</answer>",
}


def write(folder, records, name="r.jsonl"):
    text = "\n".join(json.dumps(r) for r in records) if name.endswith("l") else json.dumps(records)
    (folder / name).write_text(text)
    return str(folder / name)


def test_records_load_from_json_and_jsonl(tmp_path, clip):
    for name in ("r.json", "r.jsonl"):
        (sample,) = data.load_samples(write(tmp_path, [GOOD], name))
        assert (sample.answer, sample.problem_type, sample.path) == ("3", "numerical", str(clip))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"solution": None}, "record 2: field 'solution' is missing"),
        ({"solution": "3"}, "record 2: solution has no <answer>"),
        (
            {"problem_type": "riddle"},
            "record 2: unknown problem_type 'riddle'; use one of: multiple",
        ),
        ({"path": "gone.avi"}, "record 2: no video at"),
        ({"problem_type": "multiple choice"}, "record 2: multiple choice without options"),
        ({"data_type": "image"}, "record 2: data_type is not 'video'"),
        ({"problem_id": 1}, "record 2: problem_id of record 1"),
    ],
)
def test_bad_record_is_named_with_field_and_remedy(tmp_path, clip, change, said):
    bad = {**GOOD, "problem_id": 2} | change
    with pytest.raises(data.DataError, match=said):
        data.load_samples(write(tmp_path, [GOOD, bad]))


def test_bad_files_are_named(tmp_path, clip):
    with pytest.raises(data.DataError, match="nothing.json: no such data file"):
        data.load_samples(str(tmp_path / "nothing.json"))
    (tmp_path / "broken.json").write_text("[{]")
    with pytest.raises(data.DataError, match="broken.json: not valid JSON"):
        data.load_samples(str(tmp_path / "broken.json"))
    with pytest.raises(data.DataError, match="holds no records"):
        data.load_samples(write(tmp_path, [], "empty.json"))


def test_text_file_named_mp4_does_not_open(tmp_path):
    (tmp_path / "fake.mp4").write_text("no video")
    with pytest.raises(data.DataError, match="fake.mp4: no video file; replace it"):
        data.Video(str(tmp_path / "fake.mp4"))


def test_written_avi_decodes_to_its_frames(clip):
    video = data.Video(str(clip))
    assert (len(video), video.fps, video.seconds(6)) == (12, 4.0, 1.5)
    assert video.uniform(4) == [0, 4, 7, 11]
    assert video.uniform(99) == list(range(12))
    for k in (0, 5, 11):  # any frame, in any order, at native size, within JPEG's error
        red, _, blue = video.frame(k).getpixel((20, 10))
        assert video.frame(k).size == (64, 32)
        assert abs(red - k * 20) < 12 and abs(blue - (255 - k * 20)) < 12
    assert [f.getpixel((9, 9)) for f in video.frames([7, 2])] == [
        video.frame(7).getpixel((9, 9)),
        video.frame(2).getpixel((9, 9)),
    ]
    with pytest.raises(data.DataError, match="do not decode"):
        video.frames([99])


def test_avi_header_states_the_file_size(clip):
    content = clip.read_bytes()
    assert struct.unpack("<I", content[4:8])[0] == len(content) - 8


def test_fit_only_shrinks():
    assert data.fit(Image.new("RGB", (200, 100)), 5000).size == (100, 50)
    assert data.fit(Image.new("RGB", (20, 10)), 5000).size == (20, 10)


def test_needle_truth_is_what_the_video_shows(samples):
    for sample in samples:
        video, truth = data.Video(sample.path), sample.truth
        bright = [sum(video.frame(f).getpixel((1, 1))) for f in range(len(video))]
        flashed = sorted(range(len(video)), key=bright.__getitem__)[-2:]
        assert sorted(flashed) == data.moment_frames(truth["cue"])
        ring, core = sample.answer.split()
        spatial = truth["evidence"][-1]
        frame = video.frame(spatial["key_frames"][0])
        x1, y1, x2, y2 = (v * data.NEEDLE_SIZE for v in spatial["region"])
        for (x, y), colour in ((((x1 + x2) / 2, (y1 + y2) / 2), core), ((x1 + 10, y1 + 10), ring)):
            shown = frame.getpixel((round(x), round(y)))
            closest = min(
                data.COLOURS,
                key=lambda c: sum((a - b) ** 2 for a, b in zip(data.COLOURS[c], shown)),
            )
            assert closest == colour


def test_needle_videos_are_reproducible_and_seeded(tmp_path):
    one, again, other = (
        open(data.needle_videos(str(tmp_path / str(k)), 2, seed), encoding="utf-8").read()
        for k, seed in enumerate((3, 3, 4))
    )
    assert one == again != other
    assert (tmp_path / "0/needle-3-00000.avi").read_bytes() == (
        tmp_path / "1/needle-3-00000.avi"
    ).read_bytes()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"options": ["dog", "cat"], "solution": "<answer>cat</answer>"}, "'cat'"),
        ({"options": ["A. x", "B. y"], "solution": "<answer>AB</answer>"}, "'AB'"),
        ({"options": ["A. x", "B. y"], "solution": "<answer>E</answer>"}, "'E' names none"),
        ({"problem_type": "numerical", "solution": "<answer>3 or 4</answer>"}, "'3 or 4'"),
        ({"problem_type": "regression", "solution": "<answer>soon</answer>"}, "'soon'"),
    ],
)
def test_reference_that_no_answer_can_match_is_named(clip, tmp_path, changes, said):
    record = {"problem": "What?", "problem_type": "multiple choice", "path": clip.name} | changes
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(record))
    with pytest.raises(data.DataError, match=f"records.jsonl, record 1: .*{said}.*Correct it"):
        data.load_samples(str(file))
    done = subprocess.run(
        [sys.executable, str(ROOT / "data.py"), str(file)], capture_output=True, text=True
    )
    assert said in done.stdout + done.stderr


def test_reference_is_read_as_people_write_it_and_other_fields_are_kept(clip, tmp_path):
    kinds = {"numerical": "12 cm^2", "regression": "12:30", "OCR": "C++", "multiple choice": "(b)"}
    file = tmp_path / "records.jsonl"
    lines = []
    for kind, answer in kinds.items():
        record = {"problem": "What?", "problem_type": kind, "options": ["A. x", "B. y"]}
        record |= {"solution": f"<answer>{answer}</answer>", "path": clip.name}
        lines.append(json.dumps(record | {"subtitles": f"for {kind}"}))
    file.write_text("\n".join(lines))
    samples = data.load_samples(str(file))
    assert [sample.answer for sample in samples] == [*kinds.values()]
    assert [sample.record for sample in samples] == [{"subtitles": f"for {kind}"} for kind in kinds]


class LateClock:
    """decord's reader of a file whose first frame is not at 0."""

    def __init__(self, path, num_threads=1, **options):
        self.starts = np.array([5.0, 5.5, 6.25])

    def __len__(self):
        return len(self.starts)

    def get_frame_timestamp(self, indices):
        return np.stack([self.starts, self.starts + 0.5], 1)[list(indices)]

    def get_avg_fps(self):
        return 2.0

    def get_key_indices(self):
        return [0]


def test_times_count_from_the_first_frame(tmp_path, monkeypatch):
    path = tmp_path / "late.mp4"
    path.write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0")
    sent, answered = BytesIO(pickle.dumps((str(path), None, False, 9.0))), BytesIO()
    monkeypatch.setattr(data.decord, "VideoReader", LateClock)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BufferedReader(sent)))
    monkeypatch.setattr(
        sys, "stdout", SimpleNamespace(buffer=answered, flush=lambda: answered.flush())
    )
    data.serve_decoder()
    fault, (times, in_order, pixel_aspect) = pickle.loads(answered.getvalue())
    assert (fault, times, in_order, pixel_aspect) == (None, [0.0, 0.5, 1.25], False, 1.0)


@pytest.mark.parametrize("size", [(1920, 1080), (333, 777), (101, 99), (640, 3), (17, 16)])
@pytest.mark.parametrize("budget", [5, 256, 1000, 100_353])
def test_fit_never_exceeds_its_budget(size, budget):
    width, height = data.fit(Image.new("RGB", size), budget).size
    assert width * height <= max(budget, 1)
    assert (width, height) == size or size[0] * size[1] > budget


def test_fit_keeps_an_extreme_shape_within_its_budget():
    assert data.fit(Image.new("RGB", (10_000, 1)), 100).size == (100, 1)
    assert data.fit(Image.new("RGB", (1, 10_000)), 100).size == (1, 100)


def test_paths_start_from_the_records_folder_or_from_video_root(tmp_path, clip, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "clips" / "a b").mkdir(parents=True)
    nested = clip.rename(tmp_path / "clips" / "a b" / "v.avi")
    monkeypatch.chdir(tmp_path)
    for file, path, root in [
        (tmp_path / "r.jsonl", "clips/a b/v.avi", ""),
        (tmp_path / "r.jsonl", "./clips/a b/v.avi", ""),
        (elsewhere / "r.jsonl", "a b/v.avi", str(tmp_path / "clips")),
        (elsewhere / "r.jsonl", "./a b/v.avi", str(tmp_path / "clips") + "/"),
        (elsewhere / "r.jsonl", "a b/v.avi", "clips"),  # from where the command runs
        (elsewhere / "r.jsonl", "../clips/a b/v.avi", ""),
        (elsewhere / "r.jsonl", str(nested), ""),
        (elsewhere / "r.jsonl", str(nested), "no/such/folder"),  # a whole path needs no root
    ]:
        file.write_text(json.dumps(GOOD | {"path": path}))
        (sample,) = data.load_samples(str(file), root)
        assert os.path.samefile(sample.path, nested)
    with pytest.raises(data.DataError, match="no video at .*; mend 'path' or give --video_root"):
        (elsewhere / "r.jsonl").write_text(json.dumps(GOOD | {"path": "a b/v.avi"}))
        data.load_samples(str(elsewhere / "r.jsonl"), str(tmp_path))


def test_skip_list_leaves_out_its_numbers_and_holds_of_its_own_file_alone(tmp_path, clip):
    three = [GOOD | {"problem_id": k} for k in range(3)]
    file, copy = write(tmp_path, three), write(tmp_path, three, "copy.jsonl")
    other = write(tmp_path, three[::-1], "other.jsonl")
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps({"data": data.digest(file), "records": {"2": "cut short"}}))
    for same in (file, copy):  # its content counts, not its name
        left = data.load_samples(same, skip=str(listed))
        assert [sample.id for sample in left] == ["0", "2"]
    with pytest.raises(data.DataError, match="list.json: lists another .*other.jsonl; run python"):
        data.load_samples(other, skip=str(listed))
