"""The remote teacher against a real HTTP server on loopback, and what each of its faults costs."""

import json
import logging
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import free_port
from test_readme import snippet
from test_teacher import make_case
from test_train import recorded_rounds, recorded_update, train_once

import data
import ffr
import reward
import teacher
import train
from teacher import EvidencePatch, TeacherError

pytestmark = pytest.mark.slow  # needs an extra, the openai client
pytest.importorskip("openai", reason="pip install -r requirements-dev.txt")
KEY = "sk-not-for-anyones-eyes-4711"


TRIAL = "TOOL_CALL: get_frame(0)"


def is_trial(messages):
    """Whether this is the question, at the start, if the endpoint is of use."""
    return "Case: hello" in str(messages[-1]["content"])


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server. `fault(messages, times)` says what it sends for a conversation
    that it is asked for the `times`-th time: None as it should be, else (status, headers, body)."""

    daemon_threads = True

    def __init__(self, samples):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.chat = teacher.scripted({s.id: s.truth["evidence"] for s in samples})
        self.guess = "<answer>no idea</answer>"
        self.reset()

    def reset(self):
        self.fault, self.seen = (lambda messages, times: None), Counter()
        self.headers, self.bodies = [], []

    def reply(self, messages):
        """What a good teacher says: in the blind test, which has one message, a guess."""
        return self.guess if len(messages) == 1 else self.chat([messages], 1.0)[0][0]

    def handle_error(self, request, client_address):
        pass  # a client that stopped waiting


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        talk = json.dumps(body["messages"])
        self.server.seen[talk] += 1
        self.server.bodies.append(body)
        self.server.headers.append({k.lower(): v for k, v in self.headers.items()})
        sent = self.server.fault(body["messages"], self.server.seen[talk])
        if sent is None:
            sent = say(TRIAL if is_trial(body["messages"]) else self.server.reply(body["messages"]))
        status, headers, payload = sent
        if status == 0:  # hang up without a word
            return
        self.send_response(status)
        for name, value in {"content-length": str(len(payload)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


def message(finish="stop", usage=None, **fields):
    """A reply of any shape."""
    fields = {"role": "assistant", "content": None} | fields
    choice = {"index": 0, "message": fields, "finish_reason": finish}
    body = {"choices": [choice], "usage": usage}
    return 200, {"content-type": "application/json"}, json.dumps(body).encode()


def say(text, tokens=7):
    return message(content=text, usage={"total_tokens": tokens})


@pytest.fixture(scope="module")
def server(samples):
    server = Endpoint(samples)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def endpoint(server, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setenv("TEACHER_API_KEY", KEY + "\n")
    server.reset()
    return server


def slow(messages, times):
    time.sleep(3)


def leaking(messages, times):
    opening = messages[1]["content"][0]["text"]
    answer = opening.partition("Reference answer, for you alone: ")[2].partition("\n")[0]
    return say(patch_of(content=f"it is {answer}"))


def patch_of(**evidence):
    body = {"error_classification": "spatial", "evidence_patch": evidence}
    return f"<think>.</think><answer>{json.dumps(body)}</answer>"


def first(*replies):
    """These replies on the first requests for a conversation, then as it should be."""
    return lambda messages, times: replies[times - 1] if times <= len(replies) else None


def turns(*texts):
    """These words on the first turns of a conversation, then as it should be."""

    def fault(messages, times):
        turn = len(messages) // 2 - 1
        return say(texts[turn]) if turn < len(texts) else None

    return fault


TRUNCATED = (200, {}, say("x")[2][:-9])
FAULTS = {  # what the endpoint does to one case, and the cause that the metrics name, if it fails
    "a normal reply": (lambda messages, times: None, None),
    "two turns of tools": (turns("TOOL_CALL: get_temporal_segment(2, 6, stride=2)"), None),
    "a slow reply past the deadline": (slow, "timeout"),
    "429 with Retry-After": (first((429, {"retry-after": "1"}, b"{}")), None),
    "500 twice": (first((500, {}, b"oh"), (503, {}, b"no")), None),
    "502 with a body in no encoding": (first((502, {}, b"\xe9")), None),
    "429 with a list": (first((429, {"retry-after": "soon"}, b'[{"error": {"code": 429}}]')), None),
    "503 with null": (lambda messages, times: (503, {}, b"null"), "http_503"),
    "500 for ever": (lambda messages, times: (500, {}, b"oh"), "http_500"),
    "400": (lambda messages, times: (400, {}, b'{"error": "no pictures"}'), "http_400"),
    "a connection that breaks": (lambda messages, times: (0, {}, b""), "connection"),
    "truncated JSON": (lambda messages, times: TRUNCATED, "malformed"),
    "JSON of wrong types": (
        lambda messages, times: (200, {}, b'{"choices": {"a": [1]}}'),
        "malformed",
    ),
    "content that is no text": (lambda messages, times: say(None), "malformed"),
    "an unknown tool": (turns("TOOL_CALL: format_disk(1)"), None),
    "arguments out of range": (turns("TOOL_CALL: zoom_region(3, 0, 0, 7, 1)"), None),
    "NaN": (turns("TOOL_CALL: get_frame(nan)"), None),
    "a billion frames": (turns("TOOL_CALL: get_temporal_segment(0, 1000000000)"), None),
    "only tools": (turns(*["TOOL_CALL: get_frame(1)"] * 9), "turns"),
    "50 MB": (lambda messages, times: say("word " * 10_000_000), "malformed"),
    "a reply that leaks": (leaking, "leak"),
    "prose": (lambda messages, times: say("I think it looked at the wrong place."), "malformed"),
}


def step(make_config, accelerator, samples, endpoint, monkeypatch, **settings):
    """One training step with the remote teacher: its rollouts, advantages and metrics."""
    config = make_config(
        teacher="remote",
        teacher_url=endpoint.url,
        teacher_model="m",
        max_steps=1,
        **{"teacher_timeout": 20, "blind_test": False, **settings},
    )
    calls, groups = recorded_update(monkeypatch), recorded_rounds(monkeypatch)
    teach = train.load_teacher(config, samples, "cpu")
    _, (metrics,) = train_once(config, accelerator, samples, teach)
    return (
        [r for group in groups[0] for r in group],
        [episode.advantage for episode in calls[0][3].episodes],
        metrics,
    )


@pytest.fixture
def whole(server):
    """The step without a fault, made by the first test that needs it."""
    return server.__dict__.setdefault("whole", [])


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_the_endpoint_costs_one_rollout_its_repair_and_nothing_else(
    name,
    make_config,
    accelerator,
    samples,
    endpoint,
    monkeypatch,
    some_right,
    whole,
):
    whole = (
        whole
        or whole.extend(step(make_config, accelerator, samples, endpoint, monkeypatch))
        or whole
    )
    reference, _, usual = whole
    texts = Counter(r.unaided.text for r in reference)
    unique = [k for k, r in enumerate(reference) if r.repaired and texts[r.unaided.text] == 1]
    marked = next(
        k for k in unique if "<|" not in reference[k].unaided.text
    )  # the teacher sees it so
    endpoint.reset()
    fault, cause = FAULTS[name]

    def fault_of_one(messages, times):
        hit = json.dumps(reference[marked].unaided.text)[1:-1] in json.dumps(messages[1:2])
        return fault(messages, times) if hit else None

    endpoint.fault = fault_of_one
    began = time.time()
    late = {"teacher_timeout": 1.5} if cause == "timeout" else {}
    rollouts, advantages, metrics = step(
        make_config, accelerator, samples, endpoint, monkeypatch, **late
    )
    assert time.time() - began < 10
    for k, (a, b) in enumerate(zip(reference, rollouts)):
        assert a.unaided.completion.ids.tolist() == b.unaided.completion.ids.tolist()
        assert torch.equal(a.unaided.completion.logps, b.unaided.completion.logps)
        if k != marked or cause is None:
            a, b = (one.chosen.completion for one in (a, b))
            assert a.ids.tolist() == b.ids.tolist()
            # One row less in a batch may move the last bits.
            assert torch.allclose(a.logps, b.logps, atol=1e-5)
            assert rollouts[k].reward == reference[k].reward
    hurt = rollouts[marked]
    if cause is None:
        assert repr(hurt.patch) == repr(reference[marked].patch)
    else:
        assert hurt.repaired is None and hurt.error.cause == cause
        score = hurt.unaided.score
        assert hurt.reward == score.accuracy + score.format  # unrepaired, untaxed
    assert metrics["teacher_failures"] == (cause is not None)
    assert metrics.get(f"teacher_{cause}", 0) == (cause is not None)
    rewards = [r.reward for r in rollouts]
    for start in range(0, len(rewards), 3):  # A = (R - mean) / std, by hand
        group = rewards[start : start + 3]
        mean = sum(group) / 3
        std = (sum((r - mean) ** 2 for r in group) / 2) ** 0.5
        hand = [(r - mean) / (std + 1e-4) for r in group]
        assert advantages[start : start + 3] == pytest.approx(hand, abs=1e-5)
    asked = [n for talk, n in endpoint.seen.items() if not is_trial(json.loads(talk))]
    if name == "400":
        assert max(asked) == 1  # not tried again
    if name == "500 for ever":
        assert max(asked) == teacher.MAX_TRIES
    if name == "429 with Retry-After":
        assert time.time() - began > 1
    if name == "a normal reply":
        assert metrics["teacher_calls"] == 2 * len({r.unaided.text for r in rollouts if r.repaired})
        assert metrics["teacher_tokens"] == 7 * metrics["teacher_calls"]
        assert metrics["patch_frames"] >= 1 and metrics["patch_seconds"] > 0


def test_endpoint_that_cannot_be_used_ends_the_run_before_training(
    make_config, samples, endpoint, monkeypatch
):
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    remote = dict(teacher="remote", teacher_model="m", teacher_timeout=2)
    with pytest.raises(ValueError, match="no teacher 'm' at .*connection"):
        train.load_teacher(make_config(teacher_url=nobody, **remote), samples, "cpu")
    endpoint.fault = lambda messages, times: (401, {}, f'{{"error": "bad key {KEY}"}}'.encode())
    with pytest.raises(ValueError, match="http_401") as stop:
        train.load_teacher(make_config(teacher_url=endpoint.url, **remote), samples, "cpu")
    assert KEY not in str(stop.value)


def test_endpoint_that_goes_away_in_the_run_is_plain_grpo_and_counted(
    make_config,
    accelerator,
    samples,
    endpoint,
    monkeypatch,
    some_right,
):
    endpoint.fault = lambda messages, times: None if is_trial(messages) else (0, {}, b"")
    rollouts, _, metrics = step(make_config, accelerator, samples, endpoint, monkeypatch)
    plain = [r.unaided.score.accuracy + r.unaided.score.format for r in rollouts]
    assert [r.reward for r in rollouts] == plain and metrics["intervention"] == 0
    assert (
        metrics["teacher_connection"] == metrics["teacher_failures"] == 6 * metrics["failure"] > 0
    )


def test_a_date_in_retry_after_is_honoured(endpoint):
    wait = formatdate(time.time() + 2, usegmt=True)  # HTTP dates have whole seconds
    endpoint.fault = first((429, {"retry-after": wait}, b"{}"), say("hello"))
    chat, began = teacher.remote(endpoint.url, "m"), time.time()
    talk = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert chat([talk], 9.0) == [("hello", 7)] and 0.9 < time.time() - began < 4
    endpoint.fault = lambda messages, times: (429, {"retry-after": "3600"}, b"{}")
    began = time.time()
    assert chat([talk], 5.0)[0].cause == "http_429" and time.time() - began < 1  # no use to wait
    endpoint.fault = lambda messages, times: (
        429,
        {"retry-after": "Mon, 01 Jan 99999 00:00:00 GMT"},
        b"{}",
    )
    assert chat([talk], 1.0)[0].cause == "http_429"


def test_replay_from_the_cache_has_the_same_metrics_without_a_call(
    make_config,
    accelerator,
    samples,
    endpoint,
    monkeypatch,
    tmp_path,
    some_right,
):
    order = {}

    def fault(messages, times):  # two of three cases fail, one way or another
        if is_trial(messages):
            return None
        kind = order.setdefault(str(messages[:2]), len(order)) % 3
        return [None, (400, {}, b"{}"), say("prose")][kind]

    endpoint.fault = fault
    cached = {"teacher_cache": str(tmp_path / "cache"), "teacher_sees_answer": False}
    runs = []
    for url in (endpoint.url, ""):
        seen = endpoint.seen.total()
        config = make_config(
            teacher="remote",
            teacher_url=url,
            teacher_model="m",
            max_steps=3,
            scale_rewards="none",
            **cached,
        )
        teach = train.load_teacher(config, samples, "cpu")
        student, history = train_once(config, accelerator, samples, teach)
        runs.append((history, [p.clone() for p in student.model.parameters()]))
    assert endpoint.seen.total() == seen  # nothing was asked the second time
    (first_run, weights), (second_run, again) = runs
    spent = {"teacher_calls", "teacher_hits", "teacher_tokens", "teacher_seconds"}
    for a, b in zip(first_run, second_run):
        drop = spent | {"seconds_round", "seconds_update"}
        assert {k: v for k, v in a.items() if k not in drop} == {
            k: v for k, v in b.items() if k not in drop
        }
        assert b["teacher_calls"] == b["teacher_tokens"] == 0
        assert a["teacher_calls"] + a["teacher_hits"] == b["teacher_hits"]
    assert all(map(torch.equal, weights, again))
    total = Counter()
    for row in first_run:
        total.update({k: v for k, v in row.items() if k.startswith("teacher_")})
    assert total["teacher_http_400"] > 0 < total["teacher_malformed"] and total["teacher_calls"] > 5
    other = make_config(teacher="remote", teacher_model="another", **cached)
    teach = train.load_teacher(other, samples, "cpu")  # another teacher's replies are not in it
    assert {
        e.cause
        for e in teach(
            [ffr.case_of(ffr.Question(samples[0], data.Video(samples[0].path), [], []), "hm")]
        )
    } == {"miss"}


def test_equal_failures_are_diagnosed_once_and_a_slow_one_does_not_hold_the_others(
    samples, endpoint
):
    videos = [data.Video(s.path) for s in samples]
    cases = [
        make_case(id=s.id, question=s.question, answer=s.answer, response=f"{n}", video=v)
        for s, v in zip(samples, videos)
        for n in (1, 1, 2)
    ]
    chat, spent = teacher.remote(endpoint.url, "m", KEY, workers=4), Counter()
    verdicts = teacher.diagnose(cases, teacher.cached(chat, "", "", spent), reward.gate)
    assert all(isinstance(v, EvidencePatch) for v in verdicts) and spent["calls"] == 2 * 12
    hang = cases[2].response
    endpoint.fault = lambda messages, times: (
        slow(0, 0)
        if f"{samples[0].id}\n" in str(messages).replace("\\n", "\n")
        and f"response:\\n{hang}\\n" in str(messages)
        else None
    )
    began = time.time()
    hasty = teacher.remote(endpoint.url, "m", KEY, workers=12, timeout=1.5)
    verdicts = teacher.diagnose(cases, hasty, reward.gate)
    assert [isinstance(v, TeacherError) for v in verdicts] == [k == 2 for k in range(18)]
    assert verdicts[2].cause == "timeout" and time.time() - began < 2.9
    endpoint.fault = slow
    began = time.time()
    verdicts = teacher.diagnose(cases, chat, reward.gate, timeout=1.0)
    assert {v.cause for v in verdicts} == {"timeout"} and time.time() - began < 2  # of 12 x 3 s


def test_the_key_is_sent_to_the_endpoint_and_found_nowhere_else(
    make_config,
    accelerator,
    samples,
    endpoint,
    monkeypatch,
    tmp_path,
    some_right,
    caplog,
    capsys,
):
    """Not even where the endpoint sends it back, in an error or in a reply."""
    caplog.set_level(logging.DEBUG)

    order = {}

    def echo(messages, times):
        if is_trial(messages):
            return None
        kind = order.setdefault(str(messages[:2]), len(order)) % 3
        words = patch_of(content=f"look at {KEY}", key_frames=[1])
        return [None, (403, {}, KEY.encode()), say(words)][kind]

    endpoint.fault = echo
    settings = {"teacher_cache": str(tmp_path / "cache"), "save_steps": 1}
    rollouts, _, metrics = step(
        make_config, accelerator, samples, endpoint, monkeypatch, **settings
    )
    assert {h["authorization"] for h in endpoint.headers} == {f"Bearer {KEY}"}
    assert metrics["teacher_http_403"] > 0
    assert any(r.patch and r.patch.guidance == "look at key" for r in rollouts)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.parent.name == "cache" for file in files) and any(
        "checkpoint" in str(file) for file in files
    )
    written = b"".join(file.read_bytes() for file in files)
    said = (
        caplog.text
        + "".join(capsys.readouterr())
        + "".join(f"{r.error!r}{vars(r.error)}" for r in rollouts if r.error)
    )
    assert KEY.encode() not in written and KEY not in said


def test_no_key_of_the_users_other_services_is_sent(endpoint, monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "my_private")
    talk = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    teacher.remote(endpoint.url, "m")([talk], 5.0)
    assert endpoint.headers and "my_private" not in str(endpoint.headers)


def test_cache_is_whole_whoever_writes_it(tmp_path):
    """Many writers of one entry and a reader: never half a file."""
    file, bad = Path(tmp_path / "c" / "entry.json"), []
    replies = [("x" * 50_000, 1), TeacherError("http_500", "y" * 90_000)]

    def write(k):
        for _ in range(60):
            teacher.store_reply(file, replies[k % 2])

    writers = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        reply = teacher.load_reply(file)
        whole = reply is None or reply == replies[0] or str(reply) == str(replies[1])
        bad += [] if whole else [reply]
    assert not bad and len(list(file.parent.iterdir())) == 1


def test_a_request_may_take_most_of_the_time(endpoint):
    endpoint.fault = lambda messages, times: time.sleep(1.2)
    talk = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    began = time.time()
    assert teacher.remote(endpoint.url, "m")([talk], 2.0) == [(endpoint.guess, 7)]
    assert time.time() - began < 2 and endpoint.seen.total() == 1


def test_without_workers_all_share_one_deadline(endpoint, samples):
    videos = [data.Video(sample.path) for sample in samples]
    cases = [make_case(id=s.id, answer="x", video=v) for s, v in zip(samples, videos)]
    endpoint.fault = slow
    began = time.time()
    chat = teacher.remote(endpoint.url, "m")
    verdicts = teacher.diagnose(cases, chat, reward.gate, timeout=1.0)
    assert {v.cause for v in verdicts} == {"timeout"} and time.time() - began < 2
    time.sleep(1)
    asked = endpoint.seen.total()
    time.sleep(2)
    assert endpoint.seen.total() == asked  # nothing goes on asking


def test_a_short_or_broken_key_does_no_harm(endpoint, monkeypatch):
    endpoint.fault = lambda messages, times: say("box of 1 x")
    talk = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert teacher.remote(endpoint.url, "m", "x")([talk], 5.0) == [("box of 1 x", 7)]


def refused(status, words, **more):
    body = {"error": {"message": words, **more}}
    return status, {"content-type": "application/json"}, json.dumps(body).encode()


PATCH = patch_of(content="look there", key_frames=[3])
NATIVE = [{"id": "1", "type": "function", "function": {"name": "get_frame"}}]
NATIVE[0]["function"]["arguments"] = '{"frame_index": 3}'
PARTS = [{"type": "thinking", "thinking": []}, {"type": "text", "text": PATCH}]
OVER_LIMIT = refused(200, "Provider returned error", code=429)
ODD = {  # what is sent for ever, what it ends in: a patch, or a cause and the server's words
    "no usage": (message(content=PATCH), None, ""),
    "usage without its parts": (message(content=PATCH, usage={"total_tokens": 5}), None, ""),
    "content in parts": (message(content=PARTS), None, ""),
    "all in the reasoning": (message(reasoning_content=PATCH), None, ""),
    "cut in the reasoning": (message("length", reasoning_content="Let me"), "length", "Let me"),
    "cut": (message("length", content="I was going"), "length", "raise --teacher_max_tokens"),
    "filtered": (message("content_filter", content="[filtered]"), "content_filter", "filtered"),
    "refused": (message(refusal="I will not watch this"), "refusal", "I will not watch this"),
    "native tool calls": (message("tool_calls", tool_calls=NATIVE), "turns", ""),
    "nothing": (message(), "malformed", "no JSON"),
    "no choices": ((200, {}, b'{"choices": []}'), "malformed", "choices"),
    "an error in a 200": (OVER_LIMIT, "http_429", "Provider returned error"),
    "an error in a 200, by name": (refused(200, "no", code="busy"), "http_400", "no"),
    "a page": ((200, {"content-type": "text/html"}, b"Please log in"), "malformed", "log in"),
    "a page with a 502": ((502, {"content-type": "text/html"}, b"Bad Gateway"), "http_502", "Bad"),
    "a stream": ((200, {"content-type": "text/event-stream"}, b"data: x"), "malformed", "data: x"),
    "no such model": (refused(404, "The model `m` does not exist."), "http_404", "not exist"),
    "one picture": (refused(400, "At most 1 image(s) may be"), "http_400", "At most 1 image"),
    "no pictures": (refused(500, "image input is not supported"), "http_500", "not supported"),
    "a short context": (refused(400, "maximum context length is 8192"), "http_400", "8192"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_endpoint_ends_in_a_patch_or_in_the_cause_and_its_words(
    name, endpoint, samples, make_config
):
    sent, cause, words = ODD[name]
    endpoint.fault = lambda messages, times: sent
    case = make_case(answer="ring", video=data.Video(samples[0].path))
    (verdict,) = teacher.diagnose([case], teacher.remote(endpoint.url, "m"), reward.gate)
    if cause is None:
        assert isinstance(verdict, EvidencePatch) and verdict.key_frames == [3]
    else:
        assert verdict.cause == cause and words in verdict.detail
    if cause == "turns":
        second = next(talk for talk in map(json.loads, endpoint.seen) if len(talk) > 2)
        assert second[2]["content"][0]["text"].strip() == 'TOOL_CALL: get_frame({"frame_index": 3})'
        assert second[3]["content"][0]["text"].startswith("frame 3 ")
    if cause in ("http_429", "http_500", "http_502"):
        assert [*endpoint.seen.values()] == [teacher.MAX_TRIES]
    config = make_config(teacher="remote", teacher_url=endpoint.url, teacher_model="m")
    if cause in (None, "turns"):
        train.load_teacher(config, samples, "cpu")
    else:  # the trial at the start says so, and what to do
        with pytest.raises(ValueError, match="--num_frames") as stop:
            train.load_teacher(config, samples, "cpu")
        assert name == "nothing" or cause in str(stop.value) and words in str(stop.value)


def test_an_error_in_a_200_is_tried_again(endpoint, samples):
    endpoint.fault = first(refused(200, "busy", code=502), OVER_LIMIT, message(content=PATCH))
    case = make_case(answer="ring", video=data.Video(samples[0].path))
    (verdict,) = teacher.diagnose([case], teacher.remote(endpoint.url, "m"), reward.gate)
    assert isinstance(verdict, EvidencePatch) and [*endpoint.seen.values()] == [3]


def test_newer_name_of_the_token_limit_is_taken_where_it_is_asked_for(endpoint):
    said = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens'."
    chat, hi = teacher.remote(endpoint.url, "m"), [{"role": "user", "content": "hi"}]
    endpoint.fault = first(refused(400, said), message(content="once"))
    assert chat([hi], 9.0) == [("once", 0)] and endpoint.seen.total() == 2
    assert chat([hi], 9.0)[0][0] == endpoint.guess and endpoint.seen.total() == 3  # remembered
    asked = ["max_completion_tokens" in body for body in endpoint.bodies]
    assert asked == [False, True, True]


def test_waits_between_tries_double(endpoint, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.2)
    times = []
    endpoint.fault = lambda messages, n: times.append(time.time()) or (503, {}, b"busy")
    teacher.remote(endpoint.url, "m")([[{"role": "user", "content": "hi"}]], 20.0)
    first_wait, _, third = [b - a for a, b in zip(times, times[1:])]
    assert third > 2.3 * first_wait  # 0.2 and 0.8 s, less a quarter at most


def test_trial_shows_as_many_pictures_as_a_case_has(endpoint, samples, make_config):
    seen = []

    def one_picture(messages, times):
        seen.append(sum(part["type"] == "image_url" for part in messages[1]["content"]))
        return refused(400, "At most 8 images") if seen[-1] > 8 else None

    endpoint.fault = one_picture
    given = dict(teacher="remote", teacher_url=endpoint.url, teacher_model="m")
    with pytest.raises(ValueError, match="At most 8 images.*--num_frames"):
        train.load_teacher(make_config(**given, num_frames=9), samples, "cpu")
    train.load_teacher(make_config(**given, num_frames=8), samples, "cpu")
    assert seen == [9, 8]


def test_blind_test_asks_once_a_question_and_once_a_patch_and_is_replayed(
    make_config, accelerator, samples, endpoint, monkeypatch, tmp_path, some_right
):
    """Words from which the endpoint answers right, and without them wrong, are asked for again."""
    asked = Counter()

    def fault(messages, times):
        if len(messages) > 1:
            return None
        text = messages[0]["content"][0]["text"]
        asked["with words" if "Someone who has seen it says" in text else "alone"] += 1
        answers = [s.answer for s in samples if s.question in text]
        told = "Someone who has seen it says: the flash is here" in text
        return say(f"<answer>{answers[0] if told else 'no idea'}</answer>")

    endpoint.fault = fault
    runs = []
    for url in (endpoint.url, ""):
        config = {"blind_test": True, "teacher_cache": str(tmp_path / "cache"), "max_steps": 2}
        config |= {"teacher": "remote", "teacher_url": url, "teacher_model": "m"}
        config = make_config(**config)
        teach = train.load_teacher(config, samples, "cpu")
        runs.append(train_once(config, accelerator, samples, teach)[1])
        calls = endpoint.seen.total()
    live, replayed = runs
    assert endpoint.seen.total() == calls and replayed[0]["teacher_calls"] == 0
    questions = len({s.question for s in samples})
    assert 0 < asked["alone"] <= questions and asked["with words"] > 0
    assert sum(row["teacher_refused"] for row in live) > 0
    for a, b in zip(live, replayed):
        for name in a:
            if not name.startswith(("seconds", "teacher_calls", "teacher_hits", "teacher_tokens")):
                assert a[name] == b[name] or name == "teacher_seconds", name


def test_a_server_can_sample_in_the_place_of_generate(
    endpoint, student, samples, teach, monkeypatch
):
    """The snippet in assets/pieces.md: the server sees the frames, and in a repair the patch too."""
    monkeypatch.setattr(ffr, "generate", ffr.generate)  # what the snippet sets is taken back
    monkeypatch.setattr(ffr, "encode", ffr.encode)
    exec(snippet("def served"), names := {})
    ffr.generate = names["served"](endpoint.url, "student", student.processor.tokenizer)
    right = f"<think> look </think> <answer> {samples[0].answer} </answer>"
    wrong = "<think> look </think> <answer> look </answer>"

    def reply(messages, times):
        return say(right if "Evidence" in str(messages) else wrong)

    endpoint.fault = reply
    question = ffr.open_question(student, samples[0])
    (group,) = ffr.find_fix_reason(
        student, [question], num_rollouts=2, teacher=teach, kappa=0.3, lam=0.0, seed=(0,)
    )
    assert [member.reward for member in group] == pytest.approx([2 - 0.3] * 2)
    for member in group:
        done = member.chosen.completion
        assert done.finished and done.ids[-1] == student.processor.tokenizer.eos_token_id
        assert member.unaided.text.strip() == wrong and (done.logps < 0).all()
    shown = [body["messages"][0]["content"] for body in endpoint.bodies]
    pictures = [sum(part["type"] == "image_url" for part in content) for content in shown]
    assert pictures[:2] == [len(question.frames)] * 2 and min(pictures[2:]) > pictures[0]
