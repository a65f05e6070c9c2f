"""Every check of lab 10 takes a right answer written differently from ours, and turns down wrong ones, each with its own message."""

import copy
import re

import pytest
import torch
from torch import nn

from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab10 as check

# ---------------------------------------------------------------- bradley_terry_loss


def right_bradley_terry(chosen, rejected):
    return torch.nn.functional.softplus(rejected - chosen).sum() / len(chosen)


WRONG_BRADLEY_TERRY = {
    "sign": (lambda c, r: right_bradley_terry(r, c), "the sign is turned"),
    "sum": (lambda c, r: right_bradley_terry(c, r) * len(c), "take the mean"),
    "sigmoid without log": (lambda c, r: 1 - torch.sigmoid(c - r).mean(), "expected log 2"),
    "log of sigmoid": (lambda c, r: -torch.sigmoid(c - r).log().mean(), "use F.logsigmoid"),
    "each side alone": (
        lambda c, r: (right_bradley_terry(c, torch.zeros_like(c)) + right_bradley_terry(-r, torch.zeros_like(r))) / 2,
        "the difference inside",
    ),
    "detached": (lambda c, r: right_bradley_terry(c, r.detach()), "no gradient reaches one of the sides"),
    "a loss a pair": (lambda c, r: torch.nn.functional.softplus(r - c), "the answer has shape (9,)"),
}


def test_bradley_terry_takes_a_right_answer(capsys):
    check.bradley_terry_loss(right_bradley_terry)
    assert "✓ no overflow" in capsys.readouterr().out


