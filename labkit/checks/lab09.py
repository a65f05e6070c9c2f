"""Checks of lab 09: a soft prompt before the text, the module that trains it, the nearest tokens, BitFit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from labkit import prompts
from labkit.checks import reporting


def prepend(candidate: Callable) -> None:
    """`prepend(vectors, embeddings, attention_mask, labels=None)`: a dict of what a transformers model takes in place of input_ids."""
    with reporting("prepend") as report:
        vectors, embeddings = torch.randn(3, 8, requires_grad=True), torch.randn(2, 5, 8)
        mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
        labels = torch.tensor([[4, 5, 6, -100, -100], [1, 2, 3, 4, 5]])
        out = candidate(vectors, embeddings, mask, labels)
        names = {"inputs_embeds", "attention_mask", "position_ids", "labels"}
        report("a dict", isinstance(out, dict) and out.keys() == names, f"return a dict with the keys {', '.join(sorted(names))}")
        embeds = out["inputs_embeds"]
        report(
            "8 places",
            embeds.shape == (2, 8, 8),
            f"inputs_embeds has shape {tuple(embeds.shape)}, expected (2, 8, 8): 3 vectors and 5 tokens along axis 1, in both rows",
        )
        report(
            "the prompt comes first",
            not torch.equal(embeds[:, :5], embeddings),
            "the vectors stand after the text: a causal model would read the whole text before it sees its prompt; put them first in torch.cat",
        )
        report(
            "the same prompt in every row, then the text",
            all(torch.equal(row, vectors) for row in embeds[:, :3]) and torch.equal(embeds[:, 3:], embeddings),
            "the first 3 places of every row must be the vectors as they are, the other 5 the row's own embeddings",
        )
        _mask_and_places(report, out, mask)
        _labels(report, candidate, out, vectors, embeddings, mask, labels)
        if embeds.requires_grad:
            embeds.square().sum().backward()
        report(
            "gradients reach the vectors",
            vectors.grad is not None and bool(vectors.grad.abs().sum() > 0),
            "no gradient reaches the vectors, so they could not learn: no detach, no .data, no torch.tensor(...) around them",
        )
        half = candidate(torch.randn(3, 8), embeddings.bfloat16(), mask)["inputs_embeds"]
        report("dtype of the text", half.dtype == torch.bfloat16, f"bf16 embeddings gave {half.dtype}: convert the vectors, not the text")


def _mask_and_places(report: Callable, out: dict[str, Tensor], mask: Tensor) -> None:
    found = out["attention_mask"]
    report(
        "mask extended",
        found.shape == (2, 8),
        f"attention_mask has shape {tuple(found.shape)}, expected (2, 8): it was not extended over the prompt; put 3 ones before each row",
    )
    report(
        "everybody reads the prompt",
        bool((found[:, :3] == 1).all()),
        "the mask is 0 over the prompt: then nobody attends to the vectors, and they change nothing; extend it with ones",
    )
    report("the text's mask kept", torch.equal(found[:, 3:], mask), "the text's part of the mask changed: padding must stay 0, and stay in its place")
    places = out["position_ids"]
    report("places extended", tuple(places.shape) == (2, 8), f"position_ids has shape {tuple(places.shape)}, expected (2, 8)")
    report(
        "the text moves to place n",
        places[1, 3].item() == 3,
        f"the first token of the text has place {places[1, 3].item()}, expected 3: the 3 vectors take places 0 to 2, the text goes on",
    )
    report(
        "places 0, 1, 2 …",
        places[1].tolist() == list(range(8)) and places[0, :6].tolist() == list(range(6)),
        f"the places of a row without padding are {places[1].tolist()}, expected 0 to 7",
    )


def _labels(report: Callable, candidate: Callable, out: dict, vectors: Tensor, embeddings: Tensor, mask: Tensor, labels: Tensor) -> None:
    found = out["labels"]
    report(
        "labels extended",
        tuple(found.shape) == (2, 8),
        f"labels have shape {tuple(found.shape)}, expected (2, 8): they were not extended over the prompt, so every token would be asked for "
        "another one's label",
    )
    report(
        "the prompt is not predicted",
        bool((found[:, :3] == -100).all()),
        f"the labels over the prompt are {found[0, :3].tolist()}, expected -100: a vector is no token, so nothing is there to predict",
    )
    report("the text's labels kept", torch.equal(found[:, 3:], labels), "the text's labels changed: put -100 before them, and leave them as they are")
    bare = candidate(vectors.detach(), embeddings, mask)
    report("no labels, none made up", bare.get("labels") is None, "without labels none may come out")
    rows = candidate(vectors.detach(), embeddings, mask, torch.tensor([0, 1])).get("labels")
    report(
        "one label a row stays",
        rows is not None and rows.tolist() == [0, 1],
        f"a classifier's labels, one a row, came out as {None if rows is None else rows.tolist()}, expected [0, 1]: "
        "extend labels only when labels.ndim is 2",
    )


def _decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def soft_prompt(candidate: Callable) -> None:
    """`SoftPrompt(base, start)`: a module that owns the vectors, freezes the base, and calls it on prompt and text."""
    with reporting("SoftPrompt") as report:
        base, start = _decoder(), torch.randn(4, 16)
        weights, kept = {name: p.detach().clone() for name, p in base.named_parameters()}, start.clone()
        ids, mask = torch.randint(1, 40, (3, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
        labels = torch.where(mask == 1, ids, -100)
        model = candidate(base, start)
        training = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        report(
            "has something to learn",
            bool(training),
            "nothing in it trains: the vectors must be an nn.Parameter, a plain tensor is seen by no optimizer",
        )
        loose = [name for name in training if any(name.endswith(part) for part in weights)]
        report("the base is frozen", not loose, f"{', '.join(loose[:2])} still trains: base.requires_grad_(False) in __init__")
        report("4 vectors and nothing else train", list(training.values()) == [(4, 16)], f"{training} trains, expected one tensor of shape (4, 16)")
        (own,) = [p for p in model.parameters() if p.requires_grad]
        report("starts where it is told", torch.equal(own, start), "the vectors do not start at `start`: copy its values")
        out, reference = model(ids, mask, labels), prompts.SoftPrompt(base, start)(ids, mask, labels)
        report(
            "the base's own output",
            hasattr(out, "logits") and hasattr(out, "loss"),
            "forward must return what the base returns, with .logits and .loss",
        )
        report(
            "logits of prompt and text",
            out.logits.shape == reference.logits.shape
            and torch.allclose(out.logits[mask_of(mask, 4)], reference.logits[mask_of(mask, 4)], atol=1e-4),
            "other logits than the right ones: take the text's embeddings from base.get_input_embeddings()(input_ids), prepend the vectors, and call "
            "the base with all that prepend returns (mask and position_ids too)",
        )
        report(
            "loss of the text alone",
            out.loss is not None and torch.allclose(out.loss, reference.loss, atol=1e-4),
            "the logits are right and the loss is not: hand the extended labels to the base, too",
        )
        out.loss.backward()
        report("gradients reach the vectors", own.grad is not None and bool(own.grad.abs().sum() > 0), "no gradient reaches the vectors")
        with torch.no_grad():
            own += 1
        report("a copy of start", torch.equal(start, kept), "training changed the tensor given as start: keep a copy of it, start.detach().clone()")
        still = all(torch.equal(p, weights[name]) for name, p in base.named_parameters())
        report("the base as it was", still, "a weight of the base changed: the vectors are new parameters, not rows of the base's embedding table")


def mask_of(mask: Tensor, n: int) -> Tensor:
    """The places of prompt and real tokens: (batch, n + seq) bool. What stands on padding is nobody's business."""
    return torch.cat([mask.new_ones(len(mask), n), mask], 1) == 1


