"""The round: what is sampled, repaired, chosen, rewarded, and what a fault of the teacher costs."""

import gc
import time
import weakref
from dataclasses import replace

import pytest
import torch
from cold_start import needle_rationale
from conftest import sampled
from PIL import Image

import ffr
import reward
import teacher
from teacher import EvidencePatch, Region, TeacherError

SEED = (0, 0)


def run(student, questions, teach, kappa=0.3, lam=0.1, rollouts=3):
    return ffr.find_fix_reason(
        student, questions, num_rollouts=rollouts, teacher=teach, kappa=kappa, lam=lam, seed=SEED
    )


def with_view(student, **changes):
    return replace(student, view=replace(student.view, **changes))


def test_question_text_is_the_same_with_and_without_a_patch(student, questions, teach):
    question = questions[0]
    (patch,) = teach([ffr.case_of(question, "hm")])
    parts = ffr.render_patch(patch, question.video, question.spacing)
    assert {part["type"] for part in parts} == {"text", "image"}
    plain = ffr.render_question(student, question.sample)
    helped = ffr.render_question(student, question.sample, parts)
    turn = plain[: plain.index("<|im_end|>")]
    assert question.sample.question in turn and helped.startswith(turn) and len(helped) > len(plain)
    ids = question.prompt["input_ids"][0]
    patched = ffr.encode(student, question, patch)["input_ids"][0]
    end = ids.tolist().index(student.processor.tokenizer.eos_token_id)
    assert ids[:end].tolist() == patched[:end].tolist()


def test_tiny_student_knows_every_word_of_its_prompts(student, questions, teach):
    unknown = student.processor.tokenizer.unk_token_id
    for question in questions:
        truth = question.sample.truth
        for cited in (
            (truth["cue"] - 1, 0),
            (truth["cue"], 7 - truth["look"]),
            (truth["cue"], truth["look"]),
        ):
            response = needle_rationale(truth, *cited)
            (patch,) = teach([ffr.case_of(question, response)])
            assert unknown not in ffr.encode(student, question, patch)["input_ids"]
            assert unknown not in student.processor.tokenizer(response)["input_ids"]


def test_patch_never_contains_the_answer(questions, teach):
    for question in questions:
        (patch,) = teach([ffr.case_of(question, "hm")])
        text = ffr.render_patch(patch, question.video, question.spacing, pictures=False)[0]["text"]
        assert question.sample.answer not in text
        assert all(word not in text for word in question.sample.answer.split())


def test_prompt_template_takes_any_characters(student, samples):
    odd = replace(
        samples[0], question="{suffix} {x} %s \\1 «ü» {options}", options=["A. {question}"]
    )
    own = with_view(student, prompt="Q: {question} | {options} | {suffix} {else}")
    text = ffr.render_question(own, odd).partition("<|vision_end|>")[2].partition("<|im_end|>")[0]
    assert text == f"Q: {odd.question} | A. {{question}} | {ffr.SUFFIXES['exact']} {{else}}"


def test_without_patch_pictures_the_patch_is_text_alone(student, questions):
    """FFR Table 2, "no visual context": the same patch, its region given by its corners."""
    patch = EvidencePatch(
        error_type="spatial",
        guidance="look",
        key_frames=[3],
        spans=[(3, 4)],
        regions=[Region(3, (0.1, 0.2, 0.5, 0.6), "sign")],
    )
    blind = with_view(student, patch_pictures=False)
    seen, unseen = (ffr.encode(s, questions[0], patch) for s in (student, blind))
    assert "pixel_values" in seen and "pixel_values" not in unseen
    (part,) = ffr.render_patch(patch, questions[0].video, questions[0].spacing, pictures=False)
    assert "0.10 0.20 0.50 0.60: sign" in part["text"] and "Guidance: look" in part["text"]


