"""Group Relative Policy Optimization on any transformers vision-language model. No FFR in here.

    π_θ   `model`                 log π_θ(o_t)   `token_logps`        G    rollouts per prompt
    o     completion token ids    A_i            `group_advantages`   ε    `epsilon`, β  `beta`
    r_t   π_θ / π_old             J(θ)           `grpo_loss`          μ    `num_updates`

Sources: GRPO (DeepSeekMath), FFR eq. J(θ), Dr. GRPO. A prompt is the dict of tensors a processor
returns for one conversation, some (1, L), others (pixels, grids) with their own rows. No sibling.
"""

import os
from collections import Counter, namedtuple
from dataclasses import dataclass

import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
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
        raise ValueError(
            f"{name}: its chat template opens <think> itself, so the format reward "
            "would be 0 for ever; take that out of the template"
        )
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        name, dtype=torch.float32, attn_implementation=attention or None
    )
    vision = model.get_encoder("video")
    if freeze_vision and vision is model:
        raise ValueError(f"{name}: no vision tower is found in it; train it without freezing")
    vision.requires_grad_(not freeze_vision)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model, processor


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
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    names = [f"{part}_token_id" for part in ("image", "video", "vision_start", "vision_end")]
    never = {getattr(owner, name, None) for owner in (model.config, processor) for name in names}
    never = tuple(sorted((never | {pad_id}) - eos - {None}))
    return Sampling(temperature, top_p, max_tokens, tuple(sorted(eos)), pad_id, never)


# Sampled tokens, their log-probs and the entropy of π before each, all (T,); did an EOS end them?
Completion = namedtuple("Completion", "ids logps entropy finished")


# --- prompts: the same video is read once ---
CHUNK = 1024  # tokens whose fp32 logits are held at once
PER_TOKEN = "input_ids attention_mask mm_token_type_ids position_ids branch parent".split()


def with_positions(model, inputs: dict) -> dict:
    """A conversation's inputs and where its tokens stand, so that parts can be computed apart:
    `position_ids` (1, L), or (3, 1, L) of time, height and width. `model` is unwrapped."""
    index, mask = getattr(model.model, "get_rope_index", None), inputs["attention_mask"]
    if index is None:
        return inputs | {"position_ids": mask.cumsum(1) - 1}
    positions, of_video = index(**inputs)[0], inputs["mm_token_type_ids"][0] == 2
    if model.config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        # The weights were trained with text after a video at the largest position so far + 1; from
        # 5.3 on, transformers puts it where the frame's height and width end, inside the video.
        for after in (of_video[:-1] & ~of_video[1:]).nonzero()[:, 0] + 1:
            positions[..., after:] += positions[..., :after].max() + 1 - positions[0, 0, after]
    return inputs | {"position_ids": positions}


def can_share(model) -> bool:
    """Can prompts share a row? Where all layers attend to all before, by a kernel for any mask."""
    text = getattr(model, "module", model).config.get_text_config()
    layers = {*(getattr(text, "layer_types", None) or []), "full_attention"}
    return text._attn_implementation == "sdpa" and len(layers) == 1


def common(*prompts: dict) -> int:
    """How many tokens all begin with, less the last one of each."""
    return len(os.path.commonprefix([p["input_ids"][0, :-1].tolist() for p in prompts]))


def rest(prompt: dict, trunk: dict, n: int) -> dict:
    """What a prompt has after its first n tokens; all of `trunk`'s videos stand in these."""
    parts = {
        key: x[..., n:] if key in PER_TOKEN else x[len(trunk.get(key, ())) :]
        for key, x in prompt.items()
    }
    return {key: x for key, x in parts.items() if x.numel()}


def pack(trunk: dict, prompts: list[dict], ids: list[Tensor]) -> dict:
    """A row (1, N) that holds a tree: what `trunk` and all prompts begin with; what else a prompt
    has before its last token, once however often it is given; then leaves, for each prompt its
    last token and `ids`. `branch`: 1 in the trunk, above 1 in a prompt's part, below 0 in a leaf;
    `parent`: the branch that it goes on from."""

    def labelled(part: dict, **labels: int) -> dict:
        return part | {key: torch.full_like(part["input_ids"], k) for key, k in labels.items()}

    n, own, leaves = common(trunk, *prompts), {}, []
    head = {key: x[..., :n] if key in PER_TOKEN else x for key, x in trunk.items()}
    parts = [labelled(head, branch=1, parent=1)]
    for k, (prompt, tail) in enumerate(zip(prompts, ids), 2):
        part, number = rest(prompt, trunk, n), own.setdefault(id(prompt), k)
        leaf = {key: pad(part[key][..., -1:], (0, len(tail))) for key in part if key in PER_TOKEN}
        leaf["input_ids"][:, 1:] = tail
        leaf["position_ids"] = leaf["position_ids"][..., :1] + torch.arange(len(tail) + 1).to(tail)
        leaves.append(labelled(leaf, branch=-k, parent=number))
        if number == k:
            part = {key: x[..., :-1] if key in PER_TOKEN else x for key, x in part.items()}
            parts.append(labelled(part, branch=k, parent=1))
    return join([*parts, *leaves], -1)


