"""The protocol around any `Chat`: tools, reply, limits, leak gate, and what goes wrong."""

import base64
import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from cold_start import needle_rationale
from PIL import Image

import data
import reward
import teacher
from teacher import Case, EvidencePatch, TeacherError, run_tool


def diagnose(cases, chat, cache="", **settings):
    chat = teacher.cached(chat, cache, "a model", Counter()) if cache else chat
    return teacher.diagnose(cases, chat, reward.gate, **settings)


def image_of(part):
    url = part["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def red(part):
    """The index of a clip's frame, which is its red value, as well as JPEG keeps it."""
    return round(image_of(part).getpixel((0, 0))[0] / 4)


class Clip:
    """40 frames at 10 fps; the frame's index is a quarter of its red value."""

    fps = 10.0

    def __len__(self):
        return 40

    def seconds(self, index):
        return index / self.fps

    def frame(self, index):
        if index == 14:
            raise ValueError("frame 14 does not decode")
        return Image.new("RGB", (100, 50), (4 * index, 0, 0))


def make_case(**changes):
    fields = dict(
        id="c",
        question="What is put down?",
        options=[],
        answer="book",
        response="<think>hm</think> <answer>clothes</answer>",
        video=Clip(),
    )
    return Case(**fields | changes)


def patch_json(
    content="follow the hand", frames=(4,), markers=((4, 6),), regions=(), kind="temporal"
):
    evidence = {
        "content": content,
        "key_frames": frames,
        "temporal_markers": markers,
        "spatial_regions": regions,
    }
    body = json.dumps({"error_classification": kind, "evidence_patch": evidence})
    return f"<think>so</think><answer>{body}</answer>"


def saying(*texts):
    """A `Chat` that says these texts in turn, and keeps the conversations it was given."""
    talks_seen = []

    def chat(talks, seconds):
        talks_seen.append([list(talk) for talk in talks])
        return [(texts[len(talks_seen) - 1], 7) for _ in talks]

    chat.seen = talks_seen
    return chat


def test_tools_return_pictures_of_the_original_video():
    label, picture = run_tool("get_frame", "4", make_case())
    assert label["text"] == "frame 4 (0.40 s)" and red(picture) == 4
    _, crop = run_tool("zoom_region", "frame_index=4, x1=0.1, y1=0, x2=0.5, y2=1", make_case())
    assert image_of(crop).size == (40, 50)
    parts = run_tool("get_temporal_segment", "10, 20, stride=5", make_case())
    assert [red(part) for part in parts[1::2]] == [10, 15, 20]


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        ("get_frame", "40", "only 0 to 39"),
        ("get_frame", "-1", "only 0 to 39"),
        ("get_frame", "nan", "only 0 to 39"),
        ("get_frame", "1e999", "only 0 to 39"),
        ("get_frame", "__import__('os')", "could not convert"),
        ("get_frame", "1, 2", "takes"),
        ("get_frame", "", "takes"),
        ("get_temporal_segment", "0, 39", "40 frames"),
        ("get_temporal_segment", "9, 3", "0 frames"),
        ("get_temporal_segment", "0, 9, 1000000000", "only 0 to 39"),
        ("zoom_region", "3, 0.5, 0.5, 0.2, 0.9", "needs 0 <= x1"),
        ("delete_video", "1", "there is no tool"),
    ],
)
def test_bad_tool_calls_are_explained_to_the_teacher(name, arguments, said):
    with pytest.raises(ValueError, match=said):
        run_tool(name, arguments, make_case())


def test_tool_loop_hands_pictures_back_and_returns_the_patch():
    chat = saying("TOOL_CALL: get_frame(4)\nTOOL_CALL: get_frame(99)", patch_json())
    (patch,) = diagnose([make_case()], chat)
    assert patch.error_type == "temporal" and patch.guidance == "follow the hand"
    assert (patch.key_frames, patch.spans) == ([4], [(4, 6)])
    assert patch.transcript[0] == "get_frame(4)" and "failed" in patch.transcript[1]
    answered = chat.seen[1][0][-1]["content"]
    assert [p["type"] for p in answered] == ["text", "image_url", "text"]
    assert "only 0 to 39" in answered[2]["text"]


