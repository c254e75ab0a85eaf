"""Records and their errors, real video files, and the needle videos' truth."""

import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
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
        (
            {"problem_type": "multiple choice", "options": ["A. x", "y"]},
            "record 2: options without letters; begin them with 'A. ', 'B. '",
        ),
        ({"data_type": "image"}, "record 2: data_type is not 'video'"),
        ({"problem_id": 1}, "record 2: problem_id of record 1"),
    ],
)
def test_bad_record_is_named_with_field_and_remedy(tmp_path, clip, change, said):
    bad = {**GOOD, "problem_id": 2} | change
    with pytest.raises(data.DataError, match=said):
        data.load_samples(write(tmp_path, [GOOD, bad]))


@pytest.mark.parametrize("options", [["A. x", "B. y"], ["(A) x", "(B) y"], ["a: x", "b: y"]])
def test_options_may_show_their_letters_as_they_like(tmp_path, clip, options):
    change = {"problem_type": "multiple choice", "options": options}
    change["solution"] = "<answer>B</answer>"
    (sample,) = data.load_samples(write(tmp_path, [GOOD | change]))
    assert sample.options == options


def test_bad_files_are_named(tmp_path, clip):
    with pytest.raises(data.DataError, match="nothing.json: no such file"):
        data.load_samples(str(tmp_path / "nothing.json"))
    (tmp_path / "broken.json").write_text("[{]")
    with pytest.raises(data.DataError, match="broken.json: not valid JSON"):
        data.load_samples(str(tmp_path / "broken.json"))
    with pytest.raises(data.DataError, match="holds no records"):
        data.load_samples(write(tmp_path, [], "empty.json"))


def test_text_file_named_mp4_does_not_open(tmp_path):
    (tmp_path / "fake.mp4").write_text("no video")
    with pytest.raises(data.DataError, match="fake.mp4: not a video; replace the file"):
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
        ({"options": ["A. dog", "B. cat"], "solution": "<answer>cat</answer>"}, "'cat'"),
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


class Reader:
    """decord's reader of a clip: `starts` of the frames that it counts, `hidden` ones of them at the
    beginning; by seeking it is `off` by some frames."""

    starts, keys, off = [0.0, 0.5, 1.0, 1.5], [0, 2], 0

    def __init__(self, path, num_threads, fault_tol):
        assert (num_threads, fault_tol > 0) == (1, True)
        self.at = 0

    def __len__(self):
        return len(self.starts)

    def get_frame_timestamp(self, indices):
        return np.array([[self.starts[k], self.starts[k] + 0.5] for k in indices])

    def get_key_indices(self):
        return self.keys

    def get_batch(self, indices):
        frames = np.array([np.full((2, 2, 3), k + self.off, np.uint8) for k in indices])
        return SimpleNamespace(asnumpy=lambda: frames)

    def next(self):
        if self.at == sum(start >= 0 for start in self.starts):
            raise data.decord.DECORDLimitReachedError("repeats")
        self.at += 1
        return SimpleNamespace(asnumpy=lambda: np.full((2, 2, 3), self.at - 1, np.uint8))


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """What the decoder's process answers of a clip that `Reader` reads with these attributes."""

    def answer(indices=None, in_order=False, **attributes):
        path = tmp_path / "clip.mp4"
        path.write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0")
        request = pickle.dumps((str(path), indices, in_order, 9.0))
        given = SimpleNamespace(buffer=BufferedReader(BytesIO(request)))
        answered = SimpleNamespace(buffer=BytesIO(), flush=lambda: None)
        with monkeypatch.context() as patch:
            patch.setattr(data.decord, "VideoReader", type("Its", (Reader,), attributes))
            patch.setattr(sys, "stdin", given)
            patch.setattr(sys, "stdout", answered)
            data.serve_decoder()
        return pickle.loads(answered.buffer.getvalue())

    return answer


def test_times_count_from_the_first_frame(ask):
    assert ask(starts=[5.0, 5.5, 6.25], keys=[0]) == (None, ([0.0, 0.5, 1.25], True, 1.0))


def test_hidden_frames_are_left_out_and_the_others_read_in_order(ask):
    cut = {"starts": [-1.0, -0.5, 0.0, 0.5, 1.0]}
    assert ask(**cut) == (None, ([0.0, 0.5, 1.0], True, 1.0))
    _, frames = ask([2, 0], in_order=True, **cut)
    assert [frame[0, 0, 0] for frame in frames] == [2, 0]
    (cause, _), _ = ask([3], in_order=True, **cut)
    assert cause == "fewer frames decode than it counts"


