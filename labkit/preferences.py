"""Learning from preferences: the Bradley-Terry loss of a reward model, DPO, and the pieces of RLHF with RLOO.

A pair is a prompt with two completions, one chosen, one rejected. A *sequence log-probability* is the sum of the log-probabilities of a
completion's tokens, given everything before them; prompt and padding do not count. `dpo_loss` equals trl's DPOTrainer in value and gradient.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The loss of a reward model on pairs: the mean of -log sigmoid(chosen - rejected).

    chosen, rejected: the rewards it gives, (pairs,) each. It is the negative log-likelihood of the preferences when chosen is preferred
    with probability sigmoid of the difference (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155).
    Raises ValueError when the shapes differ or there is no pair.
    """
    _same_shape(chosen=chosen, rejected=rejected)
    return -F.logsigmoid(chosen - rejected).mean()


def preference_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """The share of pairs whose chosen side has the higher score; a tie counts half, as a coin would. (pairs,) each."""
    _same_shape(chosen=chosen, rejected=rejected)
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()


def completion_mask(prompt_lengths: Tensor, attention_mask: Tensor) -> Tensor:
    """1 where a token belongs to the completion: (batch, seq), from each row's number of prompt tokens, (batch,), padding on either side.

    Raises ValueError for a row whose prompt leaves no token of completion.
    """
    position = attention_mask.cumsum(-1)  # of real tokens, from 1; padding repeats its neighbour's and is masked below
    mask = (position > prompt_lengths[:, None]).to(attention_mask.dtype) * attention_mask
    empty = (mask.sum(-1) == 0).nonzero()
    if len(empty):
        row = int(empty[0])
        raise ValueError(f"row {row} has {int(attention_mask[row].sum())} tokens, all of them prompt: cut the prompt, not the completion")
    return mask


def token_logps(logits: Tensor, input_ids: Tensor) -> Tensor:
    """The log-probability of each token but the first, given those before: (batch, seq, vocab), (batch, seq) -> (batch, seq - 1), fp32.

    Position t of the logits predicts token t + 1. bf16 logits are converted first: a sum over a completion in bf16 loses the small differences.
    Raises ValueError when logits and ids do not belong together.
    """
    if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit input_ids {tuple(input_ids.shape)}: expected (batch, seq, vocab) and (batch, seq)")
    logps = logits[:, :-1].float().log_softmax(-1)
    return logps.gather(-1, input_ids[:, 1:, None]).squeeze(-1)


def sequence_logps(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of each completion, summed over its tokens: (batch,), fp32.

    logits (batch, seq, vocab), input_ids (batch, seq), mask (batch, seq): 1 on tokens of the completion, 0 on prompt and padding.
    Not averaged: DPO's derivation is about the probability of the whole completion. Raises ValueError for a row without completion, and for
    one whose completion begins at the first token, which nothing predicts.
    """
    if mask.shape != input_ids.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit input_ids {tuple(input_ids.shape)}: one entry for each token")
    if bool((mask.sum(-1) == 0).any()):
        raise ValueError(f"row {int((mask.sum(-1) == 0).nonzero()[0])} has no token of completion in its mask")
    if bool(mask[:, 0].any()):
        raise ValueError(
            f"row {int(mask[:, 0].nonzero()[0])}: the completion begins at token 0, which nothing predicts; put a prompt or bos before it"
        )
    return token_logps(logits, input_ids).masked_fill(mask[:, 1:] == 0, 0.0).sum(-1)


@dataclass(frozen=True)
class DPOResult:
    """What `dpo_loss` gives: the loss, a scalar, and each pair's implicit rewards, (pairs,), without gradient."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """Chosen minus rejected reward, (pairs,)."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def accuracy(self) -> float:
        """The share of pairs whose chosen side has the higher implicit reward."""
        return preference_accuracy(self.chosen_rewards, self.rejected_rewards)


def implicit_rewards(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """beta times the log-ratio of policy and reference, (pairs,): the reward for which the policy would be optimal, up to a constant a prompt."""
    return beta * (policy - reference)


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1) -> DPOResult:
    """Direct preference optimization: the mean of -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)).

    All four are sequence log-probabilities, (pairs,). Rafailov et al. 2023, arXiv 2305.18290, equation 7. Raises ValueError when shapes
    differ, when beta is not above 0, and when a gradient could reach the reference.
    """
    _same_shape(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, reference_chosen=reference_chosen, reference_rejected=reference_rejected
    )
    if not beta > 0:
        raise ValueError(f"beta is {beta}: choose a number above 0, usually 0.1; a larger one keeps the policy nearer to the reference")
    if reference_chosen.requires_grad or reference_rejected.requires_grad:
        raise ValueError("the reference's log-probabilities carry a gradient: compute them under torch.no_grad(), the reference stays as it is")
    chosen, rejected = implicit_rewards(policy_chosen, reference_chosen, beta), implicit_rewards(policy_rejected, reference_rejected, beta)
    return DPOResult(bradley_terry_loss(chosen, rejected), chosen.detach(), rejected.detach())


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy to serve as reference: in eval mode, no parameter of it trains, and training the model leaves it alone."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Each sample's reward minus the mean reward of the other samples of its prompt: (prompts, samples) -> (prompts, samples).

    REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740). A baseline that leaves the sample out does not depend on it, so that the
    gradient stays unbiased. Raises ValueError with fewer than two samples a prompt.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}: give (prompts, samples) with two samples or more, the others are the baseline")
    samples = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)


