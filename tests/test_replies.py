"""A teacher's replies as models write them: each gives the patch that a person would read."""

import json
import time

import pytest
import test_teacher
from test_teacher import diagnose, make_case, saying

import teacher
from teacher import Case, EvidencePatch, Region

BOX, LABELLED = [0.1, 0.2, 0.5, 0.6], {"frame": 3, "box": [0.1, 0.2, 0.5, 0.6], "what": "square"}


class Clip(test_teacher.Clip):
    """16 frames of 128 x 128 pixels, two a second."""

    fps = 2.0

    def __len__(self):
        return 16

    def frame(self, index):
        return teacher.Image.new("RGB", (128, 128), (8 * index, 0, 0))


def body(kind="spatial", frames=(3,), markers=((2, 4),), region=LABELLED, **more):
    evidence = {
        "content": "look at the square",
        "key_frames": frames,
        "temporal_markers": markers,
        "spatial_regions": [region],
    }
    return json.dumps({"error_classification": kind, "evidence_patch": evidence | more})


PLAIN = body()
SINGLE = PLAIN.replace("'", "").replace('"', "'")
UNQUOTED = PLAIN.replace('"evidence_patch"', "evidence_patch").replace('"content"', "content")
REPLIES = {
    "bare": PLAIN,
    "in a fence": f"```json\n{PLAIN}\n```",
    "in a fence, in the answer": f"<think>x</think>\n<answer>\n```json\n{PLAIN}\n```\n</answer>",
    "thinking without its beginning": f"it is {{wrong}}</think>{PLAIN}",
    "thinking with a call and JSON": f'<think>TOOL_CALL: get_frame(1) {{"a": 1}}</think>{PLAIN}',
    "a call in thoughts of several lines": f"<think>hm\nTOOL_CALL: get_frame(1)\n</think>{PLAIN}",
    "thinking without an end": f"<think>I see. <answer>{PLAIN}</answer>",
    "prose around": f"Here you are {{as asked}}: {PLAIN} I hope {{this}} helps.",
    "prose around, tags": f"So {{x}}. <answer>{PLAIN}</answer> I hope {{this}} helps.",
    "trailing commas": PLAIN.replace("]}", "],}").replace("}}", "},}"),
    "trailing comma and prose": PLAIN.replace("}}", "},}") + " I hope {this} helps.",
    "comments": PLAIN.replace('"key_frames"', '// the frames\n"key_frames"'),
    "comments at the end of lines": PLAIN.replace(", ", ", // note\n"),
    "comments of other kinds": PLAIN.replace(", ", ", # note\n", 1).replace("{", "{ /* a */ ", 1),
    "single quotes": SINGLE,
    "no quotes": UNQUOTED,
    "a line break in a text": PLAIN.replace("look at the square", "look at\nthe square"),
    "a line break and a comma": PLAIN.replace("at the", "at\nthe").replace("}}", "},}"),
    "None and True": PLAIN.replace('"content"', '"why": None, "sure": True, "content"'),
    "without the outer object": json.dumps(json.loads(PLAIN)["evidence_patch"]),
    "a region, not a list": body(spatial_regions=LABELLED),
    "box in 0-1000": body(region={"frame": 3, "box": [100, 200, 500, 600], "what": "square"}),
    "bbox_2d": body(region={"frame": 3, "bbox_2d": [100, 200, 500, 600], "label": "square"}),
    "box as a dict": body(
        region={"frame": 3, "box": {"x1": 0.1, "y1": 0.2, "x2": 0.5, "y2": 0.6}, "what": "square"}
    ),
    "box as corners": body(region={**LABELLED, "box": [[0.1, 0.2], [0.5, 0.6]]}),
    "box as a text": body(region={**LABELLED, "box": "0.1, 0.2, 0.5, 0.6"}),
    "box of texts": body(region={**LABELLED, "box": ["0.1", "0.2", "0.5", "0.6"]}),
    "box without a frame": body(region={"box": BOX, "what": "square"}),
    "region's frame in words": body(region={**LABELLED, "frame": "frame 3"}),
    "description": body(region={"frame_index": 3, "bbox": BOX, "description": "square"}),
    "a bad region beside": body(spatial_regions=[{"frame": 3, "box": [5]}, "left", LABELLED]),
    "flat markers": body(markers=[2, 4]),
    "markers in words": body(markers=["frames 2-4"]),
    "markers in words, with to": body(markers=["frame 2 to frame 4"]),
    "flat markers in words": body(markers=["frame 2", "frame 4"]),
    "a marker as a dict": body(markers=[{"start": 2, "end": 4}]),
    "a marker as a dict of frames": body(markers=[{"start_frame": 2, "end_frame": "4"}]),
    "a lone marker as a dict": body(markers={"start": 2, "end": 4}),
    "clock times": body(markers=[["0:01", "0:02"]]),
    "clock times in a text": body(markers=["0:01-0:02"]),
    "clock times, flat": body(markers=["00:01", "00:02"]),
    "clock times with hours": body(markers=[["0:00:01.0", "0:00:02.0"]]),
    "clock times as a dict": body(markers=[{"start": "0:01", "end": "0:02"}]),
    "seconds": body(markers=["1.0 s to 2.0 seconds"]),
    "seconds as the student reads them": body(markers=["<1.0 seconds> to <2.0 seconds>"]),
    "a bad moment beside": body(markers=[[2, 4], [900, 901], "when the hand lets go"]),
    "backwards": body(markers=[[4, 2]]),
    "frames in words": body(frames=["frame 3"]),
    "frames as numbers in texts": body(frames=["3"]),
    "a frame, not a list": body(frames=3),
    "frames in a text": body(frames="3"),
    "a frame as a dict": body(frames=[{"frame": 3}]),
    "frames with a point": body(frames=[3.0]),
    "a frame as a time": body(frames=["0:01.5"]),
    "a bad frame beside": body(frames=[3, 400, -3, "x", None]),
    "a key's name in the prose": f"I will now write the evidence_patch.\n```json\n{PLAIN}\n```",
    "a heading": f"**error_classification**: spatial\n<answer>{PLAIN}</answer>",
    "other keys first": PLAIN.replace('{"error', '{"seen": [{"frame": 1}], "error', 1),
    "a draft before": f"<answer>{body(frames=[9])}</answer> No: <answer>{PLAIN}</answer>",
    "a patch in a list": json.dumps({"evidence_patch": [json.loads(PLAIN)["evidence_patch"]]}),
    "escapes that JSON lacks": PLAIN.replace("key_frames", "key\\_frames").replace(
        "at the", "at\\ the"
    ),
    "quotes in a text": PLAIN.replace("look at the square", 'look at the "square"', 1)
    .replace('"square"', "square", 1)
    .replace("at the square", 'at "the" square', 1),
    "no brace at the end": PLAIN[:-1],
    "long thinking": "<think>" + "hm " * 10_000 + f"</think><answer>{PLAIN}</answer>",
    "two thoughts": f"<think>a</think> so <think>TOOL_CALL: get_frame(1)</think>{PLAIN}",
    "another tag of thinking": f"<thinking>TOOL_CALL: get_frame(1)</thinking>{PLAIN}",
    "frames with underscores": body(frames=["frame_3"]),
    "a frame with its time": body(frames=[{"frame": 3, "timestamp": 1.5}]),
    "a frame with a description": body(frames=[{"frame_index": 3, "description": "2 hands at 5"}]),
    "a marker with a description": body(markers=[{"start": 2, "end": 4, "what": "the 7 cups"}]),
    "times in numbers": body(markers=[{"start_time": 1.0, "end_time": 2.0}]),
    "frame_number": body(region={"frame_number": 3, "box": BOX, "what": "square"}),
    "a region's time": body(region={"timestamp": 1.5, "box": BOX, "what": "square"}),
    "no frame in a region": body(region={"frame": None, "box": BOX, "what": "square"}),
    "bounding_box": body(region={"frame": 3, "bounding_box": BOX, "label": "square"}),
    "flat corners": body(
        region={"frame": 3, "x1": 0.1, "y1": 0.2, "x2": 0.5, "y2": 0.6, "label": "square"}
    ),
    "corners in another order": body(
        region={**LABELLED, "box": {"x1": 0.1, "x2": 0.5, "y1": 0.2, "y2": 0.6}}
    ),
    "sides": body(
        region={**LABELLED, "box": {"top": 0.2, "left": 0.1, "bottom": 0.6, "right": 0.5}}
    ),
    "a box with width beside": body(
        spatial_regions=[{"frame": 3, "box": {"x": 1, "y": 2, "width": 9, "height": 9}}, LABELLED]
    ),
    "content in a list": body(content=["look at", "the square"]),
    "the kind in other words": body(kind="visual"),
    "the kind in capitals": body(kind="SPATIAL error"),
    "several kinds": body(kind=["spatial", "temporal"]),
}


