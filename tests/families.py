"""Tiny random students of other builds than `tiny_policy`'s Qwen3-VL, saved to be loaded by
path: each with its own processor, tokens and chat template."""

import torch
import transformers as T
from cold_start import CHAT_TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LOOK = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TEXT = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    initializer_range=0.08,
)


def byte_tokenizer(specials, **named):
    """Byte-level BPE without merges, as Qwen's but for size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return T.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials,
        extra_special_tokens=named,
    )


def qwen2_5_vl(folder):
    specials = [
        "<|im_end|>",
        "<|endoftext|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|im_start|>",
    ]
    tokenizer = byte_tokenizer(specials)
    look = LOOK | {
        "patch_size": 14,
        "merge_size": 2,
        "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64},
    }
    processor = T.Qwen2_5_VLProcessor(
        T.Qwen2VLImageProcessor(**look),
        tokenizer,
        T.Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **look),
        chat_template=CHAT_TEMPLATE,
    )
    end, pad, image, video, start, stop, _ = tokenizer.convert_tokens_to_ids(specials)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = T.Qwen2_5_VLConfig(
        text_config=TEXT
        | dict(vocab_size=len(tokenizer), rope_parameters=rope, pad_token_id=pad, eos_token_id=end),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=64,
            patch_size=14,
            window_size=56,
            fullatt_block_indexes=[1],
            tokens_per_second=2,
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=stop,
    )
    save(folder, T.Qwen2_5_VLForConditionalGeneration(config), processor)


def internvl(folder):
    """Another build: frames are pictures in the text, pixels of both kinds share one tensor."""
    specials = [
        "<|im_end|>",
        "<|endoftext|>",
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<video>",
        "<|im_start|>",
    ]
    tokenizer = byte_tokenizer(
        specials,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    template = CHAT_TEMPLATE.replace(
        "<|vision_start|><|{{ c.type }}_pad|><|vision_end|>",
        "{{ '<video>' if c.type == 'video' else '<IMG_CONTEXT>' }}\n",
    )
    size = {"height": 28, "width": 28}
    processor = T.InternVLProcessor(
        T.GotOcr2ImageProcessor(size=size, crop_to_patches=False, **LOOK),
        tokenizer,
        T.InternVLVideoProcessor(size=size, **LOOK),
        image_seq_length=1,
        chat_template=template,
    )
    end, pad, _, _, image, *_ = tokenizer.convert_tokens_to_ids(specials)
    config = T.InternVLConfig(
        text_config=TEXT
        | dict(model_type="qwen2", vocab_size=len(tokenizer), pad_token_id=pad, eos_token_id=end),
        vision_config=dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=[28, 28],
            patch_size=[14, 14],
        ),
        image_token_id=image,
        image_seq_length=1,
    )
    save(folder, T.InternVLForConditionalGeneration(config), processor)


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build(name, folder):
    torch.manual_seed(0)
    {"qwen2_5_vl": qwen2_5_vl, "internvl": internvl}[name](folder)