def in_rows(model, prompts: list[dict], ids: list[Tensor], trunks: list[dict]) -> tuple:
    """Packed rows, one for each trunk if the model can share, else for each prompt. Returns them,
    what each begins as, and the order in which the prompts stand in them."""
    groups, shared = {}, can_share(model)
    for i, trunk in enumerate(trunks):
        groups.setdefault(id(trunk) if shared else i, []).append(i)
    heads = [trunks[group[0]] for group in groups.values()]
    rows = [
        pack(head, [prompts[i] for i in group], [ids[i] for i in group])
        for head, group in zip(heads, groups.values())
    ]
    return rows, heads, sum(groups.values(), [])


def join(parts: list[dict], dim: int) -> dict:
    """What there is for each token along `dim`; pixels and grids one after another."""
    found = {key: [part[key] for part in parts if key in part] for part in parts for key in part}
    return {
        key: torch.cat(values, dim if key in PER_TOKEN else 0) if values[1:] else values[0]
        for key, values in found.items()
    }


def stack(rows: list[dict], pad_id: int, before: Tensor | None = None) -> tuple:
    """Packed rows as a left-padded batch (B, L) for a model whose cache holds tokens labelled
    `before` (B, N − L). Also: which tokens are of leaves (B, L), and what each one sees (B, L, N):
    the trunk, its own branch and that one's parent, up to itself."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch = join(
        [
            {
                key: pad(x, (longest - x.shape[-1], 0)) if key in PER_TOKEN else x
                for key, x in row.items()
            }
            for row in rows
        ],
        -2,
    )
    branch, parent = batch.pop("branch"), batch.pop("parent")
    keys = branch if before is None else torch.cat([before, branch], 1)
    sees = (keys == 1)[:, None] | (keys[:, None] == branch[..., None])
    sees = (sees | (keys[:, None] == parent[..., None])).tril(keys.shape[1] - longest)
    alone = (branch.amin(1) == -2).all()  # one leaf in each row: any attention kernel can do it
    batch["attention_mask"] = (keys != 0).long() if alone else sees[:, None]
    batch["input_ids"] = batch["input_ids"].masked_fill(branch == 0, pad_id)
    return batch, branch < 0, sees


def policy_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (…, V) that define π, sampled and scored: fp32, at the temperature, suppressed ids
    masked. Not top-p: it truncates what is sampled, while r_t is of the full softmax, as usual."""
    logits = logits.float() / (sampling.temperature or 1.0)
    logits[..., list(sampling.suppressed_ids)] = -torch.inf
    return logits


