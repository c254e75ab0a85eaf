"""`python data.py FILE`: broken records and videos are listed with their cause, then left out."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

import data
import ffr
import train


def absurd(content: bytes) -> bytes:
    """The stream header full of 0xff: decord's C++ aborts the process that reads it."""
    at = content.index(b"strh") + 16
    return content[:at] + b"\xff" * 48 + content[at + 48 :]


BREAK = {  # what is done to a file's bytes, and what the check says of it
    "zero bytes": (lambda content: b"", "an empty file"),
    "truncated": (lambda content: content[: len(content) // 2], "cut short"),
    "text": (lambda content: b"this is text", "not a video"),
    "missing": (lambda content: None, "no video at"),
    "one frame": (lambda content: one_frame(content), "1 frame(s)"),
    "absurd header": (absurd, "ended decord"),
    "damaged": (lambda content: spoil(content), "do not decode"),
}


def spoil(content):
    """No picture is left in the fifth frame's chunk."""
    at = [m.start() for m in re.finditer(b"00dc", content)][4] + 8
    return content[:at] + bytes(2000) + content[at + 2000 :]


def one_frame(content):
    data.write_avi("one.avi", [Image.new("RGB", (64, 64))], 2)
    return Path("one.avi").read_bytes()


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """140 records, 5 % of which are broken, and one good video under a Unicode path."""
    monkeypatch.chdir(tmp_path)
    file = Path(data.needle_videos(str(tmp_path / "needles"), 140, 5))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for k, (change, _) in enumerate(BREAK.values()):
        video = file.parent / records[20 * k]["path"]
        content = change(video.read_bytes())
        video.unlink()
        if content is not None:
            video.write_bytes(content)
    unicode = "vidéo 動画 🎬.avi"
    (file.parent / records[1]["path"]).rename(file.parent / unicode)
    records[1]["path"] = unicode
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def check(file, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "data.py"), str(file), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_check_lists_each_broken_video_with_its_cause(broken):
    said = check(broken)
    listed = json.loads(Path(f"{broken}.skip.json").read_text())["records"]
    assert list(listed) == [str(20 * k + 1) for k in range(len(BREAK))]
    for cause, (_, words) in zip(listed.values(), BREAK.values()):
        assert words in cause and cause in said and "needle" in cause
    assert "133 of 140 records are fine" in said and "exact 133" in said
    assert "7.5 to 7.5" in said  # seconds
    left = data.load_samples(str(broken), skip=f"{broken}.skip.json")
    assert len(left) == 133 and any("動画" in sample.path for sample in left)


def test_check_lists_each_broken_record(tmp_path, clip):
    good = {
        "problem_id": 1,
        "path": clip.name,
        "data_type": "video",
        "problem": "what ?",
        "problem_type": "exact",
        "options": [],
        "solution": "<answer>a</answer>",
    }
    lines = [
        json.dumps(good),
        "{",
        json.dumps(good),
        json.dumps(good | {"solution": "a"}),
        "[]",
        json.dumps(good | {"problem_id": 2, "problem": "what\u2028?"}, ensure_ascii=False),
        json.dumps(good | {"problem_id": 3, "options": "A. x"}),
        json.dumps(good | {"problem_id": 4, "problem": "what\u2028?"}, ensure_ascii=False),
    ]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    said = check(tmp_path / "bad.jsonl", "--video_root", str(clip.parent))
    listed = json.loads((tmp_path / "bad.jsonl.skip.json").read_text())["records"]
    words = {
        "2": "not valid JSON",
        "3": "problem_id of record 1",
        "4": "no <answer>",
        "5": "no JSON",
        "7": "'options' is no list",
    }
    assert list(listed) == list(words) and all(words[k] in listed[k] for k in words)
    assert "repeated      1" in said  # records 6 and 8


def test_a_file_without_a_fine_record_is_no_success(tmp_path):
    (tmp_path / "notes.jsonl").write_text("{what is to be asked}")
    command = [sys.executable, str(ROOT / "data.py"), str(tmp_path / "notes.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1
    assert "not valid JSON" in done.stdout
    assert "notes.jsonl: no record is fine; mend it" in done.stderr


def test_skip_list_of_another_file_is_refused(broken):
    check(broken)
    broken.write_text(broken.read_text().replace("needle-5-00003", "renamed", 1))
    with pytest.raises(
        data.DataError, match="no list of .* as it is; python data.py .* writes one"
    ):
        data.load_samples(str(broken), skip=f"{broken}.skip.json")
    with pytest.raises(data.DataError, match="no skip list; python data.py .* writes one"):
        data.load_samples(str(broken), skip=str(broken))


def test_video_that_hangs_costs_its_time_and_no_other(tmp_path, samples):
    os.mkfifo(tmp_path / "hangs.avi")  # opening it waits for a writer that never comes
    began, decoder = time.monotonic(), data.Decoder()
    with pytest.raises(data.DataError, match="hangs.avi: decord waits for ever"):
        data.Video(str(tmp_path / "hangs.avi"), decoder, patience=4.0)
    assert time.monotonic() - began < 10
    assert len(data.Video(samples[0].path, decoder)) == 16  # a new process serves on


def test_decoder_that_aborts_costs_its_record_and_not_the_run(
    make_config, accelerator, samples, teach, tmp_path
):
    """A file that breaks after the check: decord's process dies of it, in the middle of training."""
    path = tmp_path / "broken.avi"
    path.write_bytes(absurd(Path(samples[0].path).read_bytes()))
    config = make_config(max_steps=1, questions_per_device=6)
    records = [
        data.Sample(**vars(s) | {"path": str(path)}) if s is samples[0] else s for s in samples
    ]
    student = train.load_student(config, accelerator)
    spare = ffr.open_question(student, samples[1])
    (metrics,) = train.train(
        config, accelerator, student, samples=records, teach=teach, placeholder=spare
    )
    assert metrics["skipped"] == 1 and metrics["sampled_tokens"] > 0


def test_training_begins_only_with_videos_that_open_and_finishes_with_the_list(
    broken, model_folder, tmp_path, monkeypatch, capsys
):
    given = {
        **train.TINY,
        "model": model_folder,
        "data": str(broken),
        "out": str(tmp_path / "out"),
        "questions_per_device": 19,
        "num_rollouts": 2,
        "max_steps": 0,
        "epochs": 1,
        "max_completion_length": 2,
    }
    arguments = [x for key, value in given.items() for x in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit, match="no video at .*needle-5-00060"):
        train.main()
    (broken.parent / "needle-5-00060.avi").write_text("text")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--resume", "True"])
    with pytest.raises(
        SystemExit, match=r"an empty file; .* \(1 such, \d in all; .python data.py .* lists them"
    ):
        train.main()
    check(broken)
    later = Path(data.load_samples(str(broken), skip=f"{broken}.skip.json")[50].path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            *arguments,
            "--resume",
            "True",
            "--skip",
            f"{broken}.skip.json",
            "--out",
            str(tmp_path / "other"),
        ],
    )
    find, begun = train.open_questions, []

    def break_one(*args):  # after the check, before its turn comes
        if not begun:
            later.write_bytes(absurd(later.read_bytes()))
        begun.append(len(args[1]))
        return find(*args)

    monkeypatch.setattr(train, "open_questions", break_one)
    train.main()
    rows = [json.loads(line) for line in (tmp_path / "other" / "metrics.jsonl").open()]
    assert len(rows) == 7 and sum(row["skipped"] for row in rows) == 1
    assert "teacher_failures" in capsys.readouterr().out
