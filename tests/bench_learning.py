"""What does context repair teach, what does plain GRPO, and what do the paper's choices buy?

Every run goes through `train.train` from the same cold start until it has *sampled* its budget of
tokens, failed and repaired answers alike, and is then asked about videos it has not seen, greedily.
The learning rate falls by a cosine of the tokens spent. One thread a run, two runs at a time.

There are two looks, each with a task family of its own (`Start`, in tests/cold_start.py):

    needle   the colours at one moment. Where the student does not know, it guesses, and is right
             now and then. Record: assets/learning.json
    chain    the colours at the flash and at the moment before or after. Where the student does not
             know, it has a habit, and is never right. `CELLS` are four cold starts, from common
             success to none. Record: assets/chain.json

`python tests/bench_learning.py` runs what the record of the chain does not hold yet, so it goes on
where it was stopped. `python tests/report_learning.py` draws figures and tables.

    --look needle         the first look instead
    --quick               every arm of both in small, one seed each, under runs/learning/quick
    --phase rates         only runs of this phase
    --arm FFR --cell rare --seed 0
                          run one again, and compare it with the recorded row
    --try find=0.1,relate=0.2 --rate 3e-4 --arm FFR --seed 900
                          another cold start: a row of assets/learning-search.jsonl
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
from threading import Lock
from typing import NamedTuple

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cold_start import Start, chain_rationale, cold_start, needle_rationale  # noqa: E402

import data  # noqa: E402
import ffr  # noqa: E402
import grpo  # noqa: E402
import reward  # noqa: E402
import teacher  # noqa: E402
import train  # noqa: E402
from teacher import TeacherError  # noqa: E402

# --- what is run: fixed before the seeds ran ---
BUDGETS = {"needle": 300_000, "chain": 400_000}  # tokens that the student samples
VIDEOS = {"cold": (384, 1), "train": (1024, 2), "held_out": (512, 3)}  # number, seed
QUESTIONS, POINTS = 4, 8  # questions a step; evaluations on the way
MAIN, MORE = (0, 1, 2, 3, 4), (0, 1, 2)  # seeds

# The first look.
COLD = Start(find=0.0, relate=0.1)
GRID = (4e-5, 8e-5, 1.5e-4, 3e-4, 6e-4)  # learning rates, tried on the seeds
GRID_SEEDS = (100, 101)
LR = {"GRPO": 8e-5, "FFR": 3e-4}  # the best of the grid; the other arms take FFR's
DIAL = ((0.0, 0.05, 0.2), (0.1, 0.4, 0.7))  # find, relate
DIAL_SEED = 50
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

# The second look.
CHAIN = Start(chain=True, captions=0.7, steps=1600)
CELLS = {  # how often an answer of the cold start's lessons finds the flash, and goes on from there
    "common": CHAIN._replace(find=0.6, relate=0.6),
    "rare": CHAIN._replace(find=0.06, relate=0.3),
    "rarer": CHAIN._replace(find=0.02, relate=0.3),  # of GRPO and FFR alone
    "never": CHAIN._replace(find=0.0, relate=0.3),
}
RATES = (4e-5, 8e-5, 1.5e-4, 3e-4, 6e-4)
RATES_SEEDS = (200, 201)
TUNED = ("GRPO", "FFR", "bare prompt")  # the other arms take FFR's rate
# The patch shows the flash alone: with the term for alignment (λ) whoever cites the other moment
# too would get less, so the printed equation is used.
PRINTED = {"lam": 0.0, "max_completion_length": 24}
CHAIN_ARMS = {  # what differs from FFR
    "GRPO": {"method": "grpo"},
    "FFR": {},
    "bare prompt": {},  # the repaired tokens are scored under x, not under (x, c)
    "where all failed": {},  # repairs only in groups without a success
    "GRPO, then FFR": {},  # each for half of the budget
    "FFR, then GRPO": {},
    "reward only": {},
    "imitation": {},
}
QUICK = False


class Job(NamedTuple):
    phase: str
    arm: str
    seed: int
    start: Start
    lr: float

    @property
    def look(self) -> str:
        return "chain" if self.start.chain else "needle"


def needle_jobs() -> list[Job]:
    """The first look's: learning rates, arms, and a dial of cold starts."""
    grid = [Job("grid", arm, s, COLD, lr) for s in GRID_SEEDS for lr in GRID for arm in LR]
    arms = []
    for arm, (seeds, changes) in ARMS.items():
        rate = changes.get("learning_rate", LR.get(arm, LR["FFR"]))
        arms += [Job("arms", arm, seed, COLD, rate) for seed in seeds]
    arms.sort(key=lambda job: (ARMS[job.arm][0] == MORE, job.seed))  # main arms first
    starts = [Start(find=find, relate=relate) for find, relate in product(*DIAL)]
    dial = [Job("dial", arm, DIAL_SEED, start, LR[arm]) for start in starts for arm in LR]
    return grid + arms + dial


