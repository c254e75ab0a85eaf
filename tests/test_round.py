"""What the round sees, samples and pairs: behaviours that a slip of one name or index would change."""

import re
from dataclasses import replace

import pytest
import torch

import ffr
import grpo
from teacher import EvidencePatch, TeacherError


def round_of(student, questions, teach, rollouts=2, seed=(0, 0)):
    return ffr.find_fix_reason(
        student, questions, num_rollouts=rollouts, teacher=teach, kappa=0.3, lam=0.1, seed=seed
    )


class Uneven:
    """A video at a variable frame rate: frame k is shown at k² / 10 seconds."""

    path, fps = "uneven", 4.0
    __len__ = lambda video: 16
    seconds = lambda video, index: index * index / 10


def test_spacing_is_the_mean_gap_between_shown_frames(questions):
    uneven = replace(questions[0], video=Uneven(), indices=[1, 3, 6, 7, 9])
    assert uneven.spacing == pytest.approx((8.1 - 0.1) / 4)
    assert replace(uneven, indices=[5]).spacing == 0


def test_student_is_told_true_times_at_a_variable_frame_rate(student, questions, monkeypatch):
    """Qwen3-VL's processor writes, before each pair of frames, the mean of their times."""
    shown = [0, 3, 4, 7, 10, 11, 12, 15]
    frames = questions[0].frames[: len(shown)]
    question = replace(questions[0], video=Uneven(), indices=shown, frames=frames)
    tokenizer, written = type(student.processor.tokenizer), []
    tokenize = tokenizer.__call__

    def spy(self, text, *more, **settings):
        written.append(text[0])
        return tokenize(self, text, *more, **settings)

    monkeypatch.setattr(tokenizer, "__call__", spy)
    ffr.encode(student, question)
    told = [float(time) for time in re.findall(r"<([\d.]+) seconds>", written[0])]
    times = [index * index / 10 for index in shown]
    pairs = [(a + b) / 2 for a, b in zip(times[::2], times[1::2])]
    assert told == pytest.approx(pairs, abs=0.051)


def test_equal_patches_of_different_questions_have_prompts_of_their_own(student, questions):
    patch = EvidencePatch("temporal", "look here", key_frames=[3])
    groups = round_of(student, questions[:2], lambda cases: [patch] * len(cases))
    prompts, episodes = ffr.episodes(groups)
    for number, question in enumerate(questions[:2]):
        mine = [episode for episode in episodes if episode.question == number]
        assert len(mine) == 2 and len({episode.prompt for episode in mine}) == 1
        prompt = prompts[mine[0].prompt]
        assert "pixel_values" in prompt and mine[0].prompt != number
        pixels = prompt["pixel_values_videos"]
        assert torch.equal(pixels, question.prompt["pixel_values_videos"])
    first, second = (prompts[episodes[k].prompt] for k in (0, 2))
    assert first["pixel_values"].shape == second["pixel_values"].shape
    assert not torch.equal(first["pixel_values"], second["pixel_values"])


def test_different_patches_of_one_question_have_prompts_of_their_own(student, questions):
    patches = [EvidencePatch("temporal", key_frames=[k]) for k in (3, 9)]
    groups = round_of(student, questions[:1], lambda cases: patches)
    prompts, episodes = ffr.episodes(groups)
    assert [episode.prompt for episode in episodes] == [1, 2]
    assert not torch.equal(prompts[1]["pixel_values"], prompts[2]["pixel_values"])


def test_placeholders_reach_no_teacher_and_train_nothing(student, questions):
    broken = replace(questions[1], is_placeholder=True)
    asked = []

    def teach(cases):
        asked.extend(case.id for case in cases)
        return [TeacherError("declined")] * len(cases)

    asked_of = [questions[0], broken]
    groups = round_of(student, asked_of, teach)
    assert asked == [questions[0].sample.id] * 2
    for member, advantage in zip(ffr.flat(groups), [1.0, -1.0, 1.0, -1.0]):
        member.advantage = advantage
    _, episodes = ffr.episodes(groups)
    assert [episode.weight for episode in episodes] == [1.0, 1.0, 0.0, 0.0]
    assert [episode.advantage for episode in episodes] == [1.0, -1.0, 0.0, 0.0]
    _, mask = grpo.batched_logps(
        student.model, {k: q.prompt for k, q in enumerate(asked_of)}, episodes, student.sampling
    )
    assert mask[:2].sum() > 0 and mask[2:].sum() == 0


def test_a_moment_counts_as_cited_within_half_the_spacing(student, questions, monkeypatch):
    """The patch marks frames 4 to 5, at 2.0 to 2.5 s; frames are shown every 0.5 s."""
    assert questions[0].spacing == pytest.approx(0.5)
    patch = EvidencePatch("temporal", spans=[(4, 5)])
    align = {}
    for time in (1.70, 1.80, 2.25, 2.70, 2.80):
        said = f"<think> at <{time:.2f} seconds> </think><answer>x</answer>"
        monkeypatch.setattr(ffr, "decode", lambda *_: said)
        ((member,),) = round_of(student, questions[:1], lambda cases: [patch], rollouts=1)
        align[time] = member.align
    assert align == {1.70: 0.0, 1.80: 1.0, 2.25: 1.0, 2.70: 1.0, 2.80: 0.0}


def test_the_second_rationale_is_compared_with_the_patch(student, questions, monkeypatch):
    patch = EvidencePatch("temporal", spans=[(4, 5)])
    said = iter(["<think> </think>", "<think> at <2.25 seconds> </think>"])
    monkeypatch.setattr(ffr, "decode", lambda *_: next(said))
    ((member,),) = round_of(student, questions[:1], lambda cases: [patch], rollouts=1)
    assert member.align == 1.0


def test_each_rollout_and_each_step_draws_seeds_of_its_own(student, questions, teach, monkeypatch):
    drawn, generate = [], ffr.generate

    def spy(model, prompts, seeds, sampling):
        drawn.extend(seed for its_seeds in seeds for seed in its_seeds)
        return generate(model, prompts, seeds, sampling)

    monkeypatch.setattr(ffr, "generate", spy)
    for step in (0, 1):
        round_of(student, questions[:2], teach, seed=(0, step))
    assert len(drawn) == 2 * 8 and len({*drawn}) == len(drawn)
    again = [*drawn]
    drawn.clear()
    round_of(student, questions[:2], teach, seed=(0, 0))
    assert drawn == again[:8]
