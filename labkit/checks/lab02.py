"""Checks of lab 02, pretraining."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch.nn import functional as F

from labkit.checks import reporting
from labkit.checks.causal_toy import Toy, first_wrong_merge, gradients_are_clipped, next_token_loss, steps_are_small, toy_blocks, window_bits


def learn_bpe(candidate) -> None:
    """Byte pair encoding: count pairs of neighbours, merge the most frequent, again and again."""
    with reporting("learn_bpe") as report:
        words = {b" low": 5, b" lower": 2, b" newest": 6, b" widest": 3, b" new": 4}
        merges = candidate(words, 8)
        report(
            "a list of pairs of bytes",
            isinstance(merges, list)
            and all(isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(piece, bytes) for piece in pair) for pair in merges),
            "return a list with a tuple of two bytes objects for each merge, for example (b'e', b's')",
        )
        report("as many as asked for", len(merges) == 8, f"8 merges were asked for and {len(merges)} came back")
        by_count = candidate({b"xy": 10, b"ab": 1, b"abc": 1, b"abd": 1}, 1)
        report(
            "a word counts as often as it occurs",
            by_count == [(b"x", b"y")],
            f"the pair x, y is in one word, but that word occurs 10 times; you merged {by_count}: add the word's count, not 1",
        )
        inside = candidate({b"abab": 3, b"cd": 5}, 1)
        report(
            "a pair counts as often as a word holds it",
            inside == [(b"a", b"b")],
            f"abab, which occurs 3 times, holds the pair a, b twice: 6 against 5 for c, d; you merged {inside}: count every place in the word",
        )
        report(
            "merged pieces do not overlap",
            candidate({b"aaa": 3}, 2) == [(b"a", b"a"), (b"aa", b"a")],
            "after merging a, a the word aaa is aa, a: a piece that was merged is used up, so jump over both of its parts",
        )
        wrong = first_wrong_merge(words, merges)
        report(
            "each merge is the most frequent pair",
            not wrong,
            f"{wrong}: apply each merge to all words, then count anew and take the most frequent pair",
        )
        report(
            "stops when nothing is left",
            candidate({b"ab": 1, b"c": 2}, 5) == [(b"a", b"b")],
            "the words ab and c allow one merge only, and 5 were asked for: stop when there is no pair left",
        )


def pack(candidate) -> None:
    """Documents of any length become blocks of one length, without padding."""
    with reporting("pack") as report:
        documents = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
        blocks = candidate(documents, end=0, length=4)
        report(
            "a tensor of whole numbers",
            isinstance(blocks, torch.Tensor) and blocks.dtype == torch.long,
            f"the answer is a {getattr(blocks, 'dtype', type(blocks).__name__)}: return a torch.long tensor",
        )
        stream = [5, 6, 7, 0, 8, 0, 9, 10, 11, 12, 13, 0, 14, 15, 0]
        flat = blocks.flatten().tolist()
        report(
            "marks where documents end",
            0 in flat,
            "no end token is in the blocks: without it the model cannot tell that a new document begins, and never learns to stop",
        )
        report(
            "documents run on",
            blocks.ndim == 2 and blocks.shape[1] == 4 and flat[:8] == stream[:8],
            f"the first two blocks are {blocks[:2].tolist()}, expected {[stream[:4], stream[4:8]]}: join the documents into one stream first, "
            "each followed by end, and cut the stream",
        )
        report(
            "loses no token in between",
            flat == stream[:12],
            f"the blocks hold {flat}, expected {stream[:12]}: cut the stream in blocks one after the other",
        )
        last = candidate([[1, 2, 3], [4, 5, 6, 7]], end=9, length=3).tolist()
        report(
            "ends the last document too",
            last == [[1, 2, 3], [9, 4, 5], [6, 7, 9]],
            f"two documents of 3 and 4 tokens, with their ends, fill three blocks of 3; you return {last}: "
            "put end after every document, the last one too",
        )
        report(
            "drops what does not fill a block",
            tuple(candidate([[1, 2]], end=0, length=4).shape) == (0, 4) and tuple(candidate([[1, 2, 3, 4]], end=0, length=4).shape) == (1, 4),
            "a rest shorter than a block must be dropped, not padded; with nothing but a rest the answer has shape (0, length)",
        )


def causal_loss(candidate) -> None:
    """The mean cross-entropy of every next token."""
    with reporting("causal_loss") as report:
        logits, ids = torch.randn(3, 6, 11, requires_grad=True), torch.randint(0, 11, (3, 6))
        loss = candidate(logits, ids)
        report.shape(loss, ())
        logp = logits.detach().log_softmax(-1)
        at = logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        following = logp[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        backwards = logp[:, 1:].gather(-1, ids[:, :-1].unsqueeze(-1)).squeeze(-1)
        value = loss.item()
        report("a loss, not a score", value > 0, f"the loss is {value:.3f}: it is minus the logarithm of a probability, so above 0")
        report(
            "looks at the next token",
            not _close(value, -at.mean()),
            "position t is compared with token t, which it has already read: compare it with token t + 1",
        )
        report(
            "in the right direction",
            not _close(value, -backwards.mean()),
            "position t is compared with token t - 1: drop the last position of the logits and the first token",
        )
        wrapped = (following.sum() + logp[:, -1].gather(-1, ids[:, :1]).sum()) / ids.numel()
        report(
            "does not wrap around",
            not _close(value, -wrapped),
            "the last position is compared with the first token: it has no next token, so leave it out",
        )
        report(
            "takes logits",
            not _close(value, F.cross_entropy(logits.detach().softmax(-1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())),
            "the logits went through a softmax before the cross-entropy, which has one of its own",
        )
        count = following.numel()
        report(
            "mean over predicted tokens",
            _close(value, -following.mean()),
            f"the loss is {value:.4f}, expected {-following.mean():.4f}: sum over the {count} predicted tokens, divide by {count} "
            f"(not by all {ids.numel()} tokens, and not only by rows)",
        )
        gradient = torch.autograd.grad(loss, logits)[0]
        report("gradients flow", bool(gradient.abs().sum() > 0), "no gradient reaches the logits: do not detach them")


def _close(a, b) -> bool:
    return abs(float(a) - float(b)) < 1e-5 * max(1.0, abs(float(b)))


def bits_per_byte(candidate) -> None:
    """The bits a model needs for a text, over the text's bytes."""
    with reporting("bits_per_byte") as report:
        model, ids, num_bytes = Toy(dropout=0.5), torch.randint(0, 12, (70,)), 200
        ids[0] = ids[30] = ids[-1] = 0
        model.eval()
        with torch.no_grad():
            bits = window_bits(model, ids, 16)
            apart = [torch.cat([window_bits(model, ids[i : i + n], n) for i in range(0, 70, n)]) for n in (16, 17)]
        expected = bits.sum().item() / num_bytes
        model.train()
        value = candidate(model, ids, num_bytes, window=16)
        report(
            "one number", isinstance(value, (int, float)), f"the answer is a {type(value).__name__}: return a Python number, for example with .item()"
        )
        report(
            "same twice",
            value == candidate(model, ids, num_bytes, window=16),
            "two calls give different numbers: dropout is on, call model.eval() first",
        )
        report("gives the mode back", model.training, "the model came in train mode and left in eval mode: put back the mode it had")
        report("bits, not nats", not _close(value, expected * math.log(2)), "the answer is in nats: divide by the natural logarithm of 2")
        report(
            "over bytes, not tokens",
            not any(_close(value, bits.sum() / n) for n in (69, 70)),
            "the bits are divided by the number of tokens: divide by num_bytes, so that tokenizers can be compared",
        )
        report(
            "every token counts",
            not any(_close(value, found.sum() / n) for found in apart for n in (num_bytes, num_bytes * len(found) / 69)),
            f"only {len(apart[0])} of 69 tokens are predicted, because no window predicts its own first token: "
            "let a window's last target be the next one's first input",
        )
        report(
            "ends of documents count",
            not _close(value, bits[ids[1:] != 0].sum() / num_bytes),
            "tokens with id 0, where documents end, are left out: the model has to predict them as well",
        )
        whole = bits[:64].sum() / num_bytes
        report(
            "the last, shorter window counts", not _close(value, whole), "the rest after the last full window is left out: let it be a shorter window"
        )
        report(
            "the sum over all tokens",
            _close(value, expected),
            f"{value:.4f} bits per byte, expected {expected:.4f}: add up the bits of all tokens after the first, and divide once, at the end "
            "(a mean of the windows' means weighs the short one too much)",
        )
        report("windows no longer than asked for", model.longest <= 16, f"a window of 16 was asked for and {model.longest} tokens went in at once")
        candidate(model.eval(), ids, num_bytes, window=16)
        report("leaves eval mode alone too", not model.training, "the model came in eval mode and left in train mode: put back the mode it had")
        report("leaves no gradients", model.lm_head.weight.grad is None, "gradients were computed: decorate the function with @torch.no_grad()")


