"""Group Relative Policy Optimization (GRPO) on any transformers vision-language model.

    q     a question              `prompt`: what a processor returns for one conversation, (1, L)
                                  each but for pixels and grids, and its `position_ids`
    o_i   an answer to it         `Completion` as sampled, `Episode` as trained; T tokens
    π_θ, π_old, π_ref             `model`, `old_logps` (before a step's update), `reference`
    A_i, r_t, J(θ)                `group_advantages`, `ratio`, minus `grpo_loss`
    ε, β, μ                       `epsilon`, `beta`, `num_updates` of `Objective`

A step is `generate`, a reward R̃_i for each completion (yours), `group_advantages`, `update`.
Sources: DeepSeekMath (arXiv 2402.03300) eq. 3 and 4; FFR (arXiv 2604.16243) eq. J(θ), whose chosen
completions are τ̂_i; Dr. GRPO. The file works alone, with transformers from 5.24 on.
"""

import os
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
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
    """The same with a checkpoint's own ids. A temperature of 0 is greedy."""

    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    suppressed_ids: tuple[int, ...] = ()  # never sampled: a vision token claims missing pixels


@dataclass
class Objective:
    """What an update maximizes, and in which portions."""

    epsilon: Annotated[float, "ε of the clip (ours: the paper names none)"] = 0.2
    beta: Annotated[float, "β, weight of KL(π_θ ‖ π_ref); 0 loads no reference model"] = 0.04
    num_updates: Annotated[int, "μ, optimizer steps per batch of rollouts (ours)"] = 1
    max_grad_norm: Annotated[float, "gradients are clipped to this norm"] = 5.0
    rollouts_at_once: Annotated[int, "per forward and backward, for memory; 0: all (ours)"] = 0
    row_tokens: Annotated[int, "the most in a row that a group's rollouts share (ours)"] = 8192


# --- a policy and its tokens, from a checkpoint ---
GREETING = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]


def load_policy(name: str, attention="", freeze_vision=False) -> tuple:
    """A video VLM from a folder or the hub, and its processor. Weights are fp32: bf16 ones would
    round updates of 5e-6 away. Raises ValueError, one sentence, where it cannot be trained."""
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
        raise ValueError(f"{name}: no processor or no model loads from there ({why})") from error

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
    """`settings` with a checkpoint's ids: each EOS ends; vision and padding are suppressed."""
    tokenizer, ends = processor.tokenizer, model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    names = [f"{part}_token_id" for part in ("image", "video", "vision_start", "vision_end")]
    never = {getattr(owner, name, None) for owner in (model.config, processor) for name in names}
    never = (never | {pad_id}) - ends - {None}
    return Sampling(
        settings.temperature,
        settings.top_p,
        settings.max_completion_length,
        eos_ids=tuple(ends),
        pad_id=pad_id,
        suppressed_ids=tuple(sorted(never)),
    )


# --- sampling ---
class Completion(NamedTuple):
    ids: Tensor  # (T,) with the end that was sampled
    logps: Tensor  # (T,) log π of each
    entropy: Tensor  # (T,) of π before each
    finished: bool  # was an end sampled?