def kl_per_token(policy: Tensor, reference: Tensor, mask: Tensor, estimator: str = "k1") -> Tensor:
    """An estimate of KL(policy || reference) at each token that the policy sampled: (batch, seq) each -> (batch, seq), 0 outside the mask.

    policy, reference: log-probabilities of the sampled tokens. "k1": their difference, right on average, negative at times. "k3":
    exp(-d) - 1 + d for the difference d, right on average too, never negative, with less variance near 0 (Schulman 2020, "Approximating KL
    divergence"). Both need samples of the policy. Raises ValueError for another estimator or shapes that differ.
    """
    _same_shape(policy=policy, reference=reference, mask=mask)
    difference = policy - reference
    if estimator == "k1":
        estimate = difference
    elif estimator == "k3":
        estimate = torch.exp(-difference) - 1 + difference
    else:
        raise ValueError(f"estimator is {estimator!r}: choose 'k1' or 'k3'")
    return estimate.masked_fill(mask == 0, 0.0)


def exact_kl(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(policy || reference) over the whole vocabulary at each position: (..., vocab) each -> (...), fp32, in nats."""
    _same_shape(policy_logits=policy_logits, reference_logits=reference_logits)
    policy, reference = policy_logits.float().log_softmax(-1), reference_logits.float().log_softmax(-1)
    return (policy.exp() * (policy - reference)).sum(-1)


def penalised_rewards(scores: Tensor, policy: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The reward that RLHF maximises: score minus beta times the completion's KL estimate, (batch,), without gradient.

    scores (batch,); policy, reference, mask (batch, seq) as in `kl_per_token`. Raises ValueError for a negative beta.
    """
    if beta < 0:
        raise ValueError(f"beta is {beta}: a negative penalty rewards drifting from the reference; choose 0 or more")
    return scores.detach() - beta * kl_per_token(policy.detach(), reference.detach(), mask).sum(-1)


def policy_gradient_loss(policy: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE: minus the mean over completions of advantage times sequence log-probability, a scalar to minimise.

    policy (batch, seq): log-probabilities of the sampled tokens, with gradient; advantages (batch,); mask (batch, seq). Its gradient is that of
    minus the expected reward. Raises ValueError when shapes differ, or when the advantages carry a gradient.
    """
    _same_shape(policy=policy, mask=mask)
    if advantages.shape != policy.shape[:1]:
        raise ValueError(
            f"advantages {tuple(advantages.shape)} do not fit {policy.shape[0]} completions: give one for each, flatten (prompts, samples)"
        )
    if advantages.requires_grad:
        raise ValueError("the advantages carry a gradient: detach them, they weigh the log-probabilities and are not trained")
    return -(advantages * policy.masked_fill(mask == 0, 0.0).sum(-1)).mean()


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    if next(iter(tensors.values())).numel() == 0:
        raise ValueError(f"{' and '.join(shapes)} are empty: give at least one pair or completion")
