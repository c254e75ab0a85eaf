"""Frames and times of real files, encoded here (extra: PyAV), against what ffmpeg's libraries show:
each is right, or refused with the remedy."""

import os
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

import data
import ffr
from data import Sample

pytestmark = pytest.mark.slow
av = pytest.importorskip("av", reason="pip install -r requirements-dev.txt")
from clips import cut, encode, overcount, shorten  # noqa: E402

KINDS = {  # width, height, rate, frames, seconds after each frame (None: 1 / rate)
    "24 fps": (128, 96, Fraction(24), 60, None),
    "29.97 fps": (128, 96, Fraction(30000, 1001), 90, None),
    "variable": (128, 96, Fraction(1000), 80, (0.02, 0.2, 0.04, 0.5)),
    "portrait": (96, 224, Fraction(25), 50, None),
    "odd sizes": (101, 75, Fraction(25), 50, None),
    "one second": (64, 64, Fraction(12), 12, None),
    "ten minutes": (64, 64, Fraction(24), 14_400, None),
}


def index_of(image):
    small = image.convert("L").resize((4, 4), 4)  # box filter: the mean of each block
    return sum(1 << b for b, value in enumerate(small.tobytes()) if value > 127)


@pytest.mark.parametrize("kind", KINDS)
def test_seconds_of_a_frame_are_right_to_one_frame(kind, tmp_path):
    path = str(tmp_path / "clip é.mp4")
    times = encode(path, *KINDS[kind])
    video = data.Video(path)
    assert len(video) == len(times)
    gaps = [b - a for a, b in zip(times, times[1:])]
    for index in video.uniform(40):
        shown = index_of(video.frame(index))
        assert shown == index and video.frame(index).size == KINDS[kind][:2]
        assert abs(video.seconds(index) - times[index]) < min(gaps) / 2


def test_student_is_told_the_same_times_as_the_patch_at_a_variable_frame_rate(
    student, tmp_path, monkeypatch
):
    path, told = str(tmp_path / "variable.mp4"), []
    times = encode(path, *KINDS["variable"])
    call = type(student.processor).__call__

    def spy(self, *args, **kwargs):
        told.extend(kwargs["video_metadata"][0].timestamps)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(student.processor), "__call__", spy)
    question = ffr.open_question(
        student,
        Sample(id="v", question="what ?", options=[], answer="x", problem_type="exact", path=path),
    )
    assert told == pytest.approx([times[i] for i in question.indices], abs=1e-3)
    patch = ffr.EvidencePatch("temporal", key_frames=[question.indices[5]])
    label = ffr.render_patch(patch, question.video, question.spacing)[1]["text"]
    assert f"<{times[question.indices[5]]:.1f} seconds>" in label


