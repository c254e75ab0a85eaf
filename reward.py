"""Rewards of FFR: strings and numbers in, numbers out.

    R      accuracy reward, graded where the problem type is     `accuracy_reward`
    z      1 where the rule-based verifier accepts the answer    `verify`
    R_fmt  1 where the response has the asked-for form           `format_reward`
    align  does the rationale cite the patch's moments (ours)    `alignment`
    R̃      the Robust Improvement Reward                         `robust_improvement_reward`

Sources: FFR eq. R̃, app. D.3 (by type, as Video-R1); ours: alignment, and when a graded answer
counts as failed. Standard library only; imports no sibling.
"""

import math
import re
from collections import Counter
from typing import NamedTuple


class Score(NamedTuple):
    """What a response earned before any tax: R(τ), R_fmt(τ) and z."""
    accuracy: float
    format: float
    correct: bool


def score(response: str, answer: str, problem_type: str) -> Score:
    """Judge a response τ, by its last `<answer>…</answer>`, against the reference answer y."""
    found = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    if not found:
        return Score(0.0, format_reward(response), False)
    given = (found[-1].strip(), answer, problem_type)
    return Score(accuracy_reward(*given), format_reward(response), verify(*given))


def format_reward(response: str) -> float:
    """R_fmt: 1 for exactly `<think>…</think> <answer>…</answer>`, each tag once, else 0."""
    shape = r"\s*<think>.*</think>\s*<answer>.*</answer>\s*"
    once = all(response.count(tag) == 1 for tag in re.findall(r"</?\w+>", shape))
    return float(once and re.fullmatch(shape, response, re.DOTALL) is not None)


def accuracy_reward(given: str, answer: str, problem_type: str) -> float:
    """R in [0, 1]: same letter · equal to 2 decimals · 1 − WER · mean ROUGE-1/2/L F1 · 1 − relative
    error · equal normalised strings (ours). Raises ValueError for another type."""
    if problem_type == "multiple choice":
        return float(_letter(given) is not None and _letter(given) == _letter(answer))
    if problem_type == "numerical":
        x, y = _number(given), _number(answer)
        return float(x is not None and y is not None and round(x, 2) == round(y, 2))
    if problem_type == "OCR":
        return max(0.0, 1.0 - word_error_rate(given, answer))
    if problem_type == "free-form":
        return (rouge_n(given, answer, 1) + rouge_n(given, answer, 2) + rouge_l(given, answer)) / 3
    if problem_type == "regression":
        return 1.0 - min(1.0, _relative_error(given, answer))
    if problem_type == "exact":
        return float(_words(given) == _words(answer))
    raise ValueError(f"unknown problem_type '{problem_type}'")


def verify(given: str, answer: str, problem_type: str) -> bool:
    """z: R = 1; for two graded types a threshold (ours), as they next to never reach 1."""
    if problem_type == "free-form":
        return rouge_l(given, answer) >= 0.5
    if problem_type == "regression":
        return _relative_error(given, answer) <= 0.1 + 1e-9
    return accuracy_reward(given, answer, problem_type) == 1.0


def _letter(text: str) -> str | None:
    """'B', '(b)', 'B.' or 'B: a dog' → 'B'; 'A dog' is no letter."""
    found = re.fullmatch(r"\(?([A-Za-z])(?:\)?|[).:].*)", text.strip(), re.DOTALL)
    return found[1].upper() if found else None


def _number(text: str) -> float | None:
    """The one number in the text ('1,200 m' → 1200.0); None where there is none or several."""
    found = re.findall(r"[-+]?[\d.,]*\d(?:[eE][-+]?\d+)?", text.replace("−", "-"))
    try:
        (value,) = (float(re.sub(r",(?=\d{3}\b)", "", number)) for number in found)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _relative_error(given: str, answer: str) -> float:
    x, y = _number(given), _number(answer)
    if x is None or y is None:
        return math.inf
    return abs(x - y) / abs(y) if y else (0.0 if x == 0 else math.inf)


def _words(text: str) -> list[str]:
    """Case-folded words without punctuation around them; '4.2' and 'don't' stay whole."""
    return re.findall(r"\w+(?:[.,'’:-]\w+)*", text.casefold())


