"""Peak memory of an update and of a generation against G, frames, completion length, β and pictures
of patches: measured on tiny models, fitted by a formula, and computed from it for a 7B.
`python tests/bench_memory.py` writes assets/memory.json.

    held        weights, their gradients and Adam's two states where they are trained, π_ref (β > 0,
                no copy with LoRA), and the bf16 copies that autocast keeps of fp32 linear layers
    update      held + a · N · layers · width + v · patches · depth · width_v + c · g · C · V
                + m · N² / rows. With checkpointing a and v are of one layer, and the input of every
                layer of both towers is kept, in fp32: + 4 · (N · layers · width + patches · …)
    generation  held, less gradients, + 4 · K · layers · kv_width
                + d · K · width + e · patches · width_v + f · G · V + h · prompts · (L + c)²

P parameters, L prompt tokens, c tokens that a patch adds, C completion tokens, V vocabulary, g
rollouts at once, K = G (L + c + C) tokens in the cache. A group that shares one row has N = L + g (c
+ C) columns, and its video once; in rows of their own, g rollouts have N = g (L + c + C). With
patches it is the worst case: each rollout is a repair, and has a patch, and so a prompt, of its own.

With LoRA the frozen linear layers are stored in bf16, and nothing is kept to train them. Bytes are
those of live tensors: no allocator's rounding, no fragmentation, no kernels' workspaces.
"""

import json
import sys
import weakref
from copy import deepcopy
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.weak import WeakIdKeyDictionary  # noqa: E402

import ffr  # noqa: E402
import grpo  # noqa: E402
import train  # noqa: E402

