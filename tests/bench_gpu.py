"""A step at the paper's shape on one GPU: seconds, peak memory, and what shared rows save there.

    python tests/bench_gpu.py [--dry] FILE       figures go to FILE; --dry: tiny sizes, any device

The model is a Qwen2.5-VL of a 3B's sizes with random weights, in bf16 autocast with sdpa: 16 frames
of 128 · 28 · 28 pixels, 8 rollouts of 512 tokens, of which 4 are answered again with a patch of two
pictures each; sampled tokens never end. β is 0.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402

import ffr  # noqa: E402
import grpo  # noqa: E402
import train  # noqa: E402

PAD, IMAGE, VIDEO, START, STOP = 1, 2, 3, 4, 5  # ids
# grid: of a frame or picture, in patches of 14 pixels; four of them are a token
THREE_B = dict(
    text=dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
    ),
    sections=[16, 24, 24],
    vision=dict(out_hidden_size=2048, hidden_size=1280, intermediate_size=3420),
    grid=(16, 32),
    tokens=512,
    rollouts=8,
    rank=16,
)
DRY = dict(
    text=dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    ),
    sections=[2, 3, 3],
    vision=dict(
        out_hidden_size=64,
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        fullatt_block_indexes=[1],
        window_size=56,
    ),
    grid=(4, 4),
    tokens=6,
    rollouts=4,
    rank=2,
)


def build(sizes: dict, device):
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sizes["sections"]}
    text = sizes["text"] | dict(
        rope_parameters=rope, pad_token_id=PAD, eos_token_id=0, bos_token_id=None
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=sizes["vision"],
        tie_word_embeddings=True,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=STOP,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.Qwen2_5_VLForConditionalGeneration(config)


def prompt_of(model, sizes: dict, pictures: int, seed: int) -> dict:
    """A question of 200 words on 16 frames, and a patch of so many pictures after it."""
    (height, width), noise = sizes["grid"], torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    frame = height * width // 4
    ids = [START] + [VIDEO] * 8 * frame + [STOP] + [9] * 200
    for _ in range(pictures):
        ids += [START] + [IMAGE] * frame + [STOP] + [10 + seed % 50] * 12
    ids = torch.tensor([ids + [8, 8]])
    prompt = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE) + 2 * (ids == VIDEO).int(),
        "pixel_values_videos": torch.ones(8 * height * width, 1176),
        "video_grid_thw": torch.tensor([[8, height, width]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }
    if pictures:
        prompt["pixel_values"] = torch.randn(pictures * height * width, 1176, generator=noise)
        prompt["image_grid_thw"] = torch.tensor([[1, height, width]] * pictures)
    return ffr.with_positions(model, {key: value.to(device) for key, value in prompt.items()})


class Clock:
    """Seconds of some work and the most memory that it held."""

    def __init__(self, device):
        self.cuda, self.seconds = torch.device(device).type == "cuda", []
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def time(self, work):
        if self.cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = work()
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)
        return result

    def figures(self) -> dict:
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None
        return {"seconds": round(statistics.median(self.seconds), 3), "peak_GB": peak}


def bare_calls(model, batch: dict, rollouts: int, tokens: int) -> None:
    """The model's calls of one `generate` and nothing between them."""
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        model(**batch, cache=cache, logits_to_keep=1)
        device = batch["input_ids"].device
        cache.reorder_cache(torch.zeros(rollouts, dtype=torch.long, device=device))
        token = torch.full((rollouts, 1), 9, device=device)
        position = batch["position_ids"][..., -1:].expand(-1, rollouts, 1)
        for k in range(1, tokens):
            model(input_ids=token, position_ids=position + k, cache=cache)


def measure(sizes: dict, device, lora: bool, checkpointing: bool, result: dict) -> None:
    """A step's parts, two times each after a first; shared rows and rows of their own in turn."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=torch.device(device).type == "cpu")
    model = build(sizes, device)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    if lora:
        model = train.add_adapters(model, sizes["rank"])
        train.store_linears_in_bf16(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-6)
    model, optimizer = accelerator.prepare(model, optimizer)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    G, tokens = sizes["rollouts"], sizes["tokens"]
    sampling = grpo.Sampling(1.0, 0.95, tokens, (), PAD, (PAD, IMAGE, VIDEO, START, STOP))
    prompts = {0: prompt_of(model, sizes, 0, 0)}
    prompts |= {k: prompt_of(model, sizes, 2, k) for k in range(1, G // 2 + 1)}
    patched = [prompts[k] for k in range(1, G // 2 + 1)]
    result["prompt_tokens"] = [len(prompts[k]["input_ids"][0]) for k in (0, 1)]

    def sample(prompts: list, seeds: list) -> list:
        with accelerator.autocast():
            return sum(grpo.generate(model, prompts, seeds, sampling), [])

    if lora:  # the update alone, on tokens that nobody sampled
        noise = torch.randint(10, 100, (G, tokens), device=device)
        done = [grpo.Completion(ids, 0.0 * ids, 0.0 * ids, False) for ids in noise]
    else:
        clock = Clock(device)
        done = sample([prompts[0]], [[*range(G)]])[: G // 2]
        for seed in range(2):
            clock.time(partial(sample, [prompts[0]], [[*range(seed, seed + G)]]))
        done += clock.time(partial(sample, patched, [[k] for k in range(G // 2)]))
        clock.seconds.pop()  # it is of other prompts; its memory counts
        result["generate"] = clock.figures()
        with accelerator.autocast():
            clock, batch = Clock(device), grpo.left_pad([prompts[0]], PAD)
            clock.time(partial(bare_calls, model, batch, G, tokens))
            result["bare calls of generate"] = clock.figures()

    answers = zip([0] * (G // 2) + [*range(1, G // 2 + 1)], done)
    episodes = [
        grpo.Episode(0, prompt, c.ids, c.logps, 1.0 - 2.0 * (place % 2))
        for place, (prompt, c) in enumerate(answers)
    ]
    batch = grpo.Batch(prompts, episodes, G * tokens)
    for name, row_tokens in (("shared rows", 8192), ("rows of their own", 0)):
        objective = grpo.Objective(beta=0.0, row_tokens=row_tokens)
        step = partial(grpo.update, accelerator, model, optimizer, batch, sampling, objective)
        gap = step()["logp_gap"]
        if not lora:
            result.setdefault("logp_gap", gap)  # before anything was trained
        clock = Clock(device)
        for _ in range(2):
            clock.time(step)
        result[f"update, {name}"] = clock.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("file")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, sizes = "cuda" if cuda else "cpu", DRY if given.dry else THREE_B
    names = ("torch", "transformers", "accelerate")
    result = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {name: version(name) for name in names},
    }
    for name, lora, checkpointing in (
        ("LoRA", True, False),
        ("LoRA, checkpointed", True, True),
        ("all weights, checkpointed", False, True),
    ):
        row = result[name] = {}
        try:
            measure(sizes, device, lora, checkpointing, row)
        except torch.OutOfMemoryError as error:
            row["out of memory"] = str(error).partition(". Of the")[0]
        print(name, json.dumps(row), flush=True)
        Path(given.file).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