def word_error_rate(given: str, answer: str) -> float:
    """Word-level edit distance over the number of reference words."""
    x, y = _words(given), _words(answer)
    row = list(range(len(y) + 1))
    for i, word in enumerate(x, 1):
        diagonal, row[0] = row[0], i
        for j, reference in enumerate(y, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != reference))
            diagonal, row[j] = row[j], best
    return row[-1] / max(len(y), 1)


def rouge_n(given: str, answer: str, n: int) -> float:
    """ROUGE-n F1 without stemming. Where both texts are shorter than n words, ROUGE-(n−1): a right
    one-word answer must be able to reach R = 1."""
    x, y = _words(given), _words(answer)
    if n > 1 and max(len(x), len(y)) < n:
        return rouge_n(given, answer, n - 1)
    a, b = (Counter(zip(*[words[k:] for k in range(n)])) for words in (x, y))
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


def rouge_l(given: str, answer: str) -> float:
    """ROUGE-L F1: the longest common subsequence of words."""
    x, y = _words(given), _words(answer)
    row = [0] * (len(y) + 1)
    for word in x:
        diagonal = 0
        for j, reference in enumerate(y, 1):
            longest = diagonal + 1 if word == reference else max(row[j], row[j - 1])
            diagonal, row[j] = row[j], longest
    return 2 * row[-1] / max(len(x) + len(y), 1)


def cited_moments(rationale: str) -> list[tuple[float, float]]:
    """Moments a text cites, as (start, end) in seconds: '<3.2 seconds>', '3.2s', '0:07', '3-5 s',
    '<3.0 seconds> to <5.0 seconds>'. A number without a unit of time is not a moment."""
    number, unit = r"(\d+(?:\.\d+)?)", r"\s*(?:seconds?|secs?|s)\b>?"
    pattern = rf"<?{number}(?:{unit})?\s*(?:-|–|to|until)\s*<?{number}{unit}|<?{number}{unit}"
    found = re.findall(pattern, rationale)
    moments = [(float(single or start), float(single or end)) for start, end, single in found]
    clock = re.findall(r"\b(\d{1,3}):([0-5]\d)\b", rationale)
    moments += [(int(minutes) * 60.0 + int(seconds),) * 2 for minutes, seconds in clock]
    return [(min(pair), max(pair)) for pair in moments]


def alignment(response: str, spans: list[tuple[float, float]], tolerance: float) -> float:
    """F1 in [0, 1] of the moments that the rationale (`<think>`) cites, against the patch's spans.
    Ours. In seconds, as `tolerance`, half the student's frame spacing. Precision is the part of the
    cited time that lies in a span, so citing everything does not win; recall, of spans cited."""

    def inside(moment: tuple[float, float], span: tuple[float, float]) -> float:
        overlap = min(moment[1], span[1]) - max(moment[0], span[0])
        length = moment[1] - moment[0]  # 0: a point
        return max(0.0, overlap / length) if length else float(overlap >= 0)

    rationale = re.search(r"<think>(.*?)</think>", response, re.DOTALL)
    cited = cited_moments(rationale[1]) if rationale else []
    wide = [(start - tolerance, end + tolerance) for start, end in spans]
    if not cited or not wide:
        return 0.0
    shares = [[inside(moment, span) for span in wide] for moment in cited]
    precision = sum(map(max, shares)) / len(cited)
    recall = sum(max(column) > 0 for column in zip(*shares)) / len(wide)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def robust_improvement_reward(
    first: Score, repaired: Score | None, align: float, kappa: float, lam: float
) -> float:
    """R̃ = z (R(τ) + R_fmt(τ)) + (1 − z) (R(τ*) + R_fmt(τ*) − κ + λ · z* · align(τ*, c)).

    FFR eq. R̃, but for the λ term (ours). `repaired` is None where no patch was delivered: the
    failed rollout then keeps its plain reward, untaxed."""
    if first.correct or repaired is None:
        return first.accuracy + first.format
    return repaired.accuracy + repaired.format - kappa + lam * repaired.correct * align