VOCABULARY, PAD, IMAGE, VIDEO, START, STOP = 2048, 1, 2, 3, 4, 5
BASE = dict(G=4, frames=8, words=20, completion=32, beta=0.04, pictures=0, shared=True)
SWEEPS = dict(
    G=(2, 4, 8),
    frames=(4, 16),
    words=(200, 400),
    completion=(16, 128),
    beta=(0.0,),
    pictures=(1, 6),
    shared=(False,),
)
# Qwen2.5-VL-7B, and the paper's settings: 16 frames of 128 · 28 · 28 pixels, two to a token step;
# a picture of a patch has 512 · 28 · 28 pixels, and the patch some 60 tokens of text.
WAYS = ("plain", "checkpointed", "LoRA, checkpointed")
RANK = 16
ADAPTERS = 28 * (7168 + 2 * 4096 + 7168 + 3 * 22528)  # parameters of a 7B's, for each rank
SEVEN = dict(P=8.29e9, layers=28, width=3584, kv=512, depth=32, vision=1280, V=152_064)
DECODER = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18_944)  # its layers' parameters
PAPER = dict(G=8, prompt=8 * 128 + 200, patches=16 // 2 * 128 * 4, completion=1024)
PATCHES = {
    pictures: dict(added=(60 + pictures * 512) * (pictures > 0), added_patches=pictures * 512 * 4)
    for pictures in (0, 1, 6)
}


def build(width, layers):
    """Qwen2.5-VL's build in small, with a 7B's proportions of width, heads and MLP."""
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=width,
            intermediate_size=round(5.3 * width),
            num_hidden_layers=layers,
            num_attention_heads=7,
            num_key_value_heads=1,
            vocab_size=VOCABULARY,
            pad_token_id=PAD,
            eos_token_id=0,
            bos_token_id=None,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [width // 56, width // 14 - 2 * (width // 56), width // 56],
            },
        ),
        vision_config=dict(
            depth=layers,
            hidden_size=64,
            intermediate_size=171,
            num_heads=4,
            out_hidden_size=width,
            fullatt_block_indexes=[layers - 1],
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=STOP,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def prompt_of(frames, words, pictures=0):
    """A question of so many words about `frames` frames of 8 × 8 patches, 16 tokens each two frames,
    with a patch of pictures of that size."""
    steps = frames // 2
    ids = [START] + [VIDEO] * 16 * steps + [STOP] + [9] * words
    ids += ([START] + [IMAGE] * 16 + [STOP]) * pictures + [9]
    kinds = [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in ids]
    prompt = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids)).long(),
        "mm_token_type_ids": torch.tensor([kinds]).int(),
        "pixel_values_videos": torch.randn(64 * steps, 1176),
        "video_grid_thw": torch.tensor([[steps, 8, 8]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }
    if pictures:
        prompt["pixel_values"] = torch.randn(64 * pictures, 1176)
        prompt["image_grid_thw"] = torch.tensor([[1, 8, 8]] * pictures)
    return prompt


class Peak(TorchDispatchMode):
    """The most bytes that live tensors' storages had at any time."""

    def __init__(self, *modules):
        super().__init__()
        self.live, self.now, self.bytes = WeakIdKeyDictionary(), 0, 0
        self.note([t for m in modules for t in (*m.parameters(), *m.buffers())])

    def note(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self.live:
                self.live[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.bytes = max(self.bytes, self.now)

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.note([leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)])
        return out


def peak_of(work, optimizer, *modules):
    mode = Peak(*modules)
    mode.note([v for state in optimizer.state.values() for v in state.values()])
    with mode:
        work()
    return mode.bytes


def held(model, reference) -> dict[str, int]:
    """Bytes that are there whatever is computed: of weights, gradients and Adam, π_ref, copies."""
    trained = [p for p in model.parameters() if p.requires_grad]
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    copied = {p for m in linear for p in m.parameters(recurse=False) if p.dtype == torch.float32}
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.nbytes for p in trained),
        "Adam": sum(2 * p.nbytes for p in trained),
        "reference": sum(p.nbytes for p in reference.parameters()) if reference else 0,
        "bf16 copies": sum(p.nbytes // 2 for p in copied),
    }


def measure(width, layers, way, G, frames, words, completion, beta, pictures, shared):
    """Peaks of one update and one generation, and what the formula takes as inputs."""
    model = build(width, layers)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prompt = ffr.with_positions(model, prompt_of(frames, words))
    patched = ffr.with_positions(model, prompt_of(frames, words, pictures))
    prompts = {0: prompt} | {1 + k: patched for k in range(G)}
    reference = None
    if way == "LoRA, checkpointed":
        model = train.add_adapters(model, RANK)
        train.store_linears_in_bf16(model)
    elif beta:
        reference = deepcopy(model).requires_grad_(False)
        train.store_linears_in_bf16(reference)
    if way != "plain":
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)
    sampling = grpo.Sampling(1.0, 1.0, completion, (PAD,), PAD, (PAD, IMAGE, VIDEO))  # never ends
    ids, zeros = torch.full((completion,), 9), torch.zeros(completion)
    bytes_held = held(model, reference)
    model = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    numbers = range(1, G + 1) if pictures else [0] * G
    episodes = [grpo.Episode(0, number, ids, zeros, 1.0) for number in numbers]
    batch = grpo.Batch(prompts, episodes, G * completion)
    pi_ref = model if beta and not reference else reference

    def update():
        objective = grpo.Objective(beta=beta, row_tokens=10**9 if shared else 0)
        grpo.update(accelerator, model, optimizer, batch, sampling, objective, pi_ref)

    def generate():
        with accelerator.autocast():
            if pictures:
                grpo.generate(model, [patched] * G, [[seed] for seed in range(G)], sampling)
            else:
                grpo.generate(model, [prompt], [[*range(G)]], sampling)

    update()  # Adam's states are there from the first step on
    modules = [model, *([reference] if reference else [])]
    return {
        "held": bytes_held,
        "layers": layers,
        "width": width,
        "kv": width // 7,
        "depth": layers,
        "vision": 64,
        "V": VOCABULARY,
        "G": G,
        "at_once": G,
        "prompt": prompt["input_ids"].shape[1],
        "completion": completion,
        "patches": len(prompt["pixel_values_videos"]),
        "added": patched["input_ids"].shape[1] - prompt["input_ids"].shape[1],
        "added_patches": 64 * pictures,
        "shared": shared,
        "beta": beta,
        "checkpointing": way != "plain",
        "update": peak_of(update, optimizer, *modules),
        "generation": peak_of(generate, optimizer, *modules),
    }


def terms(x):
    """The formula's known parts in bytes, and what its coefficients multiply."""
    once, patched = x["at_once"], x["prompt"] + x["added"]
    if x["shared"]:
        rows, columns = 1, columns_of_shared_row(x)
        patches = x["patches"] + once * x["added_patches"]
    else:
        rows, columns = once, once * (patched + x["completion"])
        patches = once * (x["patches"] + x["added_patches"])
    inputs = [columns * x["layers"] * x["width"], patches * x["depth"] * x["vision"]]
    kept = 0
    if x["checkpointing"]:
        kept = 4 * sum(inputs)
        inputs = [columns * x["width"], patches * x["vision"]]  # while one layer is computed again
    always = sum(x["held"].values())

    prompts = x["G"] if x["added"] else 1
    cached = x["G"] * (patched + x["completion"])
    read = prompts * (x["patches"] + x["added_patches"])
    return {
        "update": (always + kept, [*inputs, once * x["completion"] * x["V"], columns**2 / rows]),
        "generation": (
            always - x["held"]["gradients"] + 4 * cached * x["layers"] * x["kv"],
            [cached * x["width"], read * x["vision"], x["G"] * x["V"], prompts * patched**2],
        ),
    }


