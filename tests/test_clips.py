"""Times of frames in real H.264 files, encoded here (extra: PyAV), against what was written."""

from fractions import Fraction

import numpy as np
import pytest

import data
import ffr
from data import Sample

pytestmark = pytest.mark.slow
av = pytest.importorskip("av", reason="pip install -r requirements-dev.txt")

KINDS = {  # width, height, rate, frames, seconds after each frame (None: 1 / rate)
    "24 fps": (128, 96, Fraction(24), 60, None),
    "29.97 fps": (128, 96, Fraction(30000, 1001), 90, None),
    "variable": (128, 96, Fraction(1000), 80, (0.02, 0.2, 0.04, 0.5)),
    "portrait": (96, 224, Fraction(25), 50, None),
    "odd sizes": (101, 75, Fraction(25), 50, None),
    "one second": (64, 64, Fraction(12), 12, None),
    "ten minutes": (64, 64, Fraction(24), 14_400, None),
}


def encode(path, width, height, rate, frames, gaps):
    """Write a clip whose frames carry their index as 16 blocks of black and white; returns the
    seconds at which each was put."""
    pixels = "yuv420p" if width % 2 == height % 2 == 0 else "yuv444p"
    times, clock, tick = [], Fraction(0), 1 / rate
    with av.open(path, "w") as file:
        stream = file.add_stream("h264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.options = {"crf": "12", "preset": "ultrafast", "g": "48"}
        stream.codec_context.time_base = stream.time_base = tick
        for k in range(frames):
            bits = np.array([255 * (k >> b & 1) for b in range(16)], np.uint8).reshape(4, 4)
            blocks = bits.repeat(-(-height // 4), 0).repeat(-(-width // 4), 1)[:height, :width]
            frame = av.VideoFrame.from_ndarray(np.stack([blocks] * 3, -1), format="rgb24")
            frame.time_base, frame.pts = tick, round(clock * rate)
            times.append(float(frame.pts * tick))
            clock += Fraction(gaps[k % len(gaps)]) if gaps else tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return times


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
    question = ffr.open_question(student, Sample("v", "what ?", [], "x", "exact", path))
    assert told == pytest.approx([times[i] for i in question.indices], abs=1e-3)
    patch = ffr.EvidencePatch("temporal", key_frames=[question.indices[5]])
    label = ffr.render_patch(patch, question.video, question.spacing)[1]["text"]
    assert f"<{times[question.indices[5]]:.1f} seconds>" in label