def policy_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (…, V), fp32, whose softmax is π: at the temperature, suppressed ids masked. Not
    top-p: it truncates what is sampled, while r_t is of the full softmax, as usual."""
    logits = logits.float() / (sampling.temperature or 1.0)
    logits[..., list(sampling.suppressed_ids)] = -torch.inf
    return logits


def sample_token(logits: Tensor, chance: Tensor, sampling: Sampling) -> tuple:
    """Next tokens, their log-probs and the entropy of π, each (B, 1), from logits (B, V). `chance`
    (B, 1) in [0, 1) points into the nucleus: the fewest tokens whose mass reaches top-p."""
    logps = policy_logits(logits, sampling).log_softmax(-1)
    entropy = -(logps.exp() * logps.clamp_min(-1e4)).sum(-1, keepdim=True)  # 0 · log 0 is 0
    nucleus = TopPLogitsWarper(sampling.top_p)(None, logps).softmax(-1)
    mass = nucleus.cumsum(-1)
    token = torch.searchsorted(mass / mass[:, -1:], chance, right=True)
    if sampling.temperature == 0:
        token = logps.argmax(-1, keepdim=True)
    return token, logps.gather(-1, token), entropy


@torch.no_grad()
def generate(model, prompts: list[dict], seeds: list[list[int]], sampling: Sampling) -> list[list]:
    """Sample completions: for each prompt a list of a `Completion` for each of its seeds.

    A prompt is read once. Each completion has its own seed, so it does not depend on the rest of
    the batch. `model` is unwrapped; the caller autocasts. Another sampler has this signature too.
    """
    model.eval()
    batch = left_pad(prompts, sampling.pad_id)
    device, most = batch["input_ids"].device, sampling.max_completion_length
    owner = [number for number, its_seeds in enumerate(seeds) for _ in its_seeds]
    owner = torch.tensor(owner, device=device)  # (B,) the prompt of each completion
    sources = [torch.Generator().manual_seed(seed) for its_seeds in seeds for seed in its_seeds]
    chances = [torch.rand(most, 1, generator=source) for source in sources]
    eos_ids = torch.tensor(sampling.eos_ids, device=device)

    sampled = []
    with gathered_once(model) as any_rank:
        out = model(**batch, cache=OneDtypeCache(config=model.config), logits_to_keep=1)
        out.cache.reorder_cache(owner)  # a prompt's row, again for each of its completions
        logits = out.logits[owner, -1]  # (B, V)
        attention_mask = batch["attention_mask"][owner]
        position_ids = batch["position_ids"][..., owner, -1:]  # (B, 1), or (3, B, 1)
        running, lengths = torch.ones_like(owner), torch.zeros_like(owner)
        for chance in torch.stack(chances, 1).to(device):  # (B, 1)
            sampled.append(sample_token(logits, chance, sampling))
            token = sampled[-1][0]  # (B, 1)
            lengths += running
            running *= ~torch.isin(token[:, 0], eos_ids)
            if len(sampled) == most or not any_rank(running):
                break
            attention_mask = pad(attention_mask, (0, 1), value=1)
            position_ids = position_ids + 1
            where = {"attention_mask": attention_mask, "position_ids": position_ids}
            logits = model(input_ids=token, cache=out.cache, **where).logits[:, -1]

    ids, logps, entropy = (torch.cat(values, 1) for values in zip(*sampled))  # each (B, T)
    groups = [[] for _ in prompts]
    for k, (n, unended) in enumerate(zip(lengths.tolist(), running.tolist())):
        done = Completion(ids[k, :n], logps[k, :n], entropy[k, :n], finished=not unended)
        groups[owner[k]].append(done)
    return groups


# --- scoring, advantages, objective ---
def completion_logps(model, prompt: dict, ids: Tensor, sampling: Sampling) -> Tensor:
    """log π_θ(o_t | q, o_<t) of a completion's `ids` (T,) under its prompt: (T,), fp32."""
    model.eval()  # π_old had no dropout
    inputs = extend(prompt, ids[:-1])
    logits = model(**inputs, logits_to_keep=len(ids), use_cache=False).logits[0]  # (T, V)
    return chosen_logps(logits, ids, sampling)


def chosen_logps(logits: Tensor, ids: Tensor, sampling: Sampling) -> Tensor:
    """log π of `ids` (T,) by the logits (T, V) before each."""
    logps = policy_logits(logits, sampling).log_softmax(-1)
    return logps.gather(1, ids[:, None])[:, 0]