def chain_jobs(rows: dict) -> list[Job]:
    """The second look's: learning rates in every cell, and, when these are in `rows`, all arms."""
    rates, cells = [], []
    for seed, cell, lr, arm in product(RATES_SEEDS, CELLS, RATES, TUNED):
        if arm in arms_of(cell):
            rates.append(Job("rates", arm, seed, CELLS[cell], lr))
    if any(name_of(job) not in rows for job in rates):
        return rates
    for seed, cell in product(MAIN, CELLS):
        for arm in arms_of(cell):
            rate = best_rate(rows, rates, CELLS[cell], arm if arm in TUNED else "FFR")
            cells.append(Job("cells", arm, seed, CELLS[cell], rate))
    return rates + cells


def arms_of(cell: str) -> tuple[str, ...]:
    return ("GRPO", "FFR") if cell == "rarer" else (*CHAIN_ARMS,)


def best_rate(rows: dict, tried: list[Job], start: Start, arm: str) -> float:
    """The rate with which an arm is right most often: unaided, plus with a patch where it fails, so
    that it is told apart where nobody is right unaided."""
    found = dict.fromkeys(RATES, 0.0)
    for job in tried:
        if (job.start, job.arm) == (start, arm):
            row = rows[name_of(job)]
            found[job.lr] += row["unaided"] + row["assisted"]
    return max(found, key=found.get)


def name_of(job: Job) -> str:
    """As the rows of a record are named: a chain's with all of its dials."""
    dials = f"find {job.start.find} relate {job.start.relate}"
    if job.start.chain:
        dials += f" named {job.start.named} captions {job.start.captions} steps {job.start.steps}"
    return f"{job.phase} {job.arm} {dials} lr {job.lr:g} seed {job.seed}"


def work() -> Path:
    return ROOT / "runs" / "learning" / ("quick" if QUICK else "")


def folder_of(start: Start) -> Path:
    return work() / ("cold-" + "-".join(f"{dial:g}" for dial in start))


def make_cold_start(start: Start) -> None:
    """Videos and a cold start of this strength, made once, and what it can do, in start.json."""
    folder = folder_of(start)
    if not (folder / "start.json").is_file():
        cold_start(str(folder), VIDEOS, start._replace(steps=200) if QUICK else start)
        found = Run(Job("cold", "FFR", 0, start, 0.0)).first_look()
        (folder / "start.json").write_text(json.dumps(found))


# --- what is measured ---
def cited(text: str) -> tuple[int, int] | None:
    """The moments that a rationale takes for the flash and for the one asked for."""
    times = [data.moment_time(moment) for moment in range(data.MOMENTS)]
    flash = re.search(r"flash (<[\d.]+ seconds>)", text)
    looks = re.findall(r"look (<[\d.]+ seconds>)", text)
    if not flash or not looks or not {flash[1], looks[-1]} <= {*times}:
        return None
    return times.index(flash[1]), times.index(looks[-1])