def columns_of_shared_row(x):
    return x["prompt"] + x["at_once"] * (x["added"] + x["completion"])


def fit(points, kind):
    """Least squares on relative errors, coefficients ≥ 0; returns them and the largest error."""
    A, b = [], []
    for x in points:
        known, factors = terms(x)[kind]
        A.append([f / x[kind] for f in factors])
        b.append((x[kind] - known) / x[kind])
    A, b = torch.tensor(A, dtype=torch.double), torch.tensor(b, dtype=torch.double)
    keep = list(range(A.shape[1]))
    while True:
        solution = torch.linalg.lstsq(A[:, keep], b[:, None]).solution[:, 0]
        if (solution >= 0).all():
            break
        keep.pop(int(solution.argmin()))
    coefficients = torch.zeros(A.shape[1], dtype=torch.double)
    coefficients[keep] = solution
    return coefficients.tolist(), float((A @ coefficients - b).abs().max())


def held_of_7b(lora: bool, beta: float) -> dict[str, float]:
    P, embedding = SEVEN["P"], SEVEN["V"] * SEVEN["width"]  # the embedding stays in fp32
    halved = 2 * (P - embedding) + 4 * embedding
    adapters = RANK * ADAPTERS if lora else 0
    trained = 4 * (adapters if lora else P)
    return {
        "weights": halved + trained if lora else 4 * P,
        "gradients": trained,
        "Adam": 2 * trained,
        "reference": halved * (beta > 0 and not lora),
        "bf16 copies": 0.0 if lora else 2 * (P - embedding),
    }


def of_7b(fits: dict, way: str, beta: float, once: int, pictures: int) -> dict[str, float]:
    """GB of a 7B at the paper's settings, `once` rollouts at a time, each with `pictures`."""
    x = SEVEN | PAPER | PATCHES[pictures]
    x |= {"at_once": once, "checkpointing": way != "plain"}
    x["shared"] = columns_of_shared_row(x) <= grpo.Objective().row_tokens
    x["held"] = known = held_of_7b(way.startswith("LoRA"), beta)
    peaks = {}
    for kind, (coefficients, _) in fits[way].items():
        always, factors = terms(x)[kind]
        peaks[kind] = always + sum(c * f for c, f in zip(coefficients, factors))
    held_in_generation = sum(known.values()) - known["gradients"]
    in_update = peaks["update"] - sum(known.values())
    in_generation = peaks["generation"] - held_in_generation
    # FSDP2 splits parameters, gradients, Adam and π_ref (in fp32), and keeps no copies. While it
    # samples, grpo.gathered_once has the decoder layers whole, in bf16.
    whole = known["weights"] + known["gradients"] + known["Adam"]
    split = (whole + 4 * SEVEN["P"] * (known["reference"] > 0)) / 8
    found = {
        "weights, gradients, Adam": whole,
        "reference": known["reference"],
        "bf16 copies": known["bf16 copies"],
        "activations, logits, mask": in_update,
        "one GPU, update": peaks["update"],
        "one GPU, generation": peaks["generation"],
        "8 GPUs, FSDP2, update": split + in_update,
        "8 GPUs, FSDP2, generation": split - known["gradients"] / 8 + 2 * DECODER + in_generation,
    }
    return {name: round(value / 1e9, 1) for name, value in found.items()}


def main():
    result = {"settings": {"7B": SEVEN, "paper": PAPER, "patches": PATCHES}}
    result |= {"fits": {}, "points": {}}
    for way in WAYS:
        points = []
        for width, layers in ((112, 2), (224, 4)):
            for key, values in SWEEPS.items():
                for value in values:
                    points.append(measure(width, layers, way, **BASE | {key: value}))
                    print(way, width, layers, key, value, points[-1]["update"] // 10**3, flush=True)
        fits = {kind: fit(points, kind) for kind in ("update", "generation")}
        result["points"][way], result["fits"][way] = points, fits
        for kind, (coefficients, error) in fits.items():
            print(f"  {way} {kind}: {[round(c, 1) for c in coefficients]}, error ≤ {error:.1%}")

    ways = [*((way, 0.04) for way in WAYS), ("checkpointed", 0.0)]
    result["GB"] = {}
    for (way, beta), once, pictures in product(ways, (PAPER["G"], 1), PATCHES):
        name = f"{way}, beta {beta}, {once} at once, {pictures} pictures"
        result["GB"][name] = of_7b(result["fits"], way, beta, once, pictures)
    Path("assets/memory.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["GB"], indent=1))


if __name__ == "__main__":
    main()
