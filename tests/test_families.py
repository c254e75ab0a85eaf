"""Parity on three families of video models, loaded by path: what is sampled is what is scored."""

import families
import pytest
import torch
from conftest import sampled, scored

import ffr
import grpo
import train
from teacher import EvidencePatch, Region

PATCH = EvidencePatch(
    error_type="spatial",
    guidance="look",
    key_frames=[3],
    spans=[(3, 4)],
    regions=[Region(3, (0.1, 0.1, 0.6, 0.6))],
)


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


def score(student, prompts, completions):
    with torch.no_grad():
        logps, _ = scored(student.model, prompts, [c.ids for c in completions], student.sampling)
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


def test_rollouts_in_one_row_are_scored_as_in_rows_of_their_own(rows):
    """Log-probs and gradients of a tree of one question and one patch, of a row a prompt, of a row
    a rollout, against the plain definition."""
    student, prompts, (a, b, c) = rows
    first, patched, second = range(3)
    answers = [(first, a), (first, b), (patched, b), (patched, c), (second, c)]
    episodes = [grpo.Episode(min(k, 2) * (k == second), k, x.ids) for k, x in answers]
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    own = sum(lengths[:2]) + sum(len(x.ids) for x in (a, b, b, c))  # nothing of these two shared
    found = {}
    for row_tokens, number in ((8192, 2), (max(lengths) + 2 * 12, 3), (0, 5)):
        planned = grpo.plan_rows(student.model, prompts, episodes, row_tokens)
        assert len(planned) == number and (number > 2 or planned[0].length < own - 20)
        logps, mask = grpo.batched_logps(
            student.model, prompts, episodes, sampling=student.sampling, row_tokens=row_tokens
        )
        found[number] = [row[: len(e.ids)] for row, e in zip(logps, episodes)]
        found[number].append(gradient(student, found[number]))
    plain = [
        grpo.completion_logps(student.model, prompts[e.prompt], e.ids, student.sampling)
        for e in episodes
    ]
    plain.append(gradient(student, plain))
    for *logps, slope in found.values():
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(logps, plain))
        assert (slope - plain[-1]).norm() / plain[-1].norm() < 1e-5


@pytest.mark.parametrize("kind", ["sliding_attention", "linear_attention"])
def test_rows_are_shared_only_if_every_layer_sees_all_tokens(rows, monkeypatch, kind):
    student, prompts, completions = rows
    episodes = [grpo.Episode(0, 0, completion.ids) for completion in completions]
    assert len(grpo.plan_rows(student.model, prompts, episodes, 8192)) == 1
    text = student.model.config.get_text_config()
    for layer_types in ([kind, kind], ["full_attention", kind]):
        monkeypatch.setattr(text, "layer_types", layer_types, raising=False)
        assert len(grpo.plan_rows(student.model, prompts, episodes, 8192)) == 3


def gradient(student, logps):
    """Of a sum in which each rollout has another weight."""
    sum(weight * row.sum() for weight, row in enumerate(logps, 1)).backward()
    slope = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    student.model.zero_grad()
    return slope


def test_one_leaf_has_plain_causal_attention(rows):
    """So that any kernel can do it, a patched prompt's too."""
    student, prompts, completions = rows
    for k, completion in enumerate(completions):
        episode = grpo.Episode(0, k, completion.ids)
        planned = grpo.plan_rows(student.model, prompts, [episode], 8192)
        batch, leaf = grpo.stack_rows(planned, student.sampling.pad_id)
        assert batch["attention_mask"].dim() == 2 and batch["attention_mask"].all()
        assert leaf[0].nonzero()[:, 0].tolist() == [*range(leaf.shape[1])][-len(completion.ids) :]
        whole = grpo.extend(prompts[k], completion.ids[:-1])
        assert torch.equal(batch["input_ids"], whole["input_ids"])


def test_rows_are_not_shared_where_attention_takes_no_mask(rows, monkeypatch):
    student, prompts, (a, b, _) = rows
    episodes = [grpo.Episode(0, 0, a.ids), grpo.Episode(0, 0, b.ids)]
    assert len(grpo.plan_rows(student.model, prompts, episodes, 8192)) == 1
    text = student.model.config.get_text_config()
    monkeypatch.setattr(text, "_attn_implementation_internal", "eager")
    assert len(grpo.plan_rows(student.model, prompts, episodes, 8192)) == 2


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
            seconds_per_grid=float(prompt["second_per_grid_ts"][0]),
            merge=vision.spatial_merge_size,
            tokens_per_second=vision.tokens_per_second,
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
        logps, _ = scored(student.model, [prompt], [torch.tensor([5, 6, 7])], student.sampling)
        logps.sum().backward()
        assert len(recomputed) == 1 + (name == "checkpointed")
        gradients[name] = {k: p.grad for k, p in student.model.named_parameters()}
    for key, want in gradients["plain"].items():
        assert torch.allclose(gradients["checkpointed"][key], want, atol=1e-7)
        left = gradients["frozen"][key]
        assert torch.equal(left, want) if left is not None else "vis" in key
    assert sum(g is None for g in gradients["frozen"].values()) > 5