@pytest.mark.parametrize("name", REPLIES)
def test_reply_gives_the_patch_that_a_person_would_read(name):
    (patch,) = diagnose([make_case(video=Clip())], saying(REPLIES[name]))
    assert isinstance(patch, EvidencePatch), patch
    assert patch.guidance == "look at the square" and patch.key_frames == [3]
    assert patch.spans == [(2, 4)] and patch.error_type in ("spatial", "temporal")
    assert patch.regions == [Region(3, tuple(BOX), "square")]


def test_box_in_pixels_is_of_the_picture_that_the_teacher_was_shown():
    class Large(Clip):
        def frame(self, index):
            return teacher.Image.new("RGB", (1268, 1268))  # shown at 633 x 633

    for video, box in ((Clip(), [12.8, 25.6, 64, 76.8]), (Large(), [63, 127, 317, 380])):
        text = body(region={"frame": 3, "bbox_2d": box, "label": "square"})
        (patch,) = diagnose([make_case(video=video)], saying(text))
        assert patch.regions[0].box == pytest.approx(BOX, abs=0.002)
        chat = saying(f"TOOL_CALL: zoom_region(3, {box})", PLAIN)
        diagnose([make_case(video=video)], chat)
        assert "region 0.10 0.20 0.50 0.60" in chat.seen[1][0][-1]["content"][0]["text"]


