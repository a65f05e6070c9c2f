"""Soft prompts (Lester et al. 2021, arXiv 2104.08691): learned vectors before the text of a frozen model. And the selective family.

A soft prompt stands where word embeddings stand, so it is read like text: a BERT adds positions and its layer norm to it, a Llama
rotates it by its place. Lab 09 builds the parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = ("pre_classifier", "classifier", "score")  # what transformers calls the layers that a new classification task needs
IGNORED = -100  # the label that cross entropy leaves out


class Prepended(NamedTuple):
    """A batch that begins with n soft vectors: what a transformers model takes in place of `input_ids`."""

    inputs_embeds: Tensor  # (batch, n + seq, hidden_size)
    attention_mask: Tensor  # (batch, n + seq)
    position_ids: Tensor  # (batch, n + seq)
    labels: Tensor | None  # (batch, n + seq) for a language model, (batch,) for a classifier


def prepend(
    vectors: Tensor, embeddings: Tensor, attention_mask: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None
) -> Prepended:
    """Put vectors (n, hidden_size) before every row of embeddings (batch, seq, hidden_size), and extend all that goes with them.

    attention_mask (batch, seq): ones are put before it, so that everybody reads the prompt. labels: one a token, (batch, seq), get -100
    before them, since the prompt is not predicted; one a row, (batch,), stay as they are. position_ids (batch, seq): shifted by n, after
    0 to n - 1. Without them places are counted from the left, padding too, as peft does: with padding on the left the text then stands
    further from the prompt the more padding there is. `positions_of(attention_mask)` counts real tokens only.
    The vectors come first, before [CLS] of a BERT (which moves to place n) and before padding on the left, as in peft.
    Raises ValueError when shapes do not fit.
    """
    if vectors.ndim != 2 or embeddings.ndim != 3 or vectors.shape[1] != embeddings.shape[2]:
        raise ValueError(f"vectors {tuple(vectors.shape)} and embeddings {tuple(embeddings.shape)}: expected (n, hidden) and (batch, seq, hidden)")
    batch, seq, _ = embeddings.shape
    n = len(vectors)
    if attention_mask.shape != (batch, seq):
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: expected {(batch, seq)}, the rows and tokens of the text")
    prompt = vectors.to(embeddings.dtype).expand(batch, n, -1)
    mask = torch.cat([attention_mask.new_ones(batch, n), attention_mask], 1)
    places = torch.arange(n + seq, device=embeddings.device).expand(batch, -1)
    if position_ids is not None:
        places = torch.cat([places[:, :n], position_ids.expand(batch, seq) + n], 1)
    if labels is not None and labels.ndim == 2:
        if labels.shape != (batch, seq):
            raise ValueError(f"labels have shape {tuple(labels.shape)}: expected {(batch, seq)}, one a token, or {(batch,)}, one a row")
        labels = torch.cat([labels.new_full((batch, n), IGNORED), labels], 1)
    return Prepended(torch.cat([prompt, embeddings], 1), mask, places, labels)


def positions_of(attention_mask: Tensor) -> Tensor:
    """Places that count real tokens only: attention_mask (batch, seq) -> (batch, seq), 0 on padding at the left."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


