"""Group Relative Policy Optimization (GRPO) on any transformers vision-language model.

    q     a question              `prompt`: a processor's output for one conversation, with its
                                  `position_ids`; (1, L) each, except for pixels and grids
    o_i   an answer to it         `Completion` as it was sampled, `Episode` as it is trained; (T,)
    π_θ, π_old, π_ref             `model`, `old_logps` (before the update), `reference`
    A_i, r_t, J(θ)                `group_advantages`, `ratio`, minus `grpo_loss`
    ε, β, μ                       `epsilon`, `beta`, `num_updates` of `Objective`

A step is `generate`, a reward R̃_i for each completion (yours), `group_advantages`, `update`. The
plain way to score one completion is `completion_logps`; `update` scores many at once by
`batched_logps`, the last part of this file, which gives the same numbers.

Sources: DeepSeekMath (arXiv 2402.03300) eq. 3 and 4; FFR (arXiv 2604.16243) eq. J(θ), whose chosen
completions are τ̂_i; Dr. GRPO. The file needs no sibling, and transformers from 5.24 on.
"""

import os
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import transformers
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, TopPLogitsWarper
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class SamplingSettings:
    """How completions are sampled, and so how they are scored."""

    temperature: Annotated[float, "of sampling, and so of the policy that is trained"] = 1.0
    top_p: Annotated[float, "nucleus of sampling"] = 0.95
    max_completion_length: Annotated[int, "tokens"] = 1024


@dataclass
class Sampling(SamplingSettings):
    """The same, with a checkpoint's own ids. A temperature of 0 samples greedily."""

    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    suppressed_ids: tuple[int, ...] = ()  # never sampled: vision tokens without pixels, padding


@dataclass
class Objective:
    """What an update maximizes, and how much of it at once."""

    epsilon: Annotated[float, "ε of the clip (ours: the paper names none)"] = 0.2
    beta: Annotated[float, "β, weight of KL(π_θ ‖ π_ref); 0 loads no reference model"] = 0.04
    num_updates: Annotated[int, "μ, optimizer steps per batch of rollouts (ours)"] = 1
    max_grad_norm: Annotated[float, "gradients are clipped to this norm"] = 5.0
    rollouts_at_once: Annotated[int, "per forward and backward, for memory; 0: all (ours)"] = 0
    row_tokens: Annotated[int, "the most in a row that a group's rollouts share (ours)"] = 8192


# --- sampling ---
class Completion(NamedTuple):
    """An answer as it was sampled."""

    ids: Tensor  # (T,) with the EOS, if one was sampled
    logps: Tensor  # (T,) log π of each token
    entropy: Tensor  # (T,) of π before each token
    finished: bool  # was an EOS sampled?