def nearest_tokens(candidate: Callable) -> None:
    """`nearest_tokens(vectors, table, k)`: cosines and row numbers, (n, k) each, nearest first."""
    with reporting("nearest_tokens") as report:
        table = torch.randn(50, 12) * torch.logspace(-1, 2, 50)[:, None]
        own = torch.randperm(50)[:4]
        vectors = 3 * table[own] + 0.01 * table[own].norm(dim=1, keepdim=True) * torch.randn(4, 12)
        answer = candidate(vectors, table, 5)
        pair = isinstance(answer, tuple | list) and len(answer) == 2
        report("cosines and rows", pair, "return two tensors: the cosines, and the row numbers in the table")
        cosines, rows = answer
        report(
            "shape (4, 5)",
            tuple(cosines.shape) == tuple(rows.shape) == (4, 5),
            f"shapes {tuple(cosines.shape)} and {tuple(rows.shape)}, expected (4, 5) twice: topk along the table's axis",
        )
        expected = prompts.nearest_tokens(vectors, table, 5)
        report(
            "by angle, not by length",
            rows[:, 0].tolist() == own.tolist(),
            "a vector three times as long as a row of the table is not found nearest to that row: cosine divides by both lengths; a bare product "
            "prefers long rows, a distance prefers short ways",
        )
        report("nearest first", rows.tolist() == expected[1].tolist(), "the rows are not in the order of their cosines, the largest first")
        report(
            "cosines",
            torch.allclose(cosines.float(), expected[0], atol=1e-4),
            f"the largest cosine is {cosines.max().item():.3g}, expected {expected[0].max().item():.3g}: divide by both lengths",
        )


