"""Adapters in place of all weights (extra: peft): the same log-probs everywhere, π_ref without a
copy, and a folder that peft reads."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import families
import pytest
import torch
from conftest import ROOT, sampled
from test_readme import snippet
from test_train import train_once

import ffr
import grpo
import train
from teacher import EvidencePatch, Region

pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft", reason="pip install -r requirements-dev.txt")
PATCH = EvidencePatch(
    error_type="spatial",
    guidance="look",
    key_frames=[3],
    spans=[(3, 4)],
    regions=[Region(3, (0.1, 0.1, 0.6, 0.6))],
)
SIZES = {"frame_pixels": 56 * 56, "picture_pixels": 56 * 56}


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "internvl"])
def family(request, folder, model_folder):
    if request.param == "qwen3_vl":
        return model_folder
    families.build(request.param, str(folder / f"lora-{request.param}"))
    return str(folder / f"lora-{request.param}")


@pytest.fixture
def adapted(family, make_config, accelerator):
    """A student whose adapters are not at their beginning, 0."""
    config = make_config(model=family, lora_rank=4, max_completion_length=12, **SIZES)
    student = train.load_student(config, accelerator)
    torch.manual_seed(0)
    for parameter in student.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return student


def scores(student, prompts, episodes, row_tokens):
    logps, _ = grpo.batched_logps(
        student.model, prompts, episodes, sampling=student.sampling, row_tokens=row_tokens
    )
    return [row[: len(episode.ids)] for row, episode in zip(logps, episodes)]


def test_sampled_scored_and_shared_log_probs_are_equal(adapted, samples):
    student, question = adapted, ffr.open_question(adapted, samples[0])
    prompts = [question.prompt, ffr.encode(student, question, PATCH)]
    done = sampled(student, [prompts[0], prompts[0], prompts[1]], [1, 2, 3])
    episodes = [grpo.Episode(0, k, c.ids) for k, c in zip((0, 0, 1), done)]
    for row_tokens, rows in ((8192, 1), (0, 3)):
        assert len(grpo.plan_rows(student.model, prompts, episodes, row_tokens)) == rows
        for row, completion, episode in zip(
            scores(student, prompts, episodes, row_tokens), done, episodes
        ):
            plain = grpo.completion_logps(
                student.model, prompts[episode.prompt], completion.ids, student.sampling
            )
            assert torch.allclose(row, completion.logps, atol=1e-4)
            assert torch.allclose(row, plain, atol=1e-4)


def test_reference_is_the_policy_without_its_adapters(adapted, family, samples, accelerator):
    prompt, ids = ffr.open_question(adapted, samples[0]).prompt, torch.tensor([5, 6, 7])
    model, sampling = adapted.model, adapted.sampling
    base, _ = grpo.load_policy(family)
    reference = train.reference_policy(adapted.view, accelerator, model)
    assert reference is None  # β is 0
    adapted.view.beta = 0.04
    assert train.reference_policy(adapted.view, accelerator, model) is model
    with torch.no_grad(), model.disable_adapter():
        off = grpo.completion_logps(model, prompt, ids, sampling)
    assert torch.allclose(off, grpo.completion_logps(base, prompt, ids, sampling), atol=1e-6)
    on = grpo.completion_logps(model, prompt, ids, sampling)
    assert (on - off).abs().max() > 1e-2
    done = grpo.Episode(question=0, prompt=0, ids=ids, sampled_logps=on.detach(), advantage=1.0)
    objective, keep = grpo.Objective(beta=0.04), torch.optim.SGD(model.parameters(), 0.0)
    batch = grpo.Batch({0: prompt}, [done], 3)
    figures = grpo.update(
        accelerator,
        model,
        optimizer=keep,
        batch=batch,
        sampling=sampling,
        objective=objective,
        reference=model,
    )
    d = off - on  # k3, by hand
    assert figures["kl"] == pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-3)


def test_only_adapters_of_the_text_layers_train_and_kl_begins_at_0(
    family, make_config, accelerator, samples, teach, some_right
):
    config = make_config(
        model=family, lora_rank=2, beta=0.04, max_steps=2, learning_rate=1e-2, **SIZES
    )
    student, history = train_once(config, accelerator, samples, teach)
    before, _ = grpo.load_policy(family)
    trained = {k for k, p in student.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and "vis" not in name for name in trained)
    weights = dict(before.named_parameters())
    for name, parameter in student.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, weights[name.replace("base_layer.", "")])
    assert history[0]["kl"] == 0 and history[1]["kl"] > 0 and history[0]["logp_gap"] < 1e-4


def test_saved_adapters_are_peft_s_and_merge_into_the_trained_policy(
    model_folder, make_config, accelerator, samples, teach, some_right, tmp_path
):
    train_once(make_config(max_steps=1), accelerator, samples, None)
    config = make_config(lora_rank=4, max_steps=2, learning_rate=1e-2, gradient_checkpointing=True)
    student, _ = train_once(config, accelerator, samples, teach)
    prompt, ids = ffr.open_question(student, samples[0]).prompt, torch.tensor([5, 6, 7])
    want = grpo.completion_logps(student.model, prompt, ids, student.sampling)
    saved = tmp_path / "model"
    assert not (saved / "config.json").exists()  # of the run with all weights, before
    base, _ = grpo.load_policy(model_folder)
    assert (grpo.completion_logps(base, prompt, ids, student.sampling) - want).abs().max() > 1e-4
    exec(snippet("def merge"), names := {})
    names["merge"](model_folder, saved, tmp_path / "merged")
    merged, _ = grpo.load_policy(str(tmp_path / "merged"))
    again, _ = grpo.load_policy(str(saved))  # as --eval_only takes it
    for model in (merged, again):
        got = grpo.completion_logps(model, prompt, ids, student.sampling)
        assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(SystemExit, match="holds adapters; merge them"):  # before any work
        make_config(model=saved, lora_rank=4)
    with pytest.raises(ValueError, match="holds adapters; merge them"):  # as from the hub
        train.load_student(replace(config, model=str(saved)), accelerator)
    assert make_config(model=saved, eval_only=True).model == str(saved)


def test_a_lora_run_under_bf16_stores_its_base_in_bf16(make_config, monkeypatch, samples, teach):
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    accelerator = train.Accelerator(cpu=True, mixed_precision="bf16")
    config = make_config(lora_rank=4, beta=0.04, max_steps=1)
    student, (metrics,) = train_once(config, accelerator, samples, teach)
    kinds = {"lora_" in k: p.dtype for k, p in student.model.named_parameters() if "_proj" in k}
    assert kinds == {True: torch.float32, False: torch.bfloat16} and metrics["kl"] == 0


def test_wrapped_policy_keeps_its_m_rope_positions(
    adapted, family, make_config, accelerator, samples
):
    plain = train.load_student(make_config(model=family, **SIZES), accelerator)
    a, b = (ffr.open_question(s, samples[0]).prompt["position_ids"] for s in (adapted, plain))
    assert torch.equal(a, b)
    if "mrope_section" in (plain.model.config.get_text_config().rope_parameters or {}):
        assert a.shape[:2] == (3, 1)


def test_the_gpu_bench_runs_at_tiny_sizes_anywhere(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "tests" / "bench_gpu.py", "--dry", file]
    subprocess.run(command, check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = json.loads(file.read_text())
    for name in ("LoRA", "LoRA, checkpointed", "all weights, checkpointed"):
        assert found[name]["update, shared rows"]["seconds"] > 0
    assert found["all weights, checkpointed"]["generate"]["seconds"] > 0


def test_without_peft_a_sentence_says_what_to_install(make_config, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install peft"):
        make_config(lora_rank=8)
    assert make_config().lora_rank == 0