def pretrain(candidate) -> None:
    """The training loop of a causal language model, on sequences that it must learn."""
    with reporting("pretrain") as report:
        blocks = toy_blocks(400)
        model, watched = Toy(), []
        history = candidate(model, blocks, learning_rate=0.03, batch_size=8, seed=1, watch=lambda step, watched_model: watched.append(step))
        report(
            "keeps a history",
            isinstance(history, dict) and {"loss", "learning_rate"} <= history.keys(),
            "return a dict with the lists loss and learning_rate",
        )
        report(
            "one entry a step",
            len(history["loss"]) == len(history["learning_rate"]) == 50,
            f"400 blocks in batches of 8 are 50 steps, the history has {len(history['loss'])} losses and {len(history['learning_rate'])} rates",
        )
        seen = torch.cat([ids for ids in model.seen]) if model.seen else torch.empty(0, 9)
        report(
            "trains in train mode",
            len(model.seen) == 50,
            f"{len(model.seen)} of 50 steps ran in train mode: call model.train() at the start, and after every watch",
        )
        report(
            "every block once",
            seen.shape == blocks.shape and Counter(map(tuple, seen.tolist())) == Counter(map(tuple, blocks.tolist())),
            "in one pass some blocks came twice and others never: go through one random order of all blocks",
        )
        report(
            "in a random order", not torch.equal(seen, blocks), "the blocks come in their own order: shuffle them, with a generator seeded by seed"
        )
        rates = history["learning_rate"]
        peak = rates.index(max(rates))
        report(
            "warms up and decays",
            rates[0] < rates[peak] and rates[-1] < 0.2 * rates[peak] and abs(max(rates) - 0.03) < 0.002,
            f"the learning rate goes {rates[0]:.3g} … {rates[peak]:.3g} … {rates[-1]:.3g}, and 0.03 is the peak asked for: "
            "record the rate in force, and call schedule.step() after every optimizer.step()",
        )
        report(
            "watched before and after",
            watched == list(range(51)),
            f"watch was called with {watched[:3]} … {watched[-1:]}, {len(watched)} times: call watch(0, model) before the first step "
            "and watch(step, model) after each, with the number of steps done",
        )
        report(
            "records the loss of the next token",
            abs(history["loss"][0] - math.log(12)) < 1.0,
            f"the first loss is {history['loss'][0]:.3f}; a model that knows nothing about 12 tokens starts near ln 12 = {math.log(12):.3f}: "
            "use causal_loss, and record it with .item()",
        )
        report(
            "clips gradients", gradients_are_clipped(candidate), "gradients of any size get through: clip them to norm 1.0 between backward and step"
        )
        report(
            "starts every step from zero gradients",
            steps_are_small(candidate),
            "gradients of earlier steps are still in there: call optimizer.zero_grad() every step",
        )
        with torch.no_grad():
            after = next_token_loss(model.eval(), toy_blocks(64))
        report(
            "learns",
            after < 0.5,
            f"after 50 steps the loss on new blocks is {after:.2f} where any right loop comes below 0.5: look at the order of "
            "zero_grad, backward and step",
        )
        torch.manual_seed(5)
        one, two = Toy(dropout=0.5), Toy(dropout=0.5)
        two.load_state_dict(one.state_dict())
        for twin in (one, two):
            candidate(twin, blocks[:80], learning_rate=0.01, batch_size=8, seed=3, watch=None)
        again = Toy()
        candidate(again, blocks[:16], epochs=3, learning_rate=0.01, batch_size=8, seed=3, watch=None)
        times = Counter(tuple(row) for ids in again.seen for row in ids.tolist())
        expected = Counter({row: 3 * count for row, count in Counter(map(tuple, blocks[:16].tolist())).items()})
        report(
            "as many passes as epochs",
            len(again.seen) == 6 and times == expected,
            f"16 blocks in batches of 8 for 3 epochs are 6 steps, and there were {len(again.seen)}: go through all blocks once in each epoch",
        )
        report(
            "same seed, same weights",
            torch.equal(one.lm_head.weight, two.lm_head.weight),
            "two runs with the same seed end in different weights: seed torch (for dropout) and the order of the blocks",
        )


