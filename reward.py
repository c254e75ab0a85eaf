"""What rules can judge of FFR: strings and numbers in, numbers out.

    R      accuracy reward, graded where the problem type is     `accuracy_reward`
    z      1 where rules accept the answer (thresholds ours)     `verify`
    R_fmt  1 where the response has the asked-for form           `format_reward`
    align  does the rationale cite the patch's moments (ours)    `alignment`
    R̃      the Robust Improvement Reward                         `robust_improvement_reward`
    leak   do a teacher's words give y away (ours)               `leak`, `asks_for`, `gate`

What the judgements of a step, of a run and of an evaluation add up to stands last: `summarize`,
`summarize_run`, `accuracy`.

Sources: FFR eq. R̃, app. D.3 (by type, as Video-R1). Standard library only; imports no sibling.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

# What the student is told to answer with, for each problem type.
SUFFIXES = {
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is one number.",
    "regression": "The answer is one number.",
    "OCR": "The answer is the text as it is written in the video.",
    "free-form": "The answer is a short phrase.",
    "exact": "The answer is exactly the words that are asked for.",
}


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
    x, y = given, answer
    rewards = {
        "multiple choice": lambda: _letter(x) is not None and _letter(x) == _letter(y),
        "numerical": lambda: round(_number(x), 2) == round(_number(y), 2),
        "OCR": lambda: max(0.0, 1.0 - word_error_rate(x, y)),
        "free-form": lambda: (rouge_n(x, y, 1) + rouge_n(x, y, 2) + rouge_l(x, y)) / 3,
        "regression": lambda: max(0.0, 1.0 - _relative_error(x, y)),  # 0 at nan too
        "exact": lambda: _words(x) == _words(y),
    }
    if problem_type not in rewards:
        raise ValueError(f"unknown problem_type '{problem_type}'")
    return float(rewards[problem_type]())


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


def _number(text: str) -> float:
    """The one number in the text ('1,200 m' → 1200.0); nan, equal to none, for none or several."""
    found = re.findall(r"[-+]?[\d.,]*\d(?:[eE][-+]?\d+)?", text.replace("−", "-"))
    try:
        (value,) = (float(re.sub(r",(?=\d{3}\b)", "", number)) for number in found)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _relative_error(given: str, answer: str) -> float:
    x, y = _number(given), _number(answer)
    return abs(x - y) / abs(y) if y else (0.0 if x == 0 else math.inf)


def _words(text: str) -> list[str]:
    """Case-folded words without punctuation around them; '4.2' and 'don't' stay whole."""
    return re.findall(r"\w+(?:[.,'’:-]\w+)*", text.casefold())


def edit_distance(x: list[str], y: list[str], substitution: int = 1) -> int:
    """The least cost of turning x into y; inserting or deleting a word costs 1."""
    row = list(range(len(y) + 1))
    for i, word in enumerate(x, 1):
        diagonal, row[0] = row[0], i
        for j, reference in enumerate(y, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + substitution * (word != reference))
            diagonal, row[j] = row[j], best
    return row[-1]


def word_error_rate(given: str, answer: str) -> float:
    return edit_distance(_words(given), _words(answer)) / max(len(_words(answer)), 1)


def rouge_n(given: str, answer: str, n: int) -> float:
    """ROUGE-n F1 without stemming; n at most the longer text's words: one word can reach R = 1."""
    x, y = _words(given), _words(answer)
    n = min(n, max(len(x), len(y), 1))
    a, b = (Counter(zip(*[words[k:] for k in range(n)])) for words in (x, y))
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


def rouge_l(given: str, answer: str) -> float:
    """ROUGE-L F1, 2 LCS / (|x| + |y|): without substitutions the distance is |x| + |y| − 2 LCS."""
    x, y = _words(given), _words(answer)
    return (len(x) + len(y) - edit_distance(x, y, 2)) / max(len(x) + len(y), 1)


