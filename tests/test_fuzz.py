"""Hostile and random answers: no error, R in [0, 1], little time; a sound reference is right."""

import random
import time

import pytest

from reward import (
    SUFFIXES,
    Score,
    accuracy_reward,
    alignment,
    leak,
    reference_problem,
    score,
    verify,
)

PIECES = (
    "A B C D E I a b (A) B. **B** option answer the is or and not cat dog 3 -5 3,5 1,200 1'200 12:30 1/2 ½ "
    "1½ m² cm^2 1e5 1e-400 1e999 0 0.004 − – € $ % *** \\boxed{ } { \\frac{1}{2} three twenty-one dozen nan "
    "inf ∞ 出口 犬が สวัสดี ខ្មែរ Собака İ ß ſ ＡＢ １２ … 。 ، <answer> </answer> <think> ٣ ² ⅔ _ ~ + - : / . , ' "
    "\u200b \u202f \ud800 \x00 \n"
).split(" ")  # fmt: skip
OPTIONS = ["A. a dog", "B. a cat", "C. a taxi", "D. none", "E", "dog"]


def random_text(rng):
    pieces = [rng.choice(PIECES) for _ in range(rng.randrange(6))]
    return rng.choice(["", " ", " "]).join(pieces)


def mutated(rng, text):
    letters = list(text)
    for _ in range(rng.randrange(3)):
        place = rng.randrange(len(letters) + 1)
        letters[place : place + rng.randrange(2)] = rng.choice(
            ["", chr(rng.randrange(0x3100)), rng.choice(PIECES)]
        )
    return "".join(letters)


def test_20000_random_and_mutated_answers():
    rng = random.Random(0)
    sound = dict.fromkeys(SUFFIXES, 0)
    for _ in range(20000):
        kind = rng.choice(list(SUFFIXES))
        answer = random_text(rng)
        given = rng.choice([random_text(rng), mutated(rng, answer)])

        reward = accuracy_reward(given, answer, kind)
        correct = verify(given, answer, kind)
        assert 0 <= reward <= 1, (given, answer, kind)
        assert not correct or given.strip(), (given, answer, kind)
        assert not correct or reward > 0, (given, answer, kind)

        if reference_problem(answer, kind, OPTIONS) is None:
            sound[kind] += 1
            response = "<think>x</think> <answer>" + answer + "</answer>"
            assert score(response, answer, kind).correct, (answer, kind)
    assert min(sound.values()) > 100, sound


HOSTILE = {
    "digits": "1" * 10000, "dots": "." * 10000, "commas": "," * 10000, "asterisks": "*" * 10000,
    "opening": "[" * 10000, "round": "(" * 10000, "closing": "]" * 10000, "ones": "1 " * 10000, "B,": "B" + "," * 10000,
    "B ": "B" + " " * 10000 + "x", "A ": "A" + " " * 10000 + "x", "minus": "-" * 10000, "colons": "1:" * 10000, "slashes": "1/" * 10000, "1,": "1," * 10000,
    "thousands": "1" + ",200" * 5000 + "5", "points": "1." * 10000, "e": "1e" * 10000, "is": "is " * 10000,
    "boxed": "\\boxed{" * 10000, "frac": "\\frac{1" * 10000, "han": "出" * 10000, "words": "a b " * 5000, "^": "^" * 10000, "m2": "m2" * 10000,
    "underscores": "_" * 10000, "quotes": "'" * 10000, "one": "one " * 10000, "twenty": "twenty-" * 10000, "$": "-$" * 10000, "-$": "-" + "$" * 10000,
    "5 and dots": "5" + "." * 10000, "1 then digits": "1 " + "1" * 10000 + "x", "spaces": "1" + " " * 10000 + "2", "ABC": "B, or " * 5000,
    "answers": "<answer>" * 10000, "clock": "1" + ":59" * 5000, "decimals": "0." + "3" * 5000, "4000": "9" * 4000, "whole": "1/1 " * 5000, "}": "a}" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", SUFFIXES)
def test_hostile_answers_take_little_time(kind, name):
    answers = {"multiple choice": "B", "numerical": "3", "regression": "3"}
    start = time.process_time()
    result = accuracy_reward(HOSTILE[name], answers.get(kind, "a b, 出口 -5"), kind)
    verify(HOSTILE[name], answers.get(kind, "a b, 出口 -5"), kind)
    seconds = time.process_time() - start
    assert 0 <= result <= 1
    assert seconds < 0.4  # two calls


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", SUFFIXES)
def test_hostile_references_take_little_time(kind, name):
    start = time.process_time()
    reference_problem(HOSTILE[name], kind, OPTIONS)
    assert accuracy_reward(HOSTILE[name] + "x", HOSTILE[name], kind) <= 1
    assert time.process_time() - start < 0.8


def test_a_long_response_takes_little_time():
    start = time.process_time()
    assert score("<answer>" * 10000, "B", "multiple choice") == Score(0.0, 0.0, False)
    assert score("<think>" + "a" * 100000, "B", "multiple choice") == Score(0.0, 0.0, False)
    assert time.process_time() - start < 0.4


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rationales_and_words_take_little_time(name):
    start = time.process_time()
    alignment(f"<think>{HOSTILE[name]}</think>", [(1.0, 2.0)], 0.5)
    assert time.process_time() - start < 0.4
    leak(HOSTILE[name], "How many cups?", [], "3")
    leak(HOSTILE[name], "Which?", ["A. a cup", "B. a cat"], "B")
    assert time.process_time() - start < 1.2