def test_patch_pictures_show_original_frames_with_the_region_drawn(questions):
    video = questions[0].video
    patch = EvidencePatch(
        error_type="spatial",
        guidance="",
        key_frames=[4],
        spans=[(4, 5)],
        regions=[Region(4, (0.25, 0.25, 0.75, 0.5), "it")],
    )
    text, *parts = ffr.render_patch(patch, video, 0.5)
    frame, crop = (part for part in parts if part["type"] == "image")
    assert "Moments: <2.2 seconds>" in text["text"] and "Region <2.0 seconds>: it" in text["text"]
    assert frame["image"].size == (128, 128) and crop["image"].size == (64, 32)
    assert frame["image"].getpixel((32, 40)) == (255, 0, 0)  # on the region's edge
    assert frame["image"].getpixel((5, 5)) == video.frame(4).getpixel((5, 5))
    assert video.frame(4).getpixel((32, 40)) != (255, 0, 0)  # the original stays as it was
    assert crop["image"].getpixel((3, 3)) == video.frame(4).getpixel((35, 35))
    bare = ffr.render_patch(patch, video, 0.5, pictures=False)
    assert len(bare) == 1 and "0.25 0.25 0.75 0.50" in bare[0]["text"]
    untimed = ffr.render_patch(replace(patch, spans=[], show_times=False), video, 0.5)
    assert "seconds" not in "".join(part.get("text", "") for part in untimed)


def test_long_span_is_given_by_both_ends(questions):
    patch = EvidencePatch("temporal", spans=[(2, 9)])
    text = ffr.render_patch(patch, questions[0].video, 0.5)[0]["text"]
    assert "<1.0 seconds> to <4.5 seconds>" in text


def ids_of(member):
    return member.chosen.completion.ids.tolist()


def answer(student, prompt, seed):
    (completion,) = sampled(student, [prompt], [ffr.seed_of(*seed)])
    return completion


def test_repaired_rollouts_take_the_failed_ones_places(student, questions, teach):
    groups = run(student, questions[:2], teach)
    for question, group in zip(questions, groups):
        for place, member in enumerate(group):
            assert not member.unaided.score.correct and member.repaired is not None
            first = answer(student, question.prompt, (SEED, question.sample.id, place, "first"))
            assert member.unaided.completion.ids.tolist() == first.ids.tolist()
            assert member.unaided.prompt is question.prompt
            repaired = member.repaired
            assert "pixel_values" in repaired.prompt  # the patched prompt, with its pictures
            again = answer(student, repaired.prompt, (SEED, question.sample.id, place, "again"))
            assert member.chosen.completion.ids.tolist() == again.ids.tolist()


def test_right_rollouts_are_left_alone(student, questions, teach, monkeypatch):
    """One right first answer in three: it is not shown to the teacher and keeps its reward."""
    judge, right = ffr.judge, ffr.Score(1.0, 1.0, True)
    asked = []

    def kind(*args):
        rollout = judge(*args)
        asked.append(rollout)
        return replace(rollout, score=right) if len(asked) == 2 else rollout

    monkeypatch.setattr(ffr, "judge", kind)
    seen = []
    group = run(student, questions[:1], lambda cases: seen.extend(cases) or teach(cases))[0]
    assert len(seen) == 2
    assert [r.repaired is None for r in group] == [False, True, False]
    assert group[1].reward == 2.0


def test_kappa_shifts_exactly_the_repaired_rewards(student, questions, teach):
    cheap, dear = (ffr.flat(run(student, questions[:2], teach, kappa=k)) for k in (0.0, 0.3))
    for a, b in zip(cheap, dear):
        assert ids_of(a) == ids_of(b)
        assert a.reward - b.reward == pytest.approx(0.3 if a.repaired else 0.0)


def faults(teach):
    def raises(talks, seconds):
        raise RuntimeError("out of memory")

    def hangs(talks, seconds):
        time.sleep(20)

    def diagnose(chat, **settings):
        return lambda cases: teacher.diagnose(cases, chat, reward.gate, **settings)

    leaking = (
        '<answer>{"error_classification": "spatial", "evidence_patch": {"content": "%s"}}</answer>'
    )
    return {
        "declined": lambda cases: [TeacherError("declined")] * len(cases),
        "raised": diagnose(raises),
        "timeout": diagnose(hangs, timeout=0.2),
        "leak": lambda cases: diagnose(
            lambda talks, _: [(leaking % cases[0].answer, 0)] * len(talks)
        )(cases),
        "malformed": diagnose(lambda talks, _: [("no idea", 0)] * len(talks)),
    }