def skills(sample: data.Sample, text: str) -> dict:
    """Which steps of a rationale are right: the cue (which moment is flashed), the relation (from
    there to the moment asked for), the reading (the colours at the moments it cites)."""
    truth, found = sample.truth, cited(text)
    answer = re.search(r"<answer>(.*?)</answer>", text)
    if not found or not answer:
        return dict.fromkeys(("cue", "relation", "reading", "cites"), False)
    cue, look = found
    moments, right = [look], [truth["look"]]  # those whose colours are asked for
    if is_chain(sample):
        moments, right = [cue, look], [truth["cue"], truth["look"]]
    seen = [colour for moment in moments for colour in truth["moments"][moment]]
    return {
        "cue": cue == truth["cue"],
        "relation": look - cue == truth["look"] - truth["cue"],
        "reading": answer[1].split() == seen,
        "cites": moments == right,
    }


def is_chain(sample: data.Sample) -> bool:
    return len(sample.answer.split()) == 4


def rationale_of(sample: data.Sample) -> str:
    truth = sample.truth
    write = chain_rationale if is_chain(sample) else needle_rationale
    return write(truth, truth["cue"], truth["look"])


@torch.no_grad()
def probabilities(student: ffr.Student, questions: list) -> dict:
    """Each skill by itself: the mean probability of the right step where all steps before it are
    right. `find`: the flash's time; `relate`: the time of the moment asked for; `read`: all colours
    in the rationale. Their product is about the chance of an unaided success."""
    rows = []
    for start in range(0, len(questions), 64):
        part, episodes, words = questions[start : start + 64], [], []
        for number, question in enumerate(part):
            ids = student.processor.tokenizer.encode(rationale_of(question.sample))
            words.append(student.processor.tokenizer.convert_ids_to_tokens(ids))
            episodes.append(grpo.Episode(number, number, torch.tensor(ids)))
        prompts = [question.prompt for question in part]
        logps, _ = grpo.batched_logps(student.model, prompts, episodes, student.sampling)
        for told, own in zip(words, logps):
            looks = [place for place, word in enumerate(told) if word == "look"]
            thought = told[: told.index("</think>")]
            colours = [place for place, word in enumerate(thought) if word in data.COLOURS]
            places = {"find": [told.index("flash") + 1], "relate": [looks[-1] + 1], "read": colours}
            rows.append({skill: own[at].sum().exp().item() for skill, at in places.items()})
    return {skill: statistics.mean(row[skill] for row in rows) for skill in rows[0]}


def measure(student: ffr.Student, questions: list, teach) -> dict:
    """Of the held-out questions, greedily: shares right without and with a patch; `faithful`
    (unaided) and `told` (with a patch): right, and the moments asked for are cited; the skills; and
    the reliance of sampled repairs."""
    greedy = replace(student, sampling=replace(student.sampling, temperature=0.0))
    rows, reliance = [], []
    for start in range(0, len(questions), 64):
        part = questions[start : start + 64]
        for q, (r,) in zip(part, ONE_ROUND(greedy, part, 1, teach, 0.0, 0.0, ("evaluation",))):
            row = skills(q.sample, r.unaided.text)
            right = {"unaided": r.unaided.score.correct, "assisted": r.chosen.score.correct}
            told = skills(q.sample, r.chosen.text)["cites"] and right["assisted"]
            rows.append(row | right | {"faithful": right["unaided"] and row["cites"], "told": told})
    groups = ONE_ROUND(student, questions[:64], 1, teach, 0.0, 0.0, ("reliance",))
    with_repair = [group for group in groups if group[0].repaired]
    if with_repair:
        ffr.measure_reliance(student, with_repair)
        reliance = [group[0].reliance for group in with_repair]
    found = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    found |= probabilities(student, questions)
    found |= {"reliance": statistics.mean(reliance) if reliance else 0.0}
    return {key: round(value, 4) for key, value in found.items()}


# --- what the arms do differently ---
ONE_ROUND = ffr.find_fix_reason
NOT_ASKED = TeacherError("not asked", "this arm repairs only where a whole group failed")
train.STEPS_WITHOUT_PATCH = 10**6  # that arm may not ask for many steps


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


