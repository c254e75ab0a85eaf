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
    config = make_config(
        model=family,
        top_p=1.0,
        max_completion_length=12,
        frame_pixels=56 * 56,
        picture_pixels=56 * 56,
    )
    student = train.load_student(config, accelerator)
    first, second = (ffr.open_question(student, sample) for sample in samples[:2])
    prompts = [first.prompt, ffr.encode(student, first, PATCH), second.prompt]
    assert len({p["input_ids"].shape[1] for p in prompts[:2]}) == 2
    return student, prompts, sampled(student, prompts, [1, 2, 3])


def sampled(student, prompts, seeds):
    read = grpo.prefill(student.model, prompts, student.sampling)
    return grpo.generate(student.model, read, seeds, student.sampling)


def score(student, prompts, completions):
    with torch.no_grad():
        logps, _ = grpo.token_logps(
            student.model, prompts, [c.ids for c in completions], student.sampling
        )
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
        (alone,) = sampled(student, [prompt], [k + 1])
        assert alone.ids.tolist() == completion.ids.tolist()
        assert torch.allclose(alone.logps, completion.logps, atol=1e-4)
        (row,) = score(student, [prompt], [completion])
        assert torch.allclose(row, batch[k], atol=1e-4)


def test_reading_on_from_the_question_is_as_reading_it_all(rows, monkeypatch):
    """Patched prompts of two lengths go on from the questions' cache, in their own order."""
    student, (first, patched, second), _ = rows
    more = [patched, dict(patched)]
    seen = grpo.prefill(student.model, [second, first, first], student.sampling)
    alone = grpo.prefill(student.model, more, student.sampling)
    forward, read = type(student.model).forward, []
    monkeypatch.setattr(
        student.model,
        "forward",
        lambda **inputs: (
            read.append(inputs["input_ids"].shape[1]) or forward(student.model, **inputs)
        ),
    )
    again = grpo.prefill(student.model, more, student.sampling, seen, [first, first])
    assert torch.allclose(alone.logits, again.logits, atol=1e-4)
    assert read[0] == 2 * (patched["input_ids"].shape[1] - grpo.common(first, patched))
    a, b = (grpo.generate(student.model, x, [5, 6], student.sampling) for x in (alone, again))
    for one, other in zip(a, b):
        assert one.ids.tolist() == other.ids.tolist()
        assert torch.allclose(one.logps, other.logps, atol=1e-4)


def test_rollouts_sampled_side_by_side_are_as_in_rows_of_their_own(rows, monkeypatch):
    """Questions, patched ones and two rollouts of one, in rows of two and of one."""
    student, (first, patched, second), _ = rows
    prompts = [first, patched, second, dict(patched), first, patched]
    trunks, found = [first, first, second, first, first, first], []
    for shared in (True, False):
        monkeypatch.setattr(grpo, "can_share", lambda model: shared)
        read = grpo.prefill(student.model, prompts, student.sampling, None, trunks)
        assert len(set(read.row.tolist())) == (2 if shared else 6)
        found.append(grpo.generate(student.model, read, [*range(6)], student.sampling))
    for one, other in zip(*found):
        assert one.ids.tolist() == other.ids.tolist()
        assert torch.allclose(one.logps, other.logps, atol=1e-4)


def test_rollouts_in_one_row_are_scored_as_in_rows_of_their_own(rows, monkeypatch):
    """Log-probs and gradients with the video once for all, and with it for each."""
    student, (first, patched, second), (a, b, c) = rows
    prompts, done = [first, patched, second, first, patched], [a, b, c, b, c]
    trunks, ids = [first, first, second, first, first], [x.ids for x in done]
    found, weight = [], torch.arange(1.0, 6.0)[:, None]
    for shared in (True, False):
        monkeypatch.setattr(grpo, "can_share", lambda model: shared)
        logps, mask = grpo.token_logps(student.model, prompts, ids, student.sampling, trunks)
        (logps * mask * weight).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in student.model.parameters()])
        student.model.zero_grad()
        found.append((logps, gradient))
    (logps, gradient), (own_logps, own_gradient) = found
    assert torch.allclose(logps, own_logps, atol=1e-4)
    assert (gradient - own_gradient).norm() / own_gradient.norm() < 1e-5


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

    config = make_config(
        model=family, frame_pixels=56 * 56, picture_pixels=56 * 56, max_steps=1, learning_rate=1e-3
    )
    _, (metrics,) = train_once(config, accelerator, samples, teach)
    assert metrics["logp_gap"] < 1e-4 and metrics["intervention"] == metrics["failure"] > 0


