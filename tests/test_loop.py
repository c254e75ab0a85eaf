"""The loop's arithmetic: who counts, by what is divided, how rates and seeds go from step to step."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_train import recorded_update, torchrun, train_once

import data
import ffr
import grpo
import train


def test_two_ranks_share_a_step_s_records(make_config, samples):
    config = make_config(questions_per_device=1)
    ranks = [SimpleNamespace(num_processes=2, process_index=k) for k in (0, 1)]
    for epoch in (0, 1):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            for rank in ranks:
                seen += [s.id for s in train.pick(samples, step, config, rank)]
        assert sorted(seen) == sorted(s.id for s in samples)


def test_unaided_counts_no_assisted_answer(make_config, accelerator, samples, teach, monkeypatch):
    """Every first answer is wrong and every repaired one is right."""
    patched = []

    def score(text, answer, kind):
        return ffr.Score(float(bool(patched)), 0.0, bool(patched))

    def teacher(cases, **more):
        patched.append(1)
        return teach(cases, **more)

    monkeypatch.setattr(ffr, "score", score)
    student, (metrics,) = train_once(make_config(max_steps=1), accelerator, samples, teacher)
    assert (metrics["unaided"], metrics["failure"]) == (0.0, 1.0)
    assert (metrics["intervention"], metrics["fix"]) == (1.0, 1.0)
    patched.clear()
    spare = ffr.open_question(student, samples[0])
    rows = train.evaluate(
        student.view, accelerator, student, samples, teacher, placeholder=spare, name="after"
    )
    assert [row["unaided"] for row in rows] == [False] * 6
    assert [row["assisted"] for row in rows] == [True] * 6


def test_evaluation_is_greedy_and_asks_each_record_once(
    make_config, accelerator, samples, monkeypatch, tmp_path
):
    student = train.load_student(make_config(), accelerator)
    spare = ffr.open_question(student, samples[0])
    temperatures, generate = [], ffr.generate

    def spy(model, prompts, seeds, sampling):
        temperatures.append(sampling.temperature)
        assert all(len(its_seeds) == 1 for its_seeds in seeds)
        return generate(model, prompts, seeds, sampling)

    monkeypatch.setattr(ffr, "generate", spy)
    rows = train.evaluate(
        student.view, accelerator, student, samples, teach=None, placeholder=spare, name="before"
    )
    assert {*temperatures} == {0.0} and student.sampling.temperature == 1.0
    assert [row["id"] for row in rows] == [s.id for s in samples]
    assert [row["id"] for row in train.read_rows(tmp_path / "before.jsonl")] == [
        s.id for s in samples
    ]


def test_truncated_is_the_share_of_completions_without_an_end(
    make_config, accelerator, samples, monkeypatch
):
    seen, generate = [], ffr.generate

    def spy(*arguments):
        groups = generate(*arguments)
        marked = [[c._replace(finished=k > 0) for k, c in enumerate(group)] for group in groups]
        seen.extend(marked)
        return marked

    monkeypatch.setattr(ffr, "generate", spy)
    _, (metrics,) = train_once(make_config(max_steps=1), accelerator, samples, None)
    assert len(seen) == 2 and metrics["truncated"] == pytest.approx(1 / 3)


def with_another_rank(monkeypatch, rewards, length):
    """`gather_object` as if a second process had sent rows of these rewards and this length."""
    gather = train.gather_object

    def both(objects):
        rows = gather(objects)
        if rows and isinstance(rows[0], dict) and "reward" in rows[0]:
            rows = rows + [rows[0] | {"reward": r, "length": length} for r in rewards]
        return rows

    monkeypatch.setattr(train, "gather_object", both)


def test_batch_std_is_of_all_ranks_without_placeholders(
    make_config, accelerator, samples, some_right, monkeypatch
):
    broken = [data.Sample(**vars(samples[0]) | {"path": str(ROOT / "README.md")}), samples[1]]
    with_another_rank(monkeypatch, [5.0, 9.0], length=4)
    seen, advantages = [], grpo.group_advantages

    def spy(rewards, scale, std):
        seen.append((rewards, scale, std))
        return advantages(rewards, scale, std)

    monkeypatch.setattr(grpo, "group_advantages", spy)
    config = make_config(max_steps=1, scale_rewards="batch")
    train_once(config, accelerator, broken, None, spare=samples[2])
    ((rewards, scale, std),) = seen
    opened = next(
        k for k, s in enumerate(train.pick(broken, 0, config, accelerator)) if s.id != broken[0].id
    )
    assert scale == "batch" and rewards.shape == (2, 3)
    counted = torch.tensor([*rewards[opened].tolist(), 5.0, 9.0])
    assert float(std) == pytest.approx(float(counted.std()))


def test_loss_divides_by_the_tokens_of_all_ranks(
    make_config, accelerator, samples, some_right, monkeypatch
):
    with_another_rank(monkeypatch, [1.0], length=1000)
    calls = recorded_update(monkeypatch)
    train_once(make_config(max_steps=1), accelerator, samples, None)
    batch = calls[0][3]
    assert batch.total_tokens == 1000 + sum(len(episode.ids) for episode in batch.episodes)


def test_two_unequal_processes_divide_by_the_same_count(folder, model_folder, tmp_path):
    torchrun(2, "tokens", folder, tmp_path / "tokens.json")
    zero, one = json.loads((tmp_path / "tokens.json").read_text())
    assert zero["own"] != one["own"] and zero["ids"] != one["ids"]
    for own_zero, own_one, total in zip(zero["own"], one["own"], zero["totals"]):
        assert total == own_zero + own_one
    assert zero["totals"] == one["totals"]
    assert zero["held_out"] == one["held_out"] and len({*zero["held_out"]}) == 6
    assert len(zero["held_out"]) == 6


def rates_of(monkeypatch):
    rates, update = [], grpo.update

    def spy(accelerator, model, optimizer, *more, **settings):
        rates.append(optimizer.param_groups[0]["lr"])
        return update(accelerator, model, optimizer, *more, **settings)

    monkeypatch.setattr(grpo, "update", spy)
    return rates


def test_learning_rate_falls_by_a_cosine_and_goes_on_where_a_run_is_resumed(
    make_config, accelerator, samples, monkeypatch, tmp_path
):
    rates = rates_of(monkeypatch)
    settings = {"max_steps": 4, "learning_rate": 1e-3, "save_steps": 2, "keep_checkpoints": 9}
    train_once(make_config(**settings), accelerator, samples, None)
    half = 1e-3 * (0.5 + 0.5 * 2**-0.5)
    assert rates == pytest.approx([1e-3, half, 5e-4, 1e-3 - half], abs=1e-9)
    (tmp_path / "checkpoints" / "000004").rename(tmp_path / "last")
    config, accelerator = make_config(**settings, resume=True), train.Accelerator(cpu=True)
    student = train.load_student(config, accelerator)
    spare = ffr.open_question(student, samples[0])
    history = train.train(config, accelerator, student, samples, teach=None, placeholder=spare)
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert rates[4:] == pytest.approx(rates[2:4])


def test_each_step_samples_anew(make_config, accelerator, samples, monkeypatch):
    """The same record, the same weights: only the step's seeds differ."""
    calls = recorded_update(monkeypatch)
    config = make_config(max_steps=3, questions_per_device=1, learning_rate=0.0, weight_decay=0.0)
    train_once(config, accelerator, samples[:1], None)
    drawn = [tuple(tuple(e.ids.tolist()) for e in call[3].episodes) for call in calls]
    assert len({*drawn}) == 3


def test_the_time_for_a_step_s_diagnoses_arrives(make_config, samples, monkeypatch):
    seen, diagnose = [], train.teacher.diagnose

    def spy(*arguments, **settings):
        seen.append(settings["timeout"])
        return diagnose(*arguments, **settings)

    monkeypatch.setattr(train.teacher, "diagnose", spy)
    train.load_teacher(make_config(teacher_step_timeout=77.0), samples, "cpu")([])
    assert seen == [77.0]
