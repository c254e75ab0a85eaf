"""The rewards of FFR and its leak gate: everything that rules can judge, without a model.

    R̃      the Robust Improvement Reward                         `robust_improvement_reward`
    R_fmt  1 if the response has the required form               `format_reward`
    align  does the rationale cite the patch's moments? (ours)   `alignment`
    R      accuracy reward, graded for some problem types        `accuracy_reward`
    z      1 if the rules accept the answer (thresholds ours)    `verify`
    leak   do a teacher's words give y away? (ours)              `leak`, `asks_for`, `gate`

The leak gate stands last. Sources: FFR eq. R̃ and app. D.3 (reward by problem type, as in
Video-R1). The file needs the standard library alone and no sibling.
"""

import math
import re
import unicodedata
from collections import Counter
from fractions import Fraction
from typing import NamedTuple


# --- the reward R̃, and its terms ---
class Score(NamedTuple):
    """What a response earned before any tax: R(τ), R_fmt(τ) and z."""

    accuracy: float
    format: float
    correct: bool


def robust_improvement_reward(first: Score, repaired: Score | None, align, kappa, lam) -> float:
    """R̃ = z (R(τ) + R_fmt(τ)) + (1 − z) (R(τ*) + R_fmt(τ*) − κ + λ · z* · align(τ*, c)).

    FFR eq. R̃; the λ term is ours. If `repaired` is None no patch was given, and the failed τ keeps
    its own reward, untaxed.
    """
    if first.correct or repaired is None:
        return first.accuracy + first.format
    return repaired.accuracy + repaired.format - kappa + lam * repaired.correct * align


def score(response: str, answer: str, problem_type: str) -> Score:
    """Judge a response τ, by its last `<answer>…</answer>`, against the reference answer y."""
    given = extract_answer(response) or ""
    accuracy = accuracy_reward(given, answer, problem_type)
    return Score(accuracy, format_reward(response), verify(given, answer, problem_type))


def extract_answer(response: str) -> str | None:
    """Return the text of the last `<answer>…</answer>`, or None if there is none."""
    before, _, _ = response.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    answer, _, _ = answer.partition("</answer>")
    return answer.strip() if opening else None


def format_reward(response: str) -> float:
    """R_fmt: 1 for exactly `<think>…</think> <answer>…</answer>`, each tag once, else 0."""
    text = r"(?:(?!</?(?:think|answer)>).)*"  # holds none of the tags
    shape = rf"\s*<think>{text}</think>\s*<answer>{text}</answer>\s*"
    return float(re.fullmatch(shape, response, re.DOTALL) is not None)


def alignment(response: str, spans: list[tuple[float, float]], tolerance: float) -> float:
    """Return how well the rationale (`<think>`) cites the patch's spans: an F1 in [0, 1].

    Ours. All in seconds; `tolerance` is half the student's frame spacing. Precision is the mean
    over the cited moments of the share of each that lies in its best span, so citing the whole clip
    does not win. Recall is the share of spans that are cited.
    """
    rationale = re.search(r"<think>(.*?)</think>", response, re.DOTALL)
    moments = cited_moments(rationale[1]) if rationale else []

    covered = [[covered_share(moment, span, tolerance) for span in spans] for moment in moments]
    precision = sum(max(row, default=0.0) for row in covered) / max(len(moments), 1)
    recall = sum(max(column) > 0 for column in zip(*covered)) / max(len(spans), 1)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def covered_share(moment: tuple, span: tuple, tolerance: float) -> float:
    """Return the share of a cited moment, point or interval, that lies in a span ± `tolerance`."""
    start, end = moment
    overlap = min(end, span[1] + tolerance) - max(start, span[0] - tolerance)
    if start == end:
        return float(overlap >= 0)
    return max(0.0, overlap / (end - start))


def cited_moments(rationale: str) -> list[tuple[float, float]]:
    """Return the moments a text cites, as (start, end) in seconds: '<3.2 seconds>', '3.2s', '0:07',
    '3-5 s', '<3.0 seconds> to <5.0 seconds>'. A number without a unit of time is not a moment."""
    number, unit = r"(?<!\d)(\d+(?:\.\d+)?)", r"\s*(?:seconds?|secs?|s)\b>?"
    pattern = rf"<?{number}(?:{unit})?\s*(?:-|–|to|until)\s*<?{number}{unit}|<?{number}{unit}"
    found = re.findall(pattern, rationale)
    pairs = [(float(single or start), float(single or end)) for start, end, single in found]
    clock = [int(m) * 60.0 + int(s) for m, s in re.findall(r"\b(\d{1,3}):([0-5]\d)\b", rationale)]
    return [(min(pair), max(pair)) for pair in [*pairs, *zip(clock, clock)]]


