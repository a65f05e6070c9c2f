"""Every check of lab 02 takes a right answer written differently from ours, and turns down wrong ones, each with its own message."""

import math
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab02 as check

LN2 = math.log(2)

# ---------------------------------------------------------------- learn_bpe


def bpe(*, weigh=True, repeat=True, overlap=False, recount=True, stop=True, choose=max, as_bytes=True):
    """A right learner that keeps words as lists of (start, end) cuts, with one thing wrong at a time."""

    def learn_bpe(words, num_merges):
        cuts = {word: list(range(len(word) + 1)) for word in words}
        merges, first_counts = [], None
        for _ in range(num_merges):
            counts = defaultdict(int)
            for word, ends in cuts.items():
                pairs = [(word[a:b], word[b:c]) for a, b, c in zip(ends, ends[1:], ends[2:])]
                for pair in pairs if repeat else set(pairs):
                    counts[pair] += words[word] if weigh else 1
            first_counts = first_counts or dict(counts)
            if not recount:
                counts = {pair: count for pair, count in first_counts.items() if pair not in merges}
            if not counts and stop:
                break
            best = choose(counts, key=counts.get)
            merges.append(best)
            for word, ends in cuts.items():
                cuts[word] = glue(word, ends, best, overlap)
        return merges if as_bytes else [(a.decode(), b.decode()) for a, b in merges]

    return learn_bpe


def glue(word, ends, pair, overlap):
    gone, used = set(), -1
    for a, b, c in zip(ends, ends[1:], ends[2:]):
        if a >= used and (word[a:b], word[b:c]) == pair:
            gone.add(b)
            used = c
    return [end for end in ends if end not in gone] if not overlap else ends


def bpe_overlapping(words, num_merges):
    """Merges aaa into aa, aa: the middle a is used twice."""
    pieces = {word: [bytes([b]) for b in word] for word in words}
    merges = []
    while len(merges) < num_merges:
        counts = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                counts[pair] += words[word]
        if not counts:
            break
        best = counts.most_common(1)[0][0]
        merges.append(best)
        for word, parts in pieces.items():
            out, last_merged = [], False
            for i, part in enumerate(parts):
                if tuple(parts[i : i + 2]) == best:
                    out.append(part + parts[i + 1])
                    last_merged = True
                else:
                    out += [] if last_merged else [part]
                    last_merged = False
            pieces[word] = out
    return merges


# ---------------------------------------------------------------- pack


def packing(*, ends=True, last=True, first=False, padded=False, separately=False, dtype=torch.long):
    def pack(documents, end, length):
        streams = []
        for number, document in enumerate(documents):
            tail = [end] if ends and (last or number < len(documents) - 1) else []
            streams.append(torch.tensor([*([end] if first else []), *document, *tail], dtype=dtype))
        if not separately:
            streams = [torch.cat(streams)]
        rows = []
        for stream in streams:
            if padded and len(stream) % length:
                stream = F.pad(stream, (0, length - len(stream) % length), value=end)
            rows += list(stream.split(length))
        full = [row for row in rows if len(row) == length]
        return torch.stack(full) if full else torch.zeros(0, length, dtype=dtype)

    return pack


# ---------------------------------------------------------------- causal_loss


