"""Group Relative Policy Optimization on any transformers vision-language model. No FFR in here.

    π_θ   `model`                 log π_θ(o_t)   `token_logps`        G    rollouts per prompt
    o     completion token ids    A_i            `group_advantages`   ε    `epsilon`, β  `beta`
    r_t   π_θ / π_old             J(θ)           `grpo_loss`          μ    `num_updates`

Sources: GRPO (DeepSeekMath), FFR eq. J(θ), Dr. GRPO. A prompt is the dict of tensors a processor
returns for one conversation, some (1, L), others (pixels, grids) with their own rows. No sibling.
"""

import re
from dataclasses import dataclass

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.modeling_layers import GradientCheckpointingLayer


def load_policy(name: str, attention="", checkpointing=False, freeze_vision=False) -> tuple:
    """A video VLM from a folder or the hub, and its processor. Weights are fp32: bf16 ones would
    round updates of 5e-6 away. Raises ValueError where it cannot be trained."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no processor loads from there ({error})") from error
    if not hasattr(processor, "video_processor") or not processor.chat_template:
        raise ValueError(f"{name}: no video processor or chat template; save them there")
    hello = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    opening = processor.apply_chat_template(hello, tokenize=False, add_generation_prompt=True)
    if opening.rstrip().endswith("<think>"):
        raise ValueError(f"{name}: its chat template opens <think> itself, so the format reward "
                         "would be 0 for ever; take that out of the template")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        name, dtype=torch.float32, attn_implementation=attention or None)
    if model.config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        restore_positions(model.model)
    vision = model.get_encoder("video")
    if freeze_vision and vision is model:
        raise ValueError(f"{name}: no vision tower is found in it; train it without freezing")
    vision.requires_grad_(not freeze_vision)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model, processor


def restore_positions(backbone) -> None:
    """Text after a video starts at the largest position so far + 1: with that Qwen2-VL's and
    Qwen2.5-VL's weights were trained. From 5.3 on, transformers starts it where the frame's height
    and width end, inside the video's time. Where both agree, nothing changes."""
    rope_index = backbone.get_rope_index
    def get_rope_index(input_ids, mm_token_type_ids, *args, **kwargs):
        positions, deltas = rope_index(input_ids, mm_token_type_ids, *args, **kwargs)
        for row, kind, delta in zip(positions.unbind(1), mm_token_type_ids == 2, deltas):
            largest = row.max()  # row: (3, L), time, height and width; kind: is it of a video
            for after in (kind[:-1] & ~kind[1:]).nonzero()[:, 0] + 1:
                row[:, after:] += row[:, :after].max() + 1 - row[0, after]
            delta += row.max() - largest  # what `generate` continues from
        return positions, deltas
    backbone.get_rope_index = get_rope_index


@dataclass
class Sampling:
    """How completions are sampled, and so how they are scored. `temperature` 0 is greedy."""
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 1024
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    suppressed_ids: tuple[int, ...] = ()  # never sampled: a vision id would claim missing pixels


def sampling_for(model, processor, temperature: float, top_p: float, max_tokens: int) -> Sampling:
    """`Sampling` with a checkpoint's own ids. Each EOS ends; vision and padding are suppressed."""
    tokenizer, eos = processor.tokenizer, model.generation_config.eos_token_id
    eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    names = [f"{part}_token_id" for part in ("image", "video", "vision_start", "vision_end")]
    vision = {getattr(owner, name, None) for owner in (model.config, processor) for name in names}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    never = tuple(sorted((vision | {pad}) - eos - {None}))
    return Sampling(temperature, top_p, max_tokens, tuple(sorted(eos)), pad, never)


@dataclass
class Completion:
    """Sampled tokens (T,), their log-probs (T,) as sampled, and whether an EOS ended them."""
    ids: Tensor
    logps: Tensor
    finished: bool


def stack_prompts(prompts: list[dict], pad_id: int) -> dict:
    """One-row prompts, patched and not, as a batch: (1, L) left-padded to (B, L), others joined."""
    longest, batch = max(p["input_ids"].shape[1] for p in prompts), {}
    for key in dict.fromkeys(key for p in prompts for key in p):
        rows, fill = [], pad_id if key == "input_ids" else 0
        for value, ids in ((p[key], p["input_ids"]) for p in prompts if key in p):
            left = (longest - ids.shape[1], 0) if value.shape == ids.shape else (0, 0)
            rows.append(torch.nn.functional.pad(value, left, value=fill))
        batch[key] = torch.cat(rows)
    return batch


