"""Checks of lab 01, inference."""

from __future__ import annotations

import math

import torch

from labkit.checks import reporting


def logits_to_answer(candidate) -> None:
    """Logits become a label's name and its probability."""
    names = {0: "bad", 1: "good", 2: "so-so"}
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.5]])
    with reporting("logits_to_answer") as report:
        answers = candidate(logits, names)
        report(
            "one dict a row",
            isinstance(answers, list) and len(answers) == 2 and all(isinstance(a, dict) and a.keys() == {"label", "score"} for a in answers),
            'return a list with one {"label": ..., "score": ...} for each row of logits',
        )
        report(
            "labels by name",
            [a["label"] for a in answers] == ["good", "bad"],
            f"the labels are {[a['label'] for a in answers]}, expected ['good', 'bad']: take the position of the largest logit of each row, "
            "and look its name up in id2label",
        )
        report("plain numbers", all(isinstance(a["score"], float) for a in answers), "a score is a Python float: call .item()")
        scores = [a["score"] for a in answers]
        expected = logits.softmax(-1).max(-1).values.tolist()
        across_rows = logits.softmax(0).max(-1).values.tolist()
        report(
            "classes compete within a row",
            not _close(scores, across_rows),
            "each score depends on the other texts of the batch: take the softmax over the last axis, the classes",
        )
        report(
            "the softmax of the logits",
            _close(scores, expected),
            f"the scores are {[round(s, 3) for s in scores]}, expected {[round(s, 3) for s in expected]}: "
            "a score is the softmax of the row's logits at the chosen class; its scores over all classes sum to one",
        )
        huge = candidate(torch.tensor([[1000.0, 0.0, 990.0]]), names)[0]["score"]
        report(
            "survives large logits",
            math.isfinite(huge) and abs(huge - 1) < 1e-3,
            f"for logits of 1000 the score is {huge}: exp overflows. Use torch's softmax, or subtract the row's maximum first",
        )


def top_p_filter(candidate) -> None:
    """The smallest set of likely tokens that together have probability p stays; the rest becomes minus infinity."""
    probabilities = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.97, 0.01, 0.01, 0.01]])
    with reporting("top_p_filter") as report:
        logits = probabilities.log() + 1.5
        given = logits.clone()
        out = candidate(logits, 0.7)
        report.shape(out, (2, 4))
        report(
            "leaves its input alone", torch.equal(logits, given), "your code changed the logits it was given: work on a copy, for example masked_fill"
        )
        kept = out != -math.inf
        report(
            "what stays is unchanged",
            torch.equal(out[kept], logits[kept]),
            "the kept values changed: return logits (not probabilities), in the tokens' own order, with minus infinity for the rest",
        )
        report(
            "keeps the token that reaches p",
            kept[0].sum() == 2,
            f"of probabilities {_round(probabilities[0])} with p = 0.7, {_count(kept[0])} tokens stay, expected 2: 0.5 alone is too little, "
            "so 0.3 is needed too. A token stays if the sum before it, in order of probability, is below p",
        )
        report(
            "the likeliest tokens",
            kept[0].tolist() == [False, True, False, True],
            f"of probabilities {_round(probabilities[0])} the right number stays, but not the likeliest: "
            "the mask belongs to the sorted tokens, bring it back to their own places with scatter",
        )
        report(
            "rows on their own",
            kept[1].tolist() == [True, False, False, False],
            "a row's tokens depend on the other row: sort and sum each row apart",
        )
        tiny = candidate(logits, 0.1) != -math.inf
        report("never keeps nothing", bool(tiny.any(-1).all()), "with p = 0.1 a row has no token left: the most likely one always stays")
        large = torch.randn(3, 50) * 2
        out, order = candidate(large, 0.9), large.argsort(descending=True)
        before = large.softmax(-1).gather(1, order).cumsum(-1) - large.softmax(-1).gather(1, order)
        expected = torch.zeros_like(large, dtype=torch.bool).scatter(1, order, before < 0.9)
        report(
            "on a larger vocabulary too",
            torch.equal(out != -math.inf, expected),
            "on a larger vocabulary the wrong tokens stay: sort in descending order, and sum the probabilities before each token",
        )
        report("p = 1 keeps all", torch.equal(candidate(large, 1.0), large), "with p = 1 nothing is filtered")


def repetition_penalty(candidate) -> None:
    """Tokens that were there already lose: a positive logit is divided by the penalty, a negative one multiplied."""
    with reporting("repetition_penalty") as report:
        logits = torch.tensor([[2.0, -2.0, 4.0, -4.0, 1.0], [2.0, -2.0, 4.0, -4.0, 1.0]])
        ids = torch.tensor([[0, 1, 0], [3, 3, 3]])
        given = logits.clone()
        out = candidate(logits, ids, 2.0)
        report.shape(out, (2, 5))
        report("leaves its input alone", torch.equal(logits, given), "your code changed the logits it was given: work on a copy")
        report(
            "others stay as they were",
            torch.equal(out[:, [2, 4]], logits[:, [2, 4]]),
            "the logit of a token that was not there before changed: penalise the tokens in input_ids only",
        )
        report(
            "rows on their own",
            torch.equal(out[1, :2], logits[1, :2]) and out[0, 3] == logits[0, 3],
            "a row was penalised for tokens that only the other row has: use each row's own input_ids",
        )
        report("a positive logit is divided", out[0, 0] != 0.5 and out[0, 0] == 1.0, _positive(out[0, 0].item()))
        report(
            "a negative logit is multiplied",
            out[0, 1] == -4.0,
            f"a seen token's logit of -2 became {out[0, 1].item():g} with penalty 2, expected -4: a divided negative logit is more likely",
        )
        report("once, however often it was there", out[1, 3] == -8.0, "a token that occurs three times was penalised more than once")
        report("penalty 1 changes nothing", torch.equal(candidate(logits, ids, 1.0), logits), "with penalty 1 the logits should come back unchanged")


