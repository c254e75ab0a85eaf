"""What people and published models write as an answer, and whether a person calls it right."""

import pytest

from reward import accuracy_reward, extract_answer, reference_problem, verify

RIGHT = {
    "multiple choice": [
        ('D', 'D. Both A and B'), ('B', "I'd go with B"), ('B', 'I would choose B'), ('B', 'Thus, the answer is B'), ('B', 'Based on the video, the answer is B'), ('B', 'The most likely answer is B'), ('B', '正确答案是B'), ('B', '我选B'), ('B', 'B选项'), ('B', 'B猫'), ('B', '$\\mathrm{B}$'), ('B', '\\boxed{\\mathbf{B}}'), ('B', '\\textbf{B}'),
        ("B", "**B**"), ("B", "Option B"), ("B", "B, a cat"), ("B", "B a cat"), ("B", "Answer: B"), ("B", "（B）"), ("B", "Ｂ"), ("B", "B\n\nexplanation: it purrs"), ("B. a cat", "B"),
        ("B", "`B`"), ("B", "__B__"), ("B", "\\boxed{B}"), ("B", "$\\boxed{\\text{B}}$"), ("B", "$B$"),
        ("B", "The answer is B"), ("B", "The answer is B."), ("B", "The correct answer is (B)."),
        ("B", "**Answer:** B"), ("B", "Final answer: B"), ("B", "option b"), ("B", "Choice B"),
        ("B", "B - a cat"), ("B", "B – a cat"), ("B", "B: a cat"), ("B", "B) a cat"), ("B", "[B]"),
        ("B", "Answer:B"), ("B", "b"), ("B", "B\nIt purrs"), ("A", "A\n\nThe dog barks"), ("A", "A"),
        ("A", "A, dog"), ("A", "A. dog"), ("A", "A a dog"), ("A", "Option A"), ("A", "The answer is A."),
        ("B", "I choose B"), ("B", "答案：B"), ("B", "B. vitamin C"), ("C", "C major chord"),
        ("B", "B, A cat"), ("B", "(B) a cat or a dog"), ("B", "**B. a cat**"), ("B) x", "b"),
        ("B", "B。"), ("B", "“B”"), ("A", "A is correct"), ("B", "B is the answer"), ("B", "It's B"), ("B", "B, i.e. the cat"), ("B", "The right answer is option B: a cat"),
        ("B", "<B>"), ("B", "Ｂ．猫"), ("B", "\\(B\\)"), ("B", "B; a cat"), ("B", "(B)."), ("B", "B. I see it"),
    ],
    "numerical": [
        ('-5', '‑5'), ('90', '1 min 30 s'), ('5400', '1:30:00'), ('90', '1m30s'), ('2500', '2.5×10^3'), ('300000000', '3 \\times 10^8'), ('300000000', '3×10⁸'), ('0.001', '10⁻³'), ('1.6e-19', '1.6 \\times 10^{-19}'), ('1.5', '1\\frac{1}{2}'), ('3.5', 'three and a half'), ('0.5', 'half'), ('3e9', '3 billion'), ('5', '2 + 3 = 5'), ('0.75', '3 / 4'), ('5', 'v_2 = 5'), ('5', '5 m·s⁻²'),
        ("12 cm^2", "12"), ("12", "12 m2"), ("1/2", "0.5"), ("3", "three"), ("3", "\\boxed{3}"), ("3", "$3$"),
        ("12", "12 cm²"), ("12", "12 cm^{2}"), ("12", "12 m s^-1"), ("0.5", "½"), ("1.5", "1½"),
        ("1.5", "1 1/2"), ("0.5", "\\frac{1}{2}"), ("50", "50%"), ("50", "$50"), ("50", "€ 50"), ("-5", "-$5"),
        ("21", "twenty-one"), ("21", "Twenty one"), ("12", "twelve cats"), ("1200", "1,200"),
        ("1200", "1'200"), ("1200", "1’200"), ("1200", "1_200"), ("12345678", "12 345 678"),
        ("12345678", "12,345,678"), ("1200", "1\u202f200"), ("1200.5", "1,200.5"), ("1200.5", "1 200,5"),
        ("3.5", "3,5"), ("0.125", "0,125"), ("750", "12:30"), ("3723", "1:02:03"), ("-5", "−5"),
        ("-5", "–5"), ("-5", "-5"), ("-5", "-5.00"), ("50", "~50"), ("50", "approximately 50."),
        ("3", "３"), ("3", "**3**"), ("3", "x = 3"), ("3", "3."), ("3", "3 (three)"), ("2000", "2e3"),
        ("0.333", "1/3"), ("3", "3 CO2 molecules"), ("-1.5", "-1 1/2"), ("0.5", ".5"), ("5", "+5"),
        ("1e30", "1e30"), ("3", "约3个"), ("24", "two dozen"), ("300", "three hundred"), ("1500000", "1.5 million"), ("-3", "minus three"),
    ],
    "regression": [
        ("50", "about 50"), ("12:30", "12:30"),
        ("50", "~50"), ("50", "roughly 50 m"), ("-4.2", "-4.2"), ("-4.2", "−4.2"), ("1:02:03", "1:02:03"),
        ("90", "1:30"), ("0", "0.0"), ("12:30", "12：30"), ("1200", "1 200"), ("3.5", "3,5 s"),
    ],
    "OCR": [
        ("出口", "出口"),
        ("***", "***"), ("C++", "c++"), ("C#", "C#."), ("-5", "−5"), ("ΟΔΟΣ", "οδος"), ("STRASSE", "straße"),
        ("ТАКСИ", "такси"), ("สวัสดี", "สวัสดี"), ("ＴＡＸＩ", "taxi"), ("don't", "don’t"), ("→", "→"),
    ],
    "exact": [
        ('red', '\ufeffred'), ('red', '\\boxed{\\text{red}}'), ('soft', 'so\xadft'),
        ("red blue", "**Red blue**."), ("-5", "-5"), ("-5", "−5"), ("red", "\\boxed{red}"), ("€", "€"),
        ("ភ្នំពេញ", "ភ្នំពេញ"), ("yes", "“Yes!”"),
    ],
    "free-form": [
        ("一只狗在草地上跑步", "一只狗正在草地上跑步"), ("犬が走っている", "犬が走っています"), ("собака бежит", "Собака бежит."),
        ("собака бежит", "СОБАКА БЕЖИТ!"), ("หมากำลังวิ่ง", "หมาวิ่ง"), ("ខ្ញុំស្រឡាញ់", "ខ្ញុំស្រឡាញ់អ្នក"),
        ("a dog runs", "A dog runs."), ("ຂ້ອຍຮັກ", "ຂ້ອຍຮັກເຈົ້າ"), ("-5", "-5"),
    ],
}  # fmt: skip
WRONG = {
    "multiple choice": [
        ('D', "I'd say B"), ('D', "I'd go with B"),
        ("B", "A. or B."), ("B", "A dog"),
        ("A", "A taxi"), ("A", "a dog"), ("A", "AC"), ("C", "C++"), ("C", "C#"), ("A", "A or B"), ("B", "A and B"),
        ("A", "A, B"), ("A", "A/B"), ("A", "(A)(B)"), ("B", "B C D"), ("B", "B and C"), ("A", "A. dog or B. cat"),
        ("A", "A: dog, B: cat"), ("A", "A\nB"), ("B", "cat"), ("B", ""), ("B", "  "), ("I", "I think so"),
        ("B", "Both A and B"), ("A", "A a dog or B a cat"), ("C", "C's"), ("B", "-"), ("A", "A. dog B. cat"),
    ],
    "numerical": [
        ('5', '‑5'), ('108', '10⁸'), ('1', '1h30m'), ('10', '10x20'), ('1.6e-19', '9e-19'), ('1.6e-19', '0'), ('1e-3', '0'), ('5e-3', '0.01'), ('2', '√2'), ('2', '2π'), ('125', '2 m and 5 m'), ('5.5', '1\\frac{1}{2}'), ('3', 'three and a half'),
        ("0.004", "0.001"), ("3", "3 apples and 0 pears"), ("3", "3 of 5"),
        ("35", "3,5"), ("3", "3,5"), ("5", "-5"), ("-5", "5"), ("5", "−5"), ("3", "3/5"), ("3", "3-4"), ("3", "3 or 4"),
        ("8", "8 to 6 s"), ("1", "1, 2, 3"), ("123", "1,2,3"), ("3", "infinity"), ("3", "nan"), ("nan", "nan"),
        ("inf", "inf"), ("32", "3²"), ("10", "10^3"), ("23", "2*3"), ("1200", "1*200"), ("2", "CO2"), ("0", ""),
        ("0.005", "0.009"), ("0", "-"), ("7", "3 + 4"), ("3", "3 of five"), ("1", "1/0"), ("3", "3 hundred"), ("3", "three thousand"), ("1.52", "1.5 200"), ("2", "1/2/2024"), ("-0.5", "½"), ("1200", "1,20"), ("12", "1 2"), ("3", "3:30"), ("-3", "three"),("1.2", "1.2.3"),
    ],
    "regression": [
        ("-4.2", "4.2"), ("4.2", "-4.2"), ("0", "0.001"), ("0", "-1"), ("50", "40 to 60"), ("50", ""), ("50", "nan"),
        ("1:30", "130"), ("35", "3,5"),
    ],
    "OCR": [
        ("***", ""), ("C++", "C"),
        ("C", "C++"), ("C#", "C"), ("5", "-5"), ("-5", "+5"), ("€", ""), ("€", "$"), ("***", "  "), ("***", "**"),
        ("5", "5%"),
    ],
    "exact": [("-5", "5"), ("C#", "C"), ("C", "C#"), ("", ""), ("a b", "b a"), ("5", "−5")],
    "free-form": [("", ""), ("-5", "5"), ("一只狗", "猫"), ("***", " ")],
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, answer, given", [(kind, *row) for kind, rows in RIGHT.items() for row in rows]
)
def test_right(kind, answer, given):
    assert verify(given, answer, kind)
    assert kind == "free-form" or accuracy_reward(given, answer, kind) == 1


