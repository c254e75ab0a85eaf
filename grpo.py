"""Group Relative Policy Optimization on any transformers vision-language model. No FFR in here.

    π_θ   `model`                 log π_θ(o_t)   `token_logps`        G    rollouts per prompt
    o     completion token ids    A_i            `group_advantages`   ε    `epsilon`, β  `beta`
    r_t   π_θ / π_old             J(θ)           `grpo_loss`

Sources: GRPO (DeepSeekMath), FFR eq. J(θ) and Table 8, Dr. GRPO (`scale="none"`). A prompt is the
dict of tensors that a processor returns for one conversation: some are (1, L) like `input_ids`, the
others (pixels, grids) have rows of their own. This file imports no sibling.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor


@dataclass
class Sampling:
    """How completions are sampled, and so how they are scored. `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 1024
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    suppressed_ids: tuple[int, ...] = ()  # never sampled: a vision id would claim missing pixels


@dataclass
class Completion:
    """Sampled tokens (T,), their log-probs (T,) as sampled, and whether an EOS ended them."""

    ids: Tensor
    logps: Tensor
    finished: bool


def stack_prompts(prompts: list[dict], pad_id: int) -> dict:
    """Stack one-row prompts into a batch: (1, L) tensors are left-padded to (B, L), others joined.

    Prompts may differ in what they hold: a patched one has pictures, an unpatched one has none.
    """
    longest = max(p["input_ids"].shape[1] for p in prompts)
    batch = {}
    for key in dict.fromkeys(key for p in prompts for key in p):
        rows = [(p[key], p["input_ids"]) for p in prompts if key in p]
        if rows[0][0].shape == rows[0][1].shape:  # one entry a token
            fill = pad_id if key == "input_ids" else 0
            rows = [
                (torch.nn.functional.pad(value, (longest - value.shape[1], 0), value=fill), ids)
                for value, ids in rows
            ]
        batch[key] = torch.cat([value for value, _ in rows])
    return batch


def policy_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits (…, V) that define π: fp32, at the sampling temperature, suppressed ids masked.

    Sampling and scoring (π_θ, π_old and π_ref alike) go through here, so they mean the same policy.
    Top-p is left out: it truncates what is sampled, the ratio r_t is of the full softmax (as is
    usual; at top_p = 1 both are equal).
    """
    logits = logits.float() / (sampling.temperature or 1.0)
    if sampling.suppressed_ids:
        logits[..., list(sampling.suppressed_ids)] = -torch.inf
    return logits


class _OwnNoise(LogitsProcessor):
    """Sample each row by Gumbel-max from its own generator, and keep the chosen tokens' log-probs.

    A rollout's randomness thus belongs to the rollout, not to the batch it happens to stand in:
    leaving a row out, or sharing rows among processes, changes nothing for the others.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, device: torch.device):
        self.sampling, self.logps = sampling, []
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = policy_logits(scores, self.sampling)  # (B, V)
        logp = logits.log_softmax(-1)
        noisy = logp
        if self.sampling.temperature > 0:
            if self.sampling.top_p < 1:
                # Keep the fewest tokens whose probability reaches top_p; the first always stays.
                ranked, order = logp.exp().sort(descending=True)
                beyond = ranked.cumsum(-1) - ranked >= self.sampling.top_p
                noisy = logp.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
            exponential = torch.stack(
                [torch.empty_like(logp[0]).exponential_(generator=g) for g in self.generators]
            )
            noisy = noisy - exponential.clamp_min(1e-20).log()  # argmax(log p + Gumbel) ~ p
        choice = noisy.argmax(-1, keepdim=True)  # (B, 1)
        self.logps.append(logp.gather(1, choice))
        return torch.full_like(logp, -torch.inf).scatter(1, choice, 0.0)


@torch.no_grad()
def generate(
    model,
    prompts: list[dict],
    seeds: list[int],
    sampling: Sampling,
    num_rollouts: int = 1,
    synced: bool = False,
) -> list[Completion]:
    """Sample `num_rollouts` completions per prompt (neighbours in the result), in one batch.

    `model` is unwrapped (DDP has no `generate`); `seeds` has one entry per completion. `synced`:
    keep stepping until every rank is done, needed where parameters are sharded. The checkpoint's
    own `generation_config` plays no part. A prompt's video is encoded once for its rollouts.
    """
    batch = stack_prompts(prompts, sampling.pad_id)
    noise = _OwnNoise(seeds, sampling, batch["input_ids"].device)
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    config = GenerationConfig(
        do_sample=True,  # from what `_OwnNoise` leaves: one token with all the probability
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=num_rollouts,
        max_new_tokens=sampling.max_tokens,
        eos_token_id=list(sampling.eos_ids),
        pad_token_id=sampling.pad_id,
    )
    try:
        tokens = model.generate(
            **batch, generation_config=config, logits_processor=[noise], synced_gpus=synced
        )[:, batch["input_ids"].shape[1] :]  # (B, T)
    finally:
        model.generation_config = own_config
        model.train(was_training)
    logps = torch.cat(noise.logps, 1)[:, : tokens.shape[1]]
    ends = torch.isin(tokens, torch.tensor(sampling.eos_ids, device=tokens.device))
    completions = []
    for row, logp, end in zip(tokens, logps, ends):
        finished = bool(end.any())
        length = int(end.int().argmax()) + 1 if finished else len(row)
        completions.append(Completion(row[:length], logp[:length], finished))
    return completions


def token_logps(
    model, prompts: list[dict], ids: list[Tensor], sampling: Sampling, share: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of completions under their prompts: `logps, entropy, mask`, each (B, T) fp32.

    `mask` is 1 on completion tokens, 0 on padding. Only the completion's logits are computed.
    `share`: rows whose pixels are one and the same tensor have it encoded once (exact, and most of
    the cost of a group); not where parameters are sharded, whose hooks a call by part bypasses.
    """
    batch = stack_prompts(prompts, sampling.pad_id)
    if share:
        batch |= _shared_videos(model, prompts)
        if "mm_encoder_outputs" in batch:
            batch.pop("pixel_values_videos")
            batch.pop("pixel_values", None)
    pad = {"batch_first": True, "padding_value": sampling.pad_id}
    tokens = torch.nn.utils.rnn.pad_sequence(ids, **pad)  # (B, T)
    lengths = torch.tensor([len(row) for row in ids], device=tokens.device)
    mask = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()  # (B, T)
    shape = batch["input_ids"].shape
    tails = {"input_ids": tokens, "attention_mask": mask}
    for key, value in batch.items():
        if getattr(value, "shape", None) == shape:
            batch[key] = torch.cat([value, tails.get(key, torch.zeros_like(tokens))], 1)  # (B, L+T)
    logits = model(**batch, logits_to_keep=tokens.shape[1] + 1, use_cache=False).logits[:, :-1]
    logp = policy_logits(logits, sampling).log_softmax(-1)  # (B, T, V)
    # Suppressed ids have probability 0: 0 · log 0 counts as 0, and padding may be such an id.
    entropy = -(logp.exp() * logp.clamp_min(-1e4)).sum(-1).detach()
    logps = logp.gather(-1, tokens[..., None])[..., 0].masked_fill(mask == 0, 0.0)
    return logps, entropy * mask, mask.float()


def _shared_videos(model, prompts: list[dict]) -> dict:
    """`mm_encoder_outputs` with each distinct video encoded once and repeated for its rows."""
    base = getattr(getattr(model, "module", model), "model", None)
    pixels = [p.get("pixel_values_videos") for p in prompts]
    distinct = list({id(value): row for row, value in enumerate(pixels)}.values())
    if None in pixels or len(distinct) == len(prompts) or not hasattr(base, "get_video_features"):
        return {}
    encoded = base.get_video_features(
        torch.cat([pixels[row] for row in distinct]),
        torch.cat([prompts[row]["video_grid_thw"] for row in distinct]),
    )
    place = {id(pixels[row]): i for i, row in enumerate(distinct)}
    rows = [place[id(value)] for value in pixels]
    encoded.pooler_output = [encoded.pooler_output[i] for i in rows]
    if getattr(encoded, "deepstack_features", None) is not None:
        encoded.deepstack_features = [[f[i] for i in rows] for f in encoded.deepstack_features]
    outputs = {"video": encoded}
    pictures = [p for p in prompts if "pixel_values" in p]
    if pictures:  # the model takes either pixels or encodings, for both modalities alike
        outputs["image"] = base.get_image_features(
            torch.cat([p["pixel_values"] for p in pictures]),
            torch.cat([p["image_grid_thw"] for p in pictures]),
        )
    return {"mm_encoder_outputs": outputs}


def group_advantages(rewards: Tensor, scale: str = "group", batch_std: Tensor | None = None) -> Tensor:
    """A_i = (R̃_i − mean) / std over each group. `rewards` (prompts, G) → the same shape.

    `scale`: "group" divides by the group's own std (FFR, GRPO); "batch" by `batch_std`, the std of
    all rollouts of the optimizer step; "none" not at all (Dr. GRPO).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    std = rewards.std(1, keepdim=True) if scale == "group" else batch_std
    return centred / (std + 1e-4)


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    total_tokens: Tensor | float,
    epsilon: float = 0.2,
    beta: float = 0.04,
) -> Tensor:
    """−J(θ) = −1/Σ|τ̂_i| · Σ_i Σ_t min(r_t A_i, clip(r_t, 1−ε, 1+ε) A_i) + β KL(π_θ ‖ π_ref).

    logps, old_logps, ref_logps, mask (B, T); advantages (B,); `total_tokens` = Σ|τ̂_i| over the whole
    optimizer step, all micro-batches and ranks, so that parts add up to the token mean.
    KL is the k3 estimate e^d − d − 1 with d = log π_ref − log π_θ, at its value ≥ 0 (as a loss its
    gradient is KL(π_ref ‖ π_θ)'s; the two agree to first order near the reference).
    """
    ratio = (logps - old_logps).exp()  # r_t
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])  # CLIP
    if beta > 0:
        d = ref_logps - logps
        objective = objective - beta * (d.exp() - d - 1)
    return -(objective * mask).sum() / max(float(total_tokens), 1.0)


def update(
    accelerator,
    model,
    reference,
    optimizer,
    rollouts: list[tuple[dict, Completion]],
    advantages: list[float],
    weights: list[float],
    sampling: Sampling,
    epsilon: float = 0.2,
    beta: float = 0.04,
    num_updates: int = 1,
    micro_batch: int = 0,
    max_grad_norm: float = 5.0,
    stand_in: dict | None = None,
) -> dict[str, float]:
    """μ = `num_updates` optimizer steps on one batch of (prompt, completion).

    `model` and `optimizer` are the accelerator's. `weights`: 1, or 0 for a row that only keeps the
    processes in step, all of which must pass equally many. `micro_batch` rows are taken at a time
    (0: all). π_old are the log-probs before the first step. `stand_in` (sharded parameters): a
    prompt of every modality, added to each forward with weight 0, so that all ranks make the same
    calls. Returns this process's part of the loss and of the means over tokens of `entropy`, `kl`
    and `clipped` (parts add up over processes), `grad_norm`, and `logp_gap`, the largest
    difference between a token's log-prob as sampled and as scored.
    """
    size, device = micro_batch or len(rollouts), accelerator.device
    starts = range(0, len(rollouts), size)
    counted = sum(len(c.ids) * weight for (_, c), weight in zip(rollouts, weights))
    total_tokens = accelerator.reduce(torch.tensor(float(counted), device=device)).item()
    old, ref = {}, {}
    figures = dict.fromkeys(("loss", "entropy", "kl", "clipped", "logp_gap"), 0.0)
    for _ in range(num_updates):
        for start in starts:
            chunk = rollouts[start : start + size]
            prompts, ids = [prompt for prompt, _ in chunk], [c.ids for _, c in chunk]
            adv, weight = advantages[start : start + size], weights[start : start + size]
            if stand_in is not None:
                prompts, ids = [*prompts, stand_in], [*ids, ids[0][:1]]
                adv, weight = [*adv, 0.0], [*weight, 0.0]
            adv, weight = torch.tensor(adv, device=device), torch.tensor(weight, device=device)
            rows = (prompts, ids, sampling, stand_in is None)
            # Gradients are exchanged once, with the last micro-batch.
            with nullcontext() if start == starts[-1] else accelerator.no_sync(model):
                logps, entropy, mask = token_logps(model, *rows)  # (B, T)
                mask = mask * weight[:, None]
                now = logps.detach()
                if start not in old:  # the first of the μ steps
                    old[start] = now
                    figures["entropy"] += ((entropy * mask).sum() / total_tokens).item()
                    gaps = [(c.logps - row[: len(c.ids)]).abs().max() for row, (_, c) in zip(now, chunk)]
                    figures["logp_gap"] = max(figures["logp_gap"], torch.stack(gaps).max().item())
                    if reference is not None:
                        with torch.no_grad():
                            ref[start] = token_logps(reference, *rows)[0]
                            d = ref[start] - now
                        figures["kl"] += (((d.exp() - d - 1) * mask).sum() / total_tokens).item()
                loss = grpo_loss(
                    logps, old[start], ref.get(start), adv, mask, total_tokens, epsilon, beta
                )
                # Parts over the global token count are to be summed; DDP averages over processes.
                accelerator.backward(loss * accelerator.num_processes)
            moved = ((now - old[start]).exp() - 1).abs() > epsilon
            figures["clipped"] += ((moved * mask).sum() / total_tokens / num_updates).item()
            figures["loss"] += loss.item() / num_updates
        norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return figures | {"grad_norm": float(norm)}