def _positive(value: float) -> str:
    if value == 0.5:
        return "a token that occurs twice was penalised twice: penalise each token once, however often it occurs"
    return f"a seen token's logit of 2 became {value:g} with penalty 2, expected 1: divide a positive logit by the penalty"


def greedy_decode(candidate) -> None:
    """Greedy decoding with a key-value cache: right tokens, and no token computed twice."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with reporting("greedy_decode") as report:
        sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.4, bos_token_id=0, eos_token_id=None)).eval()
        prompt = torch.tensor([[0, 7, 11, 3, 29]])
        read = []
        hook = model.register_forward_pre_hook(lambda _, args, kwargs: read.append(_length(args, kwargs)), with_kwargs=True)
        out = candidate(model, prompt, 12)
        hook.remove()
        report(
            "prompt and 12 new tokens",
            tuple(out.shape) == (1, 17),
            f"the answer has shape {tuple(out.shape)}, expected (1, 17): prompt and new tokens",
        )
        report("starts with the prompt", torch.equal(out[:, :5], prompt), "the answer does not begin with the prompt: append to input_ids")
        report(
            "the likeliest token first",
            out[0, 5] == model(prompt).logits[0, -1].argmax(),
            "the first new token is not the likeliest one after the prompt: take the argmax of the logits at the last position",
        )
        whole = model(out).logits[0, 4:-1].argmax(-1)
        report(
            "every token the likeliest",
            torch.equal(whole, out[0, 5:]),
            "from the second token on, tokens differ from the likeliest: pass only the newest token, and keep the newest past_key_values",
        )
        report(
            "reads no token twice",
            read[0] == 5 and set(read[1:]) <= {1},
            f"the model was given {read[:4]} ... tokens a step, expected [5, 1, 1, 1] ...: after the first step pass only the newest token",
        )
        report("no pass too many", len(read) <= 12, f"{len(read)} passes for 12 tokens: the last token needs no pass after it")
        end = out[0, 7].item()
        expected = out[0, : out[0, 5:].tolist().index(end) + 6]
        stopped = candidate(model, prompt, 12, eos_token_id=end)
        report("stops at eos", stopped.shape[1] < 17, "it went on after eos_token_id: leave the loop when the new token is eos_token_id")
        report("and keeps it", torch.equal(stopped[0], expected), "the answer should end with eos_token_id: append the token first, then look at it")


def _length(args, kwargs) -> int:
    return (args[0] if args else kwargs["input_ids"]).shape[1]


class _Fixed(torch.nn.Module):
    """A language model whose logits are given, whatever it reads."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, **kwargs):
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.logits[:, : input_ids.shape[1]])


def perplexity(candidate) -> None:
    """exp of the mean negative log-probability of each token after the first, given those before it."""
    with reporting("perplexity") as report:
        ids = torch.tensor([[0, 3, 1, 4, 2, 3]])
        value = candidate(_Fixed(torch.zeros(1, 6, 8)), ids)
        report("one Python number", isinstance(value, float), f"the answer is a {type(value).__name__}: return a float, for example with .item()")
        report(
            "8 for a guess among 8 tokens",
            abs(value - 8) < 1e-3,
            f"a model that finds all 8 tokens equally likely has perplexity 8, and the answer is {value:.4g}: "
            "take exp of the mean (not the sum) of the negative log-probabilities, natural logarithm",
        )
        logits = torch.randn(1, 6, 8) * 2
        losses = -logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        value, expected = candidate(_Fixed(logits), ids), losses.mean().exp().item()
        unshifted = (-logits.log_softmax(-1)[0].gather(1, ids[0, :, None]).mean()).exp().item()
        report(
            "each token from those before it",
            abs(value - unshifted) > 1e-3 * unshifted,
            "each token's probability is read at its own position, where the model has already seen it: the logits at t predict token t + 1",
        )
        report(
            "the mean inside the exponential",
            abs(value - losses.exp().mean().item()) > 1e-3 * value,
            "you averaged the perplexities of single tokens: average the negative log-probabilities first, then take exp",
        )
        report(
            "the right number",
            abs(value - expected) < 1e-3 * expected,
            f"the answer is {value:.4g}, expected {expected:.4g}: compare logits[:, :-1] with input_ids[:, 1:], and take the mean over those",
        )


def _close(found: list[float], expected: list[float]) -> bool:
    return all(abs(a - b) < 1e-4 for a, b in zip(found, expected, strict=True))


def _round(values: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def _count(kept: torch.Tensor) -> int:
    return int(kept.sum())
