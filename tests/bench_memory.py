"""Peak memory of an update and of a generation against G, frames, completion length and β: measured
on tiny models, fitted by a formula, and computed from it for a 7B. `python tests/bench_memory.py`

    update      4P (weights) + 4P (gradients) + 8P (Adam) + 4P (π_ref, β > 0) + 2P (bf16 copies)
                + a · N · layers · width + v · patches · depth · width_v + c · g · C · V + m · N²
    generation  4P + 8P (Adam) + 4P (π_ref) + 2P + 2 · (L + G·C) · layers · 2 · kv_width
                + d · G(L + C) · width + e · patches · width_v + f · G · V

With checkpointing, the input of every layer of both towers is kept, in fp32: known, not fitted.
P parameters, L prompt tokens, C completion tokens, V vocabulary, g rollouts at once, N = L + g · C. Bytes are those of live tensors:
no allocator's rounding, no fragmentation, no kernels' workspaces.
"""

import json
import sys
import weakref
from copy import deepcopy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.weak import WeakIdKeyDictionary  # noqa: E402

import grpo  # noqa: E402

VOCABULARY, PAD, IMAGE, VIDEO, START, STOP = 2048, 1, 2, 3, 4, 5
BASE = dict(G=4, frames=8, words=20, completion=32, beta=0.04)
SWEEPS = dict(G=(2, 4, 8), frames=(4, 16), words=(200, 400), completion=(16, 128), beta=(0.0,))
# Qwen2.5-VL-7B, and the paper's settings: 16 frames of 128 · 28 · 28 pixels, two to a token step
SEVEN = dict(P=8.29e9, layers=28, width=3584, kv=512, depth=32, vision=1280, V=152_064)
PAPER = dict(G=8, prompt=8 * 128 + 200, patches=16 // 2 * 128 * 4, completion=1024)


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


def prompt_of(frames, words):
    """A question of so many words about `frames` frames of 8 × 8 patches, 16 tokens each two frames."""
    steps = frames // 2
    ids = [START] + [VIDEO] * 16 * steps + [STOP] + [9] * words
    kinds = [2 * (token == VIDEO) for token in ids]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids)).long(),
        "mm_token_type_ids": torch.tensor([kinds]).int(),
        "pixel_values_videos": torch.randn(64 * steps, 1176),
        "video_grid_thw": torch.tensor([[steps, 8, 8]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }


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


def measure(width, layers, checkpointing, G, frames, words, completion, beta):
    """Peaks of one update and one generation, and what the formula takes as inputs."""
    model = build(width, layers)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.eval()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prompt = grpo.with_positions(model, prompt_of(frames, words))
    reference = [deepcopy(model).requires_grad_(False)] if beta else []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    sampling = grpo.Sampling(1.0, 1.0, completion, (PAD,), PAD, (PAD, IMAGE, VIDEO))  # never ends
    zeros = torch.zeros(completion)
    done = grpo.Completion(torch.full((completion,), 9), zeros, zeros, True)
    model = accelerator.prepare(model)

    def update():
        grpo.update(
            accelerator,
            model,
            *(reference or [None]),
            optimizer,
            [grpo.Row(prompt, prompt, done, 1.0)] * G,
            G * completion,
            sampling,
            beta=beta,
        )

    def generate():
        with accelerator.autocast():
            read = grpo.prefill(model, [prompt] * G, sampling)
            grpo.generate(model, read, [*range(G)], sampling)

    update()  # Adam's states are there from the first step on
    P = sum(p.numel() for p in model.parameters())
    length = prompt["input_ids"].shape[1]
    return {
        "P": P,
        "layers": layers,
        "width": width,
        "kv": width // 7,
        "depth": layers,
        "vision": 64,
        "V": VOCABULARY,
        "G": G,
        "prompt": length,
        "completion": completion,
        "patches": len(prompt["pixel_values_videos"]),
        "beta": beta,
        "checkpointing": checkpointing,
        "update": peak_of(update, optimizer, model, *reference),
        "generation": peak_of(generate, optimizer, model, *reference),
    }


def terms(x):
    """The formula's known parts in bytes, and what its coefficients multiply."""
    cached = x["prompt"] + x["G"] * x["completion"]
    once = x.get("at_once", x["G"])
    packed = x["prompt"] + once * x["completion"]  # N
    known = (4 + 4 * (x["beta"] > 0)) * x["P"]
    inputs = [packed * x["layers"] * x["width"], x["patches"] * x["depth"] * x["vision"]]
    kept = 4 * sum(inputs) * x["checkpointing"]
    return {
        "update": (
            known + 14 * x["P"] + kept,
            [*inputs, once * x["completion"] * x["V"], packed**2],
        ),
        "generation": (
            known + 10 * x["P"] + 4 * cached * x["layers"] * x["kv"],
            [cached * x["width"], x["patches"] * x["vision"], x["G"] * x["V"], x["prompt"] ** 2],
        ),
    }


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


def main():
    result = {"settings": {"7B": SEVEN, "paper": PAPER}, "fits": {}, "points": {}}
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        points = []
        for width, layers in ((112, 2), (224, 4)):
            for key, values in SWEEPS.items():
                for value in values:
                    points.append(measure(width, layers, checkpointing, **BASE | {key: value}))
                    print(
                        name,
                        width,
                        layers,
                        key,
                        value,
                        points[-1]["update"] // 10**3,
                        points[-1]["generation"] // 10**3,
                        "kB",
                        flush=True,
                    )
        fits = {kind: fit(points, kind) for kind in ("update", "generation")}
        result["points"][name], result["fits"][name] = points, fits
        for kind, (coefficients, error) in fits.items():
            print(f"  {name} {kind}: {[round(c, 1) for c in coefficients]}, error ≤ {error:.1%}")
    table = {}
    for name, fits in result["fits"].items():
        for beta, once in ((0.04, 8), (0.04, 1), (0.0, 8)):
            x = SEVEN | PAPER | {"beta": beta, "at_once": once, "checkpointing": name != "plain"}
            factors = terms(x)["update"][1]
            moving = [c * f for c, f in zip(fits["update"][0], factors)]
            for k in (0, 1):
                moving[k] += 4 * factors[k] * x["checkpointing"]
            generation = [c * f for c, f in zip(fits["generation"][0], terms(x)["generation"][1])]
            table[f"{name}, beta {beta}, {once} at once"] = {
                k: round(v / 1e9, 1)
                for k, v in {
                    "weights, gradients, Adam": 16 * x["P"],
                    "reference": 4 * x["P"] * (beta > 0),
                    "bf16 copies": 2 * x["P"],
                    "text activations": moving[0],
                    "vision activations": moving[1],
                    "logits": moving[2],
                    "mask": moving[3],
                    "generation": sum(generation),
                    "one GPU": 18 * x["P"] + 4 * x["P"] * (beta > 0) + sum(moving),
                    # parameters, gradients and Adam are split; π_ref is whole on each; no bf16 copies
                    "8 GPUs, FSDP2": 16 * x["P"] / 8 + 4 * x["P"] * (beta > 0) + sum(moving),
                }.items()
            }
    result["GB"] = table
    Path("assets/memory.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
