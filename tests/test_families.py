"""Parity on three families of video models, loaded by path: what is sampled is what is scored."""

import families
import pytest
import torch

import ffr
import grpo
import train
from teacher import EvidencePatch, Region

PATCH = EvidencePatch("spatial", "look", [3], [(3, 4)], [Region(3, (0.1, 0.1, 0.6, 0.6))])


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "internvl"])
def family(request, folder, model_folder):
    if request.param == "qwen3_vl":
        return model_folder
    families.build(request.param, str(folder / request.param))
    return str(folder / request.param)


@pytest.fixture
def rows(family, make_config, accelerator, samples):
    """A student, and prompts with and without a patch, of different lengths, at top-p 1."""
    config = make_config(model=family, top_p=1.0, max_completion_length=12,
                         frame_pixels=56 * 56, picture_pixels=56 * 56)
    student = train.load_student(config, accelerator)
    first, second = (ffr.open_question(student, sample) for sample in samples[:2])
    prompts = [first.prompt, ffr.encode(student, first, PATCH), second.prompt]
    assert len({p["input_ids"].shape[1] for p in prompts[:2]}) == 2
    return student, prompts, grpo.generate(student.model, prompts, [1, 2, 3], student.sampling)


def score(student, prompts, completions):
    with torch.no_grad():
        logps, _, mask = grpo.token_logps(
            student.model, prompts, [c.ids for c in completions], student.sampling)
    return [row[: len(c.ids)] for row, c in zip(logps, completions)]


def test_sampled_and_scored_log_probs_are_equal(rows):
    student, prompts, completions = rows
    for row, completion in zip(score(*rows), completions):
        assert torch.allclose(row, completion.logps, atol=1e-4)
        assert completion.logps.min() < -1  # it is no certain thing


def test_mixed_batch_is_as_one_by_one(rows):
    """Patched and unpatched prompts together, left-padded: ids and log-probs as alone."""
    student, prompts, completions = rows
    batch = score(*rows)
    for k, (prompt, completion) in enumerate(zip(prompts, completions)):
        (alone,) = grpo.generate(student.model, [prompt], [k + 1], student.sampling)
        assert alone.ids.tolist() == completion.ids.tolist()
        assert torch.allclose(alone.logps, completion.logps, atol=1e-4)
        (row,) = score(student, [prompt], [completion])
        assert torch.allclose(row, batch[k], atol=1e-4)


def test_pixels_of_video_and_patch_matter(rows):
    """Were they not looked at, the equalities above would hold all the same."""
    student, prompts, completions = rows
    right = score(*rows)
    for name in ("pixel_values", "pixel_values_videos"):
        blank = [p | {name: torch.zeros_like(p[name])} if name in p else p for p in prompts]
        for k, row in enumerate(score(student, blank, completions)):
            assert (name in prompts[k]) == bool((row - right[k]).abs().max() > 1e-4)


def test_a_step_trains(family, make_config, accelerator, samples, teach, tmp_path):
    from test_train import train_once

    config = make_config(model=family, frame_pixels=56 * 56, picture_pixels=56 * 56, max_steps=1,
                         learning_rate=1e-3)
    _, (metrics,) = train_once(config, accelerator, samples, teach)
    assert metrics["logp_gap"] < 1e-4 and metrics["intervention"] == metrics["failure"] > 0