# --- R and z, by problem type ---
# What the student is told to answer with, for each problem type.
SUFFIXES = {
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is one number.",
    "regression": "The answer is one number.",
    "OCR": "The answer is the text as it is written in the video.",
    "free-form": "The answer is a short phrase.",
    "exact": "The answer is exactly the words that are asked for.",
}


def accuracy_reward(given: str, answer: str, problem_type: str) -> float:
    """R in [0, 1] by problem type, 0 for an empty answer. Raises ValueError for an unknown type."""
    rewards = {
        "multiple choice": multiple_choice_reward,
        "numerical": numerical_reward,
        "regression": regression_reward,
        "OCR": ocr_reward,
        "free-form": free_form_reward,
        "exact": exact_reward,
    }
    if problem_type not in rewards:
        raise ValueError(f"unknown problem_type '{problem_type}'")
    if not normalize(given):
        return 0.0
    return float(rewards[problem_type](given, answer))


def verify(given: str, answer: str, problem_type: str) -> bool:
    """z: is R = 1? R hardly ever reaches 1 for two graded types, which have thresholds (ours): R of
    0.9 for regression, ROUGE-L of 0.5 for free-form."""
    if problem_type == "free-form":
        return rouge_l(given, answer) >= 0.5
    reward = accuracy_reward(given, answer, problem_type)
    if problem_type == "regression":
        return reward >= 0.9 - 1e-9  # a relative error of at most 0.1
    return reward == 1.0


def reference_problem(answer: str, problem_type: str, options: list[str]) -> str | None:
    """Return why no answer could be right by this reference, with the remedy; None if one can."""
    response = f"<answer>{answer}</answer>"
    remedy = f"Correct it or leave the sample out. {SUFFIXES[problem_type]}"
    if not score(response, answer, problem_type).correct:
        return f"The reference {answer!r} would not be right as an answer itself. {remedy}"

    letters = "ABCDEFGHIJ"[: len(options)]
    if problem_type == "multiple choice" and find_letter(answer) not in letters:
        return f"The reference {answer!r} names none of the options {options}. {remedy}"
    return None


def multiple_choice_reward(given: str, answer: str) -> bool:
    """Do both choose the same letter?"""
    letter = find_letter(given)
    return letter is not None and letter == find_letter(answer)


def numerical_reward(given: str, answer: str) -> bool:
    """Do the numbers agree to 1e-9, relative, or when both are rounded to as many decimals as the
    reference has, at least two? For 3, 3.001 is right, 3.01 wrong; for 0.004, 0.001 is wrong."""
    x, _ = find_number(given)
    y, decimals = find_number(answer)
    decimals = max(2, decimals)
    return math.isclose(x, y, rel_tol=1e-9) or round(x, decimals) == round(y, decimals)


def regression_reward(given: str, answer: str) -> float:
    """1 − |error| / |reference|, at least 0. For a reference of 0 only 0 is right."""
    x, _ = find_number(given)
    y, _ = find_number(answer)
    if y == 0:
        return float(x == 0)
    return max(0.0, 1.0 - abs(x - y) / abs(y))  # 0 for nan too


def ocr_reward(given: str, answer: str) -> float:
    """1 − the word error rate, at least 0."""
    return max(0.0, 1.0 - word_error_rate(given, answer))


def free_form_reward(given: str, answer: str) -> float:
    """The mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L."""
    ngrams = rouge_n(given, answer, 1) + rouge_n(given, answer, 2)
    return (ngrams + rouge_l(given, answer)) / 3


def exact_reward(given: str, answer: str) -> bool:
    """Do the same words stand in the same order?"""
    return split_words(given) == split_words(answer)