B = {"bf": "2", "g": "15"}  # frames that are not in the order of decoding
OPEN_264 = {"crf": "12", "x264-params": "open-gop=1:keyint=48:bframes=3:scenecut=0"}
OPEN_265 = {"preset": "veryfast", "x265-params": "keyint=48:log-level=none:scenecut=0"}
TIMES, TS = "times do not rise; re-encode it: ffmpeg", "transport stream: .* re-encode it: ffmpeg"
CLIPS = {  # file: its encoding, and what is said of it where it is refused
    "closed.mkv": ({}, None),
    "flash.flv": ({}, None),
    "fragmented.mp4": ({"muxer": {"movflags": "frag_keyframe+empty_moov"}}, None),
    "ten-bit.mp4": ({"pixels": "yuv420p10le"}, None),
    "open.mp4": ({"options": OPEN_264}, None),
    "open.mkv": ({"options": OPEN_264}, None),
    "hevc.mp4": ({"codec": "libx265", "options": OPEN_265}, None),
    "hevc.mkv": ({"codec": "libx265", "options": OPEN_265}, None),
    "mpeg4.mp4": ({"codec": "mpeg4", "options": B}, None),
    "mpeg2.mp4": ({"codec": "mpeg2video", "options": B}, None),
    "windows.wmv": ({"codec": "wmv2", "options": {}, "format": "asf"}, None),
    "vp8.webm": ({"codec": "libvpx", "options": {"crf": "10", "b": "2M", "cpu-used": "8"}}, None),
    "vp9.webm": (
        {"codec": "libvpx-vp9", "options": {"crf": "20", "b": "0", "cpu-used": "8"}},
        None,
    ),
    "prores.mov": ({"codec": "prores_ks", "options": {}, "pixels": "yuv422p10le"}, None),
    "motion.avi": ({"codec": "mjpeg", "options": {}, "pixels": "yuvj420p"}, None),
    "divx.avi": ({"codec": "mpeg4", "options": {"g": "15"}}, None),
    "xvid.avi": ({"codec": "mpeg4", "options": B}, TIMES),
    "h264.avi": ({}, TIMES),
    "dvd.mpg": ({"codec": "mpeg2video", "options": B, "format": "mpeg"}, TIMES),
    "h264.ts": ({"format": "mpegts"}, TS),
    "camera.m2ts": ({"format": "mpegts", "muxer": {"mpegts_m2ts_mode": "1"}}, TS),
    "av1.mp4": ({"codec": "libsvtav1", "options": {"preset": "10"}}, "codec av01: .* decord2 .*"),
    "av1.webm": ({"codec": "libsvtav1", "options": {"preset": "10"}}, "codec V_AV1: .*ffmpeg -i"),
}


def shown_by_ffmpeg(path):
    """Index and seconds of each frame that ffmpeg's libraries show, from the first."""
    with av.open(str(path)) as file:
        frames = [
            (index_of(frame.to_image()), float(frame.pts * frame.time_base))
            for frame in file.decode(video=0)
        ]
    return [index for index, _ in frames], [seconds - frames[0][1] for _, seconds in frames]


def is_right(path):
    """In one batch, and one by one in another order; its number of frames."""
    indices, times = shown_by_ffmpeg(path)
    video = data.Video(str(path))
    assert len(video) == len(indices)
    places = video.uniform(16)
    for shown in (video.frames(places), [video.frame(k) for k in places[::-1]][::-1]):
        assert [index_of(image) for image in shown] == [indices[k] for k in places]
    assert [video.seconds(k) for k in places] == pytest.approx([times[k] for k in places], abs=1e-3)
    return len(indices)


@pytest.mark.parametrize("name", CLIPS)
def test_clip_is_shown_as_a_player_does_or_refused(name, tmp_path):
    how, refusal = CLIPS[name]
    code = f"from clips import *; encode({name!r}, **{how})"
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": here}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    if refusal is None:
        assert is_right(tmp_path / name) == 200
    else:
        with pytest.raises(data.DataError, match=f"{name}: .*{refusal}"):
            data.Video(str(tmp_path / name))


@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize("start, end", [(6.0, 1e9), (6.0, 12.0), (0.0, 5.0), (9.98, 15.02)])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_clip_cut_without_encoding_is_shown_from_its_cut(start, end, b_frames, ending, tmp_path):
    source, path = str(tmp_path / "long.mp4"), tmp_path / f"cut.{ending}"
    options = {"g": "250", "bf": b_frames, "preset": "veryfast", "crf": "12", "sc_threshold": "0"}
    encode(source, frames=500, options=options)
    cut(source, str(path), start, end)
    assert is_right(path) > 100


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_short_clip_is_shown_whole(frames, tmp_path):
    encode(str(tmp_path / "short.mp4"), frames=frames)
    assert is_right(tmp_path / "short.mp4") == frames


