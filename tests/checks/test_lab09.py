"""Every check of lab 09 takes a right answer written differently from ours, and turns down wrong ones, each with its own message."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab09 as check

# ---------------------------------------------------------------- prepend


def prepender(
    *, after=False, mask="ones", labels="ignored", rows=True, detach=False, places="counted", upcast=False, invent=False, wide=False, bare=False
):
    """A right prepend, unlike ours (padding with F.pad, places counted from the mask), with one thing wrong at a time."""

    def prepend(vectors, embeddings, attention_mask, labels_=None):
        n, batch = vectors.size(0), embeddings.size(0)
        prompt = torch.stack([vectors] * batch)
        prompt = prompt.detach() if detach else prompt
        text = embeddings.float() if upcast else embeddings
        prompt = prompt.type_as(text)
        parts = [text, prompt] if after else [prompt, text]
        whole = torch.hstack(parts) if not wide else torch.cat([prompt, text], 0) if prompt.shape == text.shape else prompt
        extended = attention_mask if mask == "short" else F.pad(attention_mask, (n, 0), value=int(mask == "ones"))
        if mask == "all":
            extended = torch.ones_like(F.pad(attention_mask, (n, 0)))
        counted = F.pad(attention_mask, (n, 0), value=1).cumsum(1) - 1
        if places == "restart":
            counted = torch.cat([torch.arange(n).expand(batch, n), (attention_mask.cumsum(1) - 1)], 1)
        elif places == "short":
            counted = attention_mask.cumsum(1) - 1
        elif places == "from one":
            counted = counted.clone()
            counted[:, :n] = 0
        if bare:
            return whole
        out = {"inputs_embeds": whole, "attention_mask": extended, "position_ids": counted}
        if labels_ is None:
            return out | ({"labels": extended * 0 - 100} if invent else {})
        if labels_.dim() == 1:
            return out | {"labels": labels_ if rows else F.pad(labels_, (n, 0), value=-100)}
        if labels == "short":
            return out | {"labels": labels_}
        return out | {"labels": F.pad(labels_, (n, 0), value=-100 if labels == "ignored" else 0)}

    return prepend


WRONG_PREPEND = {
    "after the text": (dict(after=True), "the vectors stand after the text"),
    "mask not extended": (dict(mask="short"), "it was not extended over the prompt; put 3 ones"),
    "mask zero over the prompt": (dict(mask="zeros"), "the mask is 0 over the prompt"),
    "padding read": (dict(mask="all"), "padding must stay 0"),
    "labels not extended": (dict(labels="short"), "they were not extended over the prompt, so every token"),
    "labels zero": (dict(labels="zero"), "expected -100"),
    "labels of rows extended": (dict(rows=False), "a classifier's labels, one a row"),
    "labels made up": (dict(invent=True), "without labels none may come out"),
    "no gradient": (dict(detach=True), "no gradient reaches the vectors"),
    "places begin again": (dict(places="restart"), "the first token of the text has place 0, expected 3"),
    "places not extended": (dict(places="short"), "position_ids has shape"),
    "prompt all at 0": (dict(places="from one"), "the places of a row without padding are"),
    "upcast": (dict(upcast=True), "bf16 embeddings gave torch.float32"),
    "wrong axis": (dict(wide=True), "3 vectors and 5 tokens along axis 1"),
    "no dict": (dict(bare=True), "return a dict"),
}


def test_prepend_takes_a_right_answer():
    check.prepend(prepender())


def test_prepend_takes_places_counted_from_the_left():
    def from_the_left(vectors, embeddings, attention_mask, labels=None):
        out = prepender()(vectors, embeddings, attention_mask, labels)
        return out | {"position_ids": torch.arange(out["attention_mask"].shape[1]).repeat(len(embeddings), 1)}

    check.prepend(from_the_left)


@pytest.mark.parametrize("fault", list(WRONG_PREPEND))
def test_prepend_turns_down(fault):
    options, message = WRONG_PREPEND[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.prepend(prepender(**options))


# ---------------------------------------------------------------- SoftPrompt


class Right(nn.Module):
    """Keeps the vectors in an embedding, as peft does."""

    frozen, learned, random, copied, mask, labels, table, base_logits = True, True, False, True, True, True, False, False

    def __init__(self, base, start):
        super().__init__()
        self.model = base
        if self.frozen:
            for p in base.parameters():
                p.requires_grad = False
        values = torch.randn_like(start) if self.random else start.clone() if self.copied else start
        if self.learned:
            self.prompt = nn.Parameter(values)
        else:
            self.prompt = values
        if self.table:
            with torch.no_grad():
                base.get_input_embeddings().weight[: len(start)] = start

    def forward(self, input_ids, attention_mask, labels=None):
        words = self.model.model.embed_tokens(input_ids)
        batch = prepender()(self.prompt, words, attention_mask, labels)
        if not self.mask:
            del batch["attention_mask"]
            batch["position_ids"] = batch["position_ids"] * 0
        if not self.labels:
            batch["labels"] = None
        out = self.model(**batch)
        return out.logits if self.base_logits else out


class Shifted(Right):
    """Hands over labels that count the prompt as text."""

    def forward(self, input_ids, attention_mask, labels=None):
        batch = prepender(labels="zero")(self.prompt, self.model.model.embed_tokens(input_ids), attention_mask, labels)
        return self.model(**batch)


class Detached(Right):
    def forward(self, input_ids, attention_mask, labels=None):
        words = self.model.model.embed_tokens(input_ids).requires_grad_()
        return self.model(**prepender()(self.prompt.detach(), words, attention_mask, labels))


def with_fault(base=Right, **attributes):
    return type("Faulty", (base,), attributes)


WRONG_PROMPT = {
    "base trains": (with_fault(frozen=False), "still trains: base.requires_grad_(False)"),
    "no parameter": (with_fault(learned=False), "the vectors must be an nn.Parameter"),
    "own start": (with_fault(random=True), "the vectors do not start at `start`"),
    "start itself": (with_fault(copied=False), "training changed the tensor given as start"),
    "mask left out": (with_fault(mask=False), "other logits than the right ones"),
    "labels left out": (with_fault(labels=False), "the logits are right and the loss is not"),
    "labels wrong": (Shifted, "the logits are right and the loss is not"),
    "bare logits": (with_fault(base_logits=True), "forward must return what the base returns"),
    "base's table overwritten": (with_fault(table=True), "a weight of the base changed"),
    "detached": (Detached, "no gradient reaches the vectors"),
}


def test_soft_prompt_takes_a_right_answer():
    check.soft_prompt(Right)


@pytest.mark.parametrize("fault", list(WRONG_PROMPT))
def test_soft_prompt_turns_down(fault):
    candidate, message = WRONG_PROMPT[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.soft_prompt(candidate)


# ---------------------------------------------------------------- nearest_tokens


def right_nearest(vectors, table, k):
    cosines = F.cosine_similarity(vectors[:, None], table[None], dim=-1)
    order = cosines.argsort(dim=-1, descending=True)[:, :k]
    return cosines.gather(1, order), order


def bare_product(vectors, table, k):
    return tuple((vectors @ table.T).topk(k))


def by_distance(vectors, table, k):
    found = torch.cdist(vectors, table).topk(k, largest=False)
    return found.values, found.indices


def half_normed(vectors, table, k):
    return tuple((vectors @ F.normalize(table, dim=1).T).topk(k))


def smallest_first(vectors, table, k):
    cosines, rows = right_nearest(vectors, table, k)
    order = torch.tensor([0, *range(k - 1, 0, -1)])
    return cosines[:, order], rows[:, order]


def over_vectors(vectors, table, k):
    cosines = F.normalize(vectors, dim=1) @ F.normalize(table, dim=1).T
    found = cosines.topk(min(k, 4), dim=0)
    return found.values, found.indices


WRONG_NEAREST = {
    "product": (bare_product, "is not found nearest to that row"),
    "distance": (by_distance, "is not found nearest to that row"),
    "half normed": (half_normed, "divide by both lengths"),
    "order": (smallest_first, "not in the order of their cosines"),
    "axis": (over_vectors, "topk along the table's axis"),
    "rows only": (lambda v, t, k: right_nearest(v, t, k)[1], "return two tensors"),
}


def test_nearest_takes_a_right_answer():
    check.nearest_tokens(right_nearest)


@pytest.mark.parametrize("fault", list(WRONG_NEAREST))
def test_nearest_turns_down(fault):
    candidate, message = WRONG_NEAREST[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.nearest_tokens(candidate)


# ---------------------------------------------------------------- train_biases


def selector(wanted, freeze=True, named=True):
    def train_biases(model):
        names = []
        for name, p in model.named_parameters():
            if wanted(name, p):
                p.requires_grad = True
                names.append(name)
            elif freeze:
                p.requires_grad = False
        return names if named else None

    return train_biases


def head(name):
    return name.startswith("classifier")


def only_switch_off(model):
    for name, p in model.named_parameters():
        if not (name.endswith("bias") or head(name)):
            p.requires_grad = False
    return [name for name, p in model.named_parameters() if p.requires_grad]


WRONG_BIASES = {
    "nothing frozen": (selector(lambda n, p: n.endswith("bias") or head(n), freeze=False), "body.query.weight still trains"),
    "name holds bias": (selector(lambda n, p: "bias" in n or head(n)), "a weight whose module has `bias` in its name"),
    "one dimension": (selector(lambda n, p: p.ndim == 1 or head(n)), "it is one-dimensional, and no bias"),
    "head's bias only": (selector(lambda n, p: n.endswith("bias")), "classifier.weight is frozen: the head is new"),
    "norms left out": (selector(lambda n, p: (n.endswith("bias") and "norm" not in n) or head(n)), "those of layer norms as well"),
    "only switched off": (only_switch_off, "set requires_grad for every parameter"),
    "no names": (selector(lambda n, p: n.endswith("bias") or head(n), named=False), "return the names"),
}


def test_biases_takes_a_right_answer():
    check.train_biases(selector(lambda n, p: n.split(".")[-1] == "bias" or head(n)))


@pytest.mark.parametrize("fault", list(WRONG_BIASES))
def test_biases_turns_down(fault):
    candidate, message = WRONG_BIASES[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.train_biases(candidate)


# ---------------------------------------------------------------- prompt_parameters


def counter(prompt=lambda n, d, layers: n * d, prefix=lambda n, d, layers: d * n * layers * 2, ia3=lambda n, d, layers: 6 * d * layers):
    counts = {"prompt": prompt, "prefix": prefix, "ia3": ia3}
    return lambda method, n, hidden_size, num_layers: counts[method](n, hidden_size, num_layers)


WRONG_COUNTS = {
    "prompt in every layer": (counter(prompt=lambda n, d, layers: n * d * layers), "the prompt stands once, at the input"),
    "prefix keys only": (counter(prefix=lambda n, d, layers: n * d * layers), "n keys and n values in each"),
    "prefix at the input": (counter(prefix=lambda n, d, layers: 2 * n * d), "n keys and n values in each"),
    "ia3 without the mlp": (counter(ia3=lambda n, d, layers: 2 * d * layers), "it knows no n"),
    "ia3 with the narrow mlp": (counter(ia3=lambda n, d, layers: 3 * d * layers), "it knows no n"),
}


def test_counts_take_a_right_answer():
    check.prompt_parameters(counter())


@pytest.mark.parametrize("fault", list(WRONG_COUNTS))
def test_counts_turn_down(fault):
    candidate, message = WRONG_COUNTS[fault]
    with pytest.raises(CheckFailed, match=re.escape(message)):
        check.prompt_parameters(candidate)


# ---------------------------------------------------------------- stubs


def stub(*arguments, **options):
    raise NotImplementedError


class StubModule(nn.Module):
    def __init__(self, base, start):
        super().__init__()
        raise NotImplementedError


@pytest.mark.parametrize(
    ("call", "candidate"),
    [
        (check.prepend, stub),
        (check.soft_prompt, StubModule),
        (check.nearest_tokens, stub),
        (check.train_biases, stub),
        (check.prompt_parameters, stub),
    ],
)
def test_stubs(call, candidate):
    with pytest.raises(NotWrittenYet, match="not written yet"):
        call(candidate)
