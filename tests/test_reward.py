"""Rewards against hand-computed numbers."""

import pytest

from reward import (
    Score,
    accuracy_reward,
    alignment,
    cited_moments,
    format_reward,
    robust_improvement_reward,
    rouge_l,
    rouge_n,
    score,
    verify,
    word_error_rate,
)


@pytest.mark.parametrize(
    "kind, given, answer, reward, right",
    [
        ("multiple choice", "B", "B", 1, True),
        ("multiple choice", "(b) a taxi", "B", 1, True),
        ("multiple choice", "B. a taxi", "B.", 1, True),
        ("multiple choice", "A taxi", "A", 0, False),  # a word, not a letter
        ("multiple choice", "C", "B", 0, False),
        ("numerical", "3.001", "3", 1, True),
        ("numerical", "1,200 m", "1200", 1, True),
        ("numerical", "3.01", "3", 0, False),
        ("numerical", "3 or 4", "3", 0, False),
        ("numerical", "nan", "3", 0, False),
        ("OCR", "Taxi", "TAXI", 1, True),
        ("OCR", "no entry here", "no entry", 0.5, False),  # one insertion over two words
        ("OCR", "a b c d", "x", 0, False),  # never below 0
        ("free-form", "a bicycle", "a bicycle", 1, True),
        ("free-form", "bicycle", "bicycle", 1, True),  # one word can reach R = 1
        ("free-form", "a dog", "the cat", 0, False),
        ("regression", "4.2", "4.2", 1, True),
        ("regression", "4.62", "4.2", 0.9, True),  # relative error exactly 0.1
        ("regression", "5.04", "4.2", 0.8, False),
        ("regression", "no idea", "4.2", 0, False),
        ("regression", "0", "0", 1, True),
        ("numerical", "3,5", "35", 0, False),
        ("numerical", "−5", "-5", 1, True),  # the typographic minus
        ("numerical", "5", "-5", 0, False),
        ("regression", "-4.2", "-4.2", 1, True),  # a reference below 0
        ("regression", "-4.62", "-4.2", 0.9, True),
        ("regression", "4.2", "-4.2", 0, False),
        ("exact", " Red  blue. ", "red blue", 1, True),
        ("exact", "red", "red blue", 0, False),
    ],
)
def test_reward_and_verdict_by_problem_type(kind, given, answer, reward, right):
    assert accuracy_reward(given, answer, kind) == pytest.approx(reward)
    assert verify(given, answer, kind) is right


def test_unknown_problem_type_is_an_error():
    with pytest.raises(ValueError, match="riddle"):
        accuracy_reward("a", "a", "riddle")


def test_word_error_rate_and_rouge_by_hand():
    # "the cat sat" → "the dog sat down": one substitution, one deletion, over four words
    assert word_error_rate("the cat sat", "the dog sat down") == pytest.approx(2 / 4)
    # unigrams shared: the, sat → 2·2/(3+4); bigrams shared: none; LCS: the sat → 2·2/(3+4)
    assert rouge_n("the cat sat", "the dog sat down", 1) == pytest.approx(4 / 7)
    assert rouge_n("the cat sat", "the dog sat down", 2) == 0
    assert rouge_l("the cat sat", "the dog sat down") == pytest.approx(4 / 7)
    assert rouge_l("sat the", "the sat") == pytest.approx(0.5)  # order counts
    assert accuracy_reward("the cat sat", "the dog sat down", "free-form") == pytest.approx(8 / 21)


@pytest.mark.parametrize(
    "response, reward",
    [
        ("<think>a</think> <answer>b</answer>", 1),
        ("<think>a</think>\n<answer>b</answer>\n", 1),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<answer>b</answer>", 0),
        ("<think>a</think> <answer>b</answer> <answer>c</answer>", 0),
        ("<think>a</think> <answer>b", 0),
    ],
)
def test_format_reward(response, reward):
    assert format_reward(response) == reward


def test_last_answer_is_judged():
    response = "<think>a</think> <answer>A</answer> no, <answer>B</answer>"
    assert score(response, "B", "multiple choice") == Score(1.0, 0.0, True)
    assert score("B", "B", "multiple choice") == Score(0.0, 0.0, False)


def test_moments_need_a_unit_of_time():
    text = "At <3.2 seconds> 4 cats, then 5s, from 6 to 8 seconds, at 1:05 and <1.0 seconds> to <2.0 seconds>"
    assert sorted(cited_moments(text)) == [(1, 2), (3.2, 3.2), (5, 5), (6, 8), (65, 65)]


def test_a_moment_may_be_cited_from_its_end():
    assert cited_moments("from 8 to 6 s") == [(6, 8)]


def test_alignment_is_f1_of_cited_moments():
    spans = [(3.0, 3.5), (8.0, 9.0)]
    one_of_two = "<think>see <3.2 seconds></think>"
    assert alignment(one_of_two, spans, 0.25) == pytest.approx(2 / 3)  # precision 1, recall 1/2
    both = "<think>3.2 s and 8.5 s</think>"
    assert alignment(both, spans, 0.25) == 1
    everything = "<think>0 to 100 seconds</think>"  # precision (1.5 + 0.5) at most 1.5/100 a span
    assert alignment(everything, spans, 0.25) < 0.04
    assert alignment("<think>2.7 s</think>", [(3.0, 3.5)], 0.25) == 0  # outside the tolerance
    assert alignment("<think>2.8 s</think>", [(3.0, 3.5)], 0.25) == 1
    assert alignment("no rationale at 3.2 s", spans, 0.25) == 0
    assert alignment(both, [], 0.25) == 0


def test_rir_terms_by_hand():
    wrong, right = Score(0.0, 1.0, False), Score(1.0, 1.0, True)
    assert robust_improvement_reward(right, repaired=None, align=0, kappa=0.3, lam=0.1) == 2.0
    assert robust_improvement_reward(
        wrong, repaired=right, align=0.5, kappa=0.3, lam=0.0
    ) == pytest.approx(1.7)
    assert robust_improvement_reward(
        wrong, repaired=right, align=0.5, kappa=0.3, lam=0.1
    ) == pytest.approx(1.75)
    assert robust_improvement_reward(
        wrong, repaired=wrong, align=0.5, kappa=0.3, lam=0.1
    ) == pytest.approx(0.7)


def test_no_patch_leaves_the_plain_reward_untaxed():
    assert (
        robust_improvement_reward(
            Score(0.2, 1.0, False), repaired=None, align=0, kappa=0.3, lam=0.1
        )
        == 1.2
    )


def test_kappa_shifts_a_repaired_reward_by_exactly_kappa():
    wrong, right = Score(0.0, 0.0, False), Score(1.0, 1.0, True)
    free = robust_improvement_reward(wrong, repaired=right, align=1.0, kappa=0.0, lam=0.1)
    for kappa in (0.1, 0.3, 1.0):
        assert free - robust_improvement_reward(
            wrong, repaired=right, align=1.0, kappa=kappa, lam=0.1
        ) == pytest.approx(kappa)


def test_unaided_success_outranks_assisted_success():
    wrong, right = Score(0.0, 1.0, False), Score(1.0, 1.0, True)
    unaided = robust_improvement_reward(right, repaired=None, align=0.0, kappa=0.3, lam=0.29)
    assisted = robust_improvement_reward(
        wrong, repaired=right, align=1.0, kappa=0.3, lam=0.29
    )  # λ < κ, perfect alignment
    assert unaided > assisted