def test_box_in_pixels_of_a_wide_frame_may_lie_beyond_its_height():
    class Wide(Clip):
        def frame(self, index):
            return teacher.Image.new("RGB", (200, 100))

    text = body(region={"frame": 3, "box": [120, 10, 180, 40], "what": "square"})
    (patch,) = diagnose([make_case(video=Wide())], saying(text))
    assert patch.regions[0].box == pytest.approx((0.6, 0.1, 0.9, 0.4))


def test_box_a_little_over_the_edge_is_cut_to_it():
    for box in ([0.1, 0.2, 1.02, 0.6], [100, 200, 1010, 600]):
        (patch,) = diagnose(
            [make_case(video=Clip())], saying(body(region={**LABELLED, "box": box}))
        )
        assert patch.regions[0].box == (0.1, 0.2, 1.0, 0.6)


def test_null_is_no_word():
    text = body(content=None, region={**LABELLED, "what": None}).replace("}}", "},}")
    (patch,) = diagnose([make_case(video=Clip())], saying(text))
    assert patch.guidance == "" and patch.regions[0].what == ""


def test_one_frame_past_the_end_is_the_last():
    (patch,) = diagnose([make_case(video=Clip())], saying(body(frames=[16], markers=[[14, 16]])))
    assert patch.key_frames == [15] and patch.spans == [(14, 15)]