@pytest.mark.parametrize("cause", ["declined", "raised", "timeout", "leak", "malformed"])
def test_teacher_fault_costs_that_rollout_its_repair_and_nothing_else(
    student, questions, teach, cause
):
    """The fault hits one of six failures; the others are as they are without it, bit for bit."""
    fault = faults(teach)[cause]

    def partly(cases):
        return [*fault(cases[:1]), *teach(cases[1:])]

    whole, broken = (ffr.flat(run(student, questions[:2], t)) for t in (teach, partly))
    score = broken[0].chosen.score
    assert broken[0].repaired is None and broken[0].error.cause == cause
    assert broken[0].reward == score.accuracy + score.format  # untaxed
    assert ids_of(broken[0]) == whole[0].unaided.completion.ids.tolist()
    for a, b in zip(whole[1:], broken[1:]):
        assert ids_of(a) == ids_of(b)
        assert torch.equal(a.unaided.completion.logps, b.unaided.completion.logps)
        assert torch.allclose(a.chosen.completion.logps, b.chosen.completion.logps, atol=1e-5)
        assert a.reward == b.reward


def test_teacher_that_always_declines_is_plain_grpo(student, questions):
    def decline(cases):
        return [TeacherError("declined")] * len(cases)

    declined, plain = (ffr.flat(run(student, questions[:2], t)) for t in (decline, None))
    for a, b in zip(declined, plain):
        assert ids_of(a) == ids_of(b)
        assert a.reward == b.reward and a.chosen.prompt is b.chosen.prompt


def test_patch_over_the_prompt_limit_costs_the_repair(student, questions, teach):
    longest = questions[0].prompt["input_ids"].shape[1]
    (member,) = run(
        with_view(student, max_prompt_length=longest), questions[:1], teach, rollouts=1
    )[0]
    assert member.repaired is None and member.error.cause == "prompt"


def test_prompt_over_the_limit_is_refused_not_cut(student, samples):
    with pytest.raises(ValueError, match="over the limit of 20; raise --max_prompt_length"):
        ffr.open_question(with_view(student, max_prompt_length=20), samples[0])


def test_repair_picture_shows_all_of_it(student, questions, teach, tmp_path):
    member = run(student, questions[:1], teach)[0][0]
    text = ffr.draw_repair(member, 0.3, 0.1, tmp_path / "repairs" / "a.png")
    picture = Image.open(tmp_path / "repairs" / "a.png")
    assert (tmp_path / "repairs" / "a.txt").read_text(encoding="utf-8").strip() == text
    order = [
        "Question (exact)",
        "The student sees",
        "First answer, wrong",
        "Find: the teacher",
        "Fix: the evidence",
        "Reason: second answer",
        "Reward",
    ]
    places = [text.index(heading) for heading in order]
    assert places == sorted(places)
    assert f"= {member.reward:.2f}" in text and questions[0].sample.answer in text
    assert picture.width == 1200 and 600 < picture.height < 2400


def test_a_row_of_pictures_has_its_height_though_it_is_not_full():
    picture = ("0.0 s", Image.new("RGB", (64, 64)))

    def height(count: int) -> int:
        return ffr.draw_page([("seen", "", [picture] * count), ("said", "words", [])]).height

    row = height(1) - height(0)
    assert row > 100 and [height(k) - height(0) for k in (2, 3, 4)] == [row, row, 2 * row]


def test_repair_picture_shows_no_picture_that_the_student_did_not_get(
    student, questions, teach, tmp_path, monkeypatch
):
    shown, draw = [], ffr.draw_page
    monkeypatch.setattr(ffr, "draw_page", lambda parts: shown.append(parts) or draw(parts))
    for pictures in (True, False):
        (member,) = run(
            with_view(student, patch_pictures=pictures), questions[:1], teach, rollouts=1
        )[0]
        ffr.draw_repair(member, 0.3, 0.1, tmp_path / "a.png")
    (_, words, pictures), (_, bare_words, no_pictures) = (sections[4] for sections in shown)
    assert len(pictures) > 0 and no_pictures == []
    assert bare_words.startswith(words.split("Region")[0])


def test_a_failed_diagnosis_keeps_nothing_of_its_step_alive(student, questions):
    """An error that kept its traceback would hold the round's frame, and so prompts and rollouts,
    until the garbage collector comes by."""
    gc.disable()
    try:
        groups = run(student, questions[:1], faults(None)["declined"])
        assert all(r.error for r in ffr.flat(groups))
        alive = weakref.ref(groups[0][0])
        del groups
        assert alive() is None
    finally:
        gc.enable()