def policy_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (…, V) in fp32 whose softmax is π: over the temperature, suppressed ids masked. Top-p
    is left out: it truncates what is sampled, while r_t compares full softmaxes, as usual."""
    logits = logits.float() / (sampling.temperature or 1.0)
    logits[..., list(sampling.suppressed_ids)] = -torch.inf
    return logits


def sample_token(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple:
    """Sample next tokens from logits (B, V). Returns tokens, log-probs, entropies of π: (B, 1).
    `uniform` (B, 1) in [0, 1) goes through the inverse CDF of the nucleus, which is the fewest
    tokens whose mass reaches top-p."""
    logps = policy_logits(logits, sampling).log_softmax(-1)
    entropy = -(logps.exp() * logps.clamp_min(-1e4)).sum(-1, keepdim=True)  # 0 · log 0 is 0
    if sampling.temperature == 0:
        token = logps.argmax(-1, keepdim=True)
    else:
        nucleus = TopPLogitsWarper(sampling.top_p)(None, logps).softmax(-1)
        mass = nucleus.cumsum(-1)
        token = torch.searchsorted(mass / mass[:, -1:], uniform, right=True)
    return token, logps.gather(-1, token), entropy


@torch.no_grad()
def generate(model, prompts: list[dict], seeds: list[list[int]], sampling: Sampling) -> list[list]:
    """Sample completions. Returns for each prompt a list with a `Completion` for each of its seeds.

    Each prompt is read once. Each completion has its own seed, so it does not depend on the rest of
    the batch. `model` is unwrapped; the caller autocasts. A sampler of your own has this signature.
    """
    model.eval()
    batch = left_pad(prompts, sampling.pad_id)
    device = batch["input_ids"].device
    max_length = sampling.max_completion_length
    eos_ids = torch.tensor(sampling.eos_ids, device=device)

    # B completions: the number of each one's prompt, and random numbers of its own.
    numbers = [number for number, its_seeds in enumerate(seeds) for _ in its_seeds]
    prompt_of = torch.tensor(numbers, device=device)  # (B,)
    uniforms = uniform_numbers(seeds, max_length).to(device)

    sampled = []
    with gathered_once(model) as any_rank:
        # Read each prompt once; then copy its row of the cache for each of its completions.
        out = model(**batch, cache=OneDtypeCache(config=model.config), logits_to_keep=1)
        out.cache.reorder_cache(prompt_of)
        logits = out.logits[prompt_of, -1]  # (B, V)
        attention_mask = batch["attention_mask"][prompt_of]
        position_ids = batch["position_ids"][..., prompt_of, -1:]  # (B, 1), or (3, B, 1)

        # Sample a token of each completion at a time, until all have an EOS.
        running, lengths = torch.ones_like(prompt_of), torch.zeros_like(prompt_of)
        for uniform in uniforms:  # (B, 1)
            token, token_logps, token_entropy = sample_token(logits, uniform, sampling)  # (B, 1)
            sampled.append((token, token_logps, token_entropy))
            lengths += running
            running *= ~torch.isin(token[:, 0], eos_ids)
            if len(sampled) == max_length or not any_rank(running):
                break
            attention_mask = pad(attention_mask, (0, 1), value=1)
            position_ids = position_ids + 1
            logits = model(
                input_ids=token,
                cache=out.cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
            ).logits[:, -1]

    # Cut each completion off behind its EOS, and hand it to its prompt.
    ids, logps, entropy = (torch.cat(values, 1) for values in zip(*sampled))  # each (B, T)
    completions = [[] for _ in prompts]
    for k, (n, still_running) in enumerate(zip(lengths.tolist(), running.tolist())):
        own = ids[k, :n], logps[k, :n], entropy[k, :n]
        completions[prompt_of[k]].append(Completion(*own, finished=not still_running))
    return completions


def uniform_numbers(seeds: list[list[int]], length: int) -> Tensor:
    """Return `length` random numbers in [0, 1) for each of B seeds: (length, B, 1)."""
    generators = [torch.Generator().manual_seed(seed) for its_seeds in seeds for seed in its_seeds]
    numbers = [torch.rand(length, 1, generator=generator) for generator in generators]
    return torch.stack(numbers, 1)


# --- scoring, advantages, objective ---
def completion_logps(model, prompt: dict, ids: Tensor, sampling: Sampling) -> Tensor:
    """Return log π_θ(o_t | q, o_<t) of a completion's `ids` (T,) under its prompt: (T,), fp32."""
    model.eval()  # π_old had no dropout
    inputs = extend(prompt, ids[:-1])
    logits = model(**inputs, logits_to_keep=len(ids), use_cache=False).logits[0]  # (T, V)
    return chosen_logps(logits, ids, sampling)


def chosen_logps(logits: Tensor, ids: Tensor, sampling: Sampling) -> Tensor:
    """Return log π of each of `ids` (T,), from the logits (T, V) that predict them."""
    logps = policy_logits(logits, sampling).log_softmax(-1)
    return logps.gather(1, ids[:, None])[:, 0]