@pytest.mark.parametrize(
    "kind, answer, given", [(kind, *row) for kind, rows in WRONG.items() for row in rows]
)
def test_wrong(kind, answer, given):
    assert not verify(given, answer, kind)
    assert accuracy_reward(given, answer, kind) < 1


def test_unlike_scripts_are_graded_by_character():
    assert accuracy_reward("欢迎光临北京", "欢迎光临北京站", "OCR") == pytest.approx(6 / 7)
    assert accuracy_reward("สวัสด", "สวัสดี", "OCR") == pytest.approx(5 / 6)


def test_the_last_answer_is_extracted():
    assert extract_answer("<answer> a </answer> <answer>b\nc </answer>") == "b\nc"
    assert extract_answer("<answer>a") is None
    assert extract_answer("a</answer>") is None


@pytest.mark.parametrize(
    "kind, answer, options, fine",
    [
        ("multiple choice", "cat", ["dog", "cat"], False),
        ("multiple choice", "AC", ["A. x", "B. y", "C. z"], False),
        ("multiple choice", "E", ["A. x", "B. y"], False),
        ("multiple choice", "D", ["A. x", "B. y", "C. z", "D. A and B"], True),
        ("multiple choice", "A", ["C major", "G major", "D minor"], True),
        ("multiple choice", "B", ["red", "blue", "A"], True),
        ("multiple choice", "B", ["A. x", "B. y"], True),
        ("multiple choice", "(b)", ["(A) x", "(B) y"], True),
        ("numerical", "12 cm^2", [], True),
        ("numerical", "three", [], True),
        ("numerical", "3 or 4", [], False),
        ("numerical", "9" * 5000, [], False),
        ("regression", "12:30", [], True),
        ("regression", "no idea", [], False),
        ("OCR", "", [], False),
        ("exact", "***", [], True),
        ("exact", "a </answer> b", [], False),
    ],
)
def test_references_that_nothing_can_match_are_named(kind, answer, options, fine):
    problem = reference_problem(answer, kind, options)
    assert (problem is None) is fine
    assert fine or repr(answer) in problem