@pytest.mark.parametrize("fault", list(WRONG_BRADLEY_TERRY))
def test_bradley_terry_turns_down(fault):
    candidate, message = WRONG_BRADLEY_TERRY[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.bradley_terry_loss(candidate)


# ---------------------------------------------------------------- sequence_logps


def scorer(*, mean=False, unshifted=False, prompt=False, everything=False, late=False, positive=False, coarse=False, detach=False, raw=False):
    """A right answer, unlike ours (cross entropy a token, a loop over rows), with one thing wrong at a time."""

    def sequence_logps(logits, input_ids, mask):
        sums = []
        for scores, ids, counts in zip(logits if coarse else logits.float(), input_ids, mask):
            if not unshifted:
                scores, ids, counts = scores[:-1], ids[1:], counts[:-1] if late else counts[1:]
            lost = torch.nn.functional.cross_entropy(scores, ids, reduction="none")
            if raw:
                lost = -scores.gather(1, ids[:, None]).squeeze(1) + 20
            if prompt:
                counts = torch.arange(len(counts)) <= counts.nonzero().max()
            if everything:
                counts = torch.ones_like(counts)
            total = -lost[counts.bool()].sum()
            sums.append(total / counts.sum() if mean else total)
        out = torch.stack(sums)
        out = -out if positive else out
        return out.detach() if detach else out

    return sequence_logps


WRONG_LOGPS = {
    "mean": (dict(mean=True), "these are means over the completion's tokens"),
    "not shifted": (dict(unshifted=True), "scored with the logits of its own place"),
    "prompt counted": (dict(prompt=True), "tokens of the prompt are counted"),
    "everything counted": (dict(everything=True), "tokens of the prompt are counted"),
    "mask late": (dict(late=True), "the mask is one place late"),
    "a loss": (dict(positive=True), "no minus before it"),
    "no softmax": (dict(raw=True), "not the sum over the completion's tokens"),
    "bf16": (dict(coarse=True), "convert with .float() first"),
    "detached": (dict(detach=True), "no gradient reaches the logits"),
}


def test_logps_take_a_right_answer():
    check.sequence_logps(scorer())


@pytest.mark.parametrize("fault", list(WRONG_LOGPS))
def test_logps_turn_down(fault):
    options, message = WRONG_LOGPS[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.sequence_logps(scorer(**options))


# ---------------------------------------------------------------- frozen_copy


def right_copy(model):
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.requires_grad = False
    reference.train(False)
    return reference


def shallow(model):
    reference = type(model)(dropout=0.3)
    for module, other in ((reference.embedding, model.embedding), (reference.lm_head, model.lm_head)):
        module._parameters.update(other._parameters)
    return reference.eval()


def freezes_both(model):
    return copy.deepcopy(model.eval().requires_grad_(False))


def fresh(model):
    return type(model)().eval().requires_grad_(False)


WRONG_COPY = {
    "the model itself": (lambda model: model, "the reference is the model itself"),
    "shared weights": (shallow, "shares its weights with the model"),
    "still trains": (lambda model: copy.deepcopy(model).eval(), "the reference still trains"),
    "in train mode": (lambda model: copy.deepcopy(model).requires_grad_(False), "call .eval() on the copy"),
    "freezes both": (freezes_both, "the model itself is frozen"),
    "new weights": (fresh, "the copy gives other logits"),
    "a state dict": (lambda model: model.state_dict(), "not a model"),
}


def test_copy_takes_a_right_answer():
    check.frozen_copy(right_copy)


@pytest.mark.parametrize("fault", list(WRONG_COPY))
def test_copy_turns_down(fault):
    candidate, message = WRONG_COPY[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.frozen_copy(candidate)


# ---------------------------------------------------------------- rloo_advantages


def right_rloo(rewards):
    k = rewards.shape[1]
    others = 1 - torch.eye(k)
    return rewards - rewards @ others / (k - 1)


WRONG_RLOO = {
    "the sample itself in the baseline": (lambda r: r - r.mean(1, keepdim=True), "this one included"),
    "grpo": (lambda r: (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True), "that is GRPO's"),
    "no baseline": (lambda r: r, "along axis 1"),
    "mean of the batch": (lambda r: r - r.mean(), "along axis 1"),
    "over prompts": (lambda r: r - r.mean(0, keepdim=True), "along axis 1"),
    "divided by k": (lambda r: r - r @ (1 - torch.eye(r.shape[1])) / r.shape[1], "there are k - 1 others"),
    "sign": (lambda r: -right_rloo(r), "has a negative advantage"),
    "the best other": (
        lambda r: r - torch.stack([torch.cat([r[:, :j], r[:, j + 1 :]], 1).amax(1) for j in range(r.shape[1])], 1),
        "the mean of the other",
    ),
    "flat": (lambda r: right_rloo(r).flatten(), "the answer has shape (20,)"),
}


def test_rloo_takes_a_right_answer():
    check.rloo_advantages(right_rloo)


@pytest.mark.parametrize("fault", list(WRONG_RLOO))
def test_rloo_turns_down(fault):
    candidate, message = WRONG_RLOO[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.rloo_advantages(candidate)


# ---------------------------------------------------------------- penalised_rewards


@torch.no_grad()
def right_penalty(scores, policy, reference, mask, beta):
    return torch.stack([score - beta * (p - r)[m.bool()].sum() for score, p, r, m in zip(scores, policy, reference, mask)])


def no_mask(scores, policy, reference, mask, beta):
    return right_penalty(scores, policy, reference, torch.ones_like(mask), beta)


def per_token(scores, policy, reference, mask, beta):
    return scores - beta * ((policy - reference).detach() * mask).sum(1) / mask.sum(1)


def with_path(scores, policy, reference, mask, beta):
    return scores - beta * ((policy - reference) * mask).sum(1)


@torch.no_grad()
def forward_kl(scores, policy, reference, mask, beta):
    return scores - beta * (reference.exp() * (reference - policy) * mask).sum(1)


WRONG_PENALTY = {
    "wrong direction": (lambda s, p, r, m, b: right_penalty(s, r, p, m, b), "KL has the wrong direction"),
    "added": (lambda s, p, r, m, b: right_penalty(s, p, r, m, -b), "added where it must be taken off"),
    "forward KL": (forward_kl, "not score - beta * sum"),
    "mean": (per_token, "the penalty is a mean over the tokens"),
    "prompt counted": (no_mask, "use the mask before you sum"),
    "always on": (lambda s, p, r, m, b: right_penalty(s, p, r, m, b + 0.1), "with beta 0 the reward must be the score"),
    "gradient": (with_path, "the reward carries a gradient"),
    "a reward a token": (lambda s, p, r, m, b: (-b * (p - r) * m).detach(), "the answer has shape (4, 6)"),
}


def test_penalty_takes_a_right_answer():
    check.penalised_rewards(right_penalty)


@pytest.mark.parametrize("fault", list(WRONG_PENALTY))
def test_penalty_turns_down(fault):
    candidate, message = WRONG_PENALTY[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.penalised_rewards(candidate)


# ---------------------------------------------------------------- policy_gradient_loss


def right_gradient(policy, advantages, mask):
    return (advantages[:, None] * mask * policy).sum() / -len(policy)


WRONG_GRADIENT = {
    "sign": (lambda p, a, m: -right_gradient(p, a, m), "an optimizer minimises"),
    "no mask": (lambda p, a, m: right_gradient(p, a, torch.ones_like(m)), "use the mask"),
    "mean over tokens": (lambda p, a, m: -(a * (p * m).sum(1) / m.sum(1)).mean(), "sum over the tokens"),
    "sum over completions": (lambda p, a, m: 3 * right_gradient(p, a, m), "divide by the number of completions"),
    "probability": (lambda p, a, m: -(a * ((p * m).sum(1)).exp()).mean(), "summed log-probability"),
    "detached": (lambda p, a, m: right_gradient(p.detach(), a, m), "no gradient reaches the policy"),
}


def test_gradient_takes_a_right_answer():
    check.policy_gradient_loss(right_gradient)


@pytest.mark.parametrize("fault", list(WRONG_GRADIENT))
def test_gradient_turns_down(fault):
    candidate, message = WRONG_GRADIENT[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.policy_gradient_loss(candidate)


# ---------------------------------------------------------------- dpo_loss


def loss_of(
    *,
    sign=1.0,
    reference=True,
    detach=True,
    use_beta=True,
    total=False,
    plain_log=False,
    path=False,
    scale=True,
    swapped=False,
    two=False,
    dead=False,
):
    """A right answer, unlike ours (margins of log-ratios, softplus), with one thing wrong at a time."""

    def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
        if detach:
            reference_chosen, reference_rejected = reference_chosen.detach(), reference_rejected.detach()
        if swapped:
            reference_chosen, reference_rejected = reference_rejected, reference_chosen
        if not reference:
            reference_chosen = reference_rejected = torch.zeros_like(reference_chosen)
        margin = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        scaled = sign * margin * (beta if use_beta else 1.0)
        loss = -torch.log(torch.sigmoid(scaled)) if plain_log else torch.nn.functional.softplus(-scaled)
        chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
        rewards = [(beta if scale else 1.0) * (side if path else side.detach()) for side in (chosen, rejected)]
        loss = loss.sum() if total else loss.mean()
        loss = loss.detach() if dead else loss
        return (loss, rewards[0] - rewards[1]) if two else (loss, *rewards)

    return dpo_loss


WRONG_DPO = {
    "sign of the margin": (dict(sign=-1.0), "the sign of the margin is turned"),
    "no reference": (dict(reference=False), "with the reference's of the same side"),
    "sides mixed up": (dict(swapped=True), "with the reference's of the same side"),
    "reference trained": (dict(detach=False), "a gradient reaches the reference"),
    "beta forgotten": (dict(use_beta=False), "beta does not change the loss"),
    "sum": (dict(total=True), "the loss is the sum over the pairs"),
    "log of sigmoid": (dict(plain_log=True), "use F.logsigmoid"),
    "rewards with a gradient": (dict(path=True), "the rewards carry a gradient"),
    "rewards without beta": (dict(scale=False), "the rewards are not beta"),
    "policy detached": (dict(dead=True), "detach the reference's, and the rewards, only"),
    "the margin only": (dict(two=True), "return loss, chosen rewards, rejected rewards"),
}


def test_dpo_takes_a_right_answer():
    check.dpo_loss(loss_of())


def test_dpo_takes_an_answer_that_refuses_a_training_reference():
    def strict(pc, pr, rc, rr, beta):
        if rc.requires_grad:
            raise ValueError("the reference must not train")
        return loss_of()(pc, pr, rc, rr, beta)

    check.dpo_loss(strict)


@pytest.mark.parametrize("fault", list(WRONG_DPO))
def test_dpo_turns_down(fault):
    options, message = WRONG_DPO[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.dpo_loss(loss_of(**options))


# ---------------------------------------------------------------- stubs and labkit's own


def stub(*arguments, **options):
    raise NotImplementedError


CHECKS = ("bradley_terry_loss", "sequence_logps", "frozen_copy", "rloo_advantages", "penalised_rewards", "policy_gradient_loss", "dpo_loss")


@pytest.mark.parametrize("name", CHECKS)
def test_stubs(name):
    with pytest.raises(NotWrittenYet, match="not written yet"):
        getattr(check, name)(stub)


@pytest.mark.parametrize("name", CHECKS)
def test_labkits_own_pass(name):
    from labkit import preferences

    ours = getattr(preferences, name)
    if name == "dpo_loss":
        result = lambda *a: preferences.dpo_loss(*a)  # noqa: E731
        ours = lambda *a: (result(*a).loss, result(*a).chosen_rewards, result(*a).rejected_rewards)  # noqa: E731
    getattr(check, name)(ours)


def test_the_toy_is_a_module():
    assert isinstance(check.Toy(), nn.Module)
