"""Checks of lab 10: Bradley-Terry, log-probabilities of completions, the frozen reference, RLOO, the KL penalty, policy gradient, DPO."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from labkit import preferences
from labkit.checks import reporting
from labkit.checks.causal_toy import Toy


def _close(found, expected, atol: float = 1e-5) -> bool:
    return torch.is_tensor(found) and found.shape == expected.shape and torch.allclose(found.float(), expected.float(), atol=atol, rtol=1e-4)


def bradley_terry_loss(candidate: Callable) -> None:
    """`bradley_terry_loss(chosen, rejected)`: rewards (pairs,) each -> a scalar."""
    with reporting("bradley_terry_loss") as report:
        chosen, rejected = (2 * torch.randn(9)).requires_grad_(), (2 * torch.randn(9)).requires_grad_()
        loss = candidate(chosen, rejected)
        expected = preferences.bradley_terry_loss(chosen, rejected)
        report.shape(loss, ())
        report(
            "less loss where the chosen side leads",
            candidate(torch.ones(4), -torch.ones(4)) < candidate(-torch.ones(4), torch.ones(4)),
            "the loss is larger where the chosen side has the higher reward: the sign is turned, it is -log sigmoid(chosen - rejected)",
        )
        report(
            "a mean over pairs",
            not _close(loss, expected * 9),
            "the loss is the sum over the pairs: take the mean, so that it does not grow with the batch",
        )
        equal = candidate(torch.zeros(3), torch.zeros(3)).item()
        report("log 2 where both are equal", abs(equal - 0.693147) < 1e-4, f"two equal rewards gave {equal:.4g}, expected log 2: a coin's surprise")
        report(
            "-log sigmoid of the difference",
            _close(loss, expected),
            "the value is not that of -log sigmoid(chosen - rejected), the difference inside the sigmoid",
        )
        far = candidate(torch.tensor([-300.0]), torch.tensor([300.0]))
        report(
            "no overflow",
            bool(far.isfinite()) and abs(far.item() - 600) < 1,
            f"a difference of -600 gave {far.item():.4g}, expected 600: sigmoid rounds to 0 there; use F.logsigmoid, not the log of a sigmoid",
        )
        if loss.requires_grad:
            loss.backward()
        reached = all(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in (chosen, rejected))
        report("gradients reach both sides", reached, "no gradient reaches one of the sides: no detach, no .item()")


def sequence_logps(candidate: Callable) -> None:
    """`sequence_logps(logits, input_ids, mask)`: (batch, seq, vocab), (batch, seq), (batch, seq) -> (batch,)."""
    with reporting("sequence_logps") as report:
        logits, ids = torch.randn(3, 7, 11, requires_grad=True), torch.randint(0, 11, (3, 7))
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])
        out, expected = candidate(logits, ids, mask), preferences.sequence_logps(logits, ids, mask)
        report.shape(out, (3,))
        report(
            "a log-probability is below 0",
            bool((out < 0).all()),
            "a log-probability above 0: take log_softmax over the vocabulary, and no minus before it",
        )
        report(
            "a sum, not a mean",
            not _close(out, expected / mask.sum(-1)),
            "these are means over the completion's tokens: the probability of a completion is the product over them, so its logarithm is the sum",
        )
        unshifted = (logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) * mask).sum(-1)
        report(
            "position t predicts token t + 1",
            not _close(out, unshifted),
            "every token is scored with the logits of its own place, computed after reading it: logits[:, :-1] belong to input_ids[:, 1:]",
        )
        every = preferences.token_logps(logits, ids)
        report(
            "the prompt does not count",
            not _close(out, every.sum(-1)) and not _close(out, (every * (mask[:, 1:].flip(-1).cumsum(-1).flip(-1) > 0)).sum(-1)),
            "tokens of the prompt are counted, too: multiply by the mask before you sum",
        )
        late = (every * mask[:, :-1]).sum(-1)
        report(
            "the mask is shifted with the ids", not _close(out, late), "the mask is one place late: the ids lose their first column, so must the mask"
        )
        report("the completion's sum", _close(out, expected), "not the sum over the completion's tokens of the log-probability of each")
        noisy = logits.detach().clone()
        noisy[0, 6], noisy[:, 0] = 50 * torch.randn(11), 50 * torch.randn(3, 11)
        report(
            "prompt and padding change nothing",
            _close(candidate(noisy, ids, mask), out.detach()),
            "logits at the prompt or at padding change the result",
        )
        coarse = candidate(logits.detach().bfloat16(), ids, mask)
        report(
            "fp32",
            coarse.dtype == torch.float32,
            f"bf16 logits gave a sum in {coarse.dtype}: convert with .float() first, small differences matter here",
        )
        report(
            "gradients reach the logits", out.requires_grad, "no gradient reaches the logits: no detach, no no_grad; this is what will be trained on"
        )


def frozen_copy(candidate: Callable) -> None:
    """`frozen_copy(model)`: the reference, a copy that never trains."""
    with reporting("frozen_copy") as report:
        model, ids = Toy(dropout=0.3).train(), torch.randint(0, 12, (2, 6))
        reference = candidate(model)
        report("a model", isinstance(reference, nn.Module), f"returned a {type(reference).__name__}, not a model")
        report("another object", reference is not model, "the reference is the model itself: whatever trains the model moves both; copy.deepcopy it")
        shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in reference.parameters()}
        report("its own weights", not shared, "the copy shares its weights with the model, a shallow copy: copy.deepcopy it")
        report(
            "does not train",
            not any(p.requires_grad for p in reference.parameters()),
            "the reference still trains: requires_grad_(False) on the copy",
        )
        report("no dropout", not reference.training, "the reference is in train mode, so its dropout draws at random: call .eval() on the copy")
        report(
            "the model still trains",
            all(p.requires_grad for p in model.parameters()) and model.training,
            "the model itself is frozen, or in eval mode: do that to the copy, not to the model",
        )
        model.eval()
        before = reference(ids).logits
        same = torch.equal(before, model(ids).logits)
        report("says the same at first", same, "the copy gives other logits than the model: it must have the same weights")
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1
        report("stays where it was", torch.equal(reference(ids).logits, before), "training the model changed the reference")


def rloo_advantages(candidate: Callable) -> None:
    """`rloo_advantages(rewards)`: (prompts, samples) -> (prompts, samples)."""
    with reporting("rloo_advantages") as report:
        rewards = torch.randn(5, 4) + 10 * torch.randn(5, 1)
        out, expected = candidate(rewards.clone()), preferences.rloo_advantages(rewards)
        report.shape(out, (5, 4))
        report(
            "the mean of the others",
            not _close(out, rewards - (rewards.sum(1, keepdim=True) - rewards) / 4, 1e-4),
            "the others' sum is divided by the number of all samples: there are k - 1 others",
        )
        report(
            "a baseline for each prompt",
            _close(candidate(rewards + torch.arange(5.0)[:, None]), out, 1e-4),
            "a constant added to one prompt's rewards changes the advantages: compare a sample with the others of its own prompt, along axis 1",
        )
        report(
            "better is positive",
            bool(out[rewards == rewards.max(1, keepdim=True).values].gt(0).all()),
            "the best sample of a prompt has a negative advantage",
        )
        report(
            "the sample is left out",
            not _close(out, rewards - rewards.mean(1, keepdim=True), 1e-4),
            "the baseline is the mean of all samples, this one included: it depends on the sample, and the advantages shrink by (k - 1) / k; "
            "leave the sample out",
        )
        report(
            "not normalised",
            not torch.allclose(out.std(1), torch.ones(5), atol=0.05),
            "the advantages are divided by their spread: that is GRPO's, not RLOO's",
        )
        report("reward minus the others' mean", _close(out, expected, 1e-4), "not each reward minus the mean of the other rewards of its prompt")


def penalised_rewards(candidate: Callable) -> None:
    """`penalised_rewards(scores, policy, reference, mask, beta)`: (batch,), (batch, seq) three times, a number -> (batch,)."""
    with reporting("penalised_rewards") as report:
        scores, mask = torch.randn(4), torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]])
        policy, reference = (-3 * torch.rand(4, 6)).requires_grad_(), -3 * torch.rand(4, 6)
        out, kl = candidate(scores, policy, reference, mask, 0.3), ((policy - reference) * mask).sum(-1).detach()
        report.shape(out, (4,))
        report("beta 0 leaves the score", _close(candidate(scores, policy, reference, mask, 0.0), scores), "with beta 0 the reward must be the score")
        report(
            "straying costs",
            not _close(out.detach(), scores + 0.3 * kl),
            "the reward grows with the distance from the reference. Either the penalty is added where it must be taken off, or the KL has the wrong "
            "direction: KL(policy || reference) takes log policy minus log reference at what the policy sampled",
        )
        report(
            "summed over the completion",
            not _close(out.detach(), scores - 0.3 * kl / mask.sum(-1)),
            "the penalty is a mean over the tokens: then long completions may stray further; sum it",
        )
        whole = ((policy - reference).sum(-1)).detach()
        report("completion only", not _close(out.detach(), scores - 0.3 * whole), "prompt or padding is counted: use the mask before you sum")
        report(
            "score minus beta times KL",
            _close(out.detach(), scores - 0.3 * kl),
            "not score - beta * sum over the completion of (log policy - log reference)",
        )
        report(
            "a number, not a path for gradients",
            not out.requires_grad,
            "the reward carries a gradient: it only weighs the log-probabilities, so detach it, or compute it under no_grad",
        )


def policy_gradient_loss(candidate: Callable) -> None:
    """`policy_gradient_loss(policy, advantages, mask)`: (batch, seq), (batch,), (batch, seq) -> a scalar."""
    with reporting("policy_gradient_loss") as report:
        mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]])
        policy, advantages = (-2 * torch.rand(3, 4)).requires_grad_(), torch.tensor([2.0, -1.0, 0.5])
        loss = candidate(policy, advantages, mask)
        report.shape(loss, ())
        expected = preferences.policy_gradient_loss(policy, advantages, mask)
        report("gradients reach the policy", loss.requires_grad, "no gradient reaches the policy's log-probabilities: no detach, no no_grad")
        loss.backward()
        down = -policy.grad
        report(
            "a good completion becomes likelier",
            bool((down[0, 1:3] > 0).all()) and bool((down[1, 1:] < 0).all()),
            "a step down this loss makes the completion with the positive advantage less likely: an optimizer minimises, so put a minus before it",
        )
        report("prompt and padding are left alone", bool((policy.grad[mask == 0] == 0).all()), "a gradient reaches prompt or padding: use the mask")
        report(
            "summed over tokens, then a mean over completions",
            _close(loss, expected),
            "the value is not minus the mean over completions of advantage times the completion's summed log-probability: "
            "sum over the tokens (a mean would make long completions weigh less), and divide by the number of completions",
        )


def dpo_loss(candidate: Callable) -> None:
    """`dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)`: loss, chosen rewards, rejected rewards."""
    with reporting("dpo_loss") as report:
        policy = [(-20 + 3 * torch.randn(8)).requires_grad_() for _ in range(2)]
        reference = [-20 + 3 * torch.randn(8) for _ in range(2)]
        answer = candidate(*policy, *reference, 0.2)
        report("three results", isinstance(answer, tuple | list) and len(answer) == 3, "return loss, chosen rewards, rejected rewards")
        loss, chosen, rejected = answer
        expected = preferences.dpo_loss(*policy, *reference, 0.2)
        report.shape(loss, ())
        report("a mean over pairs", not _close(loss, 8 * expected.loss), "the loss is the sum over the pairs: take the mean")
        same = candidate(*[p.detach() for p in policy], *[p.detach() for p in policy], 0.2)[0]
        report(
            "something to train",
            loss.requires_grad,
            "no gradient reaches the policy's log-probabilities: detach the reference's, and the rewards, only",
        )
        report(
            "log 2 at the start",
            abs(same.item() - 0.693147) < 1e-4,
            f"a policy that equals its reference has the loss {same.item():.4g}, expected log 2: compare each log-probability of the policy "
            "with the reference's of the same side",
        )
        turned = preferences.dpo_loss(policy[1], policy[0], reference[1], reference[0], 0.2).loss
        report(
            "sign of the margin",
            not _close(loss, turned),
            "the loss falls when the rejected side gains: the sign of the margin is turned; it is the chosen log-ratio minus the rejected one",
        )
        one = preferences.dpo_loss(*policy, *reference, 1.0).loss
        report("scaled by beta", not _close(loss, one), "beta does not change the loss: multiply the margin by it, inside the sigmoid")
        report(
            "-log sigmoid of beta times the margin",
            _close(loss, expected.loss),
            "not the mean of -log sigmoid(beta * (chosen log-ratio - rejected log-ratio))",
        )
        report(
            "implicit rewards",
            _close(chosen, expected.chosen_rewards) and _close(rejected, expected.rejected_rewards),
            "the rewards are not beta * (log policy - log reference), (pairs,) each",
        )
        report(
            "rewards are for reading",
            not (chosen.requires_grad or rejected.requires_grad),
            "the rewards carry a gradient: detach them, nothing trains on them",
        )
        far = candidate(torch.tensor([-4000.0]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]), 0.2)[0]
        report("no overflow", bool(far.isfinite()), "a margin of -800 gives inf or nan: use F.logsigmoid, not the log of a sigmoid")
        report(
            "the reference does not train",
            not _reaches(candidate, policy),
            "a gradient reaches the reference: it must stay as it is; detach its side",
        )


def _reaches(candidate: Callable, policy: list[Tensor]) -> bool:
    """Whether a gradient reaches the reference's log-probabilities. An answer that refuses such a reference keeps it out, too."""
    reference = [(-20 + torch.randn(8)).requires_grad_() for _ in range(2)]
    try:
        candidate(*policy, *reference, 0.2)[0].backward()
    except ValueError:
        return False
    return any(side.grad is not None and bool(side.grad.abs().sum() > 0) for side in reference)