def group_advantages(rewards: Tensor, scale="group", batch_std: Tensor | None = None) -> Tensor:
    """A_i = (R̃_i − mean) / std, from `rewards` (prompts, G), in the same shape. The std is of the
    "group" (FFR, GRPO), of the "batch" (`batch_std`, of all rollouts of the step), or "none", which
    divides by nothing (Dr. GRPO)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    all_equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    centred = centred.masked_fill(all_equal, 0.0)  # exactly, although the mean is rounded
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
    total_tokens: float,
    epsilon=0.2,
    beta=0.04,
) -> Tensor:
    """−J(θ) = −1/Σ|τ̂_i| · Σ_i Σ_t min(r_t A_i, clip(r_t, 1−ε, 1+ε) A_i) + β KL(π_θ ‖ π_ref).

    logps, old_logps, ref_logps, mask (B, T); advantages (B,); `total_tokens` = Σ|τ̂_i| over the
    step's rollouts on all ranks, so that parts add up to the token mean. KL is the k3 estimate
    e^d − d − 1, d = log π_ref − log π_θ (whose gradient is that of KL(π_ref ‖ π_θ)).
    """
    ratio = (logps - old_logps).exp()  # r_t
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon)
    advantages = advantages[:, None]  # A_i, the same for each of its tokens
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    if beta > 0:
        d = ref_logps - logps
        surrogate = surrogate - beta * (d.exp() - d - 1)
    return -(surrogate * mask).sum() / max(total_tokens, 1)


# --- the update ---
class Episode(NamedTuple):
    """A completion to train on. `question` and `prompt` are keys of `Batch.prompts`."""

    question: int  # its group's plain prompt, whose video every longer prompt of the group shares
    prompt: int  # the prompt that it answers: that one, or a longer one
    ids: Tensor
    sampled_logps: Tensor | None = None  # as it was sampled; `update` measures the gap
    advantage: float = 0.0
    weight: float = 1.0  # 0: is scored, but trains nothing


class Batch(NamedTuple):
    """What an update trains on: the episodes of one step on this rank."""

    prompts: dict[int, dict]  # the distinct ones, by number
    episodes: list[Episode]
    total_tokens: float  # Σ|τ̂_i|, of those with weight 1, on all ranks
    stand_in: dict | None = None  # if sharded: a prompt of every modality, for each forward


def update(accelerator, model, optimizer, batch, sampling, objective, reference=None) -> dict:
    """Take `num_updates` optimizer steps on a `Batch`.

    `model` and `optimizer` are the accelerator's; `reference` is unwrapped, and needed if β > 0.
    Returns figures of the last optimizer step: `grad_norm`, and this rank's shares of `loss`, `kl`
    and `clipped`, to be summed over ranks. `logp_gap`, from before the first step, is the largest
    difference between a log-prob as sampled and as scored here.
    """
    prompts, micro_batches = to_micro_batches(batch, objective)

    def logps_and_mask(policy, episodes: list[Episode]) -> tuple[Tensor, Tensor]:
        with accelerator.autocast():
            return batched_logps(policy, prompts, episodes, sampling, objective.row_tokens)

    constants = {
        "total_tokens": batch.total_tokens,
        "epsilon": objective.epsilon,
        "beta": objective.beta,
    }
    ref_logps = [None] * len(micro_batches)
    if reference is not None:  # a frozen copy; with LoRA the policy without its adapters
        with torch.no_grad(), getattr(reference, "disable_adapter", nullcontext)():
            ref_logps = [logps_and_mask(reference, episodes)[0] for episodes in micro_batches]

    old_logps = []
    for iteration in range(objective.num_updates):
        figures = Counter()
        for k, episodes in enumerate(micro_batches):
            logps, mask = logps_and_mask(model, episodes)  # each (B, T)
            if iteration == 0:
                old_logps.append(logps.detach())  # π_old is π_θ before the first update

            advantages = logps.new_tensor([episode.advantage for episode in episodes])
            loss = grpo_loss(logps, old_logps[k], ref_logps[k], advantages, mask, **constants)
            # The ranks' losses are to be summed, but DDP averages gradients: undo that.
            accelerator.backward(loss * accelerator.num_processes)

            figures["loss"] += loss.item()
            per_token = token_figures(logps.detach(), old_logps[k], ref_logps[k], objective.epsilon)
            for name, values in per_token.items():
                figures[name] += ((values * mask).sum() / max(batch.total_tokens, 1)).item()

        norm = accelerator.clip_grad_norm_(model.parameters(), objective.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    gap = max(map(sampling_gap, micro_batches, old_logps))
    return dict(figures) | {"grad_norm": float(norm), "logp_gap": gap}


def to_micro_batches(batch: Batch, objective: Objective) -> tuple[dict, list[list[Episode]]]:
    """Return the prompts, and the episodes in micro-batches of `rollouts_at_once`, whose gradients
    add up. Episodes of one question and prompt stand together, so that they can share a row.
    Without KL, those without a gradient are dropped."""
    episodes = drop_idle(batch.episodes) if objective.beta == 0 else batch.episodes
    episodes = sorted(episodes, key=attrgetter("question", "prompt"))
    size = objective.rollouts_at_once or len(episodes)
    micro_batches = [episodes[start : start + size] for start in range(0, len(episodes), size)]

    if batch.stand_in is None:
        return batch.prompts, micro_batches
    extra = Episode(-1, -1, episodes[0].ids[:1], weight=0.0)
    return {**batch.prompts, -1: batch.stand_in}, [[*part, extra] for part in micro_batches]


def drop_idle(episodes: list[Episode]) -> list[Episode]:
    """Leave out episodes with A_i = 0, whose gradient is 0 without KL. Every rank leaves out the
    same number, so that all make equally many calls, and keeps at least one."""
    idle = sum(episode.advantage == 0 for episode in episodes)
    kept = max(1, len(episodes) - min(gather_object([idle])))
    return sorted(episodes, key=lambda episode: episode.advantage == 0)[:kept]


def token_figures(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, epsilon) -> dict:
    """Return what is logged as a token mean, each (B, T): KL (k3), and whether r_t leaves 1 ± ε."""
    d = torch.zeros_like(logps) if ref_logps is None else ref_logps - logps
    ratio = (logps - old_logps).exp()
    return {"kl": d.exp() - d - 1, "clipped": (ratio - 1).abs() > epsilon}


def sampling_gap(episodes: list[Episode], logps: Tensor) -> float:
    """Return the largest difference between a log-prob as it was sampled and as it is scored."""
    gaps = [0.0]
    for episode, scored in zip(episodes, logps):
        if episode.sampled_logps is not None:
            gap = episode.sampled_logps - scored[: len(episode.ids)]
            gaps.append(episode.weight * gap.abs().max().item())
    return max(gaps)


# --- a policy and its tokens, from a checkpoint ---
GREETING = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]


def load_policy(name: str, attention="", freeze_vision=False) -> tuple:
    """Load a video VLM and its processor from a folder or the hub. Weights are fp32, as bf16 would
    round updates of 5e-6 away. Raises ValueError if the model cannot be trained."""
    local = Path(name).is_dir()
    if not local:
        print(f"{name} is no folder here: it is looked for on the hub")
    try:
        processor = transformers.AutoProcessor.from_pretrained(name)
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation=attention or None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        opening = processor.apply_chat_template(
            GREETING, tokenize=False, add_generation_prompt=True
        )
        vision = model.get_encoder("video")
        vision.requires_grad_(not freeze_vision)
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())
        hint = "a run's weights are in its model/, at its end" if local else "no such folder here"
        raise ValueError(f"{name}: no processor or no model there; {hint} ({why})") from error

    lost = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    for refused, why in [
        (lost, f"weights are missing or of another shape there and would be random: {lost[:3]}"),
        (not hasattr(processor, "video_processor"), "no video processor; save one there"),
        (opening.rstrip().endswith("<think>"), "its chat template opens <think> itself"),
        (freeze_vision and vision is model, "no vision tower is found; train without freezing"),
    ]:
        if refused:
            raise ValueError(f"{name}: {why}")

    if hasattr(processor.image_processor, "crop_to_patches"):
        # InternVL's default adds a dozen enlarged crops to each picture, whatever its size.
        processor.images_kwargs = {**processor.images_kwargs, "crop_to_patches": False}
    return model, processor


def load_sampling(settings: SamplingSettings, model, processor) -> Sampling:
    """Add a checkpoint's ids to the settings: each EOS ends, vision and padding are suppressed."""
    tokenizer = processor.tokenizer
    eos = model.generation_config.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    names = [f"{part}_token_id" for part in ("image", "video", "vision_start", "vision_end")]
    never = {getattr(owner, name, None) for owner in (model.config, processor) for name in names}
    never = (never | {pad_id}) - ends - {None}

    return Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_completion_length=settings.max_completion_length,
        eos_ids=tuple(ends),
        pad_id=pad_id,
        suppressed_ids=tuple(sorted(never)),
    )