def group_advantages(rewards: Tensor, scale="group", batch_std: Tensor | None = None) -> Tensor:
    """A_i = (R̃_i − mean) / std; `rewards` (prompts, G) → the same shape. The std is of the "group"
    (FFR, GRPO), of the "batch" (of all rollouts of the step: `batch_std`), or "none" (Dr. GRPO)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = centred * (rewards.amax(1, True) > rewards.amin(1, True))  # exactly 0 where all equal
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
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])  # CLIP
    if beta > 0:
        d = ref_logps - logps
        objective = objective - beta * (d.exp() - d - 1)
    return -(objective * mask).sum() / max(total_tokens, 1)


# --- the update ---
class Episode(NamedTuple):
    """A completion to train on. Its prompts are numbers of `Batch.prompts`."""

    question: int  # the prompt that all of its group begin with
    prompt: int  # the prompt it answers: that one, or one with more in it
    ids: Tensor
    sampled_logps: Tensor | None = None  # as it was sampled; `update` measures the gap
    advantage: float = 0.0
    weight: float = 1.0  # 0: takes part in the calls and trains nothing


class Batch(NamedTuple):
    prompts: dict[int, dict]  # distinct ones, by number
    episodes: list[Episode]
    total_tokens: float  # Σ|τ̂_i|: those of weight 1, on all ranks
    stand_in: dict | None = None  # sharded: has every modality and joins each forward, at weight 0


def update(accelerator, model, optimizer, batch, sampling, objective, reference=None) -> dict:
    """`num_updates` optimizer steps on a `Batch`; `model` and `optimizer` are the accelerator's,
    `reference` is unwrapped and needed where β > 0. Returns the last step's `grad_norm` and this
    rank's part of its `loss` and of its token means `kl` and `clipped`, which add up; `logp_gap`,
    how far log-probs sampled and scored differ."""
    prompts, portions = in_portions(batch, objective)

    def score(policy, portion: list[Episode]) -> tuple[Tensor, Tensor]:
        with accelerator.autocast():
            return batched_logps(policy, prompts, portion, sampling, objective.row_tokens)

    old_logps, ref_logps = [], [None] * len(portions)
    if reference is not None:  # a frozen copy; with LoRA the policy, less its adapters
        with torch.no_grad(), getattr(reference, "disable_adapter", nullcontext)():
            ref_logps = [score(reference, portion)[0] for portion in portions]

    for iteration in range(objective.num_updates):
        figures = Counter()  # whose `update` adds
        for k, portion in enumerate(portions):
            logps, mask = score(model, portion)  # each (B, T)
            if iteration == 0:
                old_logps.append(logps.detach())  # π_old is π_θ before the first update
            advantages = logps.new_tensor([episode.advantage for episode in portion])
            terms = (logps, old_logps[k], ref_logps[k], advantages, mask, batch.total_tokens)
            loss = grpo_loss(*terms, epsilon=objective.epsilon, beta=objective.beta)
            # Parts over the global token count are to be summed; DDP averages over ranks.
            accelerator.backward(loss * accelerator.num_processes)
            figures.update(loss=loss.item(), **measure(*terms, epsilon=objective.epsilon))
        norm = accelerator.clip_grad_norm_(model.parameters(), objective.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    gap = max(map(sampling_gap, portions, old_logps))
    return dict(figures) | {"grad_norm": float(norm), "logp_gap": gap}


def in_portions(batch: Batch, objective: Objective) -> tuple[dict, list[list[Episode]]]:
    """The prompts, and the episodes in portions of `rollouts_at_once`, whose gradients add up. At
    A_i = 0 and β = 0 there is no gradient: every rank leaves out equally many such episodes."""
    episodes = sorted(batch.episodes, key=lambda episode: episode.advantage == 0)  # idle ones last
    idle = sum(episode.advantage == 0 and objective.beta == 0 for episode in episodes)
    episodes = episodes[: max(1, len(episodes) - min(gather_object([idle])))]
    episodes.sort(key=attrgetter("question", "prompt"))  # what can share a row stands together
    size = objective.rollouts_at_once or len(episodes)
    portions = [episodes[start : start + size] for start in range(0, len(episodes), size)]
    if batch.stand_in is None:
        return batch.prompts, portions
    extra = Episode(-1, -1, episodes[0].ids[:1], weight=0.0)
    return {**batch.prompts, -1: batch.stand_in}, [[*portion, extra] for portion in portions]


def measure(logps, old_logps, ref_logps, advantages, mask, total_tokens, epsilon) -> dict:
    """This portion's part of the token means of KL (k3), and of r_t outside 1 ± ε."""
    d = torch.zeros_like(old_logps) if ref_logps is None else ref_logps - logps.detach()
    outside = ((logps.detach() - old_logps).exp() - 1).abs() > epsilon
    values = {"kl": d.exp() - d - 1, "clipped": outside}
    return {name: ((x * mask).sum() / max(total_tokens, 1)).item() for name, x in values.items()}