def cited_moments(rationale: str) -> list[tuple[float, float]]:
    """Moments a text cites, as (start, end) in seconds: '<3.2 seconds>', '3.2s', '0:07', '3-5 s',
    '<3.0 seconds> to <5.0 seconds>'. A number without a unit of time is not a moment."""
    number, unit = r"(\d+(?:\.\d+)?)", r"\s*(?:seconds?|secs?|s)\b>?"
    pattern = rf"<?{number}(?:{unit})?\s*(?:-|–|to|until)\s*<?{number}{unit}|<?{number}{unit}"
    found = re.findall(pattern, rationale)
    pairs = [(float(single or start), float(single or end)) for start, end, single in found]
    clock = [int(m) * 60.0 + int(s) for m, s in re.findall(r"\b(\d{1,3}):([0-5]\d)\b", rationale)]
    return [(min(pair), max(pair)) for pair in [*pairs, *zip(clock, clock)]]


def alignment(response: str, spans: list[tuple[float, float]], tolerance: float) -> float:
    """F1 in [0, 1] of the moments that the rationale (`<think>`) cites, against the patch's spans.
    Ours. In seconds, as `tolerance`, half the student's frame spacing. Precision is the part of the
    cited time that lies in a span, so citing everything does not win; recall, of spans cited."""
    rationale = re.search(r"<think>(.*?)</think>", response, re.DOTALL)
    shares = []  # a row per cited moment: the part of it that lies in each span
    for a, b in cited_moments(rationale[1]) if rationale else []:  # a point where a = b
        overlaps = [min(b, end + tolerance) - max(a, start - tolerance) for start, end in spans]
        shares.append([max(0.0, x / (b - a)) if b > a else float(x >= 0) for x in overlaps])
    precision = sum(max(row, default=0.0) for row in shares) / max(len(shares), 1)
    recall = sum(max(column) > 0 for column in zip(*shares)) / max(len(spans), 1)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def robust_improvement_reward(first: Score, repaired: Score | None, align, kappa, lam) -> float:
    """R̃ = z (R(τ) + R_fmt(τ)) + (1 − z) (R(τ*) + R_fmt(τ*) − κ + λ · z* · align(τ*, c)).
    FFR eq. R̃; the λ term is ours. `repaired` None: no patch, so τ keeps its reward, untaxed."""
    if first.correct or repaired is None:
        return first.accuracy + first.format
    return repaired.accuracy + repaired.format - kappa + lam * repaired.correct * align


# --- the leak gate: do a teacher's words give the answer away? Rules for English, ours ---
NUMBER, TO = r"\d+(?:\.\d+)?", r" ?(?:-|–|to|and) ?"
TIMES = (
    rf"\d+:\d\d|(?:{NUMBER}{TO})?{NUMBER}[ -]?(?:second|sec|s|minute|min|hour|frame)s?\b|"
    rf"\b(?:second|minute|frame)s? {NUMBER}(?:{TO}{NUMBER})?"
)
ASKS = {  # what a question asks for, and so a patch must not say
    "place": r"(^|[,.:;] |\band )where\b|\b((which|what) (side|part|corner|hand)|position|to my)\b",
    "time": r"(^|[,.:;] |\band )when\b(?!.*, )|\bhow (long|much time|many (seconds|minutes))\b|"
    r"\b(what|which) (exact )?(time|second|minute|moment|point)\b",
    "quality": r"\b(colou?r|material|pattern|shape)",
    "truth": r"^\W*(is|are|was|were|do|does|did|has|have|had|can|could|will|would)\b",
}
COUNTS = {
    name: n
    for n, names in zip(
        [*range(21), *range(30, 101, 10), 0.5, 0.25],
        (
            "zero none nobody|one once single|two twice pair couple both double|three triple trio|"
            "four|five|six|seven|eight|nine|ten|eleven|twelve dozen|thirteen|fourteen|fifteen|"
            "sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|"
            "ninety|hundred|half|quarter"
        ).split("|"),
    )
    for name in names.split()
}
FORMS = dict(
    pair.split("=")
    for pair in (
        "threw=throw thrown=throw took=take held=hold sat=sit stood=stand ran=run went=go "
        "gave=give drank=drink drunk=drink broke=break broken=break fell=fall tore=tear "
        "torn=tear tying=tie ate=eat wrote=write drew=draw rode=ride wore=wear behind=back"
    ).split()
)
COMMON = set(
    "a an the it its this that there he his she her their they you and or then as of in "
    "on at to into from by with for is are was were be do does did has who what".split()
)
WEAK = set("hand side look watch keep see up out off over down aft befor".split())  # say little
NOT = r"\b(not|no|never|neither|nor|0|nothing|without|ignore|unlikely|rather than|wrong)\b|n't\b"
SAYS = (
    r"\b(right|correct|best) (option|choice|answer|value)\b|\banswer (is|was|lies|should)\b|"
    r"\b(first|second|third|fourth|last|final)\b[^.]*\b(option|choice|listed)|\bopposite of\b"
)
LETTERS = (
    r"(?<![\w'’-])([B-H]|A(?! [a-z])|A(?= (?:is|was|are|and|or|nor|fits|has)\b))(?![\w'’-])|"
    r"\b(?:[Oo]ption|[Cc]hoice|[Ll]etter) \W?([a-h])\b|\b([a-h])[)\"'”]"
)
CORRECTS = r"\b(more|fewer|less|too|short|off|missed|extra|exactly|total|\d as (many|much|long))\b"
YOURS = r"\byour (count|estimate|number)|\byou (counted|missed|left|gave|said|named|took)\b"
CLAUSE = r"[;:!?–—]|[.,](?!\d)| and | but "
ASSERTS = (
    r"\b(yes|(?<!do )not|no|never|nothing|is|are|was|were|does|did|has|had)\b|(?<!do)n't\b|"
    r"\w (do|can)\b|^\W*(the|his|her|its|their|both|all) (\w+ )?\w+ \w+(s|ed)\b|"
    r"\b(it|he|she|they|there|you) (?!(to|in|on|at|from|a|again|with|back|out|up)\b)\w"
)
AFTER = r"\b(when|while|as|where|what|which|who|whether|if|until|before|after|how|that|moment)\b"
ADVERBS = r"\bright (?=(after|before|when|as|at|where|behind)\b)|\b(keep|have) (?=(on|an?|in)\b)"