class SoftPrompt(nn.Module):
    """n learned vectors, `vectors` (n, hidden_size) in fp32, before the text of a frozen base model. Only they and the task heads train.

    base: a transformers model that takes `inputs_embeds`: encoder, classifier or causal language model. It is frozen in place.
    start: the first values (n, hidden_size), for example rows of the embedding table (`vocabulary_start`), which Lester et al. found
    better than random numbers. The output is the base's own, for n + seq places.
    Raises ValueError when `start` is not of the base's width.
    """

    def __init__(self, base: nn.Module, start: Tensor, *, heads: Iterable[str] = HEADS):
        super().__init__()
        width = base.get_input_embeddings().embedding_dim
        if start.ndim != 2 or len(start) < 1 or start.shape[1] != width:
            raise ValueError(f"the prompt starts with shape {tuple(start.shape)}: expected (n, {width}) with at least one vector")
        select(base, lambda name: in_heads(name, heads))
        self.base = base
        self.vectors = nn.Parameter(start.detach().clone().float())

    def prepended(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Prepended:
        """The batch with the prompt before it: input_ids (batch, seq), everything else as in `prepend`.

        Raises ValueError when prompt and text together are longer than the base can read.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        longest = getattr(self.base.config, "max_position_embeddings", None)
        if longest and len(self.vectors) + input_ids.shape[1] > longest:
            raise ValueError(
                f"{len(self.vectors)} vectors and {input_ids.shape[1]} tokens are more than the {longest} places of the base: "
                "cut the text, or use fewer vectors"
            )
        return prepend(self.vectors, self.base.get_input_embeddings()(input_ids), mask, labels, position_ids)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, position_ids: Tensor | None = None, **options
    ):
        batch = self.prepended(input_ids, attention_mask, labels, position_ids)
        given = {name: value for name, value in batch._asdict().items() if value is not None}
        return self.base(**given, **options)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options) -> Tensor:
        """Go on from prompt and text: ids of what is new, (batch, new tokens). Options are those of transformers' generate.

        It counts real tokens only, so a row gets the same places with padding on the left as alone. (In training, pass
        position_ids=positions_of(attention_mask) for the same.)
        """
        batch = self.prepended(input_ids, attention_mask)
        return self.base.generate(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, **options)


def vocabulary_start(table: Tensor, n: int, *, seed: int = 0) -> Tensor:
    """n different rows of an embedding table (vocabulary, hidden_size), drawn by seed: (n, hidden_size).

    Raises ValueError when n is below 1 or above the size of the vocabulary.
    """
    if not 1 <= n <= len(table):
        raise ValueError(f"{n} vectors from a vocabulary of {len(table)}: choose between 1 and {len(table)}")
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:n]
    return table.detach()[rows.to(table.device)].clone()


def nearest_tokens(vectors: Tensor, table: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k rows of table (vocabulary, hidden_size) nearest to each of vectors (n, hidden_size): (cosines, row numbers), both (n, k).

    Raises ValueError when the widths differ or k is not between 1 and the size of the vocabulary.
    """
    if vectors.ndim != 2 or table.ndim != 2 or vectors.shape[1] != table.shape[1]:
        raise ValueError(f"vectors {tuple(vectors.shape)} and table {tuple(table.shape)}: expected (n, hidden) and (vocabulary, hidden)")
    if not 1 <= k <= len(table):
        raise ValueError(f"k is {k}: choose between 1 and {len(table)}, the rows of the table")
    cosines = F.normalize(vectors.detach().float(), dim=1) @ F.normalize(table.detach().float(), dim=1).T
    found = cosines.topk(k, dim=1)
    return found.values, found.indices


def in_heads(name: str, heads: Iterable[str] = HEADS) -> bool:
    """Whether a parameter belongs to a task head: one part of its dotted name is in heads."""
    return not set(heads).isdisjoint(name.split("."))


def select(model: nn.Module, chosen) -> list[str]:
    """Train the parameters whose name chosen(name) is true of, freeze all others, in place. Returns the names of those that train."""
    names = [name for name, _ in model.named_parameters() if chosen(name)]
    kept = set(names)
    for name, p in model.named_parameters():
        p.requires_grad_(name in kept)
    return names


def train_biases(model: nn.Module, *, heads: Iterable[str] = HEADS) -> list[str]:
    """BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): train every bias, of layer norms too, and the task heads. Returns their names.

    Raises ValueError when the model has no bias outside its heads, as a Llama: there is nothing that BitFit could train.
    """
    is_bias = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    if not any(not in_heads(name, heads) for name in is_bias):
        raise ValueError(f"{type(model).__name__} has no bias outside its heads: BitFit needs a model with biases, such as a BERT")
    return select(model, lambda name: name in is_bias or in_heads(name, heads))


def train_last_layer(model: nn.Module, *, heads: Iterable[str] = HEADS) -> list[str]:
    """Train the task heads alone, and return the names. Raises ValueError when the model has none."""
    if not any(in_heads(name, heads) for name, _ in model.named_parameters()):
        raise ValueError(f"{type(model).__name__} has no part called {', '.join(heads)}: say with heads= what its head is called")
    return select(model, lambda name: in_heads(name, heads))


def task_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what trains, by name: vectors or biases, and heads. A task is this dict, and the base is shared."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