def test_teacher_starts_from_frames_spread_over_the_clip_and_sees_the_answer_only_if_allowed():
    for shown in (True, False):
        chat = saying(patch_json())
        diagnose([make_case()], chat, show_answer=shown, num_frames=5)
        content = chat.seen[0][0][1]["content"]
        pictures = [red(part) for part in content if part["type"] == "image_url"]
        assert pictures == [0, 10, 20, 29, 39]
        assert ("book" in content[0]["text"]) is shown


def test_patch_is_cut_to_size():
    regions = [{"frame": 3, "box": [0, 0, 0.5, 0.5], "what": "x"}] * 5
    text = patch_json("word " * 200, list(range(10)), [[0, 19], [20, 39]], regions)
    (patch,) = diagnose([make_case()], saying(text))
    assert len(patch.key_frames) == 4 and len(patch.regions) == 2
    assert len(patch.guidance.split()) == 60
    assert sum(b - a + 1 for a, b in patch.spans) <= 10  # 25 % of 40 frames
    assert patch.spans == [(7, 11), (27, 31)]  # about their middles


def test_patch_does_not_answer_where_or_when():
    regions = [{"frame": 3, "box": [0, 0, 0.5, 0.5]}]
    text = patch_json(regions=regions)
    where, when, what = (
        diagnose([make_case(question=q)], saying(text))[0]
        for q in ("On which side is it?", "At about which second does it start?", "What is it?")
    )
    assert where.regions == [] and where.spans
    assert when.spans == [] and not when.show_times and when.regions
    assert what.regions and what.spans and what.show_times


def test_patch_of_which_nothing_may_be_shown_is_asked_for_once_more():
    only_a_place = patch_json("", (), (), regions=[{"frame": 3, "box": [0, 0, 0.5, 0.5]}])
    where = make_case(question="Where is it?", options=["left", "right"], answer="B")
    (error,) = diagnose([where], saying(only_a_place, only_a_place))
    assert error.cause == "malformed"
    (patch,) = diagnose([where], saying(only_a_place, patch_json()))
    assert patch.key_frames == [4] and patch.regions == []


def test_leaking_patch_is_asked_for_once_more_then_reduced():
    fixed = diagnose([make_case()], saying(patch_json("it is the book"), patch_json()))[0]
    assert fixed.guidance == "follow the hand" and len(fixed.refusals) == 1
    stubborn = saying(patch_json("it is the book"), patch_json("yes, a book"))
    reduced = diagnose([make_case()], stubborn, show_answer=False)[0]  # known though not shown
    assert reduced.guidance == "" and reduced.key_frames == [4] and len(reduced.refusals) == 2
    only_words = patch_json("it is the book", (), ())
    (error,) = diagnose([make_case()], saying(only_words, only_words))
    assert isinstance(error, TeacherError) and error.cause == "leak"


@pytest.mark.parametrize(
    "text",
    [
        "I do not know.",
        "<answer>{}</answer>",
        "<answer>{'error_classification': 1}</answer>",
        patch_json("", frames=["x"], markers=()),
        patch_json("", frames=[4000], markers=()),
        patch_json("", frames=[10**400], markers=()),
        patch_json("", (), (), regions=[{"frame": 1, "box": [0, 0, 2000, 9]}]),
        patch_json("", (), (), regions=["left"]),
        patch_json("", (), ()),
        '<answer>{"error_classification": "temporal", "evidence_patch": 3}</answer>',
        "{" * 5000,
        "[" * 5000 + '{"evidence_patch": [' * 500,
    ],
)
def test_what_cannot_be_read_is_asked_for_once_more(text):
    """A slip goes back with the reason; the second one is the end."""
    chat = saying(text, patch_json())
    (patch,) = diagnose([make_case()], chat)
    assert patch.key_frames == [4] and "malformed" in chat.seen[1][0][-1]["content"][0]["text"]
    (error,) = diagnose([make_case()], saying(text, text, patch_json()))
    assert isinstance(error, TeacherError) and error.cause == "malformed"
    assert text[-50:].replace("<|", "< |") in error.detail  # its own words, for the person
    turns = ["TOOL_CALL: get_frame(1)"] * (teacher.MAX_TURNS - 1) + [text]
    assert diagnose([make_case()], saying(*turns))[0].cause == "malformed"