def published_positions(kinds, grids, seconds_per_grid, merge, tokens_per_second):
    """As Qwen2.5-VL's published weights were trained: a text token counts on by one; a token of a
    picture or video is at (time, row, column) from where its block starts; what follows a block
    starts at the largest position so far + 1. Written from that rule, token by token."""
    positions, videos, pictures, k = [], iter(grids["video"]), iter(grids["image"]), 0
    while k < len(kinds):
        start = max((max(p) for p in positions), default=-1) + 1
        if kinds[k] == 0:
            positions.append((start,) * 3)
            k += 1
            continue
        pace = tokens_per_second * seconds_per_grid if kinds[k] == 2 else 1
        frames, height, width = next(videos if kinds[k] == 2 else pictures)
        block = [
            (start + int(t * pace), start + y, start + x)
            for t in range(frames)
            for y in range(height // merge)
            for x in range(width // merge)
        ]
        positions += block
        k += len(block)
    return torch.tensor(positions).T


def test_qwen2_5_vl_is_given_the_positions_its_weights_were_trained_with(
    folder, make_config, accelerator, samples
):
    families.build("qwen2_5_vl", str(folder / "positions"))
    config = make_config(
        model=str(folder / "positions"), frame_pixels=56 * 56, picture_pixels=56 * 56
    )
    student = train.load_student(config, accelerator)
    question = ffr.open_question(student, samples[0])
    prompts = [question.prompt, ffr.encode(student, question, PATCH)]
    vision, own = student.model.config.vision_config, student.model.model
    for prompt in prompts:
        grids = {
            kind: prompt.get(f"{kind}_grid_thw", torch.empty(0, 3)).long().tolist()
            for kind in ("video", "image")
        }
        want = published_positions(
            prompt["mm_token_type_ids"][0].tolist(),
            grids,
            float(prompt["second_per_grid_ts"][0]),
            vision.spatial_merge_size,
            vision.tokens_per_second,
        )
        assert torch.equal(prompt["position_ids"][:, 0], want)
    untouched = type(own).get_rope_index(
        own,
        prompts[0]["input_ids"],
        **{k: prompts[0][k] for k in ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")},
    )[0]
    last = untouched[0, 0, -1] - prompts[0]["position_ids"][0, 0, -1]
    assert last <= 0  # 0 where the installed transformers has them right


def test_checkpointing_and_a_frozen_tower_change_no_gradient_that_is_left(
    family, make_config, accelerator, samples
):
    gradients = {}
    for name, changes in [
        ("plain", {}),
        ("checkpointed", {"gradient_checkpointing": True}),
        ("frozen", {"freeze_vision": True}),
    ]:
        config = make_config(model=family, frame_pixels=56 * 56, picture_pixels=56 * 56, **changes)
        student = train.load_student(config, accelerator)
        prompt = ffr.open_question(student, samples[0]).prompt
        recomputed = []
        layer = student.model.get_decoder().layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
        logps, _ = grpo.token_logps(
            student.model, [prompt], [torch.tensor([5, 6, 7])], student.sampling
        )
        logps.sum().backward()
        assert len(recomputed) == 1 + (name == "checkpointed")
        gradients[name] = {k: p.grad for k, p in student.model.named_parameters()}
    for key, want in gradients["plain"].items():
        assert torch.allclose(gradients["checkpointed"][key], want, atol=1e-7)
        left = gradients["frozen"][key]
        assert torch.equal(left, want) if left is not None else "vis" in key
    assert sum(g is None for g in gradients["frozen"].values()) > 5
