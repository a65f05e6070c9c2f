"""Every check of lab 01 takes a right answer written differently from ours, and turns down wrong ones, each with its own message."""

import math

import pytest
import torch
from torch.nn import functional as F

from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab01 as check

# ---------------------------------------------------------------- logits_to_answer


def right_answer(logits, id2label):
    answers = []
    for row in logits.tolist():
        powers = [math.exp(z - max(row)) for z in row]
        best = row.index(max(row))
        answers.append({"label": id2label[best], "score": powers[best] / sum(powers)})
    return answers


def answering(score, pick=lambda row: row.argmax().item(), named=True):
    """An answer whose score is score(logits)[row, chosen]."""

    def answer(logits, id2label):
        scores, chosen = score(logits), [pick(row) for row in logits]
        return [{"label": id2label[c] if named else c, "score": scores[i, c].item()} for i, c in enumerate(chosen)]

    return answer


def score_as_tensor(logits, id2label):
    return [{"label": a["label"], "score": torch.tensor(a["score"])} for a in right_answer(logits, id2label)]


# ---------------------------------------------------------------- top_p_filter


def right_top_p(logits, p):
    out = torch.full_like(logits, -math.inf)
    for i, row in enumerate(logits):
        total = 0.0
        for token in row.argsort(descending=True).tolist():
            if total >= p:
                break
            out[i, token] = row[token]
            total += row.softmax(-1)[token].item()
    return out


def top_p(logits, p, before=True, scatter=True, per_row=True, fill=-math.inf):
    ordered, positions = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    total = probability.cumsum(-1) if per_row else probability.cumsum(-1) + probability.cumsum(-1)[:1].flip(-1) * 0.5
    remove = (total - probability >= p) if before else (total > p)
    return logits.masked_fill(remove.scatter(-1, positions, remove) if scatter else remove, fill)


def top_p_probabilities(logits, p):
    return top_p(logits, p).softmax(-1)


def top_p_in_place(logits, p):
    return logits.copy_(top_p(logits, p))


def top_p_one_row_for_all(logits, p):
    kept = top_p(logits, p)[:1] != -math.inf
    return logits.masked_fill(~kept, -math.inf)


def top_p_best_dropped(logits, p):
    out = top_p(logits, p)
    return out if p > 0.5 else torch.full_like(out, -math.inf)


def top_p_reversed(logits, p):
    """Right on a few tokens, but puts the mask back with gather, which undoes the sort in the wrong direction."""
    ordered, positions = logits.sort(-1, descending=True)
    remove = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1) >= p
    return logits.masked_fill(remove.gather(-1, positions), -math.inf)


# ---------------------------------------------------------------- repetition_penalty


def right_penalty(logits, input_ids, penalty):
    out = logits.clone()
    for i, row in enumerate(input_ids.tolist()):
        for token in set(row):
            out[i, token] = out[i, token] / penalty if out[i, token] > 0 else out[i, token] * penalty
    return out


def penalised(change, each_time=False, all_rows=False, everywhere=False):
    def answer(logits, input_ids, penalty):
        out = logits.clone()
        for i, row in enumerate(input_ids.tolist()):
            tokens = input_ids.flatten().tolist() if all_rows else row
            tokens = range(logits.shape[1]) if everywhere else tokens
            for token in tokens if each_time else sorted(set(tokens)):
                out[i, token] = change(out[i, token], penalty)
        return out

    return answer


def by_sign(value, penalty):
    return value / penalty if value > 0 else value * penalty


def penalty_in_place(logits, input_ids, penalty):
    return logits.copy_(right_penalty(logits, input_ids, penalty))


# ---------------------------------------------------------------- greedy_decode


def right_greedy(model, input_ids, max_new_tokens, eos_token_id=None):
    tokens, out = input_ids[0].tolist(), None
    while len(tokens) < input_ids.shape[1] + max_new_tokens:
        with torch.no_grad():
            seen = out.past_key_values if out else None
            out = model(torch.tensor([tokens[-1:]]) if out else input_ids, past_key_values=seen, use_cache=True)
        tokens.append(int(out.logits[0, -1].topk(1).indices))
        if tokens[-1] == eos_token_id:
            break
    return torch.tensor([tokens])


def greedy(cache=True, whole=False, position=-1, eos="keep", prompt=True, stale=False, extra=False):
    """Greedy decoding with one thing wrong."""

    @torch.no_grad()
    def answer(model, input_ids, max_new_tokens, eos_token_id=None):
        ids, new, past, first = input_ids, input_ids, None, None
        for _ in range(max_new_tokens):
            out = model(input_ids=ids if whole or not cache else new, past_key_values=None if not cache else past, use_cache=True)
            past = first = first or out.past_key_values
            past = None if whole or stale else out.past_key_values
            new = out.logits[:, position][:, None].argmax(-1)
            if new.item() == eos_token_id and eos == "drop":
                break
            ids = torch.cat([ids, new], dim=1)
            if new.item() == eos_token_id and eos != "ignore":
                break
        if extra:
            model(input_ids=new, past_key_values=past)
        return ids if prompt else ids[:, input_ids.shape[1] :]

    return answer


def greedy_without_the_first(model, input_ids, max_new_tokens, eos_token_id=None):
    out = right_greedy(model, input_ids, max_new_tokens, eos_token_id)
    return torch.cat([out[:, 1:], out[:, -1:]], dim=1)


# ---------------------------------------------------------------- perplexity


def right_perplexity(model, input_ids):
    log_p = model(input_ids).logits[0].log_softmax(-1)
    total = sum(log_p[t - 1, input_ids[0, t]].item() for t in range(1, input_ids.shape[1]))
    return math.exp(-total / (input_ids.shape[1] - 1))