def asks_for(question: str) -> set[str]:
    """The kinds of ASKS that a question is of."""
    return {kind for kind, pattern in ASKS.items() if re.search(pattern, question, re.I)}


def leak(words: str, question: str, options: list[str], answer: str) -> str | None:
    """Why a teacher's words give y away, or None: they name an option, hold the answer's words in
    any form and order, numbers that are, make up or correct it, a time or a yes or no where that is
    asked, or leave one option only. Synonyms and descriptions pass."""
    asked, low, q = asks_for(question), _canonical(words), _canonical(question)
    texts = [_canonical(re.sub(r"^\W*[A-Za-z][.):]+", "", option)) for option in options]
    labels, letter = [option.strip(" (")[:1] for option in options], answer.strip(" ().:")
    right = texts[labels.index(letter)] if letter in labels else _canonical(answer)
    named = {"".join(found).upper() for found in re.findall(LETTERS, words)}
    named -= {*re.findall(r"(?<=\w )[A-H]\b", question)}  # 'player B'
    if re.search(SAYS, low) or letter in (labels or named) and 0 < len(named) < max(len(labels), 2):
        return "it speaks of the answer"
    spelled, lone_letters = re.sub(r"\W", "", right), r"\b\w(?:(?:\W|then|and)+\w\b){2,}"
    runs = [re.sub(r"\W|then|and", "", run) for run in re.findall(lone_letters, words.casefold())]
    initials = "".join(w if w.isdigit() else w[0] for w in re.findall(r"\w+", low))  # 'kilo india'
    if any(run in spelled for run in runs) or spelled[3:] and spelled in initials:
        return "it spells the answer"
    low, times = re.subn(TIMES, " ", low)
    if times and "time" in asked:
        return "it gives a time"
    claims = any(re.search(ASSERTS, re.split(AFTER, part)[0]) for part in re.split(CLAUSE, low))
    if claims and "truth" in asked and re.match(r"(yes|no|true|false)\b", right):
        return "it says yes or no"
    if goal := re.fullmatch(rf"\W*({NUMBER})(\W+\w+)?\W*", right):
        return "it gives the number" if _counted(low, q, float(goal[1])) else None
    return _contained(re.sub(ADVERBS, "", low), q, right, [t for t in texts if t != right], asked)