# --- prompts as tensors ---
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids")


def with_positions(model, inputs: dict) -> dict:
    """Add `position_ids` to a processor's inputs: (1, L), or (3, 1, L) of time, height and width.
    With these, parts of a prompt can be computed apart. Raises ValueError for an unknown M-RoPE."""
    indexer = next((part for part in model.modules() if hasattr(part, "get_rope_index")), None)
    if indexer is None:
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if "mrope_section" in rope:
            raise ValueError(f"{type(model).__name__} has M-RoPE, but no `get_rope_index` to find")
        return inputs | {"position_ids": inputs["attention_mask"].cumsum(1) - 1}

    positions = indexer.get_rope_index(**inputs)[0]
    if model.config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        # The weights were trained with text after a video at the largest position so far + 1; from
        # 5.3 on, transformers puts it where the frame's height and width end, inside the video.
        of_video = inputs["mm_token_type_ids"][0] == 2
        ends = (of_video[:-1] & ~of_video[1:]).nonzero()[:, 0] + 1
        for after in ends:
            right_place = positions[..., :after].max() + 1
            positions[..., after:] += right_place - positions[0, 0, after]
    return inputs | {"position_ids": positions}


def join(parts: list[dict], dim: int) -> dict:
    """Join tokens along `dim` (−1: one after another; −2: as rows) and pixels one after another."""
    joined = {}
    for key in {key: None for part in parts for key in part}:
        values = [part[key] for part in parts if key in part]
        joined[key] = torch.cat(values, dim if key in PER_TOKEN else 0)
    return joined