def losses(model, input_ids):
    return F.cross_entropy(model(input_ids).logits[0, :-1], input_ids[0, 1:], reduction="none")


def perplexity_unshifted(model, input_ids):
    return F.cross_entropy(model(input_ids).logits[0], input_ids[0]).exp().item()


def perplexity_shifted_the_other_way(model, input_ids):
    return F.cross_entropy(model(input_ids).logits[0, 1:], input_ids[0, :-1]).exp().item()


RIGHT = {
    check.logits_to_answer: right_answer,
    check.top_p_filter: right_top_p,
    check.repetition_penalty: right_penalty,
    check.greedy_decode: right_greedy,
    check.perplexity: right_perplexity,
}

WRONG = {
    check.logits_to_answer: {
        "a position for a name": (answering(lambda z: z.softmax(-1), named=False), "look its name up in id2label"),
        "the least likely": (answering(lambda z: z.softmax(-1), pick=lambda row: row.argmin().item()), "the largest logit of each row"),
        "softmax over the batch": (answering(lambda z: z.softmax(0)), "the softmax over the last axis"),
        "sigmoid": (answering(lambda z: z.sigmoid()), "its scores over all classes sum to one"),
        "the bare logit": (answering(lambda z: z), "the softmax of the row's logits"),
        "overflow": (answering(lambda z: z.exp() / z.exp().sum(-1, keepdim=True)), "exp overflows"),
        "a tensor": (score_as_tensor, "call .item()"),
        "one dict": (lambda logits, names: right_answer(logits, names)[0], "return a list with one"),
    },
    check.top_p_filter: {
        "drops the token that reaches p": (lambda z, p: top_p(z, p, before=False), "0.5 alone is too little"),
        "mask not put back": (lambda z, p: top_p(z, p, scatter=False), "not the likeliest"),
        "mask put back backwards": (top_p_reversed, "bring it back to their own places with scatter"),
        "zero for the rest": (lambda z, p: top_p(z, p, fill=0.0), "with minus infinity for the rest"),
        "probabilities": (top_p_probabilities, "return logits (not probabilities)"),
        "in place": (top_p_in_place, "work on a copy"),
        "one row for all": (top_p_one_row_for_all, "sort and sum each row apart"),
        "nothing left": (top_p_best_dropped, "the most likely one always stays"),
    },
    check.repetition_penalty: {
        "always divides": (penalised(lambda z, penalty: z / penalty), "a divided negative logit is more likely"),
        "always multiplies": (penalised(lambda z, penalty: z * penalty), "divide a positive logit by the penalty"),
        "subtracts": (penalised(lambda z, penalty: z - penalty), "a seen token's logit of 2 became 0"),
        "each time it occurs": (penalised(by_sign, each_time=True), "penalised twice"),
        "all rows alike": (penalised(by_sign, all_rows=True), "use each row's own input_ids"),
        "every token": (penalised(by_sign, everywhere=True), "penalise the tokens in input_ids only"),
        "in place": (penalty_in_place, "work on a copy"),
    },
    check.greedy_decode: {
        "no cache": (greedy(cache=False), "after the first step pass only the newest token"),
        "the last cache forgotten": (greedy(stale=True), "keep the newest past_key_values"),
        "the first position": (greedy(position=0), "the logits at the last position"),
        "new tokens only": (greedy(prompt=False), "prompt and new tokens"),
        "loses the first token": (greedy_without_the_first, "does not begin with the prompt"),
        "a pass for nothing": (greedy(extra=True), "the last token needs no pass after it"),
        "goes on after eos": (greedy(eos="ignore"), "leave the loop"),
        "drops eos": (greedy(eos="drop"), "append the token first"),
    },
    check.perplexity: {
        "no shift": (perplexity_unshifted, "the logits at t predict token t + 1"),
        "shifted the other way": (perplexity_shifted_the_other_way, "compare logits[:, :-1] with input_ids[:, 1:]"),
        "no exp": (lambda model, ids: losses(model, ids).mean().item(), "take exp of the mean"),
        "a sum": (lambda model, ids: losses(model, ids).sum().exp().item(), "(not the sum)"),
        "a mean of perplexities": (lambda model, ids: losses(model, ids).exp().mean().item(), "average the negative log-probabilities first"),
        "base two": (lambda model, ids: 2 ** losses(model, ids).mean().item(), "natural logarithm"),
        "a tensor": (lambda model, ids: losses(model, ids).mean().exp(), "return a float"),
    },
}


@pytest.mark.parametrize("checker", RIGHT, ids=lambda c: c.__name__)
def test_takes_a_right_answer_written_differently(checker, capsys):
    checker(RIGHT[checker])
    assert capsys.readouterr().out.count("✓") >= 4


@pytest.mark.parametrize(
    ("checker", "wrong"), [(c, name) for c, answers in WRONG.items() for name in answers], ids=lambda x: getattr(x, "__name__", x)
)
def test_turns_down_a_wrong_answer_with_its_own_message(checker, wrong):
    candidate, advice = WRONG[checker][wrong]
    with pytest.raises(CheckFailed) as caught:
        checker(candidate)
    assert advice in str(caught.value)


@pytest.mark.parametrize("checker", RIGHT, ids=lambda c: c.__name__)
def test_says_not_written_yet_without_a_traceback(checker):
    def stub(*args, **kwargs):
        raise NotImplementedError

    with pytest.raises(NotWrittenYet, match="not written yet") as caught:
        checker(stub)
    assert caught.value._render_traceback_() == [f"○ {caught.value}"]