def test_clip_is_read_in_order_if_it_is_short_or_seeking_finds_other_frames(ask, monkeypatch):
    assert ask()[1][1] is True
    monkeypatch.setattr(data, "LONG", 3)
    assert ask(off=0)[1][1] is False
    assert ask(off=2)[1][1] is True
    assert ask(off=2, keys=[0, 1, 2, 3])[1][1] is False  # key frames all: nothing to get wrong


@pytest.mark.parametrize(
    "starts", [[0.0, 0.5, 0.5, 1.0], [-3e17, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1e14]]
)
def test_clock_that_does_not_rise_is_refused_with_the_remedy(ask, starts):
    (cause, remedy), found = ask(starts=starts)
    assert found is None and "times do not rise" in cause
    assert remedy == "; re-encode it: ffmpeg -i IN -c:v libx264 OUT.mp4"


def busy():
    while True:
        pass


@pytest.mark.parametrize("work, status", [(busy, 3), (lambda: time.sleep(60), 4)])
def test_decoder_ends_by_its_own_work_or_by_waiting(work, status):
    process = os.fork()
    if process == 0:
        threading.Thread(target=data.end_if_stuck, args=(threading.Event(), 1.0, 0.1)).start()
        work()
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == status
    assert time.monotonic() - began >= 0.9


def test_frames_get_square_pixels():
    """120 x 90 pixels, each a third wider than high, are shown as 160 x 90."""

    def decoder(path, indices=None, **more):
        if indices is None:
            return [0.0, 0.5], False, 4 / 3
        return [np.zeros((90, 120, 3), np.uint8)]

    (image,) = data.Video("v", decoder).frames([0])
    assert image.size == (160, 90)


def test_pauses_between_work_do_not_add_up(monkeypatch):
    """Each second tick of half a second is idle, and a second in a row would end the process."""
    clock, waits = iter([0.0, 0.0, 0.1, 0.1, 0.2, 0.2]), iter([False] * 5 + [True])
    monkeypatch.setattr(data.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(data.os, "_exit", lambda status: pytest.fail(f"ended by {status}"))
    data.end_if_stuck(SimpleNamespace(wait=lambda tick: next(waits)), patience=1.0, tick=0.5)


def test_video_at_fault_is_asked_frame_by_frame_and_a_slow_one_is_not():
    asked = []

    def decoder(path, indices=None, **more):
        asked.append(indices)
        if indices is None:
            return [0.0, 0.5, 1.0], False, 1.0
        if len(indices) > 1:
            raise data.DataError(path, cause, "")
        return [np.full((2, 2, 3), indices[0], np.uint8)]

    cause = data.STUCK[0]
    images = data.Video("v", decoder).frames([2, 0])
    assert [image.getpixel((0, 0))[0] for image in images] == [2, 0]
    for cause in (data.SLOW[0], data.MISSING[0]):
        asked.clear()
        with pytest.raises(data.DataError, match=cause):
            data.Video("v", decoder).frames([2, 0])
        assert asked == [None, [2, 0]]


def test_native_frames_are_kept_for_all_videos_together(clip):
    videos = [data.Video(str(clip)) for _ in range(5)]
    for video in videos:
        for index in range(12):
            video.frame(index)
    assert data.Video.frame.cache_info().currsize == 32
    assert videos[-1].frame(11) is videos[-1].frame(11)


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
    with pytest.raises(
        data.DataError, match="list.json: no list of .*other.jsonl as it is; python"
    ):
        data.load_samples(other, skip=str(listed))


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + json.dumps(GOOD) + "\r\n" + json.dumps(GOOD | {"problem_id": 2}) + "\r\n",
        "\ufeff" + json.dumps([GOOD, GOOD | {"problem_id": 2}], indent=1),
        json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"problem_id": 2}),
    ],
)
def test_lines_or_a_list_are_read_whatever_the_files_name(tmp_path, clip, content):
    for name in ("r.json", "r.jsonl"):
        (tmp_path / name).write_bytes(content.encode())
        assert [s.id for s in data.load_samples(str(tmp_path / name))] == ["1", "2"]