def mask_tokens(candidate) -> None:
    """BERT's corruption: choose 15% of the ordinary tokens; of these 80% become the mask, 10% a random token, 10% stay."""
    with reporting("mask_tokens") as report:
        vocab_size, mask_id = 50_000, 3
        ids = torch.randint(1000, vocab_size, (400, 100))
        special = torch.zeros_like(ids)
        special[:, 0], special[:, -1], special[::2, -20:] = 1, 1, 1
        ids[:, 0], ids[:, -1], ids[::2, -20:] = 1, 2, 0
        before = ids.clone()
        result = candidate(ids, special, mask_token_id=mask_id, vocab_size=vocab_size)
        report(
            "two tensors of the shape of input_ids",
            isinstance(result, tuple) and len(result) == 2 and all(isinstance(t, torch.Tensor) and t.shape == ids.shape for t in result),
            "return the corrupted inputs and the labels, two tensors of the shape of input_ids",
        )
        inputs, labels = result
        report("leaves input_ids alone", torch.equal(ids, before), "input_ids itself was changed, and with it the data set: work on a clone")
        ordinary, chosen = special == 0, labels != -100
        report(
            "labels are -100 elsewhere",
            not bool(chosen.all()),
            "every position has a label, so the model is paid for copying what it sees: set labels to -100 where nothing was chosen",
        )
        report(
            "special tokens stay",
            not bool((chosen & ~ordinary).any()) and torch.equal(inputs[~ordinary], ids[~ordinary]),
            "special tokens were chosen or changed: where special_tokens_mask is 1 the chance is 0",
        )
        report(
            "labels are the original tokens",
            torch.equal(labels[chosen], ids[chosen]),
            "a label is not the token that stood there before: take labels from input_ids, before anything is replaced",
        )
        report(
            "changes only chosen tokens",
            torch.equal(inputs[~chosen], ids[~chosen]),
            "tokens without a label were changed: 80, 10 and 10% are shares of the chosen tokens, not of all",
        )
        total = int(ordinary.sum())
        share = chosen.sum().item() / total
        masked = (inputs == mask_id) & chosen
        kept = (inputs == ids) & chosen
        rates = [t.sum().item() / max(1, int(chosen.sum())) for t in (masked, chosen & ~masked & ~kept, kept)]
        report(
            "chosen tokens that stay have a label too",
            rates[2] > 0.02,
            "no chosen token was left as it is: a tenth of the chosen ones stay unchanged, and are still to be predicted (label, not -100)",
        )
        report(
            "chooses 15%",
            _near(share, 0.15, total),
            f"{share:.1%} of the ordinary tokens were chosen, expected 15%: draw each with the given probability",
        )
        chosen_count = int(chosen.sum())
        report(
            "a tenth becomes random",
            _near(rates[1], 0.1, chosen_count),
            f"of the chosen tokens {rates[1]:.1%} became another token, expected 10%: a tenth of all the chosen ones, "
            "which is half of what the mask left over",
        )
        report("80% become the mask", _near(rates[0], 0.8, chosen_count), f"of the chosen tokens {rates[0]:.1%} became the mask, expected 80%")
        random_tokens = inputs[chosen & ~masked & ~kept]
        report(
            "random tokens from the whole vocabulary",
            len(random_tokens.unique()) > 0.9 * len(random_tokens) and int(random_tokens.max()) > 0.95 * vocab_size,
            "the random tokens are not spread over the vocabulary: draw one for each place, from 0 to vocab_size - 1",
        )
        other = candidate(ids, special, mask_token_id=mask_id, vocab_size=vocab_size)[1]
        report("new choices at every call", not torch.equal(other, labels), "two calls choose the same tokens: do not fix a seed inside")
        all_masked = candidate(ids, special, mask_token_id=mask_id, vocab_size=vocab_size, probability=1.0, mask_share=1.0, random_share=0.0)
        report(
            "shares can be set",
            torch.equal(all_masked[1], ids.masked_fill(~ordinary, -100)) and bool((all_masked[0][ordinary] == mask_id).all()),
            "with probability 1 and mask_share 1 every ordinary token becomes the mask: use the arguments, not fixed numbers",
        )


def _near(share: float, expected: float, count: int) -> bool:
    """Within five standard errors of a share of `count` draws."""
    return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