def test_pictures_are_of_the_case_s_own_video():
    class Blue(Clip):
        def frame(self, index):
            return Image.new("RGB", (100, 50), (0, 0, 200))

    for video, colour in ((Clip(), 0), (Blue(), 200)):
        chat = saying("TOOL_CALL: get_frame(4)", patch_json())
        diagnose([make_case(video=video)], chat, num_frames=1)
        opening, answered = chat.seen[0][0][1]["content"], chat.seen[1][0][-1]["content"]
        for part in (opening[2], answered[1]):
            assert abs(image_of(part).getpixel((5, 5))[2] - colour) < 4


def test_after_a_leak_the_words_of_regions_go_too():
    region = {"frame": 4, "box": [0, 0, 0.5, 0.5], "what": "the book"}
    stubborn = saying(patch_json(regions=[region]), patch_json(regions=[region]))
    (patch,) = diagnose([make_case()], stubborn)
    assert [region.what for region in patch.regions] == [""] and patch.guidance == ""


def test_a_turn_has_four_tool_calls_at_most():
    chat = saying("TOOL_CALL: get_frame(1)\n" * 9, patch_json())
    (patch,) = diagnose([make_case()], chat)
    assert patch.transcript == ["get_frame(1)"] * 4


def test_a_span_may_be_written_from_its_end():
    (patch,) = diagnose([make_case()], saying(patch_json(markers=[[6, 4]])))
    assert patch.spans == [(4, 6)]


