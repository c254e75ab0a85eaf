"""What `test_train.py` runs under torchrun: `ranks.py gradient|calls|raises|tokens|sharded|run|lively …`."""

import json
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import ffr  # noqa: E402
import grpo  # noqa: E402
import reward  # noqa: E402
import teacher  # noqa: E402
import train  # noqa: E402

torch.set_num_threads(1)


def setup(folder):
    accelerator = train.Accelerator(cpu=True)
    samples = data.load_samples(f"{folder}/needles/records.jsonl")
    arguments = ["--model", f"{folder}/model", "--data", f"{folder}/needles/records.jsonl"]
    for key, value in train.TINY.items():
        arguments += [f"--{key}", str(value)]
    student = train.load_student(train.parse(arguments), accelerator)
    return accelerator, student, samples


def injected(student, questions):
    """Fixed rollouts of unequal lengths and rewards; only the last question's are repaired."""
    patched = ffr.encode(
        student, questions[-1], teacher.EvidencePatch("temporal", "", [3], [(3, 4)])
    )
    noise = torch.Generator().manual_seed(1)
    episodes = []
    for q in range(len(questions)):
        for g in range(3):
            ids = torch.randint(5, 60, (1 + 3 * q + g,), generator=noise)
            prompt = len(questions) if q == len(questions) - 1 and g else q
            zeros = torch.zeros(len(ids))
            episodes.append(
                grpo.Episode(q, prompt, ids, sampled_logps=zeros, advantage=float(q * g - 1.5))
            )
    prompts = [*(question.prompt for question in questions), patched]
    return dict(enumerate(prompts)), episodes


class Keep:
    """An optimizer that keeps the gradient instead of stepping."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def zero_grad(self):
        self.model.zero_grad()


def gradient(folder, out, *names):
    """The gradient of injected rollouts ("keep"), and where 20 steps on them lead: "sgd", "adam"."""
    result = {}
    for name in names:
        accelerator, student, samples = setup(folder)
        reference = deepcopy(student.model)
        prompts, episodes = injected(student, [ffr.open_question(student, s) for s in samples[:4]])
        share = len(episodes) // accelerator.num_processes
        mine = episodes[accelerator.process_index * share :][:share]
        tokens = sum(len(episode.ids) for episode in episodes)
        batch = grpo.Batch(prompts, mine, tokens)
        objective = grpo.Objective(max_grad_norm=1e9)
        parameters, model = [*student.model.parameters()], accelerator.prepare(student.model)
        optimizer = {
            "keep": lambda: Keep(student.model),
            "sgd": lambda: torch.optim.SGD(parameters, 1e-3),
            "adam": lambda: torch.optim.AdamW(parameters, 1e-3),
        }[name]()
        figures = []
        for _ in range(1 if name == "keep" else 20):
            own = grpo.update(
                accelerator,
                model,
                optimizer,
                batch,
                sampling=student.sampling,
                objective=objective,
                reference=reference,
            )
            parts = train.gather_object([own])
            figures.append([sum(part[k] for part in parts) for k in ("loss", "kl")])
        result[name] = {
            "figures": torch.tensor(figures),
            "weights": torch.cat([p.detach().flatten() for p in parameters]),
        }
        result |= {"gradient": optimizer.gradient} if name == "keep" else {}
    if accelerator.is_main_process:
        torch.save(result | {"processes": accelerator.num_processes}, out)


def lopsided_step(accelerator, student, samples, model, optimizer):
    """One round and update as with sharded parameters: rank 1's teacher helps; rank 0's raises on
    every call, and one of rank 0's records does not open. Returns rollouts and figures."""
    rank = accelerator.process_index
    chat = teacher.scripted({s.id: s.truth["evidence"] for s in samples})
    replies = chat if rank else raising
    questions = [ffr.open_question(student, s) for s in samples[rank * 2 : rank * 2 + 2]]
    if rank == 0:
        questions[1] = replace(questions[0], is_placeholder=True)
    groups = ffr.find_fix_reason(
        student,
        questions,
        num_rollouts=2,
        teacher=lambda cases: teacher.diagnose(cases, replies, reward.gate),
        kappa=0.3,
        lam=0.1,
        seed=(0, 0),
    )
    rollouts = [r for group in groups for r in group]
    for place, rollout in enumerate(rollouts):
        rollout.advantage = 1.0 - 2 * (place % 2)
    prompts, episodes = ffr.episodes(groups)
    batch = grpo.Batch(prompts, episodes, 50, ffr.stand_in(student, questions[0]))
    objective = grpo.Objective(beta=0.0)
    figures = grpo.update(
        accelerator, model, optimizer, batch, sampling=student.sampling, objective=objective
    )
    return rollouts, figures


def raising(talks, seconds):
    raise RuntimeError("out of order")


def calls(folder, out):
    """What each rank calls in a lopsided step, as if parameters were sharded."""
    grpo.is_sharded = ffr.is_sharded = lambda model: True
    accelerator, student, samples = setup(folder)
    counts, keep = Counter(), Keep(student.model)
    student.model.model.visual.register_forward_hook(lambda *_: counts.update(vision=1))
    student.model.register_forward_hook(lambda *_: counts.update(forward=1))
    model = accelerator.prepare(student.model)
    rollouts, _ = lopsided_step(accelerator, student, samples, model, optimizer=keep)
    report(
        accelerator,
        out,
        repaired=sum(r.repaired is not None for r in rollouts),
        calls=dict(counts),
        finite=bool(torch.isfinite(keep.gradient).all()),
    )