# --- reading letters, numbers and words ---
# How typographic signs are read. Characters without width are dropped.
SIGNS = {"−": "-", "–": "-", "‐": "-", "‑": "-", "‒": "-", "⁻": "-", "’": "'"}
SIGNS |= {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅛": " 1/8"}
SIGNS |= dict.fromkeys("\u200b\u200d\u200e\u200f\u00ad\ufeff")


def normalize(text: str) -> str:
    r"""Normalize what can be written in many ways: full-width letters, signs, '10²', '\text{B}'."""
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", r"^\g<0>", text)
    text = unicodedata.normalize("NFKC", text.translate(str.maketrans(SIGNS)))
    return re.sub(r"\\(?:boxed|text|math)[a-z]*(?=\{)", "", text).strip()


# One of A to J. 'A dog' and 'I think' start with words, 'A a dog' with the letter of an option.
LETTER = r"(?<!\w')([AI](?! +(?!(?:an?|the|is) )\w)|[B-HJ])(?![^\W_一-鿿]|[-+#&=%°]|'\w)"
# What may stand before the letter: 'The answer is B', '\\boxed{B}'.
LEAD = (
    r"(?:the|my|so|i|it|s|d|would|must|be|go|with|say|think|choose|pick|thus|therefore|final|"
    r"correct|right|best|answer|option|choice|letter|is)\b|答案|选项?|选择|我|正确|应该?|是|为"
)
CHOICE = rf"(?i)[\W_]*(?:(?:{LEAD})[\W_]*)*{LETTER}"
# What stands before a second letter: 'A or B', 'A, B', 'A: dog B: cat', not 'B. vitamin C'.
BETWEEN = r"(?:^|[,;/&\n]|\b(?:or|and|not)\b| (?=\w[.):] \w))[\W_]{0,9}(?:option )?"
ANOTHER = rf"(?i){BETWEEN}{LETTER}(?!\.\w)"


def find_letter(text: str) -> str | None:
    """Return the one letter chosen: 'b', '(B)', 'B. a cat', 'Answer: **B**'; 'A or B' chooses none.
    After a labelled letter only another labelled one counts: 'D. A and B' is D."""
    text = re.split(r"(?i)\banswer(?: is|:)", normalize(text))[-1]
    choice = re.match(CHOICE, text)
    if choice is None:
        return None

    rest = text[choice.end() :]
    labelled = rest[:1] in (".", ")", ":")
    others = re.findall(ANOTHER + "(?=[.):])" if labelled else ANOTHER, rest)
    letters = {letter.upper() for letter in [choice[1], *others]}
    return letters.pop() if len(letters) == 1 else None


ONES = "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
TEENS = "thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
NAMES = f"{ONES}|{TEENS}|{TENS}"
NAME_VALUES = dict(zip(NAMES.split("|"), [*range(20), *range(20, 100, 10)]))

SCALES = {"hundred": "e2", "thousand": "e3", "million": "e6", "billion": "e9"}
# What is rewritten before a number is read, in this order, each with what it catches.
NUMBER_REWRITES = [
    # '1,200', '12 345 678', not '0,125' or '1,200,5'
    (r"(?<=\d)(?<!\.\d)(?<!\d{4})(?<!\b0)([ ,'_])(?=\d{3}(?:\1\d{3}){0,6}(?!\1?\d))", ""),
    (r"(?<=\d),(?=\d)", "."),  # '3,5'
    (r"(?s)^.*=(?=[^=]*\d)", ""),  # '2 + 3 = 5'
    (r"(?<=\d) ?h(?:(?:ou)?rs?)?,?(?: and)? ?(?=\d+ ?m)", ":"),  # '1 h 30 min', like a clock
    (r"(?<=\d) ?m(?:in(?:ute)?s?)?,?(?: and)? ?(?=\d+ ?s)", ":"),  # '1 min 30 s'
    (r"(?<=\d) ?(?:[x×*·]|\\times|\\cdot) ?10\^\{?([-+]?\d{1,3})\}?", r"e\1"),  # '2·10^3'
    (r"\b10\^\{?([-+]?\d{1,3})\}?", r"1e\1"),  # '10^3'
    (r"(?<!\d[ex])(?<=[a-zͰ-ӿ])\}?(?:\^\{?)?[-+]?\d+", ""),  # 'cm^2', 'm2'
    (r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r" \1/\2"),  # '\frac{1}{2}'
    (r"(?<=\d) ?/ ?(?=\d)", "/"),  # '1 / 2'
    (r"(?:\band )?(?:\b(?:an?|1) )?\bhalf\b", "1/2"),  # 'three and a half'
    *((rf"(?<=\d) {name}\b", power) for name, power in SCALES.items()),  # '1.5 million'
    (r"\\?sqrt|\\?\bpi\b|[√π]", " 0 1 "),  # not a number that is read here
    (r"\b(?:minus|negative) (?=\d)", "-"),  # 'minus five'
    (r"(?<=[-+])[$€£¥ ]+(?=\d)", ""),  # '-$5'
]
# A sign, a whole number before a fraction, then digits: '-1 1/2', '12:30', '.5', '2e3'.
NUMBER = r"[-+]?(?:\d+ (?=\d+/\d))?(?:(?<![\w.])\.)?\d(?:[\d.:/]{0,400}\d)?(?:e[-+]?\d{1,3})?"


def find_number(text: str) -> tuple[float, int]:
    """Return the one number in a text and how many decimals it has; nan for none or for several.
    '1,200 m' → (1200.0, 0), 'about 2.50' → (2.5, 2), and in seconds '1:30' → (90.0, 0)."""
    text = normalize(text).casefold()
    text = re.sub(rf"\b(?:({TENS})[ -])?({NAMES})( dozen)?\b", name_to_digits, text)
    for pattern, replacement in NUMBER_REWRITES:
        text = re.sub(pattern, replacement, text)

    numbers = set(re.findall(NUMBER, text))
    if len(numbers) != 1:
        return math.nan, 0

    number = numbers.pop()
    value = Fraction(0)
    try:
        for part in number.lstrip("+-").split(":"):
            value = 60 * value + sum(Fraction(term) for term in part.split())
        value = float(-value if number.startswith("-") else value)
    except (ValueError, ArithmeticError):  # '1.2.3', '1/0', thousands of digits
        return math.nan, 0
    mantissa, _, exponent = number.partition("e")
    return value, len(mantissa.partition(".")[2]) - int(exponent or 0)


def name_to_digits(name: re.Match) -> str:
    """Write a number's name in digits: 'twenty-one' → '21', 'two dozen' → '24'."""
    value = NAME_VALUES.get(name[1], 0) + NAME_VALUES[name[2]]
    return str(12 * value if name[3] else value)


# Scripts without spaces: Thai to Burmese, Khmer, Tai, Javanese and Cham, kana, Han.
SPACELESS = r"([\u0e00-\u109f\u1780-\u17ff\u1950-\u1aaf\ua980-\uaadf\u3001-\u312f㐀-鿿𠀀-𿿽])"
EDGES = ".,;:!?…¿¡'\"‘“”„«»‹›()[]{}<>*_`~|—、。〈〉《》「」『』【】〔〕・·।॥؟،؛។៕၊။།"
MAX_COMPARED = 200  # the rest counts as one word, as the time of an edit distance is quadratic


def split_words(text: str) -> list[str]:
    """Split into case-folded words, or characters in a script without spaces. Punctuation at a
    word's edges is dropped, unless the text has nothing else; signs stay: '-5', 'C#', '€'."""
    text = re.sub(SPACELESS, r" \1 ", normalize(text).casefold())
    tokens = text.split(maxsplit=MAX_COMPARED)
    words = [token.strip(EDGES) for token in tokens]
    return [word for word in words if word] or tokens


def edit_distance(x: list[str], y: list[str], substitution: int = 1) -> int:
    """Return the least cost of turning x into y; inserting or deleting a word costs 1."""
    row = list(range(len(y) + 1))
    for i, word in enumerate(x, 1):
        diagonal, row[0] = row[0], i
        for j, reference in enumerate(y, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + substitution * (word != reference))
            diagonal, row[j] = row[j], best
    return row[-1]


def word_error_rate(given: str, answer: str) -> float:
    """Return the edit distance in words over the number of words in the reference."""
    reference = split_words(answer)
    return edit_distance(split_words(given), reference) / max(len(reference), 1)


def rouge_n(given: str, answer: str, n: int) -> float:
    """ROUGE-n F1 without stemming. n is at most the longer text's length in words, so that a single
    word can reach 1."""
    x, y = split_words(given), split_words(answer)
    n = min(n, max(len(x), len(y), 1))
    a = Counter(tuple(x[k : k + n]) for k in range(len(x) - n + 1))
    b = Counter(tuple(y[k : k + n]) for k in range(len(y) - n + 1))
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


def rouge_l(given: str, answer: str) -> float:
    """ROUGE-L F1 = 2 LCS / (|x| + |y|), as without substitutions the edit distance is
    |x| + |y| − 2 LCS."""
    x, y = split_words(given), split_words(answer)
    total = len(x) + len(y)
    return (total - edit_distance(x, y, substitution=2)) / max(total, 1)


# --- the leak gate: do a teacher's words give the answer away? (✗ is refused, ✓ passes) ---
ASKS = {  # what kind of answer a question asks for
    "place": r"(^|[,.;] )where\b|\b(which|what) (side|part|corner|hand)\b|\bto my\b",
    "time": r"^when\b[^,]*$|[,.;] when\b|\bhow (long|much time|many (second|minute)s)\b|"
    r"\b(what|which) (exact )?(time|second|minute|moment)\b",
    "truth": r"^(is|are|was|were|do|does|did|has|have|had|can|could|will|would)\b",
}
TIME = r"(?<![\w.:–-])(\d+:\d\d|\d[\d.–-]* ?s\b|[\w.–-]+ (second|minute)s\b)|\b(second|frame)s? \d+"
# What is refused: "answer" always, "number" if the answer has a digit, the others if asked for.
FORBIDDEN = {
    "answer": r"\banswer (is|was|lies|should)\b|\b(right|correct) (answer|value)\b"  # ✓ 'an answer'
    r"|\b(best|first|second|third|last|final|listed) (option|choice)"  # ✗ 'the last option'
    r"|\b(option|choice|letter) [a-h]\b|\b[a-h]\)",  # ✗ 'option a', '(b)'  ✓ 'player B'
    "number": r"\b(one|two|three|twice|\d+)( \w+)? (more|fewer|less|short|extra|too|off)\b(?! time)"
    r"|\btoo (many|few|low|high|short|long)\b|\b(missed|overlooked|forgot|left out) (a|one|two|\d)"
    r"|\byour (count|estimate|number)|\byou (counted|left|said|gave)",  # ✗ 'one too many'
    "time": TIME,  # ✗ 'look at 0:12', 'after ten seconds'  ✓ 'wait for the second bounce'
    "truth": r"\b(yes|no|never|(?<!do )not)\b|(?<!do)n\Wt\b"  # ✗ 'it is not there'  ✓ 'do not stop'
    r"|(^|[.;:,\d] )(the|its?|s?he|they|there)\b",  # ✗ 'the lamp glows'  ✓ 'see if the lamp glows'
}
OPTION_LETTER = r"(?<![\w'’-])([B-H]|A(?! [a-z])|A(?= (?:is|was|fits)\b))(?![\w'’-])"  # ✓ 'A bus'
SYNONYMS = """0 zero none|1 one single|2 two twice pair|3 three|4 four|5 five|6 six|7 seven|8 eight
    |9 nine|10 ten|11 eleven|12 twelve dozen|13 thirteen|14 fourteen|15 fifteen|16 sixteen
    |17 seventeen|18 eighteen|19 nineteen|20 twenty|0.5 half|0.25 quarter quarters
    |throw threw thrown|tear tore torn|take took taken|back behind"""
FIRST_SYNONYM = {word: row.split()[0] for row in SYNONYMS.split("|") for word in row.split()}
STOP_WORDS = r"""(?x: \b(an|and|are|as|at|be|by|do|does|for|from|has|he|her|his|in|into|is|its?|off?
    |on|only|or|out|she|that|the|their|then|there|they|this|to|up|was|were|with|you|hands?
    |keep)\b)"""
NOT_A_NUMBER = r"(?<!-)\bone (?=by|of|from|as|only|with|that)|\b(this|each) one\b"
NOT_A_PLACE = r"\bright (?=after|before|when|as|at)"
WORD_ENDING = r"(?<=[^\W\d]{6}).+|(?<=[^\W\d]{3})(ing|ish|ed|es|e?n|s|y|e)$"


def asks_for(question: str) -> set[str]:
    """Return the kinds of answer, keys of ASKS, that a question asks for."""
    return {kind for kind, pattern in ASKS.items() if re.search(pattern, question, re.I)}


def stems(text: str) -> list[str]:
    """Return the stems of a text's words, in order, without stop words; then `derived_numbers`."""
    text = re.sub(r"\b([^\W\d_])[-, ]+(?=[^\W\d_]\b)", r"\1", text.casefold())  # 't-a-x-i'
    text = text.translate(str.maketrans("−,", "-."))
    text = re.sub(rf"{TIME}|{STOP_WORDS}|{NOT_A_NUMBER}|{NOT_A_PLACE}", " ", text)
    words = re.findall(r"(?:(?<!\w)-)?\d+(?:\.\d+)?|[^\W\d_]{2,}", text)
    stemmed = [re.sub(WORD_ENDING, "", FIRST_SYNONYM.get(word, word)) for word in words]
    return stemmed + derived_numbers([float(word) for word in stemmed if word[-1].isdecimal()])


def derived_numbers(numbers: list[float]) -> list[str]:
    """Return the sum and the product of each run of up to four numbers (if the answer is 3: ✗ 'two
    here, one there'), each also divided and multiplied by 100, because of percentages."""
    runs = [numbers[i : i + n] for n in (1, 2, 3, 4) for i in range(len(numbers) - n + 1)]
    values = [combine(run) for run in runs for combine in (sum, math.prod)]
    return [f"{value * unit:g}" for value in values for unit in (0.01, 1, 100)]


def word_match(wanted: list[str], said: list[str]) -> float:
    """The share of the wanted words that are said, doubled if all are said in their order, so that
    options of the same words can be told apart."""
    rest = iter(said)
    in_order = all(word in rest for word in wanted)  # `in` moves `rest` past the word it finds
    share = len(set(wanted) & set(said)) / max(len(wanted), 1)
    return 2 * share if in_order else share


def leak(words: str, question: str, options: list[str], answer: str) -> str | None:
    """Return why a teacher's words give the answer away ('it ...'), or None if they do not."""
    # 1. Phrases that tell, by the kind of answer.
    asked = {"answer"} | asks_for(question)
    if re.search(r"\d", answer):
        asked.add("number")
    for kind in sorted(asked & FORBIDDEN.keys()):
        if re.search(FORBIDDEN[kind], words, re.I):
            return f"it tells the {kind}"

    # 2. The letters of some options, but not of all.
    letters = {*re.findall(OPTION_LETTER, words)} - {*re.findall(r"\b[A-H]\b", question)}
    if 0 < len(letters) < len(options):  # ✗ 'B fits'  ✓ 'compare A, B, C and D'
        return "it names an option"

    # 3. The answer, spelled by the words' first letters.
    initials = re.sub(r"\B\w|\W", "", words.casefold())
    spelled = re.sub(r"\W", "", answer)
    if len(spelled) > 3 and spelled.casefold() in initials:  # ✗ 'tango, alpha, xray, india'
        return "it spells the answer"

    # 4. Words that fit the answer.
    return leak_by_words(words, question, options, answer)


def leak_by_words(words: str, question: str, options: list[str], answer: str) -> str | None:
    """Return why the stems of the words give the answer away: they fit the right option better or
    worse than all others, or hold half of a free answer's words. None if they do not."""
    said = stems(words)
    matches = {label: word_match(stems(text), said) for label, text in zip("ABCDEFGHIJ", options)}
    of_answer = matches.pop(find_letter(answer), None)
    if of_answer is None:  # a free answer: half of the words that the question lacks are too many
        new = set(stems(answer)) - set(stems(question))  # ✗ 'look at the books'
        if not stems(answer):  # 'up', 'K'
            new, said = set(split_words(answer)), split_words(words)
        return "it holds the answer's words" if word_match(list(new), said) >= 0.5 else None

    others = list(matches.values())  # ✗ 'a taxi', 'no bus, no tram'  ✓ 'the bus or the taxi'
    if others and (of_answer < min(others) or of_answer > max(others)):
        return "it tells the options apart"
    return None


def withhold(patch, case) -> None:
    """Take away the evidence that would be the answer itself: the regions if the question asks for
    a place, the times if it asks for a time. Changes `patch`."""
    asked = asks_for(case.question)
    if "place" in asked:
        patch.regions = []
    if "time" in asked:
        patch.spans, patch.show_times = [], False


def gate(patch, case) -> str | None:
    """Withhold evidence that is the answer, then return why the words that are left give it away,
    or None if they do not."""
    withhold(patch, case)
    words = "; ".join([patch.guidance, *(region.what for region in patch.regions)])
    return leak(words, case.question, case.options, case.answer)


def answers_correctly(reply: str, case) -> bool:
    """Does a reply in the blind test, where the model sees no video, answer the case rightly?"""
    given, _, _ = reply.rpartition("<answer>")[2].partition("</answer>")
    return verify(given.strip(), case.answer, case.problem_type)
