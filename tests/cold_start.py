"""What tiny mode starts from, `assets/tiny`: a Qwen3-VL of 0.5 M parameters after a supervised cold
start that is mediocre on purpose. `python tests/cold_start.py` makes it again."""

import json
import random
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import ffr  # noqa: E402
import grpo  # noqa: E402
import train  # noqa: E402

VIDEOS = {"cold": (384, 1)}  # how many, and their seed
CAPTION = "describe every moment"
SPECIALS = [
    f"<|{name}|>"
    for name in ("im_end pad image_pad video_pad vision_start vision_end im_start").split()
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}"
    "<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Start(NamedTuple):
    """How much a cold start knows. Where a needle's answers do not know, they guess and are right
    now and then. A chain's have a habit that is never right: they cite the first moment or the
    last, which are never flashed, and stay there."""

    chain: bool = False
    find: float = 0.0  # share of unaided answers that know the flash
    relate: float = 0.1  # share of all answers that know the way from there to the moment asked for
    named: float = 1.0  # share of captions that name the flash
    captions: float = 0.62  # share of the steps that teach to read, not to answer
    steps: int = 1000


def tiny_policy(folder: str, texts: list[str], seed: int) -> None:
    """Save a random Qwen3-VL of 0.5 M parameters, its real processor, and a tokenizer of words."""
    word = r"<[^<>|]+>|[A-Za-z]+|[^\sA-Za-z]"
    words = sorted({w for text in ["user assistant", *texts] for w in re.findall(word, text)})
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(word), "removed", invert=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIALS,
    )
    look = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "patch_size": 16,
        "merge_size": 2,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64},
    }
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**look),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **look),
        CHAT_TEMPLATE,
    )
    end, pad, image, video, start, stop, _ = tokenizer.convert_tokens_to_ids(SPECIALS)
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 4, 4]}
    text = dict(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        rope_parameters=rope,
        vocab_size=len(tokenizer),
        pad_token_id=pad,
        eos_token_id=end,
        bos_token_id=None,
        initializer_range=0.08,
    )
    vision = dict(
        hidden_size=64,
        intermediate_size=128,
        depth=1,
        num_heads=2,
        out_hidden_size=96,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
        initializer_range=0.08,
    )
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=stop,
    )
    torch.manual_seed(seed)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def needle_rationale(truth: dict, cue: int, look: int) -> str:
    """The response that cites moments `cue` and `look` and reads the colours shown at `look`."""
    told = needle_caption(truth | {"cue": cue}, [look])
    return f"{told} <answer> {' '.join(truth['moments'][look])} </answer>"


def needle_caption(truth: dict, order: list[int]) -> str:
    """All that is to be seen at the moments in `order`: what a cold start learns to read from."""
    seen = [f"look {data.moment_time(m)} {' '.join(truth['moments'][m])}" for m in order]
    return f"<think> flash {data.moment_time(truth['cue'])} {' '.join(seen)} </think>"


def chain_videos(folder: str, n: int, seed: int) -> str:
    """Needle videos that ask for two moments: the flash, and the one before or after. Four colours
    must be right, so that nobody guesses them. Returns the records' path."""
    file = Path(data.needle_videos(folder, n, seed, relations=(-1, 1)))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        where = record["problem"].removeprefix("ring and core colour ").removesuffix(" the flash ?")
        colours = " ".join(sum((record["moments"][record[key]] for key in ("cue", "look")), []))
        record["problem"] = f"ring and core colour of the flash and {where} ?"
        record["solution"] = f"<answer>{colours}</answer>"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def chain_rationale(truth: dict, cue: int, look: int) -> str:
    """The response that cites moments `cue` and `look` and reads the colours of both."""
    return chain_caption(truth | {"cue": cue}, [cue, look])


def chain_caption(truth: dict, order: list[int]) -> str:
    """All that is to be seen at the moments in `order`, and the colours of the first two again."""
    colours = [colour for moment in order[:2] for colour in truth["moments"][moment]]
    return f"{needle_caption(truth, order)} <answer> {' '.join(colours)} </answer>"


def needle_texts(samples: list[data.Sample]) -> list[str]:
    """Every word that a student of needle videos must know: questions, rationales, patches."""
    seconds = [
        f"<{f / data.NEEDLE_FPS:.1f} seconds>" for f in range(data.MOMENTS * data.FRAMES_PER_MOMENT)
    ]
    told = [e[k] for s in samples for e in s.truth["evidence"] for k in ("error_type", "guidance")]
    return [
        CAPTION,
        *data.COLOURS,
        *data.RELATIONS.values(),
        *map(data.moment_time, range(data.MOMENTS)),
        *seconds,
        *told,
        *(s.question for s in samples),
        "<think> look </think> <answer> </answer>",
        "Evidence Moments to Region Guidance Frame Crop 0123456789 . , : ( )",
    ]