def policy_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (…, V) that define π, sampled and scored: fp32, at the temperature, suppressed ids
    masked. Not top-p: it truncates what is sampled, while r_t is of the full softmax, as usual."""
    logits = logits.float() / (sampling.temperature or 1.0)
    if sampling.suppressed_ids:
        logits[..., list(sampling.suppressed_ids)] = -torch.inf
    return logits


class _OwnNoise(LogitsProcessor):
    """Sample each row by Gumbel-max from its own generator, and keep the chosen tokens' log-probs:
    leaving a row out, or sharing rows among processes, changes nothing for the others."""

    def __init__(self, seeds: list[int], sampling: Sampling, device: torch.device):
        self.sampling, self.logps = sampling, []
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noisy = logp = policy_logits(scores, self.sampling).log_softmax(-1)  # (B, V)
        if self.sampling.temperature > 0:
            # Top-p: the fewest tokens whose probability reaches it; the likeliest always stays.
            ranked, order = logp.exp().sort(descending=True)
            beyond = ranked.cumsum(-1) - ranked >= self.sampling.top_p
            noisy = logp.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
            draws = [torch.empty_like(row).exponential_(generator=g)
                     for row, g in zip(logp, self.generators)]
            noisy = noisy - torch.stack(draws).clamp_min(1e-20).log()  # argmax(log p + Gumbel) ~ p
        choice = noisy.argmax(-1, keepdim=True)  # (B, 1)
        self.logps.append(logp.gather(1, choice))
        return torch.full_like(logp, -torch.inf).scatter(1, choice, 0.0)


@torch.no_grad()
def generate(model, prompts: list[dict], seeds: list[int], sampling: Sampling,
             num_rollouts: int = 1, synced: bool = False) -> list[Completion]:
    """Sample `num_rollouts` completions per prompt (neighbours in the result), in one batch.
    `model` is unwrapped (DDP has no `generate`), its `generation_config` plays no part; `seeds` has
    one entry per completion. `synced` (sharded parameters): step until every rank is done."""
    batch = stack_prompts(prompts, sampling.pad_id)
    noise = _OwnNoise(seeds, sampling, batch["input_ids"].device)
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    config = GenerationConfig(  # "samples" from what `_OwnNoise` leaves: one token of probability 1
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=num_rollouts,
        max_new_tokens=sampling.max_tokens, eos_token_id=list(sampling.eos_ids),
        pad_token_id=sampling.pad_id)
    try:
        tokens = model.generate(**batch, generation_config=config, logits_processor=[noise],
                                synced_gpus=synced)[:, batch["input_ids"].shape[1] :]  # (B, T)
    finally:
        model.generation_config = own_config
        model.train(was_training)
    logps = torch.cat(noise.logps, 1)[:, : tokens.shape[1]]
    ends = torch.isin(tokens, torch.tensor(sampling.eos_ids, device=tokens.device))
    lengths = [int(end.int().argmax()) + 1 if end.any() else len(end) for end in ends]
    return [Completion(row[:n], logp[:n], bool(end.any()))
            for row, logp, end, n in zip(tokens, logps, ends, lengths)]


def token_logps(model, prompts: list[dict], ids: list[Tensor], sampling: Sampling) -> tuple:
    """Log-probs of completions under their prompts: `logps, entropy, mask`, each (B, T) fp32. The
    mask is 1 on completion tokens, 0 on padding. Only the completion's logits are computed."""
    batch = stack_prompts(prompts, sampling.pad_id)
    tokens = torch.nn.utils.rnn.pad_sequence(ids, True, sampling.pad_id)  # (B, T)
    lengths = torch.tensor([len(row) for row in ids], device=tokens.device)
    mask = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()  # (B, T)
    for module in model.modules():  # checkpointing needs training mode, dropout must stay off
        module.training = isinstance(module, GradientCheckpointingLayer)
    tails, shape = {"input_ids": tokens, "attention_mask": mask}, batch["input_ids"].shape
    for key, value in batch.items():
        if value.shape == shape:  # one entry a token
            batch[key] = torch.cat([value, tails.get(key, torch.zeros_like(tokens))], 1)  # (B, L+T)
    logits = model(**batch, logits_to_keep=tokens.shape[1] + 1, use_cache=False).logits[:, :-1]
    logp = policy_logits(logits, sampling).log_softmax(-1)  # (B, T, V)
    # Suppressed ids have probability 0: 0 · log 0 counts as 0, and padding may be such an id.
    entropy = -(logp.exp() * logp.clamp_min(-1e4)).sum(-1).detach()
    logps = logp.gather(-1, tokens[..., None])[..., 0].masked_fill(mask == 0, 0.0)
    return logps, entropy * mask, mask.float()