def test_clip_that_counts_hidden_or_empty_frames_is_refused(tmp_path):
    said = "fewer frames decode than it counts; re-encode it"
    encode(
        str(tmp_path / "trimmed.mp4"),
        frames=200,
        options={"g": "48"},
    )
    shorten(tmp_path / "trimmed.mp4", 0.5)
    encode(
        str(tmp_path / "mpeg4.mp4"),
        frames=60,
        codec="mpeg4",
        options={"g": "12"},
    )
    overcount(str(tmp_path / "mpeg4.mp4"), str(tmp_path / "empty.mp4"))
    for name in ("trimmed.mp4", "empty.mp4"):
        video = data.Video(str(tmp_path / name))
        with pytest.raises(data.DataError, match=said):
            video.frames(video.uniform(16))


@pytest.mark.parametrize("codec, options", [("h264", OPEN_264), ("libx265", OPEN_265)])
def test_long_clip_whose_seeks_are_off_is_read_in_order(codec, options, tmp_path):
    path = tmp_path / "long.mp4"
    encode(
        str(path),
        width=64,
        height=64,
        rate=Fraction(25),
        frames=2100,
        codec=codec,
        options=options,
    )
    assert is_right(path) == 2100
    video = data.Video(str(path))
    for index in (46, 47, 48, 97, 241, 2099):
        assert index_of(video.frame(index)) == index


def test_open_groups_that_begin_late_are_shown_right(tmp_path):
    path = tmp_path / "late.mp4"
    forced = "keyint=48:b-adapt=0:scenecut=0:log-level=none"
    options = {"preset": "veryfast", "x265-params": forced}
    encode(
        str(path),
        frames=700,
        codec="libx265",
        options=options,
    )
    video = data.Video(str(path))
    for index in video.uniform(64):
        assert index_of(video.frame(index)) == index


def test_pixels_are_made_square(tmp_path):
    path = str(tmp_path / "wide.mp4")
    encode(
        path, width=120, height=90, rate=Fraction(25), frames=30, gaps=None, aspect=Fraction(4, 3)
    )
    video = data.Video(path)
    assert video.frame(5).size == (160, 90) and index_of(video.frame(5)) == 5


def test_phones_rotation_is_applied(tmp_path):
    path = tmp_path / "phone.mp4"
    encode(str(path), width=96, height=64, rate=Fraction(25), frames=40, gaps=None)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # the matrix: a quarter turn
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    content[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    path.write_bytes(content)
    video = data.Video(str(path))
    for k in (1, 17, 39):
        assert video.frame(k).size == (64, 96)
        assert index_of(video.frame(k).rotate(90, expand=True)) == k


def test_decoder_holds_little_memory_after_a_read(tmp_path):
    """1080p, 40 s: decord itself goes on decoding into memory, gigabytes of it."""
    path = str(tmp_path / "large.mp4")
    encode(path, width=1920, height=1080, rate=Fraction(30), frames=1200, gaps=None)
    decoders = [data.Decoder() for _ in range(8)]
    video = data.Video(path, decoders[0])
    video.frames(video.uniform(16))
    for decoder in decoders[1:]:
        decoder(path, [600], in_order=False)
    time.sleep(10)
    held = [resident(decoder.child.pid) for decoder in decoders]
    assert max(held) < 400 and sum(held) < 1000, held


def test_good_clips_are_fine_where_the_machine_has_fewer_cores_than_it_says(tmp_path, monkeypatch):
    """Twelve decoders at a time on what this machine has, with patience for one of them alone."""
    path = tmp_path / "large.mp4"
    encode(str(path), width=1280, height=720, rate=Fraction(30), frames=600, gaps=None)
    began = time.monotonic()
    data.open_videos([str(path)], 16)
    patience = 1.5 * (time.monotonic() - began) + 1
    copies = [str(shutil.copy(path, tmp_path / f"{k}.mp4")) for k in range(12)]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    facts = data.open_videos(copies, 16, patience)
    assert facts == dict.fromkeys(copies, (600, pytest.approx(599 / 30, abs=1e-3)))


def resident(process):
    """Its megabytes of memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024
