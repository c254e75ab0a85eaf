"""How well the leak gate works: `python tests/bench_leaks.py` writes `assets/leaks.json`.

1. The leak set (`leaks.jsonl`): of the patches that state the answer, how many the gate catches; of
   the clean ones, how many it refuses. The gate was built on one half. The other, `held_out`, was
   written by others, but some rules were chosen with a look at its counts. `implied` ones give the
   answer by synonyms, descriptions or world knowledge, which no rule on words can know, and are
   counted apart. The same with the blind test, played by language models whose answers stand in
   the file: `blind`, from question, options and words; `alone`, without the words. `unguessed` are
   the records that `alone` has wrong.
2. The blind probe: a tiny student is trained to answer needle questions from the question and the
   patch's text, without the video. What it gets right on new videos beyond what it gets right
   without a patch is the measured leak.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from cold_start import needle_rationale, needle_texts, tiny_policy  # noqa: E402

import data  # noqa: E402
import ffr  # noqa: E402
import grpo  # noqa: E402
import reward  # noqa: E402
import teacher  # noqa: E402
import train  # noqa: E402
from reward import leak  # noqa: E402

HERE = Path(__file__).parent
STEPS, TRAINED, TESTED, SEED = 400, 768, 512, 0


def load() -> list[dict]:
    lines = (HERE / "leaks.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def refused(record: dict) -> bool:
    words = "; ".join([record["content"], *record["regions"]])
    return leak(words, record["question"], record["options"], record["answer"]) is not None


def right(record: dict, condition: str) -> bool:
    """Whether a strong reader was right without the video: `blind`, from the words; `alone`."""
    return reward.verify(record[condition], record["answer"], record["problem_type"])


def told(record: dict) -> bool:
    """The blind test: right from the words, and wrong without them."""
    return right(record, "blind") and not right(record, "alone")


def rates(records: list[dict]) -> dict:
    """Counts on the half that the gate was built on, and under `held_out` on the other."""

    def count(half: str) -> dict:
        names = {
            "leak": ("caught", "leaks"),
            "clean": ("refused", "clean"),
            "implied": ("implied_caught", "implied"),
        }
        found = {}
        for label, (hit, all_) in names.items():
            among = [r for r in records if (r["half"], r["label"]) == (half, label)]
            unguessed = [r for r in among if not right(r, "alone")]
            found |= {
                hit: sum(map(refused, among)),
                f"{hit}_blind": sum(refused(r) or told(r) for r in among),
                all_: len(among),
                f"{all_}_unguessed_blind": sum(refused(r) or told(r) for r in unguessed),
                f"{all_}_unguessed": len(unguessed),
            }
        return found

    return count("seen") | {"held_out": count("held_out")}


# --- the blind probe ---
def patch_texts(samples: list[data.Sample], leaks: bool, gate) -> list[str]:
    """What the student would read of each sample's patch: the scripted teacher's, after a random
    wrong answer, or that of one who says the answer."""
    chat, rng = teacher.scripted({s.id: s.truth["evidence"] for s in samples}), random.Random(SEED)
    answers = {s.id: s.answer for s in samples}

    def tell(talks: list, seconds: float) -> list:
        replies = []
        for talk, (text, tokens) in zip(talks, chat(talks, seconds)):
            case_id = talk[1]["content"][0]["text"].partition("\n")[0].removeprefix("Case: ")
            for said in ("the flash is here", "count from the flash", "look at the square"):
                text = text.replace(said, f"it is {answers[case_id]}")
            replies.append((text, tokens))
        return replies

    texts = []
    for sample in samples:
        response = needle_rationale(sample.truth, rng.randrange(8), sample.truth["look"])
        video = data.Video(sample.path)
        case = teacher.Case(sample.id, sample.question, [], sample.answer, response, video)
        (patch,) = teacher.diagnose([case], tell if leaks else chat, gate)
        texts.append(ffr.render_patch(patch, video, 0.5)[0]["text"])
    return texts


def answered(student: ffr.Student, trained: list, tested: list) -> float:
    """Train on (text, answer) pairs, return the share of new ones answered right, greedily."""

    def encode(text: str) -> dict:
        chat = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        text = student.processor.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        inputs = dict(student.processor(text=[text], return_tensors="pt"))
        return ffr.with_positions(student.model, inputs)

    tokenizer, rng = student.processor.tokenizer, random.Random(SEED)
    pairs = [
        (encode(text), torch.tensor(tokenizer(answer + tokenizer.eos_token)["input_ids"]))
        for text, answer in trained
    ]
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        prompts, ids = zip(*rng.sample(pairs, 32))
        episodes = [grpo.Episode(k, k, own) for k, own in enumerate(ids)]
        logps, mask = grpo.batched_logps(student.model, prompts, episodes, student.sampling)
        (-(logps * mask).sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts, seeds = [encode(text) for text, _ in tested], [[0]] * len(tested)
    done = grpo.generate(student.model, prompts, seeds, student.sampling)
    said = [tokenizer.decode(c.ids, skip_special_tokens=True).strip() for (c,) in done]
    return sum(a == b for a, (_, b) in zip(said, tested)) / len(tested)


def blind_probe() -> dict:
    shares, no_gate = {}, lambda patch, case: None
    conditions = {
        "question_alone": None,
        "patch": (False, reward.gate),
        "leaking_teacher": (True, no_gate),
        "leaking_teacher_gated": (True, reward.gate),
    }
    with tempfile.TemporaryDirectory() as folder:
        samples = data.load_samples(data.needle_videos(f"{folder}/n", TRAINED + TESTED, SEED + 70))
        tiny_policy(f"{folder}/model", needle_texts(samples), SEED)
        arguments = [x for k, v in train.TINY.items() for x in (f"--{k}", str(v))]
        arguments += ["--model", f"{folder}/model", "--data", f"{folder}/n/records.jsonl"]
        config, accelerator = train.parse(arguments), train.Accelerator(cpu=True)
        for name, how in conditions.items():
            texts = patch_texts(samples, *how) if how else [""] * len(samples)
            pairs = [(s.question + text, s.answer) for s, text in zip(samples, texts)]
            student = train.load_student(config, accelerator)
            student.sampling = ffr.Sampling(**vars(student.sampling) | {"temperature": 0.0})
            shares[name] = answered(student, pairs[:TRAINED], pairs[TRAINED:])
            print(f"  {name:24} {shares[name]:.3f}", flush=True)
    return shares | {"chance": round(1 / 64, 4), "videos": TESTED, "steps": STEPS, "seed": SEED}


if __name__ == "__main__":
    torch.set_num_threads(2)
    found = rates(load())
    for half, among in (("built on", found), ("held out", found["held_out"])):
        print(
            "  {0:9} caught {caught} ({caught_blind}) of {leaks}, refused {refused} "
            "({refused_blind}) of {clean} clean, caught {implied_caught} ({implied_caught_blind}) "
            "of {implied} implied; in brackets: with the blind test".format(half, **among)
        )
    print("  answered right without the video:")
    found["blind_probe"] = blind_probe()
    out = HERE.parent / "assets" / "leaks.json"
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