def sampling_gap(portion: list[Episode], logps: Tensor) -> float:
    gaps = [0.0]
    for episode, scored in zip(portion, logps):
        if episode.sampled_logps is not None:
            gap = episode.sampled_logps - scored[: len(episode.ids)]
            gaps.append(episode.weight * gap.abs().max().item())
    return max(gaps)


# --- what a prompt is to the functions above ---
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids")


def with_positions(model, inputs: dict) -> dict:
    """A processor's inputs and `position_ids`, (1, L), or (3, 1, L) of time, height and width, so
    that parts can be computed apart. Raises ValueError where M-RoPE hides how it counts."""
    counter = next((part for part in model.modules() if hasattr(part, "get_rope_index")), None)
    if counter is None:
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if "mrope_section" in rope:
            raise ValueError(f"{type(model).__name__} has M-RoPE, but no `get_rope_index` to find")
        return inputs | {"position_ids": inputs["attention_mask"].cumsum(1) - 1}

    positions = counter.get_rope_index(**inputs)[0]
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
    """Tokens joined along `dim` (−1: one after another; −2: as rows), pixels one after another."""
    joined = {}
    for key in {key: None for part in parts for key in part}:
        values = [part[key] for part in parts if key in part]
        joined[key] = torch.cat(values, dim if key in PER_TOKEN else 0)
    return joined


def left_pad(prompts: list[dict], pad_id: int) -> dict:
    """Prompts as rows (B, L) that all end at the right edge."""
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
    """A prompt, and a completion's tokens (T,) after it."""
    ones = torch.ones_like(ids)[None]
    text = {
        "input_ids": ids[None],
        "attention_mask": ones,
        "mm_token_type_ids": 0 * ones,
        "position_ids": prompt["position_ids"][..., -1:] + ones.cumsum(1),
    }
    return join([prompt, {key: text[key] for key in PER_TOKEN if key in prompt}], -1)


def part_of(prompt: dict, start: int, stop: int | None, less_pixels_of: dict) -> dict:
    """A prompt's tokens from `start` to `stop`, and its pixels after those of another prompt."""
    part = {}
    for key, value in prompt.items():
        known = len(less_pixels_of.get(key, ()))
        if key in PER_TOKEN:
            part[key] = value[..., start:stop]
        elif len(value) > known:
            part[key] = value[known:]
    return part


# --- what large models need of `generate` ---
class OneDtypeCache(DynamicCache):
    """Under autocast keys come in fp32, values in bf16. Attention casts the keys anyway; cast
    before they are kept, they take half the memory."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple:
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


def is_sharded(model) -> bool:
    """Are its parameters spread over ranks (FSDP2), so that every call needs every rank?"""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def gathered_once(model):
    """Gather sharded text layers once for all tokens, not again for each. Yields a function that
    tells whether any completion still runs, on any rank if they must call together."""
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
# One by one, eight completions of a question read its video eight times. In a row it stands once.
# The row is a tree of segments, and a token sees the path that leads to it, up to itself:
#
#              q  τ1 c  τ2 τ3     q   the question but for its last token, with its video
#         q    ◣                  τ   a leaf: the last token of its prompt, and the completion but
#         τ1   ■  ◣                   for its last; so the logits here are those of its tokens
#         c    ◧     ◣            c   what a longer prompt adds to what it has in common with q,
#         τ2   ◧     ■  ◣             but for its last token
#         τ3   ◧     ■     ◣      τ1 answers q; τ2 and τ3 answer q with c. Positions are explicit,
#     ■ all, ◧ the common part    so τ3 does not feel that τ2 stands before it.
class Row:
    """Segments, the path of columns that each one's tokens see, and the columns of the leaves."""

    def __init__(self):
        self.segments, self.paths, self.leaves, self.length = [], [], [], 0

    def add(self, segment: dict, above: Tensor) -> Tensor:
        """Put a segment below the columns `above`; returns the path that ends with it."""
        start = self.length
        self.length += segment["input_ids"].shape[1]
        path = torch.cat([above, torch.arange(start, self.length)])
        self.segments.append(segment)
        self.paths.append(path)
        return path