def left_pad(prompts: list[dict], pad_id: int) -> dict:
    """Make prompts rows (B, L) that all end at the right edge."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    padded = []
    for prompt in prompts:
        missing = (longest - prompt["input_ids"].shape[1], 0)
        tokens = {key: pad(prompt[key], missing) for key in PER_TOKEN if key in prompt}
        padded.append(prompt | tokens)
    batch = join(padded, -2)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad_id)
    return batch


def extend(prompt: dict, ids: Tensor) -> dict:
    """Put a completion's tokens (T,) behind a prompt."""
    ones = torch.ones_like(ids)[None]
    text = {
        "input_ids": ids[None],
        "attention_mask": ones,
        "mm_token_type_ids": 0 * ones,
        "position_ids": prompt["position_ids"][..., -1:] + ones.cumsum(1),
    }
    return join([prompt, {key: text[key] for key in PER_TOKEN if key in prompt}], -1)


def slice_prompt(prompt: dict, start: int, stop: int | None, after_pixels_of: dict) -> dict:
    """Return a prompt's tokens from `start` to `stop`, and its pixels after another prompt's."""
    part = {}
    for key, value in prompt.items():
        known = len(after_pixels_of.get(key, ()))
        if key in PER_TOKEN:
            part[key] = value[..., start:stop]
        elif len(value) > known:
            part[key] = value[known:]
    return part


# --- what large models need in `generate` ---
class OneDtypeCache(DynamicCache):
    """Keep keys in the dtype of the values. Under autocast rotary embeddings make them fp32, and
    attention casts them anyway; cast before they are kept, they take half the memory."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple:
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


def is_sharded(model) -> bool:
    """Are the parameters spread over ranks (FSDP2), so that every call needs every rank?"""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def gathered_once(model):
    """Gather sharded text layers once, not once a token. Yields a function that tells whether any
    completion still runs: on any rank, if the ranks must call together."""
    together = is_sharded(model)
    layers = [part for part in model.get_decoder().modules() if isinstance(part, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)

    def any_rank(running: Tensor) -> bool:
        most = running.max()
        if together:
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return bool(most)

    yield any_rank
    for layer in layers:
        layer.set_reshard_after_forward(True, recurse=False)
        layer.reshard()


# --- many completions at once: those of a group share a row ---
#
# One by one, eight completions of a question read its video eight times. In a shared row it stands
# once. The row is a tree of segments, and each token sees the path from the root to itself:
#
#              q  τ1 c  τ2 τ3     q   the question with its video
#         q    ◣                  c   what a longer prompt adds to what it has in common with q
#         τ1   ■  ◣               τ   a leaf: a completion. τ1 answers q; τ2 and τ3 answer q with c
#         c    ◧     ◣
#         τ2   ◧     ■  ◣         ■   sees all of it
#         τ3   ◧     ■     ◣      ◧   sees the part in common
#                                 ◣   sees what stands before in the same segment
#
# A logit predicts the next token. So a leaf begins with the last token of its prompt and ends with
# the last but one of its completion, and q and c end one token earlier. Positions are explicit: τ3
# has the positions it would have in a row of its own, whatever stands before it.
class Row:
    """A tree of segments, laid out one behind the other in the columns of one row."""

    def __init__(self):
        self.segments = []
        self.paths = []  # of each segment: the columns above it and its own, which its tokens see
        self.leaves = []  # of each episode: the columns that predict its tokens
        self.length = 0

    def add(self, segment: dict, above: Tensor) -> Tensor:
        """Put a segment below the columns `above`. Returns the path that ends with it."""
        start = self.length
        self.length += segment["input_ids"].shape[1]
        path = torch.cat([above, torch.arange(start, self.length)])
        self.segments.append(segment)
        self.paths.append(path)
        return path


def build_row(prompts: dict, episodes: list[Episode]) -> Row:
    """Return the tree of a group's episodes. A longer prompt is taken to begin with the question's
    tokens, at least up to its last vision token, and with the question's pixels, before its own."""
    alike = all(episode.prompt == episodes[0].prompt for episode in episodes)
    root_number = episodes[0].prompt if alike else episodes[0].question
    root = prompts[root_number]

    row = Row()
    paths = {root_number: row.add(slice_prompt(root, 0, -1, {}), above=torch.arange(0))}
    for episode in episodes:
        prompt = prompts[episode.prompt]
        if episode.prompt not in paths:
            # A longer prompt, met first: add what it does not have in common with the question.
            tokens = [each["input_ids"][0, :-1].tolist() for each in (root, prompt)]
            common = len(os.path.commonprefix(tokens))  # it takes any sequences
            added = slice_prompt(prompt, common, -1, after_pixels_of=root)
            paths[episode.prompt] = row.add(added, above=paths[root_number][:common])

        # The leaf: the prompt's last token, then the completion without its last.
        length = len(episode.ids)
        whole = extend(prompt, episode.ids[:-1])
        leaf = slice_prompt(whole, -length, None, after_pixels_of=prompt)
        path = row.add(leaf, above=paths[episode.prompt])
        row.leaves.append(path[-length:])
    return row