def report(accelerator, out, **facts):
    """Every rank's facts, in a file."""
    gathered = train.gather_object([facts])
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(gathered))


def raises(folder, out):
    """Some steps with a teacher on both ranks, then with one that raises on every call of rank 1."""
    accelerator, student, samples = setup(folder)
    chat, facts = teacher.scripted({s.id: s.truth["evidence"] for s in samples}), {}
    spare = ffr.open_question(student, samples[0])
    for name in ("normal", "raising"):
        config = replace(student.view, out=f"{out}-{name}", max_steps=4, questions_per_device=3)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        broken = name == "raising" and accelerator.process_index == 1
        replies = raising if broken else chat
        teach = train.partial(teacher.diagnose, chat=replies, gate=reward.gate)
        history = train.train(
            config,
            accelerator,
            student=replace(student, view=config),
            samples=samples * 2,
            teach=teach,
            placeholder=spare,
        )
        facts[name] = [row | {"processes": accelerator.num_processes} for row in history]
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(facts))


def tokens(folder, out):
    """Two steps through train on ranks whose rollouts have different lengths, and an evaluation:
    by what each rank divides, and which records it is asked."""
    accelerator, student, samples = setup(folder)
    config = replace(student.view, out=f"{out}-run", max_steps=2, questions_per_device=1)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    student = replace(student, view=config)
    if accelerator.process_index == 1:
        student.sampling.max_completion_length = 3
    batches, ids, update, find = [], [], grpo.update, ffr.find_fix_reason

    def keep(*arguments, **settings):
        batches.append(arguments[3])
        return update(*arguments, **settings)

    def watch(student, questions, *more, **settings):
        ids.extend(q.sample.id for q in questions)
        return find(student, questions, *more, **settings)

    grpo.update, ffr.find_fix_reason = keep, watch
    spare = ffr.open_question(student, samples[0])
    train.train(config, accelerator, student, samples, teach=None, placeholder=spare)
    rows = train.evaluate(
        student.view, accelerator, student, samples, teach=None, placeholder=spare, name="before"
    )
    report(
        accelerator,
        out,
        ids=ids,
        own=[sum(len(episode.ids) for episode in batch.episodes) for batch in batches],
        totals=[batch.total_tokens for batch in batches],
        held_out=[row["id"] for row in rows],
    )


def sharded(folder, out):
    """A lopsided step with every parameter sharded."""
    accelerator, student, samples = setup(folder)
    model = student.model
    for unit in [*model.model.language_model.layers, model.model.visual, model]:
        fully_shard(unit)
    dtensors, start = all(isinstance(p, DTensor) for p in model.parameters()), whole(model)
    prompt = ffr.open_question(student, samples[0]).prompt
    _, *gathers = [gathers_of(student, prompt, tokens) for tokens in (3, 3, 12)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    rollouts, figures = lopsided_step(accelerator, student, samples, model, optimizer=sgd)
    end = whole(model)
    report(
        accelerator,
        out,
        dtensors=dtensors,
        gathers=gathers,
        repaired=sum(r.repaired is not None for r in rollouts),
        finite=bool(torch.isfinite(end).all()),
        moved=bool((end != start).any()),
        sum=end.double().sum().item(),
        gap=figures["logp_gap"],
    )


def gathers_of(student, prompt, tokens):
    """How often parameters are gathered while so many tokens are sampled."""
    sampling = replace(student.sampling, max_completion_length=tokens, eos_ids=())
    with torch.profiler.profile() as profile:
        ((completion,),) = grpo.generate(student.model, [prompt], [[0]], sampling)
    assert len(completion.ids) == tokens
    layers = student.model.model.language_model.layers  # the root stays whole till its backward
    assert all(isinstance(p, DTensor) for p in layers.parameters())
    return sum(event.count for event in profile.key_averages() if "allgather" in event.key)


def whole(model):
    return torch.cat([p.full_tensor().flatten() for p in model.parameters()])


def lively(*arguments):
    """train.py itself, with a verifier that finds a random student right now and then: without
    unequal rewards every gradient would be 0."""
    ffr.score = lambda text, *_: ffr.Score(float(len(text) % 3 == 0), 0.0, len(text) % 3 == 0)
    sys.argv = ["train.py", *arguments]
    train.main()


def run(folder, *arguments):
    """train.py itself, on fewer videos."""
    train.NEEDLES = {"train": (12, 2), "held_out": (5, 3)}
    sys.argv = ["train.py", "--out", folder, *arguments]
    train.main()


if __name__ == "__main__":
    modes = {
        "gradient": gradient,
        "calls": calls,
        "raises": raises,
        "tokens": tokens,
        "sharded": sharded,
        "run": run,
        "lively": lively,
    }
    modes[sys.argv[1]](*sys.argv[2:])
    if torch.distributed.is_initialized():  # a rank that exits inside the group may abort
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