def train_biases(candidate: Callable) -> None:
    """`train_biases(model)`: BitFit. Every bias and the whole head train, nothing else; returns the names."""
    with reporting("train_biases") as report:
        body = nn.ModuleDict({"query": nn.Linear(6, 6), "bias_of_attention": nn.Linear(6, 6, bias=False), "norm": nn.LayerNorm(6)})
        model = nn.ModuleDict({"body": body, "classifier": nn.Linear(6, 2)})
        body["query"].bias.requires_grad_(False)
        names = candidate(model)
        on = {name for name, p in model.named_parameters() if p.requires_grad}
        report("the weights are frozen", "body.query.weight" not in on, "body.query.weight still trains: freeze what is neither a bias nor the head")
        report(
            "only what is called bias",
            "body.bias_of_attention.weight" not in on,
            "body.bias_of_attention.weight trains: it is a weight whose module has `bias` in its name; look at the end of the name",
        )
        report(
            "biases train, also where they were frozen",
            "body.query.bias" in on,
            "body.query.bias is frozen: set requires_grad for every parameter, to True or False",
        )
        report("the norms' biases too", "body.norm.bias" in on, "body.norm.bias is frozen: BitFit trains every bias, those of layer norms as well")
        report("the norms' weights not", "body.norm.weight" not in on, "body.norm.weight trains: it is one-dimensional, and no bias")
        head = {"classifier.weight", "classifier.bias"}
        report("the whole head trains", head <= on, f"{', '.join(sorted(head - on))} is frozen: the head is new and must learn, its weight too")
        report("names returned", set(names or ()) == on, "return the names of the parameters that train")


def prompt_parameters(candidate: Callable) -> None:
    """`prompt_parameters(method, n, hidden_size, num_layers)`: how many numbers a task takes, without the head."""
    with reporting("prompt_parameters") as report:
        for n, hidden, layers in ((1, 8, 2), (20, 384, 6), (7, 48, 5)):
            found = candidate("prompt", n, hidden, layers)
            report(
                f"prompt tuning, n={n}",
                found == n * hidden,
                f"prompt tuning with {n} vectors of {hidden} has {n * hidden:,} numbers, you say {found:,}: the prompt stands once, at the input",
            )
            found = candidate("prefix", n, hidden, layers)
            report(
                f"prefix tuning, n={n}",
                found == 2 * layers * n * hidden,
                f"prefix tuning has {2 * layers * n * hidden:,} numbers, you say {found:,}: n keys and n values in each of {layers} layers",
            )
            found = candidate("ia3", n, hidden, layers)
            report(
                f"IA3, n={n}",
                found == layers * (2 * hidden + 4 * hidden),
                f"IA3 has {layers * 6 * hidden:,} numbers, you say {found:,}: in each layer one factor for every key, every value, and every one of "
                "the 4 x hidden_size numbers inside the MLP; it knows no n",
            )
