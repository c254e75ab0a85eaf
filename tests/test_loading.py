"""A checkpoint cannot go wrong in silence: what is refused, in one sentence, and what is put right."""

import json
import shutil
from types import SimpleNamespace

import families
import pytest
import torch
from accelerate.utils import DistributedType
from conftest import scored
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import start

import ffr
import grpo
import reward
import train


@pytest.fixture
def broken(model_folder, samples, tmp_path, monkeypatch):
    """Change the tiny checkpoint's weights and see what train.py says of it."""

    def run(change, *arguments):
        shutil.copytree(model_folder, tmp_path / "model")
        weights = load_file(tmp_path / "model" / "model.safetensors")
        save_file(change(weights), tmp_path / "model" / "model.safetensors", {"format": "pt"})
        records = str(samples[0].path).rsplit("/", 1)[0] + "/records.jsonl"
        given = ["--model", str(tmp_path / "model"), "--data", records, *arguments]
        return start(monkeypatch, tmp_path, *given)

    return run


def test_an_end_that_is_also_the_padding_can_be_sampled(student):
    tokenizer = SimpleNamespace(eos_token_id=7, pad_token_id=7)
    processor = SimpleNamespace(tokenizer=tokenizer)
    sampling = grpo.load_sampling(grpo.SamplingSettings(), student.model, processor)
    assert sampling.pad_id == 7 and 7 in sampling.eos_ids and 7 not in sampling.suppressed_ids


def test_renamed_weights_are_refused_by_name(broken):
    said = broken(lambda w: {k.replace("self_attn", "attention"): x for k, x in w.items()})
    assert "weights are missing" in said and "layers.0.self_attn.k_norm.weight" in said


def test_weights_of_another_shape_are_refused_by_name(broken):
    def cut(weights):
        name = "model.language_model.layers.1.mlp.up_proj.weight"
        return weights | {name: weights[name][:-1].clone()}

    assert "layers.1.mlp.up_proj.weight" in broken(cut)


def test_more_weights_than_the_model_has_are_fine(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file(
        weights | {"head.of.another.task": torch.zeros(2)},
        tmp_path / "model" / "model.safetensors",
        {"format": "pt"},
    )
    model, _ = grpo.load_policy(str(tmp_path / "model"))
    plain, _ = grpo.load_policy(model_folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))


def test_an_attention_kernel_that_is_not_there_is_one_sentence(broken):
    assert "FlashAttention2" in broken(lambda w: w, "--attention", "flash_attention_2")


def test_tags_that_are_special_tokens_are_read_by_the_reward(student):
    """Some tokenizers hold <think> and <answer> as special tokens."""
    tokenizer = student.processor.tokenizer
    right = "<think> look </think> <answer> red blue </answer>"
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    ids = tokenizer(right + tokenizer.eos_token + tokenizer.pad_token)["input_ids"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags}, False)
    assert "<answer>" not in tokenizer.decode(ids, skip_special_tokens=True)
    text = ffr.decode(student, torch.tensor(ids))
    assert reward.score(text, "red blue", "exact") == (1.0, 1.0, True)
    assert tokenizer.eos_token not in text and tokenizer.pad_token not in text


@pytest.fixture(scope="module")
def internvl(folder):
    """With the defaults of its published processor: a dozen crops of each picture."""
    families.build("internvl", str(folder / "crops"))
    file = folder / "crops" / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"] |= {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}
    file.write_text(json.dumps(config))
    return str(folder / "crops")


def test_a_large_picture_is_one_picture_to_internvl(internvl):
    """640 × 480 within the picture's pixels: one tile, not thirteen."""
    _, processor = grpo.load_policy(internvl)
    picture = Image.new("RGB", (640, 480), "red")
    inputs = processor(text=["<IMG_CONTEXT>"], images=[picture], return_tensors="pt")
    assert len(inputs["pixel_values"]) == 1
    assert (inputs["input_ids"] == processor.image_token_id).sum() == processor.image_seq_length
    assert (
        "crop_to_patches" not in type(processor).__dict__["images_kwargs"]
        or (
            type(processor).images_kwargs["crop_to_patches"]  # other processors stay as they were
        )
    )