def choose(arm: str, r: ffr.Member) -> ffr.Member:
    """The rollout that this arm trains in place of the chosen one."""
    if not r.repaired:
        return r
    if arm.startswith("reward only"):
        return replace(r, repaired=None)
    if arm == "bare prompt":
        return replace(r, repaired=replace(r.repaired, prompt=r.question.prompt))
    plain = r.unaided.score.accuracy + r.unaided.score.format
    if arm == "best of" and plain >= r.reward:
        return replace(r, repaired=None, reward=plain)
    return r


def asks(arm: str, spent: float) -> bool:
    """Whether this arm asks its teacher when this share of its budget is spent."""
    if arm == "GRPO, then FFR":
        return spent >= 0.5
    return arm != "FFR, then GRPO" or spent < 0.5


def only_where_all_failed(ask, cases: list, num_rollouts: int) -> list:
    """Patches for the cases of the groups that have no success, in the order of all cases."""
    failures = [case.id for case in cases]
    whole = [failures.count(case.id) == num_rollouts for case in cases]
    wanted = [case for case, all_failed in zip(cases, whole) if all_failed]
    patches = iter(ask(wanted) if wanted else [])
    return [next(patches) if all_failed else NOT_ASKED for all_failed in whole]


# --- a run ---
class Spent(Exception):
    """The budget is used up."""


