"""Does context repair beat plain GRPO here, and why? `python tests/bench_learning.py` runs what is
not in `assets/learning.json` yet, two runs at a time, and writes that file, `assets/learning.md`
(the table) and, with matplotlib, `assets/learning.png`.

Every run goes through `train.train` from the same cold start until it has *sampled* BUDGET tokens,
failed and repaired answers alike, and is then asked about videos it has not seen, greedily. The
learning rate falls by a cosine of the tokens spent. One thread a run.

    --quick               every arm in small, one seed each, under runs/learning/quick
    --phase grid          only the learning rates, or arms, or dial
    --arm FFR --seed 0    run one again, and compare it with the recorded row
    --report              write table and figure again
    --minutes 60          start no further run after an hour
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cold_start import cold_start, needle_rationale  # noqa: E402

import data  # noqa: E402
import ffr  # noqa: E402
import grpo  # noqa: E402
import reward  # noqa: E402
import teacher  # noqa: E402
import train  # noqa: E402
from teacher import TeacherError  # noqa: E402

# Fixed before the seeds ran.
BUDGET = 300_000  # tokens that the student samples
VIDEOS = {"cold": (384, 1), "train": (1024, 2), "held_out": (512, 3)}  # number, seed
COLD = (0.0, 0.1)  # p_find, p_read: how often the lessons are right beyond chance
QUESTIONS, POINTS = 4, 8  # questions a step; evaluations on the way
GRID = (4e-5, 8e-5, 1.5e-4, 3e-4, 6e-4)  # learning rates, tried on the seeds
GRID_SEEDS = (100, 101)
LR = {"GRPO": 8e-5, "FFR": 3e-4}  # the best of the grid; the other arms take FFR's
DIAL = ((0.0, 0.05, 0.2), (0.1, 0.4, 0.7))  # p_find, p_read
DIAL_SEED = 50
MAIN, MORE = (0, 1, 2, 3, 4), (0, 1, 2)  # seeds
ARMS = {  # seeds, and what differs from FFR
    "GRPO": (MAIN, {"method": "grpo"}),
    "FFR": (MAIN, {}),
    "reward only": (MAIN, {}),  # the released code: the repaired reward on the failed tokens
    "random patch": (MAIN, {}),  # of the same size, at another moment and place
    "reward only, slower": (MORE, {"learning_rate": LR["GRPO"]}),  # at GRPO's rate
    "text-only patch": (MORE, {"patch_pictures": False}),
    "leaking teacher": (MORE, {}),  # its guidance is the answer; no gate
    "imitation": (MORE, {}),  # supervised, on the teacher's own answers
    "best of": (MORE, {}),  # app. E.2: the higher reward is chosen, if equal the unaided one
    "kappa 0": (MORE, {"kappa": 0.0}),
    "kappa 0.1": (MORE, {"kappa": 0.1, "lam": 0.05}),  # lambda must stay below kappa
    "kappa 0.5": (MORE, {"kappa": 0.5}),
    "kappa 1": (MORE, {"kappa": 1.0}),
    "lambda 0": (MORE, {"lam": 0.0}),
    "lambda 0.2": (MORE, {"lam": 0.2}),
    "std batch": (MORE, {"scale_rewards": "batch"}),
    "std none": (MORE, {"scale_rewards": "none"}),
}


class Spent(Exception):
    """The budget is used up."""


def work() -> Path:
    return ROOT / "runs" / "learning" / ("quick" if BUDGET < 10**5 else "")


def jobs(phase: str) -> list[tuple]:
    """(phase, arm, seed, cold start, learning rate) of every run."""
    if phase == "grid":
        return [("grid", arm, seed, COLD, lr) for seed in GRID_SEEDS for lr in GRID for arm in LR]
    if phase == "dial":
        return [("dial", arm, DIAL_SEED, cold, LR[arm]) for cold in product(*DIAL) for arm in LR]
    todo = [
        ("arms", arm, seed, COLD, changes.get("learning_rate", LR.get(arm, LR["FFR"])))
        for arm, (seeds, changes) in ARMS.items()
        for seed in seeds
    ]
    return sorted(todo, key=lambda job: (ARMS[job[1]][0] == MORE, job[2]))  # main arms first


def name_of(job: tuple) -> str:
    phase, arm, seed, (find, read), lr = job
    return f"{phase} {arm} find {find} read {read} lr {lr:g} seed {seed}"


def rows_of(phase: str, arm: str) -> list[str]:
    return [name_of(job) for job in jobs(phase) if job[1] == arm]


def cold_folder(cold: tuple) -> Path:
    """Videos and a cold start of this strength, made once."""
    folder = work() / "cold-{}-{}".format(*cold)
    if not (folder / "done").is_file():
        cold_start(str(folder), VIDEOS, *cold, steps=1000 if BUDGET > 10**5 else 200)
        (folder / "done").touch()
    return folder


# --- what is measured ---
def skills(sample: data.Sample, text: str) -> dict:
    """Which steps of a rationale are right: the cue (which moment is flashed), the relation (from
    there to the moment asked for), the reading (the colours at the moment it cites)."""
    truth, times = sample.truth, [data.moment_time(m) for m in range(data.MOMENTS)]
    cited = re.search(r"flash (<[\d.]+ seconds>) look (<[\d.]+ seconds>)", text)
    answer = re.search(r"<answer>(.*?)</answer>", text)
    if not cited or not answer or not {*cited.groups()} <= {*times}:
        return dict.fromkeys(("cue", "relation", "reading", "cites"), False)
    cue, look = map(times.index, cited.groups())
    return {
        "cue": cue == truth["cue"],
        "relation": look - cue == truth["look"] - truth["cue"],
        "reading": answer[1].split() == truth["moments"][look],
        "cites": look == truth["look"],
    }


def measure(student: ffr.Student, questions: list, teach) -> dict:
    """Shares of the held-out questions. `faithful`: right, and the right moment is cited."""
    student, rows = replace(student, sampling=replace(student.sampling, temperature=0.0)), []
    for start in range(0, len(questions), 64):
        part = questions[start : start + 64]
        for q, (r,) in zip(part, ONE_ROUND(student, part, 1, teach, 0.0, 0.0, ("evaluation",))):
            row = skills(q.sample, r.unaided.text)
            right = {"unaided": r.unaided.score.correct, "assisted": r.rollout.score.correct}
            rows.append(row | right | {"faithful": right["unaided"] and row["cites"]})
    return {k: round(sum(row[k] for row in rows) / len(rows), 4) for k in rows[0]}


# --- what the arms do differently ---
ONE_ROUND = ffr.find_fix_reason


def change(arm: str, patch, case, rng: random.Random):
    """The patch that this arm's student gets in place of the teacher's."""
    if isinstance(patch, TeacherError):
        return patch
    if arm == "leaking teacher":
        return replace(patch, guidance=case.answer)
    if arm != "random patch":
        return patch
    shift, frames = data.FRAMES_PER_MOMENT * rng.randrange(1, data.MOMENTS), len(case.video)

    def moved(first: int, last: int) -> tuple[int, int]:
        start = (first + shift) % frames
        return start, start + last - first

    def elsewhere(low: float, high: float) -> tuple[float, float]:
        start = rng.uniform(0, 1 - (high - low))
        return start, start + high - low

    regions = []
    for region in patch.regions:
        (x1, x2), (y1, y2) = (elsewhere(*region.box[k::2]) for k in (0, 1))
        regions.append(region._replace(frame=moved(*[region.frame] * 2)[0], box=(x1, y1, x2, y2)))
    return replace(
        patch,
        key_frames=[moved(k, k)[0] for k in patch.key_frames],
        regions=regions,
        spans=[moved(*span) for span in patch.spans],
    )


def choose(arm: str, r: ffr.Chosen) -> ffr.Chosen:
    """The rollout that this arm trains in place of the chosen one."""
    if r.repaired and arm.startswith("reward only"):
        return replace(r, repaired=None)
    plain = r.unaided.score.accuracy + r.unaided.score.format
    if r.repaired and arm == "best of" and plain >= r.reward:
        return replace(r, repaired=None, reward=plain)
    return r


# --- a run ---
def learn(job: tuple) -> dict:
    """One arm from the cold start to the end of its budget; what is recorded of it."""
    (_, arm, seed, cold, lr), began = job, time.time()
    folder, rng = cold_folder(cold), random.Random(seed)
    given = (
        train.TINY
        | {
            "model": folder / "model",
            "data": folder / "train/records.jsonl",
            "seed": seed,
            "out": work() / name_of(job).replace(" ", "-"),
            "learning_rate": lr,
            "questions_per_device": QUESTIONS,
            "max_steps": 10**6,
            "save_steps": 10**6,
        }
        | ARMS[arm][1]
    )
    config = train.parse([x for key, value in given.items() for x in (f"--{key}", str(value))])
    Path(config.out).mkdir(parents=True, exist_ok=True)
    Path(config.out, "metrics.jsonl").unlink(missing_ok=True)
    accelerator = train.Accelerator(cpu=True)
    student = train.load_student(config, accelerator)
    samples, opened = data.load_samples(config.data), {}
    held_out = data.load_samples(str(folder / "held_out/records.jsonl"))
    # A scripted brain does not look at the frames that it is shown: two will do.
    shown = replace(config, num_frames=2)
    gate = (lambda patch, case: None) if arm == "leaking teacher" else reward.gate
    evidence = {s.id: s.truth["evidence"] for s in samples + held_out}
    teach, helped = (
        teacher.load_teacher(shown, None, one, reward.answers, evidence)
        for one in (gate, reward.gate)
    )

    def open_questions(_, asked: list, spare=None) -> list:  # each video is decoded once a run
        for sample in asked:
            opened[sample.id] = opened.get(sample.id) or ffr.open_question(student, sample)
        return [opened[sample.id] for sample in asked]

    questions = open_questions(None, held_out)
    tokens, prompt_tokens, curve, rates = 0, 0, [], []

    def stop_or_measure() -> None:
        if tokens >= len(curve) * BUDGET / POINTS:
            now = {"tokens": tokens, "step": len(rates)}
            curve.append(now | measure(student, questions, None))
        if tokens >= BUDGET:
            raise Spent

    def one_round(student, asked, num_rollouts, ask, kappa, lam, seed) -> list:
        nonlocal tokens, prompt_tokens
        stop_or_measure()

        def told(cases: list) -> list:
            return [change(arm, *pair, rng) for pair in zip(ask(cases), cases)]

        groups = ONE_ROUND(student, asked, num_rollouts, ask and told, kappa, lam, seed)
        rollouts = [r for group in groups for r in group]
        sampled = [x for r in rollouts for x in (r.unaided, r.repaired) if x]
        tokens += sum(len(x.completion.ids) for x in sampled)
        prompt_tokens += sum(x.prompt["input_ids"].shape[1] for x in sampled)
        fixed = [r.repaired.score.correct for r in rollouts if r.repaired]
        rates.append((len(fixed) / len(rollouts), sum(fixed)))
        return [[choose(arm, r) for r in group] for group in groups]

    def imitate() -> None:
        """As many of the teacher's own answers a step as the other arms have rollouts."""
        nonlocal tokens, prompt_tokens
        parameters, decay = student.model.parameters(), config.weight_decay
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=decay)
        tokenizer, scheduler = student.processor.tokenizer, by_tokens(optimizer)
        config.questions_per_device *= config.num_rollouts
        while True:
            stop_or_measure()
            asked = open_questions(None, train.pick(samples, len(rates), config, accelerator))
            truths = [q.sample.truth for q in asked]
            said = [needle_rationale(t, t["cue"], t["look"]) for t in truths]
            ids = [torch.tensor(tokenizer.encode(text + tokenizer.eos_token)) for text in said]
            episodes = [grpo.Episode(k, k, own) for k, own in enumerate(ids)]
            prompts = [q.prompt for q in asked]
            logps, mask = grpo.batched_logps(student.model, prompts, episodes, student.sampling)
            (-(logps * mask).sum() / mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(student.model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            tokens += int(mask.sum())
            prompt_tokens += sum(q.prompt["input_ids"].shape[1] for q in asked)
            rates.append((0.0, 0))
            scheduler.step()

    def by_tokens(optimizer, *_):
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda _: 0.5 + 0.5 * math.cos(math.pi * min(tokens / BUDGET, 1))
        )

    ffr.find_fix_reason, train.open_questions = one_round, open_questions
    train.transformers.get_cosine_schedule_with_warmup = by_tokens
    try:
        if arm == "imitation":
            imitate()
        train.train(
            config,
            accelerator,
            student,
            samples,
            teach if config.method == "ffr" else None,
            questions[0],
        )
    except Spent:
        final = measure(student, questions, helped)
    third = max(len(rates) // 3, 1)
    repairs = sum(row[0] for row in rates) * QUESTIONS * config.num_rollouts
    return final | {
        "intervention_first": round(statistics.mean(row[0] for row in rates[:third]), 4),
        "intervention_last": round(statistics.mean(row[0] for row in rates[-third:]), 4),
        "fix": round(sum(row[1] for row in rates) / max(repairs, 1), 4),
        "tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "steps": len(rates),
        "curve": curve,
        "seconds": round(time.time() - began),
    }


# --- the report ---
def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % t-interval."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), math.nan)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.mean(values), t * spread / len(values) ** 0.5


def report(record: dict) -> None:
    """`arms` from the rows, the table and the figure."""
    keys = (
        "unaided assisted faithful cue relation reading intervention_first intervention_last "
        "fix tokens prompt_tokens steps seconds"
    ).split()
    columns = (
        "arm | seeds | right unaided | of those cite the moment | right assisted | "
        "interventions, first → last third | fix | steps | prompt tokens, M"
    )
    lines = [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]
    record["arms"] = {}
    for arm in ARMS:
        rows = [record["rows"][n] for n in rows_of("arms", arm) if n in record["rows"]]
        if not rows:
            continue
        found = record["arms"][arm] = {key: [row[key] for row in rows] for key in keys}
        mean = {key: statistics.mean(values) for key, values in found.items()}
        mean["middle"], mean["half"] = interval(found["unaided"])
        mean["cites"] = statistics.mean(row["faithful"] / max(row["unaided"], 1e-9) for row in rows)
        lines.append(
            f"| {arm} | {len(rows)} | "
            + (
                "{middle:.3f} ± {half:.3f} | {cites:.3f} | {assisted:.3f} | {intervention_first:.3f} → "
                "{intervention_last:.3f} | {fix:.3f} | {steps:.0f} | {millions:.2f} |"
            ).format(**mean, millions=mean["prompt_tokens"] / 1e6)
        )
    assets = ROOT / "assets" if BUDGET > 10**5 else work()
    (assets / "learning.json").write_text(json.dumps(record, indent=0) + "\n")
    (assets / "learning.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    try:
        draw(record, assets / "learning.png")
    except ImportError:
        print("no matplotlib: no figure")


def draw(record: dict, file: Path) -> None:
    """What the main arms learn over their budget, with 95 % bands, and the dial."""
    from matplotlib import pyplot

    figure, ((first, second, dial), skill) = pyplot.subplots(2, 3, figsize=(13, 8))
    panels = dict(
        zip(
            (first, second, *skill),
            (
                ("unaided", "right"),
                ("faithful", "right, and the right moment is cited"),
                ("cue", "cue: the flash is found"),
                ("relation", "relation: from there to the moment"),
                ("reading", "reading: the colours at the moment cited"),
            ),
        )
    )
    looks = {
        "FFR": ("black", "-", "o"),
        "GRPO": ("0.3", "--", "s"),
        "reward only": ("0.5", ":", "^"),
        "random patch": ("0.65", "-.", "v"),
    }
    for arm in [arm for arm in looks if arm in record["arms"]]:
        rows = [record["rows"][n] for n in rows_of("arms", arm) if n in record["rows"]]
        points = list(zip(*(row["curve"] for row in rows)))  # at the same share of the budget
        colour, line, mark = looks[arm]
        for axis, (key, title) in panels.items():
            x = [statistics.mean(p["tokens"] for p in point) / 1000 for point in points]
            y = [interval([p[key] for p in point]) for point in points]
            axis.plot(
                x,
                [m for m, _ in y],
                line,
                color=colour,
                marker=mark,
                markersize=4,
                label=f"{arm}, {len(rows)} seeds",
            )
            axis.fill_between(
                x,
                [m - h for m, h in y],
                [m + h for m, h in y],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
            axis.set(
                title=title,
                ylim=(0, 1.02),
                xlabel="tokens sampled by the student, thousands",
                ylabel=f"share of {VIDEOS['held_out'][0]} held-out videos",
            )
    first.legend(frameon=False, handlelength=4, loc="upper left")
    (finds, reads), shown = DIAL, {}
    for place in product(range(len(finds)), range(len(reads))):
        cold = finds[place[0]], reads[place[1]]
        pair = [
            record["rows"].get(name_of(("dial", arm, DIAL_SEED, cold, LR[arm])))
            for arm in ("FFR", "GRPO")
        ]
        shown[place] = None if None in pair else pair[0]["unaided"] - pair[1]["unaided"]
    dial.imshow(
        [[shown[i, j] or 0.0 for j in range(len(reads))] for i in range(len(finds))],
        cmap="Greys",
        vmin=-1,
        vmax=1.5,
    )
    for (i, j), gain in shown.items():
        dial.text(j, i, "not run" if gain is None else f"{gain:+.2f}", ha="center", va="center")
    dial.set(
        title="FFR − GRPO, right unaided, one seed",
        xticks=range(len(reads)),
        xticklabels=reads,
        yticks=range(len(finds)),
        yticklabels=finds,
        xlabel="p_read: relation known beyond chance",
        ylabel="p_find: cue known beyond chance",
    )
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main() -> None:
    global BUDGET, VIDEOS, POINTS
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--phase", choices=("grid", "arms", "dial"))
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # one run in this process, to a file
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so many")
    given, began = parser.parse_args(), time.time()
    if given.quick:
        BUDGET, POINTS = 12_000, 2
        VIDEOS = {"cold": (32, 1), "train": (64, 2), "held_out": (64, 3)}
    file = (ROOT / "assets" if not given.quick else work()) / "learning.json"
    record = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    settings = {
        "budget": BUDGET,
        "videos": VIDEOS,
        "cold": COLD,
        "questions": QUESTIONS,
        "machine": "one thread a run, two runs at a time on two cores",
    }
    settings = json.loads(json.dumps(settings))
    if record.setdefault("settings", settings) != settings:
        raise SystemExit(f"{file} holds rows of other settings: remove it to begin again")
    every = {name_of(job): job for phase in ("grid", "arms", "dial") for job in jobs(phase)}
    if given.quick:
        every = {n: j for n, j in every.items() if j[0] == "arms" and j[2] == 0}
    (work() / "rows").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if given.job:
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True)
        row = learn(every[given.job]) | {"commit": head.stdout.decode().strip()}
        (work() / "rows" / f"{given.job}.json").write_text(json.dumps(row))
        return
    record["rows"] |= {
        n: json.loads(f.read_text())
        for n in every
        if n not in record["rows"]
        for f in [work() / "rows" / f"{n}.json"]
        if f.is_file() and not given.arm
    }
    todo = [n for n, j in every.items() if n not in record["rows"] and given.phase in (None, j[0])]
    if given.arm:
        (todo,) = [[n] for n, j in every.items() if j[:3] == ("arms", given.arm, given.seed)]
    for cold in sorted({every[n][3] for n in todo}):
        if not given.report:
            cold_folder(cold)

    def run(name: str) -> None:
        if time.time() - began > 60 * given.minutes:
            return
        command = [sys.executable, __file__, "--job", name, *["--quick"] * given.quick]
        log = work() / "rows" / f"{name}.log"
        with open(log, "w") as opened:
            done = subprocess.run(
                command,
                stdout=opened,
                stderr=opened,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        if done.returncode:
            print(f"{name}: failed, see {log}")
            return
        row = json.loads((work() / "rows" / f"{name}.json").read_text())
        print(f"{name}: unaided {row['unaided']:.3f}, {row['seconds']} s", flush=True)
        if given.arm:
            before = record["rows"].get(name, {})
            differ = [k for k in row if k not in ("seconds", "commit") and row[k] != before.get(k)]
            commits = f"({before.get('commit')}) from this one ({row['commit']})"
            print(
                f"the recorded row {commits} differs in {differ}"
                if differ
                else "equal to the record"
            )
        else:
            record["rows"][name] = row

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [] if given.report else todo))
    if not given.arm:
        record["learning_rates"] = LR
        record["commit"] = sorted({row["commit"] for row in record["rows"].values()})
        report(record)


if __name__ == "__main__":
    main()