def test_hidden_m_rope_positions_are_refused_not_guessed(
    folder, make_config, accelerator, samples, monkeypatch
):
    families.build("qwen2_5_vl", str(folder / "hidden"))
    config = make_config(model=str(folder / "hidden"), frame_pixels=56 * 56, picture_pixels=56 * 56)
    student = train.load_student(config, accelerator)
    prompt = ffr.open_question(student, samples[0]).prompt
    assert prompt["position_ids"].shape == (3, 1, prompt["input_ids"].shape[1])
    monkeypatch.delattr(type(student.model.model), "get_rope_index")
    with pytest.raises(ValueError, match="has M-RoPE, but no `get_rope_index`"):
        ffr.open_question(student, samples[0])


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_other_kinds_of_sharding_are_refused_in_a_sentence(kind, monkeypatch, tmp_path):
    launched = SimpleNamespace(
        num_processes=1, distributed_type=DistributedType(kind), is_fsdp2=False
    )
    monkeypatch.setattr(train, "Accelerator", lambda **_: launched)
    assert "--fsdp_version 2" in start(monkeypatch, tmp_path)


# --- numerics under bf16 ---
@pytest.fixture
def bf16(monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # other tests keep theirs
    return train.Accelerator(cpu=True, mixed_precision="bf16")


def test_frozen_linear_layers_in_bf16_change_no_log_prob(make_config, bf16, questions):
    student = train.load_student(make_config(), bf16)
    student.model.requires_grad_(False)
    prompts, ids = [questions[0].prompt], [torch.tensor([5, 6, 7])]
    with bf16.autocast():
        before, _ = scored(student.model, prompts, ids, student.sampling)
    size = sum(p.nbytes for p in student.model.parameters())
    train.store_linears_in_bf16(student.model)
    with bf16.autocast():
        after, _ = scored(student.model, prompts, ids, student.sampling)
    assert torch.equal(before, after)
    assert sum(p.nbytes for p in student.model.parameters()) < 0.75 * size
    norm = student.model.model.language_model.norm
    assert norm.weight.dtype == torch.float32  # `.to(bfloat16)` would have taken it along


def test_linear_layers_that_are_trained_stay_in_fp32():
    frozen, trained = torch.nn.Linear(4, 4).requires_grad_(False), torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(frozen, trained)
    model.get_input_embeddings = lambda: SimpleNamespace(weight=None)
    train.store_linears_in_bf16(model)
    assert (frozen.weight.dtype, trained.weight.dtype) == (torch.bfloat16, torch.float32)


def test_logits_and_cache_stay_in_bf16_and_kl_is_exactly_0(
    make_config, bf16, samples, teach, some_right, monkeypatch
):
    """fp32 copies are made of a chunk of logits at a time; keys are kept as values are."""
    from test_train import train_once

    kinds, chosen, update = {}, grpo.chosen_logps, grpo.OneDtypeCache.update

    def keep(logits, *more):
        kinds.setdefault("logits", set()).add(logits.dtype)
        return chosen(logits, *more)

    def cache(self, keys, values, *more, **named):
        kept = update(self, keys, values, *more, **named)
        kinds.setdefault("given", set()).add(keys.dtype)
        kinds.setdefault("kept", set()).update(x.dtype for x in kept)
        return kept

    monkeypatch.setattr(grpo, "chosen_logps", keep)
    monkeypatch.setattr(grpo.OneDtypeCache, "update", cache)
    config = make_config(max_steps=1, beta=0.04, learning_rate=1e-5)
    student, (metrics,) = train_once(config, bf16, samples, teach)
    assert kinds["logits"] == kinds["kept"] == {torch.bfloat16} and torch.float32 in kinds["given"]
    assert metrics["kl"] == 0.0 and metrics["grad_norm"] > 0
    assert all(p.dtype == torch.float32 for p in student.model.parameters())