def _canonical(text: str) -> str:
    """Case-folded, numbers as digits: 'Twenty-one' → '21', 'two dozen' → '24', '3,99' → '3.99'."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.casefold().replace("’", "'").strip())
    text = re.sub(r"(?<=\d),(?=\d)", ".", text)
    text = re.sub(rf"\b(?:an? )?({'|'.join(COUNTS)})s?\b", lambda m: str(COUNTS[m[1]]), text)
    text = re.sub(r"\b([2-9])0[ -]([1-9])\b", r"\1\2", text)
    text = re.sub(r"\b(\d+|an?)( [a-z]+)? and 0\.5", r"\1.5\2", text).replace("a.5", "1.5")
    times = rf"\b({NUMBER})[ -](100|12|0\.5|0\.25)\b"
    return re.sub(times, lambda m: f"{float(m[1]) * float(m[2]):g}", text)


def _stems(text: str) -> set[str]:
    """Words without their endings, COMMON ones left out."""
    found = {*re.findall(rf"{NUMBER}|[^\W\d_]+", text)} - COMMON
    endings = r"(?<=\w{3})(ies|ing|ish|ed|es|en|ly|er|s|y|e|(?<=(\w))\2)+$"
    return {re.sub(endings, "", FORMS.get(word, word)) for word in found}


def _counted(low: str, q: str, goal: float) -> bool:
    """Whether numbers in the text are the answer, make it up, or correct the student's."""
    wrong = any(re.search(NUMBER, c) and re.search(CORRECTS, c) for c in re.split(CLAUSE, low))
    found = re.findall(rf"({NUMBER})(?=\W*(\w*))", low)  # 'one' is mostly a pronoun
    values = [float(n) for n, thing in found if n != "1" or _stems(thing) & _stems(q)]
    made = [
        make(values[a : a + n]) * unit
        for a in range(len(values))
        for n in range(1, 7)
        for make in (sum, math.prod)
        for unit in (1, 0.001, 0.01, 100, 1000)
    ]
    near = any(abs(x - goal) <= (0.1 * goal if goal % 1 else 1e-9) for x in made)
    return near or wrong or bool(found and re.search(YOURS, low))


def _contained(low: str, q: str, right: str, others: list[str], asked: set[str]) -> str | None:
    said, denied, known, key = set(), set(), _stems(q), _stems(right)
    for clause in re.split(CLAUSE, low):
        (denied if re.search(NOT, clause) else said).update(_stems(clause))
    said |= {a + b for a in said for b in said}  # 'window sill'
    group = r"\w+" + r" \w+" * (len(right.split()) - 1)
    pairs = re.findall(rf"\b(?=({group})(?:,| or|, or) ({group})\b)", q)  # are as good as options
    pairs += [(b, a) for a, b in pairs]
    rest = [_stems(other) for other in others or [a for a, b in pairs if _stems(b) <= key]]
    if not rest:
        new = key - known - WEAK or key - known
        part = asked & {"quality", "place"} and new & said - WEAK
        most = len(new & said) >= 0.6 * len(new) or re.search(rf"\b{re.escape(right)}\b", low)
        return "it contains the answer" if new and (part or most) else None
    every, shared = key.union(*rest), key.intersection(*rest)
    even = sum(bool((other - shared) & known) for other in (key, *rest)) > 1  # q names them all
    told = shared if even else shared | known  # what gives nothing away
    mine, core = (every - told) & said - (WEAK if key - WEAK else set()), key - told - WEAK
    whole = core and core <= said and not any(other - shared <= said for other in rest)
    if whole or mine and mine <= key and not any(mine <= other for other in rest):
        return "it contains the answer"
    out = (every - shared) & (said | denied if rest[1:] else denied)
    if not key <= said and all((other - shared - key) & out for other in rest):
        return "it rules out the others"
    items = re.split(r", | then | and |→", right)
    places = [place for item in items if (place := low.find(item.strip(" ."))) >= 0]
    return "it gives the order" if places[2:] and places == sorted(places) else None