def group_advantages(rewards: Tensor, scale="group", batch_std: Tensor | None = None) -> Tensor:
    """A_i = (R̃_i − mean) / std; `rewards` (prompts, G) → the same shape. The std is of the "group"
    (FFR, GRPO), of the "batch" (of all rollouts of the step: `batch_std`), or "none" (Dr. GRPO)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    std = rewards.std(1, keepdim=True) if scale == "group" else batch_std
    return centred / (std + 1e-4)


def grpo_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor,
              mask: Tensor, total_tokens: float, epsilon=0.2, beta=0.04) -> Tensor:
    """−J(θ) = −1/Σ|τ̂_i| · Σ_i Σ_t min(r_t A_i, clip(r_t, 1−ε, 1+ε) A_i) + β KL(π_θ ‖ π_ref).
    logps, old_logps, ref_logps, mask (B, T); advantages (B,); `total_tokens` = Σ|τ̂_i| over the
    step's rollouts on all ranks, so that parts add up to the token mean. KL is the k3 estimate
    e^d − d − 1, d = log π_ref − log π_θ (whose gradient is that of KL(π_ref ‖ π_θ))."""
    ratio = (logps - old_logps).exp()  # r_t
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])  # CLIP
    if beta > 0:
        d = ref_logps - logps
        objective = objective - beta * (d.exp() - d - 1)
    return -(objective * mask).sum() / max(total_tokens, 1)


def update(accelerator, model, reference, optimizer, prompts: list[dict],
           completions: list[Completion], advantages: list[float], weights: list[float],
           total_tokens: float, sampling: Sampling, epsilon=0.2, beta=0.04, num_updates=1,
           max_grad_norm=5.0, stand_in: dict | None = None) -> dict[str, float]:
    """μ = `num_updates` optimizer steps on one batch of rollouts; π_old is π_θ before the first.
    `model` and `optimizer` are the accelerator's. `weights`: 1, or 0 for a row that only keeps the
    processes in step; `total_tokens` counts those of weight 1 on all. `stand_in` (sharded
    parameters): a prompt of every modality, added with weight 0, so that ranks make equal calls.
    Returns this process's parts, to be summed, of `loss` and the token means `entropy`, `kl`,
    `clipped`; `grad_norm`; and `logp_gap`, the most that log-probs sampled and scored differ."""
    ids = [completion.ids for completion in completions]
    if stand_in is not None:
        prompts, ids = [*prompts, stand_in], [*ids, ids[0][:1]]
        advantages, weights = [*advantages, 0.0], [*weights, 0.0]
    advantages, weights = (torch.tensor(v, device=ids[0].device) for v in (advantages, weights))
    old_logps = ref_logps = None
    for _ in range(num_updates):
        with accelerator.autocast():
            logps, entropy, mask = token_logps(model, prompts, ids, sampling)  # (B, T)
        mask, now = mask * weights[:, None], logps.detach()
        old_logps = now if old_logps is None else old_logps
        if reference is not None and ref_logps is None:
            with torch.no_grad(), accelerator.autocast():
                ref_logps = token_logps(reference, prompts, ids, sampling)[0]
        loss = grpo_loss(logps, old_logps, ref_logps, advantages, mask, total_tokens, epsilon, beta)
        # Parts over the global token count are to be summed; DDP averages over processes.
        accelerator.backward(loss * accelerator.num_processes)
        norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    d = (now if ref_logps is None else ref_logps) - now
    clipped = ((now - old_logps).exp() - 1).abs() > epsilon
    gaps = [(c.logps - row[: len(c.ids)]).abs().max() for row, c in zip(old_logps, completions)]
    means = {"entropy": entropy, "kl": d.exp() - d - 1, "clipped": clipped}
    figures = {k: ((value * mask).sum() / total_tokens).item() for k, value in means.items()}
    return figures | {"loss": loss.item(), "grad_norm": float(norm), "logp_gap": float(max(gaps))}


# --- a policy to try it on ---
SPECIALS = [f"<|{name}|>" for name in (
    "im_end pad image_pad video_pad vision_start vision_end im_start").split()]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}"
    "<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_policy(folder: str, texts: list[str], seed: int) -> None:
    """Save a random Qwen3-VL of 0.5 M parameters, its real processor, and a tokenizer of words."""
    word = r"<[^<>|]+>|[A-Za-z]+|[^\sA-Za-z]"
    words = sorted({w for text in ["user assistant", *texts] for w in re.findall(word, text)})
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(word), "removed", invert=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=SPECIALS)
    look = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16, "merge_size": 2,
            "size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64}}
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**look), tokenizer,
        transformers.Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **look), CHAT_TEMPLATE)
    end, pad, image, video, start, stop, _ = tokenizer.convert_tokens_to_ids(SPECIALS)
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 4, 4]}
    text = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, head_dim=24, rope_parameters=rope, vocab_size=len(tokenizer),
                pad_token_id=pad, eos_token_id=end, bos_token_id=None, initializer_range=0.08)
    vision = dict(hidden_size=64, intermediate_size=128, depth=1, num_heads=2, out_hidden_size=96,
                  num_position_embeddings=64, deepstack_visual_indexes=[0], initializer_range=0.08)
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=image,
        video_token_id=video, vision_start_token_id=start, vision_end_token_id=stop)
    torch.manual_seed(seed)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