def sample(logits: Tensor, chance: Tensor, sampling: Sampling) -> tuple:
    """Next tokens, their log-probs, the entropy of π; each (B, 1), from logits (B, V). `chance`
    (B, 1) in [0, 1) points into the nucleus: the fewest tokens whose probability reaches top-p."""
    logp = policy_logits(logits, sampling).log_softmax(-1)
    ranked, order = logp.exp().sort(descending=True)
    mass = ranked.cumsum(-1)
    last = (mass < sampling.top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    place = (mass <= chance * mass.gather(-1, last)).sum(-1, keepdim=True)
    token = order.gather(-1, torch.minimum(place, last) if sampling.temperature > 0 else place * 0)
    entropy = -(logp.exp() * logp.clamp_min(-1e4)).sum(-1, keepdim=True)  # 0 · log 0 is 0
    return token, logp.gather(-1, token), entropy


Prefill = namedtuple("Prefill", "prompts cache row sees position logits")


@torch.no_grad()
def prefill(
    model,
    prompts: list[dict],
    sampling: Sampling,
    seen: Prefill | None = None,
    trunks: list[dict] = (),
) -> Prefill:
    """Read S prompts. `trunks`: for each one that `seen` has read; what they have in common is not
    read again, and `seen` is used up. `model` is unwrapped, and left in eval. Returns them and the
    cache; for each its `row` there (S,); what its last token `sees` of that (S, N), and its
    `position` (…, S); the `logits` after it (S, V)."""
    model.eval()
    trunks, before, cache = trunks or prompts, None, None
    rows, heads, order = in_rows(model, prompts, [p["input_ids"][0, :0] for p in prompts], trunks)
    if seen is not None and can_share(model):
        known = [[*map(id, seen.prompts)].index(id(head)) for head in heads]
        begins = dict(zip(map(id, heads), seen.sees[known].int().argmax(1).tolist()))
        keep = min(begins[id(trunk)] + common(p, trunk) for p, trunk in zip(prompts, trunks))
        rows = [rest(row, head, keep - begins[id(head)]) for row, head in zip(rows, heads)]
        before, cache = seen.sees[known, :keep].long(), seen.cache
        cache.crop(keep - cache.get_seq_length())
        cache.reorder_cache(seen.row[known])
    batch, leaf, sees = stack(rows, sampling.pad_id, before)
    out = model(**batch, cache=cache, use_cache=True, logits_to_keep=leaf)
    place = torch.tensor(order).argsort()  # of each prompt's leaf
    row, column = leaf.nonzero()[place].T
    position = batch["position_ids"][..., row, column]
    return Prefill(prompts, out.cache, row, sees[row, column], position, out.logits[place])


@torch.no_grad()
def generate(
    model, read: Prefill, seeds: list[int], sampling: Sampling, synced: bool = False
) -> list[Completion]:
    """Sample a completion of each prompt, in one batch, each from a seed of its own: leaving one
    out changes nothing for the others. Those of a row go on side by side, K tokens a step, each
    seeing its own; `read`'s cache grows by them. `synced` (sharded): till all ranks are done."""
    row, logits, device = read.row, read.logits, read.row.device
    chances = torch.stack(
        [
            torch.rand(sampling.max_tokens, 1, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ],
        1,
    ).to(device)  # (T, S, 1)
    slot = (row[:, None] == row).tril(-1).sum(1)  # (S,), which of its row's K
    R, K = int(row.max()) + 1, int(slot.max()) + 1
    ids = torch.zeros(R, K, dtype=torch.long, device=device)
    position = read.position.new_zeros(*read.position.shape[:-1], R, K)
    sees = read.sees.new_zeros(R, K, read.sees.shape[1])
    position[..., row, slot], sees[row, slot] = read.position, read.sees
    itself = torch.eye(K, dtype=torch.bool, device=device).expand(R, K, K)
    eos, sampled = torch.tensor(sampling.eos_ids, device=device), []
    going, lengths = torch.ones_like(row), torch.zeros_like(row)  # (S,), going: 0 after an EOS
    for chance in chances:
        sampled.append(sample(logits, chance, sampling))
        ids[row, slot], lengths = sampled[-1][0][:, 0], lengths + going
        going = going * ~torch.isin(ids[row, slot], eos)
        more = going.max()
        if synced:
            torch.distributed.all_reduce(more, torch.distributed.ReduceOp.MAX)
        if not more or len(sampled) == sampling.max_tokens:
            break
        position, sees = position + 1, torch.cat([sees, itself], -1)
        mask = sees[:, None] if K > 1 else sees[:, 0].long()
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            cache=read.cache,
            use_cache=True,
        ).logits[row, slot]
    parts = [torch.cat(values, 1) for values in zip(*sampled)]  # each (S, T)
    return [
        Completion(*(part[k, :n] for part in parts), not unended)
        for k, (n, unended) in enumerate(zip(lengths.tolist(), going.tolist()))
    ]


def token_logps(
    model,
    prompts: list[dict],
    ids: list[Tensor],
    sampling: Sampling,
    trunks: list[dict] | None = None,
) -> tuple:
    """Log-probs of completions under their prompts: `logps, mask`, each (B, T) fp32. The mask is 1
    on completion tokens, 0 on padding. Those with the same trunk (by default, the same prompt)
    stand in one row, where each sees the trunk and itself: a video is encoded once for all, and
    only completions get logits."""
    for module in model.modules():  # checkpointing needs training mode, dropout must stay off
        module.training = isinstance(module, GradientCheckpointingLayer)
    rows, _, order = in_rows(model, prompts, [x[:-1] for x in ids], trunks or prompts)
    batch, leaf, _ = stack(rows, sampling.pad_id)
    logits = model(**batch, logits_to_keep=leaf, use_cache=False).logits  # (Σ T, V)
    tokens = torch.cat([ids[i] for i in order])

    def chosen(logits: Tensor, tokens: Tensor) -> Tensor:  # (N, V), (N,) → (N,)
        return policy_logits(logits, sampling).log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    # In parts, and computed again backward: fp32 logits of all are large.
    flat = torch.cat(
        [
            checkpoint(chosen, *part, use_reentrant=False)
            for part in zip(logits.split(CHUNK), tokens.split(CHUNK))
        ]
    )
    logps = dict(zip(order, flat.split([len(ids[i]) for i in order])))
    logps = [logps[i] for i in range(len(ids))]
    return pad_sequence(logps, True), pad_sequence([*map(torch.ones_like, logps)], True)


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
    e^d − d − 1, d = log π_ref − log π_θ (whose gradient is that of KL(π_ref ‖ π_θ))."""
    ratio = (logps - old_logps).exp()  # r_t
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])  # CLIP
    if beta > 0:
        d = ref_logps - logps
        objective = objective - beta * (d.exp() - d - 1)
    return -(objective * mask).sum() / max(total_tokens, 1)


# A rollout in the update; its group's prompts begin as `trunk`. Weight 0 trains nothing.
Row = namedtuple("Row", "trunk prompt completion advantage weight", defaults=[1.0])


def update(
    accelerator,
    model,
    reference,
    optimizer,
    rows: list[Row],
    tokens: float,
    sampling: Sampling,
    epsilon=0.2,
    beta=0.04,
    num_updates=1,
    max_grad_norm=5.0,
    at_once=0,
    stand_in: dict | None = None,
) -> dict[str, float]:
    """μ = `num_updates` optimizer steps on one batch of rollouts; π_old is π_θ before the first.
    `model` and `optimizer` are the accelerator's. `tokens`: how many of weight 1 there are on all
    processes. `at_once`: rollouts in a forward and backward, 0 for all; their gradients add up.
    `stand_in` (sharded parameters): a prompt of every modality, added with weight 0, so that ranks
    make equal calls. Returns this process's parts, to be summed, of `loss` and the token means
    `kl`, `clipped`; `grad_norm`; and `logp_gap`, how far log-probs sampled and scored differ."""
    # Where A_i = 0 and β = 0 there is no gradient; every process leaves out as many rows.
    rows = sorted(rows, key=lambda row: row.advantage == 0)
    idle = sum(row.advantage == 0 and beta == 0 for row in rows)
    rows = rows[: max(1, len(rows) - min(gather_object([idle])))]
    size, old, ref = at_once or len(rows), {}, {}
    extra = [
        Row(stand_in, stand_in, c._replace(ids=c.ids[:1]), 0.0, 0.0)
        for c in [rows[0].completion]
        if stand_in is not None
    ]
    for _ in range(num_updates):
        figures = Counter()
        for k in range(0, len(rows), size):
            trunks, prompts, completions, advantages, weights = zip(*rows[k : k + size], *extra)
            ids = [completion.ids for completion in completions]
            with accelerator.autocast():
                logps, mask = token_logps(model, prompts, ids, sampling, trunks)  # (B, T)
            advantages, weights = (logps.new_tensor(values) for values in (advantages, weights))
            mask, now = mask * weights[:, None], logps.detach()
            if k not in old and reference is not None:
                with torch.no_grad(), accelerator.autocast():
                    ref[k] = token_logps(reference, prompts, ids, sampling, trunks)[0]
            old.setdefault(k, now)
            loss = grpo_loss(logps, old[k], ref.get(k), advantages, mask, tokens, epsilon, beta)
            # Parts over the global token count are to be summed; DDP averages over processes.
            accelerator.backward(loss * accelerator.num_processes)
            d, ratio = ref.get(k, now) - now, (now - old[k]).exp()
            means = {"kl": d.exp() - d - 1, "clipped": (ratio - 1).abs() > epsilon}
            figures.update(
                {name: ((value * mask).sum() / tokens).item() for name, value in means.items()}
                | {"loss": loss.item()}
            )
        norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    gap = max(
        (row.completion.logps - logp[: len(row.completion.ids)]).abs().max().item()
        for k, logps in old.items()
        for row, logp in zip(rows[k : k + size], logps)
    )
    return dict(figures) | {"grad_norm": float(norm), "logp_gap": gap}
