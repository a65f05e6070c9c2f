"""The course's own PyTorch model: a small transformer that classifies texts. Lab 03 builds it; this is the reference version."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def masked_mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over real tokens: hidden (batch, seq, hidden_size), attention_mask (batch, seq) -> (batch, hidden_size).

    A row without tokens gives zeros.
    """
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def attention(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762): softmax(Q K^T / sqrt(head_size)) V.

    query, key, value: (batch, num_heads, seq, head_size), and so is the result; attention_mask (batch, seq), 0 where there is padding,
    which nobody attends to. Equal to torch's scaled_dot_product_attention, whose backward pass in bf16 is slower on a CPU.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    # A large finite number, not -inf: a row without any token must give finite numbers, not nan.
    scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).to(value.dtype) @ value


class SelfAttention(nn.Module):
    """Multi-head self-attention: (batch, seq, hidden_size) -> the same shape. Padding is never attended to.

    Raises ValueError when hidden_size is not a multiple of num_heads.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}: change one of them")
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        batch, seq, hidden_size = hidden.shape

        def heads(x: Tensor) -> Tensor:  # (batch, seq, hidden_size) -> (batch, num_heads, seq, head_size)
            return x.view(batch, seq, self.num_heads, -1).transpose(1, 2)

        query, key, value = heads(self.query(hidden)), heads(self.key(hidden)), heads(self.value(hidden))
        mixed = attention(query, key, value, attention_mask)
        return self.output(mixed.transpose(1, 2).reshape(batch, seq, hidden_size))


class TransformerBlock(nn.Module):
    """One pre-norm transformer block: attention, then a two-layer MLP, each added to the residual stream."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.1):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = SelfAttention(hidden_size, num_heads)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), attention_mask))
        return hidden + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(hidden)))))


class TransformerClassifier(nn.Module):
    """Embeddings, transformer blocks, masked mean, linear head: input_ids (batch, seq) -> logits (batch, num_labels).

    word_vectors: optional (vocab_size, embedding_size) table to start from instead of random numbers; when its width is not
    hidden_size a linear projection follows. freeze_embeddings keeps the table as it is.
    """

    def __init__(
        self,
        vocab_size: int,
        num_labels: int,
        *,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        max_length: int = 256,
        dropout: float = 0.1,
        embedding_size: int | None = None,
        word_vectors: Tensor | None = None,
        freeze_embeddings: bool = False,
    ):
        super().__init__()
        if word_vectors is not None and word_vectors.shape[0] != vocab_size:
            raise ValueError(f"word_vectors has {word_vectors.shape[0]} rows for a vocabulary of {vocab_size}: use the table of this tokenizer")
        embedding_size = word_vectors.shape[1] if word_vectors is not None else embedding_size or hidden_size
        self.max_length = max_length
        self.token_embedding = nn.Embedding(vocab_size, embedding_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if word_vectors is not None:
            self.token_embedding.weight.data.copy_(word_vectors)
        self.token_embedding.weight.requires_grad = not freeze_embeddings
        self.projection = nn.Linear(embedding_size, hidden_size) if embedding_size != hidden_size else nn.Identity()
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One vector a token: (batch, seq) -> (batch, seq, hidden_size)."""
        seq = input_ids.shape[1]
        if seq > self.max_length:
            raise ValueError(f"a batch of {seq} tokens for a model of max_length {self.max_length}: truncate when tokenizing, or build it longer")
        positions = torch.arange(seq, device=input_ids.device)
        hidden = self.projection(self.token_embedding(input_ids)) + self.position_embedding(positions)
        hidden = self.dropout(hidden)
        for block in self.blocks:
            hidden = block(hidden, attention_mask)
        return self.norm(hidden)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.classifier(masked_mean(self.encode(input_ids, attention_mask), attention_mask))
