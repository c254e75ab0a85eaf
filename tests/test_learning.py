"""The learning bench: its arms differ from FFR in what they say, its figures are what it says."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import bench_learning as bench
import pytest
import torch
from cold_start import chain_rationale, chain_videos, needle_rationale
from conftest import ROOT
from report_learning import by_arm, interval, retention, searched, short_table, table

import data
import ffr
import grpo
import teacher
from reward import Score


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return data.load_samples(chain_videos(str(tmp_path_factory.mktemp("chain")), 6, seed=5))


RIGHT, WRONG = Score(1.0, 1.0, True), Score(0.0, 1.0, False)


def repaired(score: Score, reward: float) -> ffr.Member:
    failed = ffr.Rollout({}, "failed tokens", "", WRONG)
    again = ffr.Rollout({}, "repaired tokens", "", score)
    return ffr.Member(None, 0, failed, repaired=again, reward=reward)


def test_reward_only_trains_the_failed_tokens_with_the_repaired_reward():
    r = repaired(RIGHT, 1.7)
    trained = bench.choose("reward only", r)
    assert (trained.chosen.completion, trained.reward) == ("failed tokens", 1.7)
    assert bench.choose("FFR", r) is r


@pytest.mark.parametrize(
    "score, reward, tokens, expected",
    [
        (RIGHT, 1.7, "repaired tokens", 1.7),  # R + R_fmt - κ is above the failed answer's 0 + 1
        (WRONG, 0.7, "failed tokens", 1.0),
        (RIGHT, 1.0, "failed tokens", 1.0),  # kappa 1: equal, so the unaided one
    ],
)
def test_best_of_keeps_the_higher_reward_and_the_unaided_one_if_equal(
    score, reward, tokens, expected
):
    trained = bench.choose("best of", repaired(score, reward))
    assert (trained.chosen.completion, trained.reward) == (tokens, expected)


def test_random_patch_has_the_size_of_the_teachers_and_another_place(samples, teach):
    video, rng = data.Video(samples[0].path), random.Random(0)
    case = teacher.Case(
        id="x", question="q", options=[], answer="red blue", response="", video=video
    )
    region = teacher.Region(4, (0.1, 0.2, 0.4, 0.6), "a square")
    patch = teacher.EvidencePatch(
        error_type="spatial", guidance="look", key_frames=[4, 5], spans=[(4, 5)], regions=[region]
    )
    for _ in range(50):
        other = bench.change("random patch", patch, case, rng)
        (a, b), (moved,) = other.spans[0], other.regions
        assert b - a == 1 and a % 2 == 0 and a != 4 and other.key_frames == [a, b]
        x1, y1, x2, y2 = moved.box
        assert (x2 - x1, y2 - y1) == pytest.approx((0.3, 0.4)) and 0 <= min(x1, y1) < max(
            x2, y2
        ) <= 1
        assert moved.frame == a and (other.guidance, moved.what) == ("look", "a square")
    assert bench.change("FFR", patch, case, rng) is patch
    assert bench.change("leaking teacher", patch, case, rng) == replace(patch, guidance="red blue")
    error = teacher.TeacherError("timeout")
    assert bench.change("leaking teacher", error, case, rng) is error


def test_skills_name_the_step_of_a_rationale_that_failed(samples):
    truth = samples[0].truth
    cue, look = truth["cue"], truth["look"]
    right = needle_rationale(truth, cue, look)
    assert all(bench.skills(samples[0], right).values())
    later = bench.skills(samples[0], needle_rationale(truth, (cue + 1) % 8, (look + 1) % 8))
    assert later == {"cue": False, "relation": True, "reading": True, "cites": False}
    there = bench.skills(samples[0], needle_rationale(truth, cue, 7 - look))
    assert there == {"cue": True, "relation": False, "reading": True, "cites": False}
    guessed = bench.skills(samples[0], needle_rationale(truth, (cue + 1) % 8, look))
    assert guessed["cites"] and not guessed["cue"]  # a needle asks for one moment
    misread = bench.skills(samples[0], right.replace("<answer> ", "<answer> not "))
    assert misread == {"cue": True, "relation": True, "reading": False, "cites": True}
    assert not any(bench.skills(samples[0], "<answer> red blue </answer>").values())


def test_a_chain_asks_for_the_colours_of_the_flash_and_of_the_moment_beside_it(chain):
    for sample in chain:
        truth = sample.truth
        cue, look = truth["cue"], truth["look"]
        assert abs(look - cue) == 1 and data.RELATIONS[look - cue] in sample.question
        assert sample.answer.split() == truth["moments"][cue] + truth["moments"][look]
        right = chain_rationale(truth, cue, look)
        assert all(bench.skills(sample, right).values())
        stayed = bench.skills(sample, chain_rationale(truth, cue, cue))
        assert stayed == {"cue": True, "relation": False, "reading": True, "cites": False}


def test_skills_by_themselves_are_the_students_probabilities(chain, student):
    (question,) = [ffr.open_question(student, chain[0])]
    found = bench.probabilities(student, [question])
    tokenizer = student.processor.tokenizer
    ids = torch.tensor(tokenizer.encode(bench.rationale_of(chain[0])))
    with torch.no_grad():
        logps = grpo.completion_logps(student.model, question.prompt, ids, student.sampling)
    # <think> flash TIME look TIME c c look TIME c c </think> …
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[1] == "flash" and (words[3], words[7]) == ("look", "look")
    expected = {"find": [2], "relate": [8], "read": [5, 6, 9, 10]}
    for skill, places in expected.items():
        assert found[skill] == pytest.approx(logps[places].sum().exp().item(), rel=1e-4)


def test_the_bare_prompt_arm_trains_the_repaired_tokens_under_the_question_alone():
    question = ffr.Question(None, None, [], [], prompt={"the": "question"})
    r = replace(repaired(RIGHT, 1.7), question=question)
    trained = bench.choose("bare prompt", r).chosen
    assert trained.prompt is question.prompt and trained.completion == "repaired tokens"


def test_repair_only_where_all_failed_asks_for_no_other_group():
    cases = [
        teacher.Case(id=name, question="q", options=[], answer="a", response="", video=None)
        for name in ("x", "y", "y", "x", "y")
    ]
    asked = []

    def ask(wanted: list) -> list:
        asked.extend(wanted)
        return [f"patch {place}" for place in range(len(wanted))]

    replies = bench.only_where_all_failed(ask, cases, num_rollouts=3)
    assert [case.id for case in asked] == ["y", "y", "y"]
    refused = bench.NOT_ASKED
    assert replies == [refused, "patch 0", "patch 1", refused, "patch 2"]


def test_an_arm_of_two_halves_asks_its_teacher_in_one_of_them():
    halves = [(arm, bench.asks(arm, 0.49), bench.asks(arm, 0.5)) for arm in bench.CHAIN_ARMS]
    two = {arm: first_and_second for arm, *first_and_second in halves}
    assert two["GRPO, then FFR"] == [False, True] and two["FFR, then GRPO"] == [True, False]
    assert two["FFR"] == two["bare prompt"] == [True, True]


def test_the_rate_of_an_arm_is_the_best_on_the_seeds_that_tried_it():
    jobs = bench.chain_jobs({})
    assert {job.phase for job in jobs} == {"rates"}
    start = bench.CELLS["rare"]
    rows = {bench.name_of(job): {"unaided": 0.1, "assisted": 0.2} for job in jobs}
    for job in jobs:
        if (job.start, job.arm, job.lr) == (start, "GRPO", bench.RATES[2]):
            rows[bench.name_of(job)] = {"unaided": 0.1, "assisted": 0.3}
    cells = {(j.start, j.arm): j.lr for j in bench.chain_jobs(rows) if j.phase == "cells"}
    assert cells[start, "GRPO"] == bench.RATES[2] and cells[start, "imitation"] == bench.RATES[0]
    assert len(bench.chain_jobs(rows)) == len(jobs) + 5 * (3 * 8 + 2)


def test_interval_is_student_s():
    # 1, 2, 3: s = 1, t(2 degrees of freedom, 0.975) = 4.303, half = 4.303 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.4843), abs=1e-4)


def test_the_first_looks_record_and_table_agree():
    record = json.loads((ROOT / "assets" / "learning.json").read_text())
    told = (ROOT / "assets" / "learning.md").read_text(encoding="utf-8")
    for job in bench.needle_jobs():
        name, arm = bench.name_of(job), job.arm
        if job.phase == "arms" and name in record["rows"]:
            assert record["rows"][name]["unaided"] in record["arms"][arm]["unaided"]
    for arm, found in record["arms"].items():
        mean, half = interval(found["unaided"])
        assert f"| {arm} | {len(found['unaided'])} | {mean:.3f} ± {half:.3f} |" in told
        assert all(300_000 <= n < 303_000 for n in found["tokens"])


def test_what_the_first_look_says_of_its_arms_is_in_the_record():
    record = json.loads((ROOT / "assets" / "learning.json").read_text())
    arms, mean = record["arms"], lambda values: sum(values) / len(values)
    middle, half = interval(arms["FFR"]["unaided"])
    other, its_half = interval(arms["GRPO"]["unaided"])
    assert 0 < middle - other < 0.015 < min(half, its_half)  # a draw
    for far in ("reward only", "reward only, slower", "kappa 0"):
        worse, wide = interval(arms[far]["unaided"])
        assert worse + wide < middle - half
    assert [round(mean(arms["kappa 0"][k]), 2) for k in ("assisted", "unaided")] == [0.65, 0.15]
    first, last = (mean(arms["FFR"][f"intervention_{k}"]) for k in ("first", "last"))
    assert round(1 - last / first, 2) == 0.43
    cells = {name[:-1]: row["unaided"] for name, row in record["rows"].items() if "dial" in name}
    gains = [
        value - cells[name.replace("dial FFR", "dial GRPO").replace("0.0003", "8e-05")]
        for name, value in cells.items()
        if "FFR" in name
    ]
    assert len(gains) == 9 and [round(f(gains), 2) for f in (min, max)] == [-0.05, 0.03]
    for arm, rates in {
        "GRPO": (0.33, 0.61, 0.54, 0.49, 0.07),
        "FFR": (0.13, 0.32, 0.42, 0.72, 0.50),
    }.items():
        for lr, share in zip(bench.GRID, rates):
            tried = [
                record["rows"][bench.name_of(job)]["unaided"]
                for job in bench.needle_jobs()
                if job[:2] == ("grid", arm) and job.lr == lr
            ]
            assert mean(tried) == pytest.approx(share, abs=0.0051)


def chain_record() -> dict:
    return json.loads((ROOT / "assets" / "chain.json").read_text())


def test_the_chains_table_is_its_record_and_all_of_it_is_of_one_commit():
    record = chain_record()
    shown = (ROOT / "assets" / "chain.md").read_text(encoding="utf-8")
    assert shown.endswith("\n".join(["", *table(record), ""]))
    jobs = bench.chain_jobs(record["rows"])
    assert {bench.name_of(job) for job in jobs} == set(record["rows"]) and len(jobs) == 240
    cells = [record["rows"][bench.name_of(job)] for job in jobs if job.phase == "cells"]
    assert len(cells) == 5 * (3 * 8 + 2) and len({row["commit"] for row in cells}) == 1
    assert all(400_000 <= row["tokens"] < 404_000 for row in cells)


def test_the_readme_shows_the_chains_table_and_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(short_table(chain_record())) in readme
    assert "(assets/chain-curves.png)" in readme and "(assets/chain-skills.png)" in readme


def test_what_the_readme_says_of_the_chain_is_in_its_record():
    record = chain_record()
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def runs(cell: str, arm: str, key: str) -> list[float]:
        return [row[key] for row in by_arm(record, cell)[arm]]

    def mean(cell: str, arm: str, key: str) -> float:
        return interval(runs(cell, arm, key))[0]

    def apart(cell: str, worse: str, better: str, key: str) -> bool:
        (low, its_half), (high, half) = (interval(runs(cell, a, key)) for a in (worse, better))
        return low + its_half < high - half

    # The cold starts.
    shares = [f"{100 * record['starts'][cell]['p0']:.2g} %" for cell in ("common", "rare")]
    assert shares == ["29 %", "0.05 %"] and all(share in readme for share in shares)
    assert record["starts"]["rarer"]["p0"] == record["starts"]["never"]["p0"] == 0
    assert [bench.CELLS[cell].find for cell in ("rarer", "never")] == [0.02, 0.0]

    # Repair teaches to answer with a patch, and not to find.
    assert apart("never", "GRPO", "FFR", "assisted")
    helped = {arm: mean("never", arm, "assisted") for arm in ("GRPO", "FFR")}
    assert helped["FFR"] > 3 * helped["GRPO"]
    assert f"FFR ends with {helped['FFR']:.2f} assisted, GRPO with {helped['GRPO']:.2f}" in readme
    rarer = [f"{mean('rarer', arm, 'unaided'):.2f}" for arm in ("GRPO", "FFR")]
    assert f"in *rarer* it ends at {rarer[0]}, FFR at {rarer[1]}, in intervals that" in readme
    assert not apart("rarer", "FFR", "GRPO", "unaided")
    for cell in record["starts"]:
        assert not apart(cell, "GRPO", "FFR", "unaided")
    assert sum(share < 0.005 for share in runs("rare", "FFR", "unaided")) == 2

    # What lucky successes can spoil.
    never, start = record["settings"]["cells"]["never"], record["starts"]["never"]["reading"]
    tuning = {}
    for row in record["rows"].values():
        if row["phase"] == "rates" and row["start"] == never:
            tuning.setdefault(row["arm"], []).append(row["reading"] / start)
    assert [round(kept, 2) <= 0.11 for kept in sorted(tuning["GRPO"])] == [True] * 9 + [False]
    assert [round(kept, 2) <= 0.26 for kept in sorted(tuning["FFR"])] == [True] * 2 + [False] * 8
    kept = [
        interval(retention(record, "never", by_arm(record, "never")[arm]))[0]
        for arm in ("GRPO", "FFR")
    ]
    assert kept[1] > 0.9 and f"GRPO kept {kept[0]:.2f}, FFR {kept[1]:.2f}" in readme
    assert mean("never", "GRPO", "signal") < 0.005

    # The bare prompt, and asking only where all failed.
    assert apart("common", "bare prompt", "FFR", "unaided")
    figures = [mean("common", arm, "unaided") for arm in ("bare prompt", "FFR")]
    start = record["starts"]["common"]["unaided"]
    told = "in *common*, unaided falls from {:.2f} to {:.2f}; scored with the patch in the prompt"
    assert told.format(start, figures[0]) in readme
    assert f"it rises to {figures[1]:.2f}" in readme
    for cell, key in (("common", "unaided"), ("rare", "unaided"), ("never", "assisted")):
        assert mean(cell, "where all failed", key) > mean(cell, "FFR", key) - 0.02
    hours = sum(row["seconds"] for row in record["rows"].values()) / 7200
    assert f"(240 runs, {hours:.1f} hours on two threads" in readme


def test_what_the_readme_says_of_the_searchs_pairs_is_in_its_runs():
    pairs = {}
    for line in (ROOT / "assets" / "learning-search.jsonl").read_text().splitlines():
        row = json.loads(line)
        pair = (row.get("habit"), str(row["start"]), row["lr"], row["seed"])
        pairs.setdefault(pair, {})[row["arm"]] = row["unaided"]
    gains = [pair["FFR"] - pair["GRPO"] for pair in pairs.values() if len(pair) == 2]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"FFR minus GRPO, unaided, is −{-min(gains):.2f} to {max(gains):.2f}" in readme


def test_every_run_of_the_search_stands_in_its_table():
    told = (ROOT / "assets" / "learning-search.md").read_text(encoding="utf-8").splitlines()
    lines = searched(ROOT / "assets" / "learning-search.jsonl")
    assert len(lines) == 2 + 28 and [line for line in told if line.startswith("|")] == lines


@pytest.mark.slow
def test_a_row_is_the_same_when_it_is_run_again():
    def row():
        command = [
            sys.executable,
            str(ROOT / "tests/bench_learning.py"),
            "--quick",
            "--look",
            "needle",
        ]
        command += ["--arm", "FFR"]
        subprocess.run(command, check=True, capture_output=True)
        (file,) = (ROOT / "runs/learning/quick/rows").glob("arms FFR*.json")
        found = json.loads(file.read_text())
        file.unlink()
        return {key: value for key, value in found.items() if key != "seconds"}

    first = row()
    assert first["tokens"] >= 6_000 and len(first["curve"]) == 3 and first == row()