class Run:
    """One arm from the cold start to the end of its budget."""

    def __init__(self, job: Job) -> None:
        self.job, self.folder, self.budget = job, folder_of(job.start), BUDGETS[job.look]
        changes = PRINTED | CHAIN_ARMS[job.arm] if job.start.chain else ARMS[job.arm][1]
        given = (
            train.TINY
            | {
                "model": self.folder / "model",
                "data": self.folder / "train/records.jsonl",
                "seed": job.seed,
                "out": work() / name_of(job).replace(" ", "-"),
                "learning_rate": job.lr,
                "questions_per_device": QUESTIONS,
                "max_steps": 10**6,
                "save_steps": 10**6,
            }
            | changes
        )
        arguments = [x for key, value in given.items() for x in (f"--{key}", str(value))]
        self.config = train.parse(arguments)
        Path(self.config.out).mkdir(parents=True, exist_ok=True)
        Path(self.config.out, "metrics.jsonl").unlink(missing_ok=True)
        self.accelerator = train.Accelerator(cpu=True)
        self.student = train.load_student(self.config, self.accelerator)
        self.samples = data.load_samples(self.config.data)
        held_out = data.load_samples(str(self.folder / "held_out/records.jsonl"))
        # A scripted teacher does not look at the frames that it is shown: two will do.
        shown = replace(self.config, num_frames=2)
        evidence = {s.id: s.truth["evidence"] for s in self.samples + held_out}
        gate = (lambda patch, case: None) if job.arm == "leaking teacher" else reward.gate
        self.teach, self.helped = (
            teacher.load_teacher(shown, None, one, reward.answers_correctly, evidence)
            for one in (gate, reward.gate)
        )
        self.opened = {}
        self.questions = self.open_questions(None, held_out)
        self.rng = random.Random(job.seed)
        self.tokens = self.prompt_tokens = 0
        self.curve, self.rates = [], []
        self.met, self.moved = set(), set()  # questions trained on; those that ever had a signal

    def open_questions(self, _, asked: list, spare=None) -> list:
        """Each video is decoded once a run."""
        for sample in asked:
            if sample.id not in self.opened:
                self.opened[sample.id] = ffr.open_question(self.student, sample)
        return [self.opened[sample.id] for sample in asked]

    def first_look(self) -> dict:
        """What the cold start can do: its measures, the chance of a success and the share of groups
        without one, with a patch and without, over 256 of the questions that it will train on."""
        asked = self.open_questions(None, self.samples[:256])
        right, groups, repaired, with_patch = [], [], [], []
        for start in range(0, len(asked), 32):
            part = asked[start : start + 32]
            num, seed = self.config.num_rollouts, ("first look",)
            for group in ONE_ROUND(self.student, part, num, self.helped, 0.0, 0.0, seed):
                right += [r.unaided.score.correct for r in group]
                groups.append(not any(r.unaided.score.correct for r in group))
                repaired += [r.repaired.score.correct for r in group if r.repaired]
                with_patch.append(not any(r.chosen.score.correct for r in group))
        shares = {
            "p0": right,
            "groups_without_success": groups,
            "fix": repaired,
            "groups_without_success_with_patch": with_patch,
        }
        found = {name: round(statistics.mean(values), 4) for name, values in shares.items()}
        return found | measure(self.student, self.questions, self.helped)

    def stop_or_measure(self) -> None:
        if self.tokens >= len(self.curve) * self.budget / POINTS:
            asked = self.questions if self.tokens >= self.budget else self.questions[::2]
            now = {"tokens": self.tokens, "step": len(self.rates)}
            self.curve.append(now | measure(self.student, asked, self.helped))
        if self.tokens >= self.budget:
            raise Spent

    def one_round(self, student, asked, num_rollouts, ask, kappa, lam, seed) -> list:
        """The round as `train.train` calls it, as this arm has it."""
        self.stop_or_measure()
        arm = self.job.arm

        def told(cases: list) -> list:
            if arm == "where all failed":
                return only_where_all_failed(ask, cases, num_rollouts)
            return [change(arm, *pair, self.rng) for pair in zip(ask(cases), cases)]

        helped = told if ask and asks(arm, self.tokens / self.budget) else None
        groups = ONE_ROUND(student, asked, num_rollouts, helped, kappa, lam, seed)
        rollouts = [r for group in groups for r in group]
        sampled = [x for r in rollouts for x in (r.unaided, r.repaired) if x]
        self.tokens += sum(len(x.completion.ids) for x in sampled)
        self.prompt_tokens += sum(x.prompt["input_ids"].shape[1] for x in sampled)
        chosen = [[choose(arm, r) for r in group] for group in groups]
        signals = [len({round(r.reward, 6) for r in group}) > 1 for group in chosen]
        for question, signal in zip(asked, signals):
            self.met.add(question.sample.id)
            if signal:
                self.moved.add(question.sample.id)
        fixed = [r.repaired.score.correct for r in rollouts if r.repaired]
        self.rates.append((len(fixed) / len(rollouts), sum(fixed), statistics.mean(signals)))
        return chosen

    def imitate(self) -> None:
        """As many of the teacher's own answers a step as the other arms have rollouts."""
        student, config = self.student, self.config
        parameters, decay = student.model.parameters(), config.weight_decay
        optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=decay)
        tokenizer, scheduler = student.processor.tokenizer, self.by_tokens(optimizer)
        config.questions_per_device *= config.num_rollouts
        while True:
            self.stop_or_measure()
            picked = train.pick(self.samples, len(self.rates), config, self.accelerator)
            asked = self.open_questions(None, picked)
            said = [rationale_of(question.sample) for question in asked]
            ids = [torch.tensor(tokenizer.encode(text + tokenizer.eos_token)) for text in said]
            episodes = [grpo.Episode(k, k, own) for k, own in enumerate(ids)]
            prompts = [question.prompt for question in asked]
            logps, mask = grpo.batched_logps(student.model, prompts, episodes, student.sampling)
            (-(logps * mask).sum() / mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(student.model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            self.tokens += int(mask.sum())
            self.prompt_tokens += sum(prompt["input_ids"].shape[1] for prompt in prompts)
            self.met |= {sample.id for sample in picked}
            self.moved |= self.met
            self.rates.append((0.0, 0, 1.0))
            scheduler.step()

    def by_tokens(self, optimizer, *_):
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda _: 0.5 + 0.5 * math.cos(math.pi * min(self.tokens / self.budget, 1))
        )

    def learn(self) -> dict:
        """Train until the budget is spent; what is recorded of it."""
        began = time.time()
        ffr.find_fix_reason, train.open_questions = self.one_round, self.open_questions
        train.transformers.get_cosine_schedule_with_warmup = self.by_tokens
        try:
            if self.job.arm == "imitation":
                self.imitate()
            teach = self.teach if self.config.method == "ffr" else None
            spare = self.questions[0]
            train.train(self.config, self.accelerator, self.student, self.samples, teach, spare)
        except Spent:
            pass
        third = max(len(self.rates) // 3, 1)
        repairs = sum(row[0] for row in self.rates) * QUESTIONS * self.config.num_rollouts
        found = {
            "intervention_first": statistics.mean(row[0] for row in self.rates[:third]),
            "intervention_last": statistics.mean(row[0] for row in self.rates[-third:]),
            "fix": sum(row[1] for row in self.rates) / max(repairs, 1),
            "signal": statistics.mean(row[2] for row in self.rates),
            "never_a_signal": 1 - len(self.moved) / max(len(self.met), 1),
        }
        found = {name: round(value, 4) for name, value in found.items()}
        found |= {
            key: self.curve[-1][key] for key in self.curve[-1] if key not in ("tokens", "step")
        }
        return found | {
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "steps": len(self.rates),
            "curve": self.curve,
            "seconds": round(time.time() - began),
        }


# --- the record ---
CODE = "ffr.py teacher.py reward.py grpo.py data.py train.py".split()
CODE += ["tests/cold_start.py", "tests/bench_learning.py"]


def commit() -> str:
    """The last commit of the files that a row depends on; with a + where they differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", *CODE)
    return git("log", "-1", "--format=%H", "--", *CODE) + "+" * bool(changed)


def run_all(jobs: list[Job], minutes: float, keep) -> None:
    """Two at a time, each in a process of its own; `keep(job, row)` as they come."""
    began = time.time()
    for start in sorted({job.start for job in jobs}):
        make_cold_start(start)

    def run(job: Job) -> None:
        if time.time() - began > 60 * minutes:
            return
        name = name_of(job)
        command = [sys.executable, __file__, "--job", json.dumps(job), *["--quick"] * QUICK]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        log = work() / "rows" / f"{name}.log"
        with open(log, "w") as opened:
            done = subprocess.run(command, stdout=opened, stderr=opened, env=environment)
        if done.returncode:
            print(f"{name}: failed, see {log}", flush=True)
            return
        row = json.loads((work() / "rows" / f"{name}.json").read_text())
        words = "{unaided:.3f} unaided, {assisted:.3f} with a patch, {seconds} s".format(**row)
        print(f"{name}: {words}", flush=True)
        keep(job, row)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs))


def run_here(job: Job) -> None:
    told = job._asdict() | {"start": job.start._asdict(), "commit": commit()}
    row = told | Run(job).learn()
    (work() / "rows" / f"{name_of(job)}.json").write_text(json.dumps(row))


def read_record(look: str) -> tuple[Path, dict]:
    """The record of a look, as far as it has come; refused where its settings are others."""
    folder = work() if QUICK else ROOT / "assets"
    file = folder / {"needle": "learning.json", "chain": "chain.json"}[look]
    record = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    settings = {
        "budget": BUDGETS[look],
        "videos": VIDEOS,
        "questions": QUESTIONS,
        "machine": "one thread a run, two runs at a time on two cores",
    }
    if look == "chain":
        settings["cells"] = {cell: start._asdict() for cell, start in CELLS.items()}
    else:
        settings["cold"] = (COLD.find, COLD.relate)
    settings = json.loads(json.dumps(settings))
    if record.setdefault("settings", settings) != settings:
        raise SystemExit(f"{file} holds rows of other settings: remove it to begin again")
    return file, record


def jobs_of(look: str, rows: dict) -> list[Job]:
    return chain_jobs(rows) if look == "chain" else needle_jobs()


def fill(look: str, phase: str | None, minutes: float) -> None:
    """Run what a record lacks; each row is written to it as it comes."""
    (file, record), one_at_a_time = read_record(look), Lock()

    def keep(job: Job, row: dict) -> None:
        with one_at_a_time:
            record["rows"][name_of(job)] = row
            for cell, start in CELLS.items():
                if start == job.start:
                    found = json.loads((folder_of(start) / "start.json").read_text())
                    record.setdefault("starts", {})[cell] = found
            part = file.with_suffix(".part")
            part.write_text(json.dumps(record, indent=0) + "\n")
            part.replace(file)

    for _ in range(2):  # a chain's arms wait for their rates
        jobs = [job for job in jobs_of(look, record["rows"]) if name_of(job) not in record["rows"]]
        if QUICK:
            jobs = [job for job in jobs if job.seed == 0 and job.phase not in ("grid", "dial")]
        run_all([job for job in jobs if phase in (None, job.phase)], minutes, keep)


def again(look: str, cell: str, arm: str, seed: int) -> None:
    """Run one of the arms again, and say whether it is as it was."""
    _, record = read_record(look)
    wanted = (arm, seed, CELLS[cell] if look == "chain" else COLD)
    jobs = [job for job in jobs_of(look, record["rows"]) if job.phase in ("cells", "arms")]
    jobs = [job for job in jobs if (job.arm, job.seed, job.start) == wanted]
    if not jobs:
        raise SystemExit(f"no {arm} of seed {seed}, or its cell's learning rates are not known yet")
    run_all(jobs, 1e9, lambda job, row: compare(record["rows"].get(name_of(job)), row))


def compare(before: dict | None, row: dict) -> None:
    if before is None:
        return
    differ = [k for k in before if k not in ("seconds", "commit") and row[k] != before[k]]
    commits = f"({before['commit']}) from this one ({row['commit']})"
    print(f"the recorded row {commits} differs in {differ}" if differ else "equal to the record")


def search(dials: str, arms: str, rates: str, seed: int) -> None:
    """Runs from a cold start of one's own: every row is kept, whatever it is."""
    start = CHAIN._replace(**{k: json.loads(v) for k, v in re.findall(r"(\w+)=([^,]+)", dials)})

    def keep(job: Job, row: dict) -> None:
        cold = json.loads((folder_of(start) / "start.json").read_text())
        with open(ROOT / "assets" / "learning-search.jsonl", "a") as file:
            file.write(json.dumps(row | {"cold": cold}) + "\n")

    tried = product(map(float, rates.split(",")), arms.split(","))
    run_all([Job("search", arm, seed, start, rate) for rate, arm in tried], 1e9, keep)


def main() -> None:
    global BUDGETS, VIDEOS, POINTS, RATES, RATES_SEEDS, CELLS, QUICK
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--look", choices=BUDGETS, default="chain")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--phase")
    parser.add_argument("--arm")
    parser.add_argument("--cell", choices=CELLS, default="rare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so many")
    parser.add_argument("--try", dest="dials", help="find=0.1,relate=0.2: another cold start")
    parser.add_argument("--rate", default="3e-4", help="with --try; as --arm several, by commas")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # one run in this process, to a file
    given = parser.parse_args()
    if given.quick:
        BUDGETS, POINTS, QUICK = dict.fromkeys(BUDGETS, 6_000), 2, True
        VIDEOS = {"cold": (32, 1), "train": (64, 2), "held_out": (32, 3)}
        CELLS, RATES, RATES_SEEDS = {"rare": CELLS["rare"]}, RATES[2:3], (0,)
    (work() / "rows").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if given.job:
        phase, arm, seed, start, lr = json.loads(given.job)
        run_here(Job(phase, arm, seed, Start(*start), lr))
    elif given.dials:
        search(given.dials, given.arm, given.rate, given.seed)
    elif given.arm:
        again(given.look, given.cell, given.arm, given.seed)
    else:
        for look in BUDGETS if given.quick else (given.look,):
            fill(look, given.phase, given.minutes)


if __name__ == "__main__":
    main()