def test_one_record_may_take_several_lines_and_nothing_is_left_out(tmp_path, clip, capsys):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(GOOD, indent=1))
    assert [sample.id for sample in data.load_samples(str(file))] == ["1"]
    data.check(str(file), "", 4, 60.0)
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 1 records are fine."


def test_a_line_that_is_lost_costs_its_record_alone(tmp_path, clip):
    """As a crash of the machine leaves it: zeros in place of a block."""
    second = json.dumps(GOOD | {"problem_id": 2})
    for lost in ("\0" * 99, "{", "notes"):
        (tmp_path / "r.jsonl").write_text("\n".join([json.dumps(GOOD), lost, second]))
        one, fault, two = data.read_records(str(tmp_path / "r.jsonl")).values()
        assert [one.id, two.id] == ["1", "2"] and fault.cause == "not valid JSON"
    (tmp_path / "r.jsonl").write_text("\n".join(["{", json.dumps(GOOD)]))
    fault, one = data.read_records(str(tmp_path / "r.jsonl")).values()
    assert fault.cause == "not valid JSON" and one.id == "1"


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"problem": "caf\xe9"}', "record 1: not UTF-8 .*; save the file as UTF-8"),
        ("[{}]".encode("utf-16"), "r.json: no JSON; give a list of records, .* as UTF-8"),
        (b"RIFF\0\0{\n[\n", "r.json: no JSON; give a list of records, .* as UTF-8"),
        (b"question,answer\nwhat?,A\n", "r.json: no JSON; give a list of records, .* as UTF-8"),
        (b"[" + b"9" * 5000 + b"]", "r.json: not valid JSON .*5000 digits.*mend that place"),
        (b'{"problem": ' + b"9" * 5000 + b"}", "record 1: not valid JSON .*mend that place"),
        (b"[" * 200_000, "r.json: not valid JSON .*mend that place"),
        (b"\xef\xbb\xbf", "holds no records; give a list of them"),
        (b'{"problem" "b"}', "record 1: not valid JSON .*delimiter: column 12 "),
        (b'[{"problem": "a"},\n {"problem" "b"}]', "r.json: not valid JSON .*: line 2 column 13 "),
        (b'{"records": [{"problem": "a"}]}', "record 1: no JSON record; README shows one"),
        (b'{\r\n "records": [\r\n{}]}', "record 1: no JSON record; README shows one"),
    ],
)
def test_odd_file_costs_one_sentence(tmp_path, content, said):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(data.DataError, match=said):
        data.load_samples(str(tmp_path / "r.json"))


def test_images_are_counted_in_one_line(tmp_path, clip, capsys):
    """Half of Video-R1's file."""
    images = [GOOD | {"problem_id": k, "data_type": "image"} for k in range(2, 42)]
    file = write(tmp_path, [GOOD, *images, GOOD | {"problem_id": 99, "solution": "3"}])
    with pytest.raises(data.DataError, match="data_type .* but 'image'; .* .40 such, 41 in all; "):
        data.load_samples(file)
    data.check(file, "", 4, 60.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "not fine" in line] == ["40", "1"]
    assert "1 of 42 records are fine" in lines[-2]
    listed = json.loads((tmp_path / "r.jsonl.skip.json").read_text())
    assert len(listed["records"]) == 41 and list(listed["videos"]) == [str(clip)]


def test_videos_that_the_check_has_opened_are_trusted_until_they_change(
    tmp_path, clip, monkeypatch
):
    file = write(tmp_path, [GOOD])
    samples = data.load_samples(file)
    opened, open_videos = [], data.open_videos
    monkeypatch.setattr(
        data, "open_videos", lambda p, *a, **k: opened.append(p) or open_videos(p, *a, **k)
    )
    data.refuse_broken(samples, file)
    data.check(file, "", 4, 60.0)
    data.refuse_broken(samples, file)
    data.refuse_broken(samples, "other", f"{file}.skip.json")  # as --skip names it
    os.utime(clip, (1, 1))
    data.refuse_broken(samples, file)
    assert [len(paths) for paths in opened] == [1, 1, 0, 0, 1]


def test_many_videos_are_to_be_checked_before_a_run(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(data, "MANY", 0)
    file = write(tmp_path, [GOOD])
    with pytest.raises(data.DataError, match="1 videos were not opened before; run .python data"):
        data.refuse_broken(data.load_samples(file), file)
    data.check(file, "", 4, 60.0)
    data.refuse_broken(data.load_samples(file), file)
