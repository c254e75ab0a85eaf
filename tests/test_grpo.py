"""GRPO against hand-computed numbers, an independent implementation, and itself one row at a time."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import sampled, scored

import ffr
import grpo
from teacher import EvidencePatch


def test_advantages_by_hand():
    # G = 8, one unaided success (2.0), seven repairs (1.7): std 0.10607, unbiased
    rewards = torch.tensor([[2.0] + [1.7] * 7])
    advantages = grpo.group_advantages(rewards, "group")
    assert advantages[0, 1].item() == pytest.approx(-0.353, abs=1e-3)
    assert advantages[0, 0].item() == pytest.approx(0.2625 / (0.10607 + 1e-4), rel=1e-4)
    assert grpo.group_advantages(rewards, "none")[0, 0].item() == pytest.approx(0.2625)
    batch = grpo.group_advantages(rewards, "batch", torch.tensor(0.5))
    assert batch[0, 0].item() == pytest.approx(0.2625 / 0.5001)
    assert grpo.group_advantages(torch.ones(1, 4)).abs().max() == 0  # equal rewards teach nothing


def test_loss_by_hand():
    """2 rollouts of 3 and 2 tokens, ε 0.2, β 0.1."""
    tensor = torch.tensor
    logps = tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).requires_grad_()
    old = -tensor([[0.0, 0.4, -0.4], [0.4, 0.0, 9.0]])  # ratios 1, e^0.4, e^-0.4 | e^0.4, 1
    ref = tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 9.0]])
    mask = tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    loss = grpo.grpo_loss(
        logps,
        old,
        ref,
        advantages=tensor([1.0, -1.0]),
        mask=mask,
        total_tokens=5,
        epsilon=0.2,
        beta=0.1,
    )
    e = 2.718281828459045
    first = 1.0 + 1.2 + e**-0.4  # A = 1: min(r, clip(r)) = 1, 1.2, e^-0.4
    second = -(e**0.4) - 1.0  # A = −1: min(−r, −clip(r)) = −e^0.4, −1
    kl = e**0.5 - 0.5 - 1
    assert loss.item() == pytest.approx(-(first + second - 0.1 * kl) / 5, abs=1e-6)
    loss.backward()
    assert logps.grad[0, 1] == 0  # clipped
    assert logps.grad[1, 2] == 0  # padding
    assert logps.grad[1, 0].item() == pytest.approx(e**0.4 / 5, rel=1e-5)


def test_loss_equals_an_independent_implementation():
    torch.manual_seed(0)
    for beta in (0.0, 0.04):
        logps, old, ref = (torch.randn(5, 7) * 0.3 for _ in range(3))
        advantages, lengths = torch.randn(5), [7, 3, 1, 5, 2]
        total, count = 0.0, 0
        for i, length in enumerate(lengths):
            for t in range(length):
                r = torch.exp(logps[i, t] - old[i, t]).item()
                a = advantages[i].item()
                bounded = min(max(r, 0.8), 1.2) * a
                d = (ref[i, t] - logps[i, t]).item()
                total += min(r * a, bounded) - beta * (torch.tensor(d).exp().item() - d - 1)
                count += 1
        mask = torch.tensor([[float(t < n) for t in range(7)] for n in lengths])
        loss = grpo.grpo_loss(
            logps, old, ref, advantages, mask, total_tokens=count, epsilon=0.2, beta=beta
        )
        assert loss.item() == pytest.approx(-total / count, abs=1e-6)


def test_empty_batch_has_a_finite_loss():
    zeros, advantages = torch.zeros(2, 3), torch.ones(2)
    loss = grpo.grpo_loss(zeros, zeros, None, advantages, mask=zeros, total_tokens=0, beta=0.0)
    assert loss.item() == 0


def mixed_prompts(student, questions):
    """Patched and unpatched prompts, of different lengths."""
    patch = EvidencePatch("temporal", "look there", [4, 9], [(4, 5)])
    plain = [question.prompt for question in questions[:3]]
    return [plain[0], ffr.encode(student, questions[0], patch), plain[1], plain[2]]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampled_logps_equal_scored_logps(student, questions, top_p):
    prompts = mixed_prompts(student, questions)
    changes = {"temperature": 0.7, "top_p": top_p, "max_completion_length": 12}
    sampling = replace(student.sampling, **changes)
    done = sampled(student, prompts, [1, 2, 3, 4], sampling)
    batched, mask = scored(student.model, prompts, [c.ids for c in done], sampling)
    assert len({p["input_ids"].shape[1] for p in prompts}) > 1  # so there is left padding
    for i, (prompt, completion) in enumerate(zip(prompts, done)):
        n = len(completion.ids)
        single, _ = scored(student.model, [prompt], [completion.ids], sampling)
        assert torch.allclose(completion.logps, batched[i, :n], atol=1e-4)
        assert torch.allclose(completion.logps, single[0], atol=1e-4)
        assert mask[i].sum() == n


def test_a_rollout_does_not_depend_on_its_batch(student, questions):
    prompts = mixed_prompts(student, questions)
    together = sampled(student, prompts, [1, 2, 3, 4], student.sampling)
    alone = sampled(student, prompts[2:3], [3], student.sampling)
    assert together[2].ids.tolist() == alone[0].ids.tolist()
    grouped = sampled(student, prompts[2:3] * 2, [3, 8], student.sampling)
    assert grouped[0].ids.tolist() == alone[0].ids.tolist()
    assert grouped[1].ids.tolist() != alone[0].ids.tolist()


def test_sampling_follows_the_policy(student, questions):
    """4,000 first tokens against their probabilities; a right sampler fails one run in 10^6."""
    changes = {"temperature": 1.0, "top_p": 1.0, "max_completion_length": 1}
    sampling = replace(student.sampling, **changes)
    done = sampled(student, [questions[0].prompt] * 4000, list(range(4000)), sampling)
    counts = torch.bincount(torch.stack([c.ids[0] for c in done]), minlength=200).float()
    likely = counts.argmax()
    logp, _ = scored(student.model, [questions[0].prompt], [likely[None]], sampling)
    p = logp[0, 0].exp()
    assert abs(counts[likely] - 4000 * p) < 4.9 * (4000 * p * (1 - p)).sqrt()


def test_top_p_keeps_the_fewest_likely_tokens():
    sampling = grpo.Sampling(top_p=0.6)
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(500, 4)
    chosen, *_ = grpo.sample_token(logits, torch.linspace(0, 1, 501)[:500, None], sampling)
    assert chosen.flatten().bincount().tolist() == [313, 187]  # 5 to 3, of 500 even chances


def test_entropy_of_a_uniform_policy_is_the_log_of_its_size():
    sampling = grpo.Sampling(top_p=0.5)
    _, _, entropy = grpo.sample_token(torch.zeros(2, 8), torch.tensor([[0.1], [0.9]]), sampling)
    assert entropy[:, 0].tolist() == pytest.approx([math.log(8)] * 2)


def test_a_ratio_is_counted_as_clipped_on_either_side():
    logps = torch.tensor([0.7, 0.9, 1.0, 1.1, 1.3]).log()[None]
    figures = grpo.token_figures(logps, torch.zeros(1, 5), None, epsilon=0.2)
    assert figures["clipped"].tolist() == [[True, False, False, False, True]]


def test_greedy_sampling_takes_the_likeliest_token_whatever_the_chance():
    logits = torch.tensor([[0.3, 0.5, 0.2]]).log().expand(10, 3)
    token, logps, _ = grpo.sample_token(
        logits, torch.linspace(0, 0.99, 10)[:, None], grpo.Sampling(temperature=0.0)
    )
    assert (token == 1).all() and torch.allclose(logps.exp(), torch.tensor(0.5))


def test_policy_is_the_softmax_at_the_sampling_temperature(student, questions):
    prompt, ids = questions[0].prompt, torch.tensor([5, 6, 7])
    hot = grpo.Sampling(temperature=2.0, pad_id=student.sampling.pad_id)
    logps, _ = scored(student.model, [prompt], [ids], hot)
    first = student.model(**prompt).logits[0, -1].float()
    assert torch.allclose(logps[0, 0], (first / 2.0).log_softmax(-1)[5], atol=1e-5)


def test_suppressed_ids_are_never_sampled_nor_scored(student):
    vision = student.processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert vision in student.sampling.suppressed_ids
    logits = torch.zeros(1, 1, len(student.processor.tokenizer))
    logp = grpo.policy_logits(logits, student.sampling).log_softmax(-1)
    assert logp[..., vision].exp() == 0


def test_padding_with_a_suppressed_id_gives_no_nan(student, questions):
    assert student.sampling.pad_id in student.sampling.suppressed_ids
    prompts = [questions[0].prompt, questions[1].prompt]
    ids = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    logps, mask = scored(student.model, prompts, ids, student.sampling)
    logps.sum().backward()
    assert torch.isfinite(logps).all() and mask.sum() == 4
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.model.parameters())
    student.model.zero_grad()


def test_checkpoints_generation_config_plays_no_part(student, questions):
    before = sampled(student, [questions[0].prompt], [1], student.sampling)
    own = student.model.generation_config
    own.repetition_penalty, own.top_k, own.temperature, own.do_sample = 3.0, 1, 0.1, True
    after = sampled(student, [questions[0].prompt], [1], student.sampling)
    assert before[0].ids.tolist() == after[0].ids.tolist()
    assert student.model.generation_config is own  # and it is saved with the weights as it was


def test_logps_change_when_the_pixels_change(student, questions):
    ids = [torch.tensor([5, 6, 7])]
    seen, _ = scored(student.model, [questions[0].prompt], ids, student.sampling)
    pixels = torch.zeros_like(questions[0].prompt["pixel_values_videos"])
    blank = questions[0].prompt | {"pixel_values_videos": pixels}
    unseen, _ = scored(student.model, [blank], ids, student.sampling)
    assert (seen - unseen).abs().max() > 1e-3


def updated(
    student,
    accelerator,
    optimizer,
    prompts,
    completions,
    advantages,
    weights=None,
    reference=None,
    stand_in=None,
    **settings,
):
    """The figures of one `update`, each prompt its own group."""
    weights = weights or [1.0] * len(completions)
    episodes = [
        grpo.Episode(
            question=k,
            prompt=k,
            ids=c.ids,
            sampled_logps=c.logps,
            advantage=advantages[k],
            weight=weights[k],
        )
        for k, c in enumerate(completions)
    ]
    tokens = sum(len(c.ids) * weight for c, weight in zip(completions, weights))
    return grpo.update(
        accelerator,
        model=student.model,
        optimizer=optimizer,
        batch=grpo.Batch(dict(enumerate(prompts)), episodes, tokens, stand_in),
        sampling=student.sampling,
        objective=grpo.Objective(**settings),
        reference=reference,
    )


def gradients(
    student,
    accelerator,
    prompts,
    completions,
    advantages,
    weights,
    reference=None,
    beta=0.0,
    stand_in=None,
    **settings,
):
    """The gradient that `update` steps along, as one vector."""

    class Keep:
        def step(self):
            self.grads = [p.grad.clone().flatten() for p in student.model.parameters()]

        def zero_grad(self):
            student.model.zero_grad()

    keep = Keep()
    figures = updated(
        student,
        accelerator,
        optimizer=keep,
        prompts=prompts,
        completions=completions,
        advantages=advantages,
        weights=weights,
        reference=reference,
        stand_in=stand_in,
        beta=beta,
        max_grad_norm=1e9,
        **settings,
    )
    return torch.cat(keep.grads), figures


def test_update_follows_the_policy_gradient_row_by_row(student, questions, accelerator):
    """At r_t = 1 the gradient is −1/N Σ A ∇ log π, here with one plain forward per rollout."""
    prompts = mixed_prompts(student, questions)
    done = sampled(student, prompts, [1, 2, 3, 4], student.sampling)
    advantages, weights = [0.5, -1.0, 2.0, 7.0], [1.0, 1.0, 1.0, 0.0]
    got, figures = gradients(
        student, accelerator, prompts, completions=done, advantages=advantages, weights=weights
    )
    assert figures["logp_gap"] < 1e-4
    tokens = sum(len(c.ids) for c in done[:3])
    for prompt, completion, advantage in list(zip(prompts, done, advantages))[:3]:
        n = len(completion.ids)
        inputs = {key: value for key, value in prompt.items() if key != "position_ids"}
        inputs["input_ids"] = torch.cat([prompt["input_ids"], completion.ids[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        zeros = torch.zeros_like(completion.ids)[None]
        inputs["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], zeros], 1)
        logits = student.model(**inputs).logits[0, -n - 1 : -1].float()
        logits[:, list(student.sampling.suppressed_ids)] = -torch.inf
        logp = logits.log_softmax(-1)[torch.arange(n), completion.ids]
        (-advantage * logp.sum() / tokens).backward()
    want = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    student.model.zero_grad()
    assert (got - want).norm() / want.norm() < 1e-5


def test_stand_in_row_changes_no_gradient(student, questions, accelerator):
    prompts = mixed_prompts(student, questions)
    done = sampled(student, prompts, [1, 2, 3, 4], student.sampling)
    rows = (prompts, done, [0.5, -1.0, 2.0, 1.0], [1.0] * 4)
    plain, _ = gradients(student, accelerator, *rows)
    padded, _ = gradients(student, accelerator, *rows, stand_in=ffr.stand_in(student, questions[0]))
    assert (plain - padded).norm() / plain.norm() < 1e-5


def test_micro_batches_add_up_to_the_same_gradient(student, questions, accelerator):
    prompts = mixed_prompts(student, questions)
    done = sampled(student, prompts, [1, 2, 3, 4], student.sampling)
    rows = (prompts, done, [0.5, -1.0, 2.0, 1.0], [1.0] * 4)
    whole, figures = gradients(student, accelerator, *rows)
    for size in (1, 3):
        parts, others = gradients(student, accelerator, *rows, rollouts_at_once=size)
        assert (whole - parts).norm() / whole.norm() < 1e-5
        assert others["loss"] == pytest.approx(figures["loss"], abs=1e-6)


def test_rollouts_without_advantage_cost_nothing_and_change_nothing(
    student, questions, accelerator, monkeypatch
):
    prompts = mixed_prompts(student, questions)
    done = sampled(student, prompts, [1, 2, 3, 4], student.sampling)
    rows = (prompts, done, [0.5, 0.0, -1.0, 0.0], [1.0] * 4)
    score, seen = grpo.batched_logps, []
    monkeypatch.setattr(grpo, "batched_logps", lambda *a: seen.append(len(a[2])) or score(*a))
    left, _ = gradients(student, accelerator, *rows)
    # A β whose gradient vanishes in fp32 keeps them all.
    kept, _ = gradients(student, accelerator, *rows, beta=1e-30, reference=student.model)
    assert seen == [2, 4, 4] and (left - kept).norm() / kept.norm() < 1e-5
    none, figures = gradients(
        student, accelerator, prompts, completions=done, advantages=[0.0] * 4, weights=[1.0] * 4
    )
    assert none.abs().max() == 0 and figures["loss"] == 0


def test_second_update_is_clipped_against_the_first_policy(student, questions, accelerator):
    """μ = 2 with a large step: ratios leave 1 ± ε and are counted."""
    prompts = [question.prompt for question in questions[:3]]
    done = sampled(student, prompts, [1, 2, 3], student.sampling)
    reference = type(student.model)(student.model.config)
    reference.load_state_dict(student.model.state_dict())
    settings = {"num_updates": 2, "beta": 0.04, "reference": reference.eval()}
    figures = trained(
        student,
        accelerator,
        prompts,
        completions=done,
        advantages=[1.0, -1.0, 2.0],
        rate=1.0,
        **settings,
    )
    assert figures["clipped"] > 0 and figures["kl"] > 0


@pytest.mark.parametrize("size, reward", [(3, 1.7), (6, 0.9), (7, 1.9), (8, 0.1)])
def test_equal_rewards_teach_exactly_nothing_even_where_their_mean_is_rounded(size, reward):
    rewards = torch.full((1, size), reward)
    for scale in ("group", "batch", "none"):
        advantages = grpo.group_advantages(rewards, scale, torch.tensor(0.5))
        assert torch.equal(advantages, torch.zeros(1, size)), scale


def test_a_completion_is_finished_exactly_where_an_end_was_sampled(student, questions):
    """Every id an end: one token, the end itself, which counts. No id an end: all tokens there are."""
    prompts = [question.prompt for question in questions[:2]]
    every = range(student.model.lm_head.out_features)
    for eos_ids, length in ((tuple(every), 1), ((), 5)):
        sampling = replace(student.sampling, eos_ids=eos_ids)
        sampling.max_completion_length = 5
        for completion in sampled(student, prompts, [1, 2], sampling):
            assert completion.finished == bool(eos_ids) and len(completion.ids) == length


def test_the_end_that_was_sampled_is_trained(student, questions, accelerator):
    """A completion ends with its EOS; leave that out, and the gradient is another one."""
    prompts = [questions[0].prompt] * 8
    likely = sampled(student, prompts, range(8), student.sampling)[0].ids[-3]
    sampling = replace(student.sampling, eos_ids=(int(likely),))
    (ended,) = sampled(student, prompts[:1], [0], sampling)
    assert ended.finished and ended.ids[-1] == likely and (ended.ids[:-1] != likely).all()
    one = {"prompts": prompts[:1], "advantages": [1.0], "weights": [1.0]}
    whole, _ = gradients(student, accelerator, completions=[ended], **one)
    without = ended._replace(ids=ended.ids[:-1], logps=ended.logps[:-1])
    less, _ = gradients(student, accelerator, completions=[without], **one)
    (-grpo_logps(student, prompts[0], ended.ids).mean()).backward()
    want = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    student.model.zero_grad()
    assert (whole - want).norm() / want.norm() < 1e-5 < (less - want).norm() / want.norm()


def grpo_logps(student, prompt, ids):
    return grpo.completion_logps(student.model, prompt, ids, student.sampling)


def test_gradients_are_clipped_before_the_step(student, questions, accelerator):
    """With plain SGD at rate 1 the weights move by the clipped gradient: its norm is the limit."""
    prompts = [questions[0].prompt, questions[1].prompt]
    done = sampled(student, prompts, [1, 2], student.sampling)
    before = torch.cat([p.detach().flatten() for p in student.model.parameters()])
    figures = trained(
        student,
        accelerator,
        prompts,
        completions=done,
        advantages=[1.0, -1.0],
        rate=1.0,
        max_grad_norm=1e-3,
    )
    after = torch.cat([p.detach().flatten() for p in student.model.parameters()])
    assert figures["grad_norm"] > 0.01
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def trained(student, accelerator, prompts, completions, advantages, rate, **settings):
    """The figures of one `update` with plain SGD."""
    optimizer = torch.optim.SGD(student.model.parameters(), lr=rate)
    settings = {"beta": 0.0} | settings
    return updated(student, accelerator, optimizer, prompts, completions, advantages, **settings)


def test_both_updates_of_a_step_are_measured_from_the_policy_that_sampled(
    student, questions, accelerator, monkeypatch
):
    """μ = 2, in parts of one: π_old stays what π_θ was before the first of them."""
    prompts = [questions[0].prompt, questions[1].prompt]
    done, seen, loss = sampled(student, prompts, [1, 2], student.sampling), [], grpo.grpo_loss

    def keep(logps, old_logps, *more, **settings):
        seen.append((logps.detach().clone(), old_logps.clone()))
        return loss(logps, old_logps, *more, **settings)

    monkeypatch.setattr(grpo, "grpo_loss", keep)
    settings = {"num_updates": 2, "rollouts_at_once": 1}
    trained(
        student,
        accelerator,
        prompts,
        completions=done,
        advantages=[1.0, -1.0],
        rate=0.1,
        **settings,
    )
    first, second = seen[:2], seen[2:]
    for (logps, old), (later, its_old) in zip(first, second):
        assert torch.equal(old, logps) and torch.equal(its_old, old) and not torch.equal(later, old)


def test_ranks_leave_out_equally_many_idle_rollouts(student, questions, accelerator, monkeypatch):
    """Three of four are idle here but one on another rank: one is left out, so calls stay equal."""
    prompts = [questions[0].prompt, questions[1].prompt] * 2
    done = sampled(student, prompts, [1, 2, 3, 4], student.sampling)
    lengths, loss = [], grpo.grpo_loss
    monkeypatch.setattr(
        grpo, "grpo_loss", lambda logps, *a, **k: lengths.append(len(logps)) or loss(logps, *a, **k)
    )
    monkeypatch.setattr(grpo, "gather_object", lambda idle: [*idle, 1])
    trained(
        student, accelerator, prompts, completions=done, advantages=[0.0, 0.0, 1.0, 0.0], rate=0.0
    )
    assert lengths == [3]


def test_kl_is_that_to_the_reference(student, questions, accelerator):
    """k3 of one completion, by hand, where the reference is another model."""
    prompt = questions[0].prompt
    (done,) = sampled(student, [prompt], [1], student.sampling)
    reference = type(student.model)(student.model.config).eval()
    settings = {"beta": 0.04, "reference": reference}
    now = grpo_logps(student, prompt, done.ids).detach()
    figures = trained(
        student,
        accelerator,
        prompts=[prompt],
        completions=[done],
        advantages=[1.0],
        rate=0.0,
        **settings,
    )
    with torch.no_grad():
        theirs = grpo.completion_logps(reference, prompt, done.ids, student.sampling)
    d = theirs - now
    by_hand = (d.exp() - d - 1).mean().item()
    assert by_hand > 0.01 and figures["kl"] == pytest.approx(by_hand, rel=1e-3)


def test_dropout_is_off_when_scoring(student, questions):
    for layer in student.model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    prompt, ids = questions[0].prompt, torch.tensor([5, 6, 7])
    student.model.train()
    (first, _), (again, _) = (
        scored(student.model, [prompt], [ids], student.sampling) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert torch.allclose(first[0], grpo_logps(student, prompt, ids), atol=1e-5)