def cold_start(folder: str, videos=VIDEOS, start=Start(), seed=0) -> None:
    """A student in FOLDER/model and the videos that it learns from in FOLDER/cold: captions teach
    to read a moment that is cited, answers to follow a patch; which flash they cite unaided is left
    to reward."""
    for name, (count, its_seed) in videos.items():
        write = chain_videos if start.chain else data.needle_videos
        write(f"{folder}/{name}", count, its_seed)
    samples = data.load_samples(f"{folder}/cold/records.jsonl")
    tiny_policy(f"{folder}/model", needle_texts(samples), seed)
    c = replace(train.parse(["--out", folder]), model=f"{folder}/model")
    accelerator = train.Accelerator(cpu=True)
    student = train.load_student(c, accelerator)
    teach = train.load_teacher(c, samples, None)
    rng, tokenizer = random.Random(seed), student.processor.tokenizer
    rationale, describe = needle_rationale, needle_caption
    if start.chain:
        rationale, describe = chain_rationale, chain_caption

    def caption(truth: dict, shown: list[int]) -> str:
        told = describe(truth, rng.sample(shown, len(shown)))
        named = start.named == 1 or rng.random() < start.named
        return told if named else re.sub("flash <.*?> ", "", told)

    def answer(truth: dict, cue_known: float, gap_known: float) -> str:
        guesses, gaps = range(1, data.MOMENTS - 1), (-1, 0, 1)
        if start.chain:
            guesses, gaps = (0, data.MOMENTS - 1), (0,)
        cue = truth["cue"] if rng.random() < cue_known else rng.choice(guesses)
        gap = truth["look"] - truth["cue"] if rng.random() < gap_known else rng.choice(gaps)
        return rationale(truth, cue, min(max(cue + gap, 0), data.MOMENTS - 1))

    lessons = {2: [], 4: [], data.MOMENTS: [], 0: []}  # prompts, each with a writer of its target
    for i, sample in enumerate(tqdm(samples, desc="lessons")):
        x, told = ffr.open_question(student, sample), replace(sample, question=CAPTION)
        truth, cue, look = sample.truth, sample.truth["cue"], sample.truth["look"]
        for moments in (2, 4, data.MOMENTS):  # the flash and others, anywhere in time
            others = [m for m in range(data.MOMENTS) if m != cue]
            shown = sorted([cue, *rng.sample(others, moments - 1)])
            view = [frame for m in shown for frame in data.moment_frames(m)]
            part = ffr.Question(told, x.video, view, [x.frames[frame] for frame in view])
            lessons[moments].append((ffr.encode(student, part), partial(caption, truth, shown)))
        if start.chain:
            error = [(0, 0), (0, 0), (cue, cue), (cue, look)][i % 4]
            told_where = error == (cue, look)
        else:
            error = [(cue - 1, look), (cue - 1, look), (cue, 7 - look), (cue, look)][i % 4]
            told_where = error[0] == cue  # told to count, it does
        (patch,) = teach([ffr.case_of(x, rationale(truth, *error))])
        known = 1.0 if told_where else start.relate
        lessons[0] += [
            (x.prompt, partial(answer, truth, start.find, start.relate)),
            (ffr.encode(student, x, patch), partial(answer, truth, 1.0, known)),
        ]
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=1.5e-3, betas=(0.9, 0.99))
    for step in (bar := tqdm(range(start.steps), desc="cold start")):
        part = step / start.steps
        moments = 2 if part < 0.2 else 4 if part < 0.36 else data.MOMENTS
        moments = moments if part < start.captions or rng.random() < 0.2 else 0
        prompts, writers = zip(*rng.sample(lessons[moments], 16))
        texts = [tokenizer.encode(write() + tokenizer.eos_token) for write in writers]
        ids = [torch.tensor(text, device=accelerator.device) for text in texts]
        episodes = [grpo.Episode(k, k, tokens) for k, tokens in enumerate(ids)]
        logps, mask = grpo.batched_logps(student.model, list(prompts), episodes, student.sampling)
        loss = -(logps * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1, step / 20) * (0.3 if part > 0.85 else 1)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.2f}")
    student.model.save_pretrained(c.model)


if __name__ == "__main__":
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as made:
        cold_start(made)
        shutil.rmtree(ROOT / "assets" / "tiny", ignore_errors=True)
        shutil.copytree(f"{made}/model", ROOT / "assets" / "tiny")