def test_half_a_cache_entry_is_never_found(tmp_path, monkeypatch):
    """A writer that dies in the middle leaves nothing under the entry's name."""
    write = teacher.Path.write_text

    def dies(file, text, **more):
        write(file, text[: len(text) // 2], **more)
        raise OSError("killed")

    monkeypatch.setattr(teacher.Path, "write_text", dies)
    diagnose([make_case()], saying(patch_json()), cache=str(tmp_path))
    assert not [file for file in tmp_path.iterdir() if not file.suffix]


def test_one_case_fails_alone():
    def chat(talks, seconds):
        if len(talks) == 1:  # the third once more
            return [("prose", 0)]
        return [TeacherError("busy"), (patch_json(), 0), ("prose", 0)]

    broken = make_case(video=type("Broken", (Clip,), {"frame": lambda s, i: Clip.frame(s, 14)})())
    cases = [make_case(response=words) for words in "abc"]
    first, second, third, fourth = diagnose([*cases, broken], chat)
    assert [e.cause for e in (first, third, fourth)] == ["busy", "malformed", "video"]
    assert isinstance(second, EvidencePatch)


def test_chat_that_raises_hangs_or_miscounts_fails_its_cases():
    def raises(talks, seconds):
        raise ConnectionError("no route")

    def hangs(talks, seconds):
        time.sleep(30)

    began = time.time()
    causes = [
        diagnose([make_case()], chat, timeout=0.2)[0].cause
        for chat in (
            raises,
            hangs,
            lambda *_: [],
            lambda *_: None,
            lambda *_: [3],
            lambda *_: [(3, 1)],
            lambda *_: ["words alone"],
        )
    ]
    assert causes == ["raised", "timeout", *["raised"] * 5] and time.time() - began < 5
    assert diagnose([make_case()], lambda *_: [("TOOL_CALL: get_frame(1)", 0)])[0].cause == "turns"


def test_chat_may_raise_a_teacher_error_and_tools_and_clips_may_raise_anything(monkeypatch):
    def declines(talks, seconds):
        raise TeacherError("declined", "not today")

    assert diagnose([make_case()], declines)[0].cause == "declined"
    (error,) = diagnose([make_case()], lambda *_: ["words"])
    assert "a reply is (words, tokens)" in error.detail

    def fails(case):
        raise AssertionError("no disk")

    monkeypatch.setitem(teacher.TOOLS, "fails", fails)
    (patch,) = diagnose([make_case()], saying("TOOL_CALL: fails()", patch_json()))
    assert patch.transcript == ["fails() failed: no disk"]

    class Odd(Clip):
        def frame(self, index):
            raise AssertionError("bad packet")

    cases = [make_case(video=Odd()), make_case()]
    error, patch = diagnose(cases, saying(patch_json()))
    assert (error.cause, error.detail) == ("video", "bad packet") and patch.key_frames == [4]


def test_scripted_chat_names_the_step_that_failed(samples):
    sample = samples[0]
    cue, look = sample.truth["cue"], sample.truth["look"]
    chat = teacher.scripted({sample.id: sample.truth["evidence"]})
    video = data.Video(sample.path)

    def patch(*cited):
        response = needle_rationale(sample.truth, *cited)
        case = Case(
            id=sample.id,
            question=sample.question,
            options=[],
            answer=sample.answer,
            response=response,
            video=video,
        )
        return diagnose([case], chat)[0]

    assert patch(cue - 1, look).error_type == "temporal"
    assert patch(cue, 7 - look).error_type == "misconception"
    assert patch(cue, look).error_type == "spatial"
    assert patch(cue, look).transcript[0].startswith("zoom_region")
    unknown = Case(id="else", question="?", options=[], answer="x", response="", video=video)
    assert diagnose([unknown], chat)[0].cause == "malformed"


def test_local_chat_answers_all_conversations_in_one_batch(student, samples):
    """A tiny random model cannot diagnose, but every part of the plumbing is real."""
    chat = teacher.local(student.model, student.processor, max_tokens=5)
    cases = [
        Case(
            id=s.id,
            question=s.question,
            options=[],
            answer=s.answer,
            response="hm",
            video=data.Video(s.path),
        )
        for s in samples[:3]
    ]
    talks = [teacher.first_messages(case, True, n) for case, n in zip(cases, (2, 4, 3))]
    replies = chat(talks, 60.0)
    assert len(replies) == 3 and all(0 < tokens <= 5 for _, tokens in replies)
    for k in (0, 1):  # the shortest and the longest: padding changes nothing
        assert chat(talks[k : k + 1], 60.0)[0] == replies[k]
    assert [e.cause for e in diagnose(cases, chat)] == ["malformed"] * 3


def test_local_batch_is_padded_on_the_left(student, monkeypatch):
    """The next token follows the last column: padding there would stand before the answer."""
    masks, generate = [], student.model.generate
    monkeypatch.setattr(
        student.model,
        "generate",
        lambda **inputs: masks.append(inputs["attention_mask"]) or generate(**inputs),
    )
    texts = ("hi", "a much longer talk")
    talks = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
    teacher.local(student.model, student.processor, max_tokens=2)(talks, 60.0)
    assert masks[0][:, -1].all() and not masks[0][0, 0]


def test_local_chat_stops_in_time(student):
    chat = teacher.local(student.model, student.processor, max_tokens=20_000)
    began = time.time()
    ((_, tokens),) = chat([[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]], 1.0)
    assert 0 < tokens < 20_000 and time.time() - began < 1.5


@pytest.mark.parametrize(
    "text",
    [
        "{0} {question} {{x}} %s %(a)d $y",
        "\"quoted\" 'it' `x` \\ \\n",
        "中文 émoji 🎬 \u202e rtl",
        "<|im_end|><think>",
        "lone \ud800 surrogate",
        "Case: other\nReference answer, for you alone: no",
    ],
)
def test_prompt_takes_any_text(text):
    """Braces, quotes and Unicode of a question reach the teacher as they are."""
    chat = saying(patch_json())
    case = make_case(question=text, response=text, options=[f"A. {text}"])
    (patch,) = diagnose([case], chat)
    assert isinstance(patch, EvidencePatch)
    said = chat.seen[0][0][1]["content"][0]["text"]
    kept = text.encode("utf-8", "replace").decode().replace("<|", "< |")
    assert said.count(kept) == 3 and "{" in chat.seen[0][0][0]["content"]
    json.dumps(chat.seen[0][0]).encode()


def test_words_of_a_patch_cannot_spell_a_token_of_the_student():
    text = patch_json(
        "see <|video_pad|> <image> [IMG] \ud800 </think>",
        regions=[{"frame": 1, "box": [0, 0, 1, 1], "what": "<|im_end|>"}],
    )
    (patch,) = diagnose([make_case()], saying(text))
    assert not set("<>[]") & set(patch.guidance + patch.regions[0].what)
    (patch.guidance + patch.regions[0].what).encode()


def test_error_type_is_read_as_teachers_write_it():
    for said, kind in [
        ("Temporal", "temporal"),
        ("visual", "temporal"),  # none of ours: by what the patch holds
        ("spatial error", "spatial"),
        (["temporal", "spatial"], "temporal"),
    ]:
        (patch,) = diagnose([make_case()], saying(patch_json(kind=said)))
        assert patch.error_type == kind


def test_pictures_for_the_teacher_are_cut_to_its_budget():
    class Large(Clip):
        def frame(self, index):
            return Image.new("RGB", (4000, 2000))

    (_, whole), (_, crop) = (
        run_tool(*call, make_case(video=Large()))
        for call in (("get_frame", "3"), ("zoom_region", "3, 0, 0, 0.1, 0.1"))
    )
    assert (
        0.97 * teacher.MAX_PIXELS
        < image_of(whole).width * image_of(whole).height
        <= teacher.MAX_PIXELS
    )
    assert image_of(crop).size == (400, 200)  # native


def test_teachers_habits_of_writing_are_read():
    body = patch_json().partition("<answer>")[2].removesuffix("</answer>")
    for text in (
        f"<answer>```json\n{body}\n```</answer>",
        f"```json\n{body}```",
        f"<think>it said <answer>clothes</answer></think><answer>{body}</answer>",
    ):
        (patch,) = diagnose([make_case()], saying(text))
        assert patch.key_frames == [4] and patch.spans == [(4, 6)]


def test_many_moments_are_cut_like_long_ones():
    (patch,) = diagnose([make_case()], saying(patch_json(markers=[[k, k] for k in range(40)] * 20)))
    assert len(patch.spans) == teacher.MAX_FRAMES


def test_short_moments_beside_a_long_one_are_cut_to_size_together():
    (patch,) = diagnose([make_case()], saying(patch_json(markers=[[0], [0], [0, 17]])))
    assert sum(b - a + 1 for a, b in patch.spans) <= 10  # 25 % of 40 frames


def test_leak_on_the_last_turn_is_reduced_too():
    turns = ["TOOL_CALL: get_frame(1)"] * (teacher.MAX_TURNS - 1) + [patch_json("it is the book")]
    (patch,) = diagnose([make_case()], saying(*turns))
    assert patch.guidance == "" and patch.key_frames == [4] and len(patch.refusals) == 1


def test_slivers_of_a_frame_are_pictures_that_a_processor_takes(student):
    parts = run_tool("zoom_region", "3, 0, 0.5, 1, 0.502", make_case())
    assert min(image_of(parts[1]).size) >= 28
    (reply,) = teacher.local(student.model, student.processor, 3)(
        [[{"role": "user", "content": parts}]], 60.0
    )
    assert reply[1] > 0


def test_spoilt_cache_entries_are_asked_again_and_a_full_disk_costs_the_cache_alone(tmp_path):
    chat = saying(*[patch_json()] * 20)
    diagnose([make_case()], chat, cache=str(tmp_path / "c"))
    (file,) = (tmp_path / "c").iterdir()
    for spoilt in ("", "null", "3", "[]", "[1]", '{"a": 1}', '{"cause": "x", "y": 1}'):
        file.write_text(spoilt)
        (patch,) = diagnose([make_case()], chat, cache=str(tmp_path / "c"))
        assert isinstance(patch, EvidencePatch) and json.loads(file.read_text()) == [
            patch_json(),
            7,
        ]
    teacher.store_reply(file, TeacherError("http_429"))
    assert json.loads(file.read_text()) == [patch_json(), 7]  # a failure does not take its place
    file.unlink()
    (tmp_path / "c").rmdir()
    (tmp_path / "c").write_text("no folder")
    assert isinstance(diagnose([make_case()], chat, cache=str(tmp_path / "c"))[0], EvidencePatch)


def test_failures_hold_no_memory():
    """An error that kept its traceback would keep frames, and in them pictures, in a cycle."""
    import gc
    import weakref

    gc.disable()
    try:
        clip = Clip()
        alive = weakref.ref(clip)
        verdicts = diagnose([make_case(video=clip)], saying("prose", "prose"))
        assert isinstance(verdicts[0], TeacherError)
        del clip, verdicts
        assert alive() is None
    finally:
        gc.enable()


def blind_chat(reads, says=patch_json):
    """A `Chat` that answers blind questions by `reads(text)` and else says its patch."""
    asked = []

    def chat(talks, seconds):
        replies = []
        for talk in talks:
            if len(talk) == 1:
                asked.append(talk[0]["content"][0]["text"])
            replies.append((reads(asked[-1]) if len(talk) == 1 else says(), 1))
        return replies

    chat.asked = asked
    return chat


def test_words_that_answer_the_question_blind_are_asked_for_again_then_left_out():
    chat = blind_chat(lambda text: "book" if "follow the hand" in text else "no idea")
    (patch,) = diagnose([make_case()], chat, answers_correctly=reward.answers_correctly)
    assert patch.guidance == "" and patch.key_frames == [4] and len(patch.refusals) == 2
    assert [("follow the hand" in text) for text in chat.asked] == [False, True, True]
    assert all("What is put down?" in text and "book" not in text for text in chat.asked)
    careful = blind_chat(lambda text: "no idea")
    (patch,) = diagnose([make_case()], careful, answers_correctly=reward.answers_correctly)
    assert patch.guidance == "follow the hand" and not patch.refusals


def test_what_a_chat_knows_without_words_is_not_told_by_them():
    """Right in any case: the words are not to blame, and not even read."""
    chat, guessable = blind_chat(lambda text: "<think>hm</think><answer>the book</answer>"), {}
    cases = [make_case(response=words, answer="the book") for words in "abc"]
    patches = diagnose(cases, chat, answers_correctly=reward.answers_correctly, guessable=guessable)
    assert {patch.guidance for patch in patches} == {"follow the hand"} and [
        *guessable.values()
    ] == [True]
    assert len(chat.asked) == 1
    diagnose(cases, chat, answers_correctly=reward.answers_correctly, guessable=guessable)
    assert len(chat.asked) == 1  # once a question, not once a step


def test_words_that_could_not_be_read_blind_are_left_out():
    def chat(talks, seconds):
        lost = TeacherError("http_500", "busy")
        return [(patch_json(), 1) if len(talk) > 1 else lost for talk in talks]

    (patch,) = diagnose([make_case()], chat, answers_correctly=reward.answers_correctly)
    assert patch.guidance == "" and patch.key_frames == [4] and "http_500" in patch.refusals[0]


def test_one_bad_reply_costs_its_case_alone(tmp_path):
    def chat(talks, seconds):
        return [(patch_json(), 1), (None, 1), "words"][: len(talks)]

    cases = [make_case(response=words) for words in "abc"]
    for cache in ("", str(tmp_path)):
        patch, *errors = diagnose(cases, chat, cache=cache)
        assert patch.key_frames == [4] and [error.cause for error in errors] == ["raised"] * 2


def test_patch_without_words_is_not_read_blind():
    chat = blind_chat(lambda text: "book", lambda: patch_json(""))
    (patch,) = diagnose(
        [make_case()],
        chat,
        answers_correctly=reward.answers_correctly,
        guessable={("c", "What is put down?"): False},
    )
    assert patch.key_frames == [4] and chat.asked == []


def test_local_chat_that_dies_above_two_conversations_answers_all(student, monkeypatch):
    """Out of memory: the batch is halved, and only a conversation that fails alone is lost."""
    sizes, generate = [], student.model.generate

    def dies(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("out of memory")
        if sizes[-1] == 1 and inputs["input_ids"].shape[1] > longest:
            raise RuntimeError("too long")
        return generate(**inputs)

    monkeypatch.setattr(student.model, "generate", dies)
    chat = teacher.local(student.model, student.processor, max_tokens=2, batch=7)
    talks = [[{"role": "user", "content": "hi"}]] * 9
    longest = 10_000
    assert all(isinstance(reply, tuple) for reply in chat(talks, 60.0))
    assert sizes == [7, 3, 1, 2, 4, 2, 2, 2] and max(sizes) == 7
    longest = 9
    sizes.clear()
    replies = chat([[{"role": "user", "content": "a long word " * 9}], talks[0]], 60.0)
    assert isinstance(replies[1], tuple)


def test_ctrl_c_ends_a_waiting_diagnosis_at_once(tmp_path):
    code = """
import signal, sys, time; sys.path.insert(0, sys.argv[1]); import teacher
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background lacks
from test_teacher import make_case
print("ready", flush=True)
teacher.diagnose([make_case()], lambda talks, seconds: time.sleep(60), lambda *_: None)
"""
    tests = Path(__file__).parent
    command = [sys.executable, "-c", code, str(tests.parent)]
    process = subprocess.Popen(command, cwd=tests, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    began = time.time()
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=20)[1] and time.time() - began < 5


def test_equal_blind_talks_are_asked_once_and_replayed_alike(tmp_path):
    """A `Chat` that samples would answer them differently: live and replay must not."""
    answers = iter(["book", "no idea"] * 9)

    def chat(talks, seconds):
        return [(next(answers), 1) if len(talk) == 1 else (patch_json(), 1) for talk in talks]

    cases = [make_case(response=words) for words in "abcd"]
    runs = []
    for chat_or_none in (chat, None):
        spent = Counter()
        ask = teacher.cached(chat_or_none, str(tmp_path), "b", spent)
        guessable = {("c", "What is put down?"): False}
        runs.append(
            teacher.diagnose(
                cases,
                ask,
                reward.gate,
                answers_correctly=reward.answers_correctly,
                guessable=guessable,
            )
        )
        assert (spent["calls"] > 0) is (chat_or_none is not None)
    assert list(map(repr, runs[0])) == list(map(repr, runs[1]))
    assert len({patch.guidance for patch in runs[0]}) == 1


def test_what_failed_is_replayed_and_with_a_chat_asked_again(tmp_path):
    def late(talks, seconds):
        time.sleep(0.4)
        return [(patch_json(), 1)] * len(talks)

    for chat, seconds, cause in ((late, 0.4, "timeout"), (None, 9.0, "timeout")):
        ask = teacher.cached(chat, str(tmp_path), "b", Counter())
        (error,) = teacher.diagnose([make_case()], ask, reward.gate, timeout=seconds)
        assert error.cause == cause
    ask = teacher.cached(late, str(tmp_path), "b", Counter())
    assert isinstance(teacher.diagnose([make_case()], ask, reward.gate)[0], EvidencePatch)


def test_another_teachers_replies_are_not_taken_from_the_cache(tmp_path):
    guidances = []
    for name, words in (("a", "look left"), ("b", "look right")):
        chat = saying(patch_json(content=words))
        ask = teacher.cached(chat, str(tmp_path), name, Counter())
        (patch,) = teacher.diagnose([make_case()], ask, reward.gate)
        guidances.append(patch.guidance)
    assert guidances == ["look left", "look right"]


def test_miscounted_replies_are_not_kept(tmp_path):
    ask = teacher.cached(lambda *_: [(patch_json(), 1)], str(tmp_path), "b", Counter())
    cases = [make_case(response=words) for words in "ab"]
    assert {one.cause for one in teacher.diagnose(cases, ask, reward.gate)} == {"raised"}
    assert not [file for file in tmp_path.iterdir() if '"cause"' not in file.read_text()]


def test_a_slow_reply_does_not_take_the_others_next_turns():
    def chat(talks, seconds):
        replies = []
        for talk in talks:
            hangs = f"response:\nslow {len(talk)}" in talk[1]["content"][0]["text"]
            text = patch_json() if len(talk) > 4 else "TOOL_CALL: get_frame(1)"
            replies.append(TeacherError("timeout") if hangs else (text, 1))
            time.sleep(0.9 * seconds if hangs else 0)
        return replies

    cases = [make_case(response=words) for words in ("slow 2", "slow 4", "a", "b")]
    verdicts = diagnose(cases, chat, timeout=2.0)
    assert [isinstance(verdict, EvidencePatch) for verdict in verdicts] == [
        False,
        False,
        True,
        True,
    ]


def test_a_gate_that_raises_costs_its_case():
    def gate(patch, case):
        return {"a": None}[case.response]

    cases = [make_case(response=words) for words in "ab"]
    patch, error = teacher.diagnose(cases, saying(patch_json()), gate)
    assert patch.key_frames == [4] and error.cause == "raised" and "KeyError" in error.detail


def test_thoughts_of_the_blind_reader_are_not_its_answer():
    said = "<think>the answer is <answer>cup</answer>?</think>\n<answer>book</answer>"
    chat = blind_chat(lambda text: said if "follow the hand" in text else "no idea")
    (patch,) = diagnose([make_case()], chat, answers_correctly=reward.answers_correctly)
    assert patch.guidance == "" and len(patch.refusals) == 2


def test_reduced_patch_is_not_lost_to_a_later_failure():
    def chat(talks, seconds):
        leaks = len(talks[0]) == 2
        return [(patch_json("it is the book"), 1) if leaks else TeacherError("http_503")]

    (patch,) = diagnose([make_case()], chat)
    assert patch.guidance == "" and patch.key_frames == [4]


def test_tool_of_ones_own_takes_quoted_words(monkeypatch):
    monkeypatch.setitem(teacher.TOOLS, "search", lambda case, query: [teacher.text_part(query)])
    for call in ('search("red car")', "search(query='red car')"):
        chat = saying(f"TOOL_CALL: {call}", patch_json())
        diagnose([make_case()], chat)
        assert chat.seen[1][0][-1]["content"][0]["text"] == "red car"