def right_loss(logits, input_ids):
    targets = F.pad(input_ids[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100)


def loss_over_all_tokens(logits, input_ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum") / input_ids.numel()


# ---------------------------------------------------------------- bits_per_byte


def bits(*, training=False, give_back=True, unit=LN2, by_tokens=False, overlap=1, skip_end=False, drop_rest=False, means=False, grad=False):
    def bits_per_byte(model, ids, num_bytes, window=256):
        mode = model.training
        model.train(training)
        nats, count, starts = 0.0, 0, list(range(0, len(ids) - overlap, window))
        windows = [ids[start : start + window + 1] if overlap else ids[start : start + window] for start in starts]
        if drop_rest:
            windows = [piece for piece in windows if len(piece) == window + 1]
        for piece in windows:
            with torch.set_grad_enabled(grad):
                losses = F.cross_entropy(model(input_ids=piece[:-1].unsqueeze(0)).logits[0], piece[1:], reduction="none")
            if skip_end:
                losses = losses[piece[1:] != 0]
            if grad:
                losses.sum().backward()
            nats += losses.mean().item() if means else losses.sum().item()
            count += 1 if means else len(losses)
        if give_back:
            model.train(mode)
        if means:
            nats = nats / count * (len(ids) - 1)
        return nats / unit / (count if by_tokens else num_bytes)

    return bits_per_byte


def bits_to_train_mode(model, ids, num_bytes, window=256):
    value = bits()(model, ids, num_bytes, window)
    model.train()
    return value


# ---------------------------------------------------------------- pretrain


def loop(
    *,
    zero=True,
    schedule=True,
    train_mode=True,
    step=True,
    seeded=True,
    clip=True,
    shuffle=True,
    replace=False,
    shift=1,
    early=True,
    per_step=True,
    passes=True,
):
    """A right loop, unlike the notebook's (a schedule by hand, SGD-like indexing), with one thing wrong at a time."""

    def pretrain(model, blocks, *, learning_rate, epochs=1, batch_size=8, seed=0, watch=None):
        if seeded:
            torch.manual_seed(seed)
        order = torch.cat([torch.randperm(len(blocks)) if shuffle else torch.arange(len(blocks)) for _ in range(epochs if passes else 1)])
        if replace:
            order = torch.randint(len(blocks), (len(blocks),))
        total = math.ceil(len(order) / batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        history = {"loss": [], "learning_rate": []}
        if watch and early:
            watch(0, model)
        model.train(train_mode)
        for number in range(total):
            rate = learning_rate * (min((number + 1) / 5, (total - number) / (total - 4)) if schedule else 1.0)
            optimizer.param_groups[0]["lr"] = rate
            ids = blocks[order[number * batch_size : (number + 1) * batch_size]]
            logits = model(input_ids=ids).logits
            loss = F.cross_entropy(logits[:, : ids.shape[1] - shift].flatten(0, 1), ids[:, shift:].flatten())
            if zero:
                optimizer.zero_grad()
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if step:
                optimizer.step()
            if per_step:
                history["loss"].append(loss.item())
                history["learning_rate"].append(rate)
            if watch:
                watch(number + 1, model)
        return history

    return pretrain


# ---------------------------------------------------------------- mask_tokens


def masking(*, of_all=False, guard=True, label_all=False, label_changed=False, in_place=False, tenth_of_rest=False, one_word=False, fixed=False,
            rate=None, labels_after=False, shares=None, never_keep=False):  # fmt: skip
    """A right corruption by one uniform number a token, with one thing wrong at a time."""

    def mask_tokens(input_ids, special_tokens_mask, *, mask_token_id, vocab_size, probability=0.15, mask_share=0.8, random_share=0.1):
        if shares:
            mask_share, random_share = shares
        generator = torch.Generator().manual_seed(0 if fixed else int(torch.randint(2**31, (1,))))
        ordinary = special_tokens_mask == 0 if guard else torch.ones_like(special_tokens_mask, dtype=torch.bool)
        chosen = (torch.rand(input_ids.shape, generator=generator) < (rate or probability)) & ordinary
        roll = torch.rand(input_ids.shape, generator=generator)
        if of_all:
            to_mask, to_random = (roll < 0.8 * probability) & ordinary, (roll > 1 - 0.1 * probability) & ordinary
        else:
            to_mask, to_random = chosen & (roll < mask_share), chosen & (roll >= mask_share) & (roll < mask_share + random_share)
        if tenth_of_rest:
            to_random = chosen & ~to_mask & (torch.rand(input_ids.shape, generator=generator) < random_share)
        if never_keep:
            to_random = chosen & ~to_mask
        out = input_ids if in_place else input_ids.clone()
        labels = torch.where(chosen, input_ids, -100)
        out[to_mask] = mask_token_id
        words = torch.randint(vocab_size, input_ids.shape, generator=generator)
        out[to_random] = words[0, 0] if one_word else words[to_random]
        if label_all:
            labels = input_ids.clone()
        if label_changed:
            labels = torch.where(to_mask | to_random, input_ids, -100)
        if labels_after:
            labels = torch.where(chosen, out, -100)
        return out, labels

    return mask_tokens


RIGHT = {
    check.learn_bpe: bpe(),
    check.pack: packing(),
    check.causal_loss: right_loss,
    check.bits_per_byte: bits(),
    check.pretrain: loop(),
    check.mask_tokens: masking(),
}

WRONG = {
    check.learn_bpe: {
        "counts a word once": (bpe(weigh=False), "add the word's count, not 1"),
        "counts a pair once a word": (bpe(repeat=False), "count every place in the word"),
        "merges overlap": (bpe_overlapping, "jump over both of its parts"),
        "never merges": (bpe(overlap=True), "jump over both of its parts"),
        "counts only once": (bpe(recount=False), "jump over both of its parts"),
        "takes the rarest": (bpe(choose=min), "add the word's count"),
        "strings": (bpe(as_bytes=False), "a tuple of two bytes objects"),
        "does not stop": (bpe(stop=False), "stopped with ValueError"),
        "one too many": (lambda words, n: bpe()(words, n + 1), "8 merges were asked for and 9 came back"),
        "a few wrong merges": (lambda words, n: bpe()(words, n)[:4] + bpe()(words, n)[:3:-1], "apply each merge to all words, then count anew"),
    },
    check.pack: {
        "no end": (packing(ends=False), "no end token is in the blocks"),
        "end in front": (packing(ends=False, first=True), "each followed by end"),
        "none after the last": (packing(last=False), "put end after every document, the last one too"),
        "padded": (packing(padded=True), "cut the stream in blocks one after the other"),
        "each document apart": (packing(separately=True), "join the documents into one stream first"),
        "32-bit": (packing(dtype=torch.int32), "return a torch.long tensor"),
        "a list": (lambda documents, end, length: packing()(documents, end, length).tolist(), "return a torch.long tensor"),
    },
    check.causal_loss: {
        "unshifted": (lambda logits, ids: F.cross_entropy(logits.flatten(0, 1), ids.flatten()), "which it has already read"),
        "shifted backwards": (lambda logits, ids: F.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, :-1].flatten()), "compared with token t - 1"),
        "wraps around": (lambda logits, ids: F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()), "it has no next token"),
        "softmax first": (lambda logits, ids: right_loss(logits.softmax(-1), ids), "which has one of its own"),
        "divides by all tokens": (loss_over_all_tokens, "divide by 15 (not by all 18 tokens"),
        "sum": (lambda logits, ids: right_loss(logits, ids) * 15, "divide by 15"),
        "one a token": (lambda logits, ids: F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"), "expected ()"),
        "log-likelihood": (lambda logits, ids: -right_loss(logits, ids), "minus the logarithm"),
        "detached": (lambda logits, ids: right_loss(logits.detach(), ids) + 0 * logits.sum(), "do not detach"),
    },
    check.bits_per_byte: {
        "dropout on": (bits(training=True), "model.eval() first"),
        "stays in eval": (bits(give_back=False), "left in eval mode"),
        "always train mode": (bits_to_train_mode, "came in eval mode and left in train mode"),
        "nats": (bits(unit=1.0), "divide by the natural logarithm of 2"),
        "per token": (bits(by_tokens=True), "divide by num_bytes"),
        "windows apart": (bits(overlap=0), "no window predicts its own first token"),
        "ends skipped": (bits(skip_end=True), "tokens with id 0"),
        "rest dropped": (bits(drop_rest=True), "let it be a shorter window"),
        "mean of means": (bits(means=True), "divide once, at the end"),
        "one window": (lambda model, ids, num_bytes, window: bits()(model, ids, num_bytes, len(ids)), "add up the bits of all tokens"),
        "gradients": (bits(grad=True), "@torch.no_grad()"),
        "a tensor": (lambda *args, **kwargs: torch.tensor(bits()(*args, **kwargs)), "return a Python number"),
    },
    check.pretrain: {
        "no zero_grad": (loop(zero=False), "optimizer.zero_grad()"),
        "constant rate": (loop(schedule=False), "schedule.step()"),
        "in eval mode": (loop(train_mode=False), "0 of 50 steps ran in train mode"),
        "no step": (loop(step=False), "after 50 steps the loss"),
        "no seed": (loop(seeded=False), "two runs with the same seed"),
        "no clipping": (loop(clip=False), "clip them to norm 1.0"),
        "in order": (loop(shuffle=False), "shuffle them"),
        "with replacement": (loop(replace=True), "some blocks came twice"),
        "unshifted": (loop(shift=0), "after 50 steps the loss"),
        "not watched at the start": (loop(early=False), "call watch(0, model) before the first step"),
        "one pass only": (loop(passes=False), "go through all blocks once in each epoch"),
        "no history": (loop(per_step=False), "the history has 0 losses"),
    },
    check.mask_tokens: {
        "shares of all tokens": (masking(of_all=True), "shares of the chosen tokens, not of all"),
        "special tokens": (masking(guard=False), "where special_tokens_mask is 1"),
        "labels everywhere": (masking(label_all=True), "set labels to -100"),
        "labels only where changed": (masking(label_changed=True), "still to be predicted"),
        "labels after the change": (masking(labels_after=True), "before anything is replaced"),
        "in place": (masking(in_place=True), "work on a clone"),
        "a tenth of the rest": (masking(tenth_of_rest=True), "half of what the mask left over"),
        "none kept": (masking(never_keep=True), "a tenth of the chosen ones stay unchanged"),
        "a fifth chosen": (masking(rate=0.2), "expected 15%"),
        "fixed shares": (masking(shares=(0.8, 0.1)), "use the arguments"),
        "one random word": (masking(one_word=True), "draw one for each place"),
        "fixed seed": (masking(fixed=True), "do not fix a seed inside"),
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


@pytest.mark.parametrize("checker", RIGHT, ids=lambda c: c.__name__)
def test_says_which_error_stopped_the_answer(checker):
    def broken(*args, **kwargs):
        raise TypeError("unsupported operand")

    with pytest.raises(CheckFailed, match=r"stopped with TypeError: unsupported operand\n  in broken, at: raise TypeError"):
        checker(broken)