def gate(patch, case) -> str | None:
    """Drop regions where a place is asked, times where a time is; return why words give y away."""
    asked = asks_for(case.question)
    patch.regions = [] if "place" in asked else patch.regions
    if "time" in asked:
        patch.spans, patch.show_times = [], False
    words = "; ".join([patch.guidance, *(region.what for region in patch.regions)])
    return leak(words, case.question, case.options, case.answer)


def answers(reply: str, case) -> bool:
    """Whether a brain that was asked a case's question, in the blind test, answers it right."""
    said = reply if "<answer>" in reply else f"<answer>{reply}</answer>"
    return score(said, case.answer, case.problem_type).correct


# --- what judgements add up to ---
def describe(question, r) -> dict:
    """A chosen rollout in the numbers that `summarize` works on."""
    frames, spans = (r.patch.key_frames, r.patch.spans) if r.patch else ([], [])
    return {
        "failure": not r.first.score.correct,
        "intervention": r.failed is not None,
        "reward": r.reward,
        "format": r.score.format,
        "truncated": not r.completion.finished,
        "length": len(r.completion.ids),
        "entropy": float(r.completion.entropy.sum()),
        "fix": r.score.correct,
        "align": r.align,
        "cause": r.error and r.error.cause,
        "patch_frames": len(frames),
        "patch_seconds": sum(b - a + 1 for a, b in spans) / question.video.fps,
        "sampled_tokens": sum(len(x.completion.ids) for x in (r, r.failed) if x),
    }


def summarize(rows: list[dict], updates: list[dict]) -> dict[str, float]:
    """A step's metrics (README, metric glossary) from every rollout and every process's update."""
    repaired = [row for row in rows if row["intervention"]]
    among = dict.fromkeys("failure intervention reward format truncated length".split(), rows)
    among |= dict.fromkeys("fix align patch_frames patch_seconds".split(), repaired)
    metrics = {k: sum(row[k] for row in part) / max(len(part), 1) for k, part in among.items()}
    metrics["entropy"] = sum(r["entropy"] for r in rows) / max(sum(r["length"] for r in rows), 1)
    metrics["sampled_tokens"] = sum(row["sampled_tokens"] for row in rows)
    for name in updates[0]:
        join = max if name in "logp_gap grad_norm seconds_round seconds_update".split() else sum
        metrics[name] = join(update[name] for update in updates)
    causes = [row["cause"] for row in rows if row["cause"]]
    asked = max(metrics["teacher_calls"] + metrics["teacher_hits"], 1)
    metrics |= {
        "unaided": 1 - metrics["failure"] if rows else 0.0,
        "teacher_failures": len(causes),
        "won_per_call": sum(row["fix"] for row in repaired) / asked,
    }
    return metrics | {f"teacher_{cause}": causes.count(cause) for cause in causes}


def summarize_run(before: list[dict], after: list[dict], history: list[dict]) -> dict:
    """A run in figures: held-out accuracy before and after, and its first and last third."""
    third = max(len(history) // 3, 1)  # of the steps
    parts = {
        "unaided_before": before,
        "unaided_after": after,
        "assisted_after": after,
        "failure_first": history[:third],
        "failure_last": history[-third:],
        "intervention_first": history[:third],
        "intervention_last": history[-third:],
    }
    figures = {
        name: sum(row[name.split("_")[0]] for row in rows) / len(rows) if rows else None
        for name, rows in parts.items()
    }
    repairs = max(sum(row["intervention"] for row in history), 1e-9)
    fixed = sum(row["fix"] * row["intervention"] for row in history)
    failures = sum(row["teacher_failures"] for row in history)
    return figures | {"fix_rate": fixed / repairs, "teacher_failures": failures}


def accuracy(rows: list[dict]) -> dict[str, dict]:
    """Unaided accuracy with its 95 % interval (Wilson): of all, of each type and each source."""
    groups, table = {"all": rows}, {}
    for name, row in ((f"{kind} {row[kind]}", row) for row in rows for kind in ("type", "source")):
        groups.setdefault(name, []).append(row)
    for name, group in groups.items():
        n, z = max(len(group), 1), 1.96
        share = sum(row["unaided"] for row in group) / n
        middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
        table[name] = dict(n=len(group), accuracy=share, low=middle - half, high=middle + half)
    return table