def build_row(prompts: dict, episodes: list[Episode]) -> Row:
    """The tree of episodes of one group. The pixels of a longer prompt begin with the question's,
    and the tokens that stand for these are in what the two have in common."""
    alike = all(episode.prompt == episodes[0].prompt for episode in episodes)
    root_number = episodes[0].prompt if alike else episodes[0].question
    row, root = Row(), prompts[root_number]
    paths = {root_number: row.add(part_of(root, 0, -1, {}), above=torch.arange(0))}
    for episode in episodes:
        prompt = prompts[episode.prompt]
        if episode.prompt not in paths:
            tokens = [each["input_ids"][0, :-1].tolist() for each in (root, prompt)]
            common = len(os.path.commonprefix(tokens))
            rest = part_of(prompt, common, -1, less_pixels_of=root)
            paths[episode.prompt] = row.add(rest, above=paths[root_number][:common])
        leaf = part_of(extend(prompt, episode.ids[:-1]), -len(episode.ids), None, prompt)
        row.leaves.append(row.add(leaf, above=paths[episode.prompt])[-len(episode.ids) :])
    return row


def plan_rows(model, prompts: dict, episodes: list[Episode], row_tokens: int) -> list[Row]:
    """A row a group if it has at most `row_tokens` columns (the mask has their square), else a row
    a prompt, else an episode. They share only where every layer attends to all, by any mask."""
    text = getattr(model, "module", model).config.get_text_config()
    layers = {*(getattr(text, "layer_types", None) or []), "full_attention"}
    if text._attn_implementation != "sdpa" or len(layers) > 1:
        row_tokens = 0
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
    """Rows as a batch of inputs (R, N), and which of its tokens are of leaves (R, N)."""
    batch = left_pad([join(row.segments, -1) for row in rows], pad_id)
    length, device = batch["input_ids"].shape[1], batch["input_ids"].device
    leaf = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
    for k, row in enumerate(rows):
        leaf[k, torch.cat(row.leaves) + length - row.length] = True
    if all(len(row.leaves) == 1 for row in rows):
        return batch, leaf  # plain causal attention, by any kernel
    sees = torch.eye(length, dtype=torch.bool, device=device).repeat(len(rows), 1, 1)
    for k, row in enumerate(rows):
        for path in row.paths:
            path = path.to(device) + length - row.length
            sees[k, path[:, None], path] = path[:, None] >= path
    batch["attention_mask"] = sees[:, None]
    return batch, leaf


def batched_logps(
    model, prompts: dict, episodes: list[Episode], sampling: Sampling, row_tokens=8192
) -> tuple[Tensor, Tensor]:
    """`completion_logps` of many: `logps, mask`, each (B, T); the mask is an episode's weight."""
    for module in model.modules():  # checkpointing needs training mode, dropout must stay off
        module.training = isinstance(module, GradientCheckpointingLayer)
    batch, leaf = stack_rows(plan_rows(model, prompts, episodes, row_tokens), sampling.pad_id)
    logits = model(**batch, logits_to_keep=leaf, use_cache=False).logits  # (Σ T, V)
    # In the order of `episodes`; in chunks computed again backward: fp32 logits of all are large.
    chunks = zip(logits.split(1024), torch.cat([e.ids for e in episodes]).split(1024))
    flat = [checkpoint(chosen_logps, *chunk, sampling, use_reentrant=False) for chunk in chunks]
    logps = torch.cat(flat).split([len(episode.ids) for episode in episodes])
    mask = [torch.full_like(own, episode.weight) for own, episode in zip(logps, episodes)]
    return pad_sequence(logps, batch_first=True), pad_sequence(mask, batch_first=True)