def plan_rows(model, prompts: dict, episodes: list[Episode], row_tokens: int) -> list[Row]:
    """Return one row for each group, if it has at most `row_tokens` columns (the mask has their
    square); else one for each prompt, or for each episode. Rows are shared only if every layer
    attends to all tokens and takes any mask."""
    text = getattr(model, "module", model).config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    if text._attn_implementation != "sdpa" or layer_types != {"full_attention"}:
        row_tokens = 0  # too few for any group: each episode gets a row of its own

    rows = []
    for _, group in groupby(episodes, attrgetter("question")):
        group = list(group)
        by_prompt = [list(same) for _, same in groupby(group, attrgetter("prompt"))]
        for grouping in ([group], by_prompt, [[episode] for episode in group]):
            planned = [build_row(prompts, sharing) for sharing in grouping]
            if max(row.length for row in planned) <= row_tokens:
                break
        rows += planned  # the last grouping is taken whatever its length
    return rows


def stack_rows(rows: list[Row], pad_id: int) -> tuple[dict, Tensor]:
    """Stack rows into a batch of inputs (R, N). Also returns which tokens are of leaves, (R, N)."""
    batch = left_pad([join(row.segments, -1) for row in rows], pad_id)
    length, device = batch["input_ids"].shape[1], batch["input_ids"].device

    leaf = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
    for k, row in enumerate(rows):
        padding = length - row.length  # on the left
        leaf[k, torch.cat(row.leaves) + padding] = True
    if all(len(row.leaves) == 1 for row in rows):
        return batch, leaf  # plain causal attention, by any kernel

    # Padding sees itself, as a softmax over nothing is nan. A token sees its path, up to itself.
    sees = torch.eye(length, dtype=torch.bool, device=device).repeat(len(rows), 1, 1)  # (R, N, N)
    for k, row in enumerate(rows):
        padding = length - row.length
        for path in row.paths:
            path = path.to(device) + padding
            sees[k, path[:, None], path] = path[:, None] >= path
    batch["attention_mask"] = sees[:, None]  # (R, 1, N, N), of all heads
    return batch, leaf


def batched_logps(
    model, prompts: dict, episodes: list[Episode], sampling: Sampling, row_tokens=8192
) -> tuple[Tensor, Tensor]:
    """Do `completion_logps` for many episodes: `logps` and `mask`, each (B, T), right-padded. The
    mask holds the episode's weight."""
    for module in model.modules():  # checkpointing needs training mode, dropout must stay off
        module.training = isinstance(module, GradientCheckpointingLayer)

    batch, leaf = stack_rows(plan_rows(model, prompts, episodes, row_tokens), sampling.pad_id)
    logits = model(**batch, logits_to_keep=leaf, use_cache=False).logits  # (Σ T, V)

    # In the order of `episodes`. Chunks are computed again in backward, as fp32 logits are large.
    ids = torch.cat([episode.ids for episode in episodes])  # (Σ T,)
    chunks = zip(logits.split(1024), ids.split(1024))
    parts = [checkpoint(chosen_logps, *chunk, sampling, use_reentrant=False) for chunk in chunks]
    logps = torch.cat(parts).split([len(episode.ids) for episode in episodes])
    mask = [torch.full_like(own, episode.weight) for own, episode in zip(logps, episodes)]
    return pad_sequence(logps, batch_first=True), pad_sequence(mask, batch_first=True)
