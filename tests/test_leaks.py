"""The leak gate: one behaviour each, and its rates on the leak set (`tests/bench_leaks.py`)."""

import json

import pytest
from bench_leaks import load, rates
from conftest import ROOT

import reward
from reward import asks_for, leak
from teacher import Case, EvidencePatch, Region

OPTIONS = ["A. A bus", "B. A yellow taxi", "C. A bicycle", "D. A tram"]
OPEN = ("What is put down?", [], "the book")
COUNT = ("How many cups are on the table?", [], "3")
CHOICE = ("Which vehicle passes first?", OPTIONS, "B")
STATE = ("Is the drawer open or closed at the end?", [], "closed")
TRUTH = ("Is there a dog in the garden?", [], "no")
TIME = ("At what second does the light go out?", [], "12")
WORD = ("What is written on the sign?", [], "TAXI")


@pytest.mark.parametrize(
    "words, case, leaks",
    [
        ("follow the hand until it lets go", OPEN, False),
        ("look at the books on the table", OPEN, True),
        ("the answer is seen near the end", OPEN, True),
        ("choose option B", CHOICE, True),
        ("(b) is what passes", CHOICE, True),
        ("it is the second option", CHOICE, True),
        ("a taxi passes, painted yellow", CHOICE, True),
        ("compare the bus, the yellow taxi, the bicycle and the tram", CHOICE, False),
        ("neither the bus nor the tram, and no bicycle either", CHOICE, True),
        ("not the bus that you followed", CHOICE, False),
        ("A vehicle passes close to the camera", CHOICE, False),
        ("there are 3 of them", COUNT, True),
        ("you will find three cups", COUNT, True),
        ("two cups in front and one cup behind", COUNT, True),
        ("your count is one too many", COUNT, True),
        ("go through frames 3 to 30 and count again", COUNT, False),
        ("at 3.0 seconds the whole table is in view", COUNT, False),
        ("it never stays open", STATE, True),
        ("see how far the drawer sticks out", STATE, False),
        ("there is no dog at all", TRUTH, True),
        ("go through the garden from left to right", TRUTH, False),
        ("do not stop at the fence", TRUTH, False),
        ("look at second 12", TIME, True),
        ("wait for the change of brightness", TIME, False),
        ("it reads T-A-X-I", WORD, True),
        ("tango, alpha, xray, india", WORD, True),
        ("t", WORD, False),
        ("look at the taxi", ("Which passes?", OPTIONS, "Option B"), True),
        ("look at the taxi", ("Which passes?", OPTIONS, "**b**"), True),
        ("watch the ball go up", ("What does the ball do?", [], "up"), True),
        ("follow the ball", ("What does the ball do?", [], "up"), False),
        ("", WORD, False),
        ("read the letters one by one", WORD, False),
    ],
)
def test_gate_knows_what_gives_the_answer_away(words, case, leaks):
    assert (leak(words, *case) is not None) is leaks, leak(words, *case)


@pytest.mark.parametrize(
    "question, kinds",
    [
        ("Where is the cup?", {"place"}),
        ("On which side of the table is the cup?", {"place"}),
        ("When does the man leave?", {"time"}),
        ("When the man leaves, what does he hold?", set()),
        ("What is the place where he works called?", set()),
        ("How long does he wait?", {"time"}),
        ("What colour is the cup when he leaves?", set()),
        ("Does he leave?", {"truth"}),
    ],
)
def test_what_a_question_asks_for(question, kinds):
    assert asks_for(question) == kinds


def test_patch_has_no_region_where_a_place_and_no_time_where_a_time_is_asked():
    def patch():
        return EvidencePatch(
            error_type="spatial",
            guidance="look",
            key_frames=[1],
            spans=[(1, 2)],
            regions=[Region(1, (0, 0, 1, 1), "the cup")],
        )

    where, when, who = patch(), patch(), patch()
    for each, question in ((where, "Where is it?"), (when, "When is it?"), (who, "Who is it?")):
        assert (
            reward.gate(
                each,
                Case(
                    id="c", question=question, options=[], answer="Ann", response="hm", video=None
                ),
            )
            is None
        )
    assert where.regions == [] and where.spans and where.show_times
    assert when.regions and when.spans == [] and not when.show_times
    assert who == patch()
    labelled = EvidencePatch("spatial", "look", regions=[Region(1, (0, 0, 1, 1), "Ann's hat")])
    assert (
        reward.gate(
            labelled,
            Case(
                id="c", question="Who is it?", options=[], answer="Ann", response="hm", video=None
            ),
        )
        is not None
    )


def test_rates_on_the_leak_set_are_those_in_assets():
    found = rates(load())
    assert found == {
        k: v
        for k, v in json.loads((ROOT / "assets/leaks.json").read_text()).items()
        if k != "blind_probe"
    }
    for half in (found, found["held_out"]):
        assert half["leaks"] + half["clean"] >= 80
        assert half["caught"] >= 0.89 * half["leaks"] and half["refused"] <= 0.06 * half["clean"]
        assert half["caught_blind"] >= 0.94 * half["leaks"]
        assert half["refused_blind"] <= 0.13 * half["clean"]
        assert half["implied_unguessed_blind"] == half["implied_unguessed"]
