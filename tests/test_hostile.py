"""Ten thousand random and mutated replies (extra: hypothesis): nothing but the module's own error."""

import json
from collections import Counter

import pytest
from test_teacher import make_case, patch_json

import ffr
import reward
import teacher
from teacher import EvidencePatch, TeacherError

pytestmark = pytest.mark.slow
hypothesis = pytest.importorskip("hypothesis", reason="pip install -r requirements-dev.txt")
st = hypothesis.strategies

NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([-1, 3.5, 39, 40, 10**9, 10**400, "3", "nan", True])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "error_classification": st.one_of(
            st.sampled_from(["temporal", "spatial", ["temporal"]]), VALUES
        ),
        "evidence_patch": st.one_of(
            VALUES,
            st.fixed_dictionaries(
                {},
                optional={
                    "content": st.one_of(st.text(max_size=400), VALUES),
                    "key_frames": st.one_of(st.lists(NUMBERS, max_size=9), VALUES),
                    "temporal_markers": st.one_of(
                        st.lists(st.lists(NUMBERS, max_size=3), max_size=4), VALUES
                    ),
                    "spatial_regions": st.one_of(
                        VALUES,
                        st.lists(
                            st.fixed_dictionaries(
                                {},
                                optional={
                                    "frame": NUMBERS,
                                    "box": st.lists(NUMBERS, max_size=5),
                                    "what": VALUES,
                                },
                            ),
                            max_size=4,
                        ),
                    ),
                },
            ),
        ),
    },
)
TOOLS = st.tuples(
    st.sampled_from([*teacher.TOOLS, "rm", "__import__"]),
    st.lists(st.one_of(NUMBERS, st.text(max_size=12)), max_size=6),
)
OUTCOMES = Counter()
QUESTIONS = [
    ("What is put down?", [], "book"),
    ("How many?", [], "3"),
    ("Is it there?", [], "no"),
    ("Where is it?", ["A. left", "B. right"], "B"),
    ("When?", [], "7"),
    ("?", ["A"], "(A)"),
]


@st.composite
def replies(draw):
    text = draw(
        st.one_of(
            st.text(max_size=300),
            BODIES.map(lambda body: f"<think>.</think><answer>{json.dumps(body)}</answer>"),
            st.lists(TOOLS, max_size=5).map(
                lambda calls: "\n".join(
                    f"TOOL_CALL: {name}({', '.join(map(str, values))})" for name, values in calls
                )
            ),
            st.just(patch_json(regions=[{"frame": 3, "box": [0, 0, 0.5, 0.5], "what": "x"}])),
        )
    )
    for _ in range(draw(st.integers(0, 3))):  # cut, doubled, spoilt
        at, to = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        text = draw(
            st.sampled_from(
                [
                    text[:at] + text[to:],
                    text[:to] + text[at:],
                    text[:at] + '\x00{["' + text[at:],
                    text[:at] + "\ud800" + text[to:],
                    text.replace("0", "9" * 50),
                ]
            )
        )
    return text


@hypothesis.settings(
    max_examples=10_000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(text=replies(), question=st.sampled_from(QUESTIONS))
def take(text, question):
    asked, options, answer = question
    case = make_case(question=asked, options=options, answer=answer)
    (verdict,) = teacher.diagnose(
        [case], lambda talks, seconds: [(text, 1)] * len(talks), reward.gate, num_frames=1
    )
    OUTCOMES[getattr(verdict, "cause", "patch")] += 1
    assert isinstance(verdict, EvidencePatch | TeacherError)
    if isinstance(verdict, TeacherError):
        assert verdict.cause in ("malformed", "leak", "turns")
        return
    assert verdict.error_type in teacher.ERROR_TYPES
    frames = [*verdict.key_frames, *(r.frame for r in verdict.regions), *sum(verdict.spans, ())]
    assert all(type(k) is int and 0 <= k < 40 for k in frames)
    assert len(verdict.key_frames) <= 4 and len(verdict.regions) <= 2
    assert sum(b - a + 1 for a, b in verdict.spans) <= 10
    assert len(verdict.guidance.split()) <= 60 and not set("<>[]") & set(verdict.guidance)
    ffr.render_patch(verdict, Seconds(), 0.2)[0]["text"].encode()


def test_any_reply_is_a_patch_within_its_limits_or_a_teacher_error():
    OUTCOMES.clear()
    take()
    assert OUTCOMES.total() >= 10_000
    assert min(OUTCOMES[kind] for kind in ("patch", "malformed", "turns")) > 200, OUTCOMES


class Seconds:
    """What a patch is rendered from, besides itself."""

    def seconds(self, index):
        return index / 10

    def frame(self, index):
        return teacher.Image.new("RGB", (100, 50))