CALLS = {
    "a line": "TOOL_CALL: get_frame(3)",
    "named": "TOOL_CALL: get_frame(frame_index=3)",
    "named with spaces": "TOOL_CALL: get_frame(frame_index = 3)",
    "in bold and code": "I'll look.\n**TOOL_CALL:** `get_frame(3)`",
    "in bold as a whole": "**TOOL_CALL: get_frame(3)**",
    "in a fence": "```\nTOOL_CALL: get_frame(3)\n```",
    "in a list": "- `TOOL_CALL: get_frame(3)`",
    "in small letters": "tool_call: get_frame(3)",
    "in two words": "Tool call: get_frame(3)",
    "quoted": 'TOOL_CALL: get_frame("3")',
    "as JSON": '<tool_call>{"name": "get_frame", "arguments": {"frame_index": 3}}</tool_call>',
    "as JSON in lines": '<tool_call>\n{"name": "get_frame",\n "arguments": {"frame_index": 3}}',
    "as JSON in a fence": '```json\n{"name": "get_frame", "parameters": {"frame_index": 3}}\n```',
    "with a hyphen": "TOOL-CALL: get_frame(3)",
    "escaped": "TOOL\\_CALL: get\\_frame(3)",
    "in the plural": "TOOL_CALLS:\n- get_frame(3)",
    "with the name in bold": "**TOOL_CALL**: **get_frame**(3)",
    "as a function of functions": "TOOL_CALL: functions.get_frame(3)",
    "by another name": "TOOL_CALL: get_frame(frame=3)",
    "in words": 'TOOL_CALL: get_frame("frame 3")',
    "as JSON in single quotes": "{'name': 'get_frame', 'arguments': {'frame_index': 3}}",
    "in GLM's tags": "<tool_call>get_frame\n<arg_key>frame_index</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>",
    "after thinking": "<think>TOOL_CALL: get_frame(1)?</think>TOOL_CALL: get_frame(3)",
}


@pytest.mark.parametrize("name", CALLS)
def test_tool_call_is_read_as_models_write_it(name):
    chat = saying(CALLS[name], PLAIN)
    (patch,) = diagnose([make_case(video=Clip())], chat)
    assert len(patch.transcript) == 1 and "failed" not in patch.transcript[0]
    assert chat.seen[1][0][-1]["content"][0]["text"] == "frame 3 (1.50 s)"


def test_a_fourth_tool_is_one_entry(monkeypatch):
    def get_subtitles(case):
        return [teacher.text_part(case.record["subtitles"])]

    monkeypatch.setitem(teacher.TOOLS, "get_subtitles", get_subtitles)
    chat = saying("TOOL_CALL: get_subtitles()", PLAIN)
    diagnose([make_case(record={"subtitles": "mind the gap"})], chat)
    assert "TOOL_CALL: get_subtitles()" in chat.seen[0][0][0]["content"]
    assert chat.seen[1][0][-1]["content"][0]["text"] == "mind the gap"


def test_hostile_replies_are_read_in_no_time():
    texts = ["{" * 20_000, "[" * 20_000, '{"evidence_patch": ' * 1000, "TOOL_CALL" * 2000]
    texts += ["TOOL_CALL: a(" * 1500, '"name": ' * 2500, "&a [*a, " * 2500, "</think>" * 2500]
    texts += ['{"evidence_patch": {"key_frames": "' + d * 19_000 for d in ("1", "1:", ".", "1 s")]
    texts += ["{evidence_patch: [&a [1], &b [*a, *a], &c [*b, *b]" + ", &d [*c, *c]" * 400 + "]}"]
    for text in texts:
        began = time.time()
        case = Case(id="c", question="?", options=[], answer="x", response="hm", video=Clip())
        diagnose([case], lambda talks, seconds, text=text: [(text, 1)], num_frames=1)
        assert time.time() - began < 1.5, text[:40]
