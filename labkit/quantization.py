"""Quantization with evenly spaced levels, training through it, and the arithmetic of memory. Labs 07 and 08 build the parts.

The four-bit format of QLoRA is in `labkit.nf4`, codebooks in `labkit.codebook`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

CLIPS = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class UniformQuantized:
    """Whole-number codes of `bits` bits in the shape of the values; value = (code - zero_point) * scale.

    scale (fp32) and zero_point (int32) have one entry a group, in a shape that broadcasts over `groups(codes)`: (groups, 1).
    axis and group_size say what a group is, as in `quantize_uniform`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool
    axis: int | None = None
    group_size: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes when the codes are packed: `bits` a code, 4 bytes a scale and, if affine, `bits` rounded up to bytes a zero point."""
        per_group = 4 + (0 if self.symmetric else math.ceil(self.bits / 8))
        return math.ceil(self.codes.numel() * self.bits / 8) + per_group * self.scale.numel()

    def dequantize(self) -> Tensor:
        """The values that the codes stand for, fp32."""
        rows = _to_groups(self.codes, self.axis, self.group_size)
        return _from_groups((rows - self.zero_point) * self.scale, self.codes.shape, self.axis)


def quantize_uniform(
    values: Tensor,
    bits: int = 8,
    *,
    symmetric: bool = True,
    axis: int | None = None,
    group_size: int | None = None,
    clip: str = "minmax",
    percentile: float = 99.9,
) -> UniformQuantized:
    """Quantize to evenly spaced levels, with one scale for all values, for each channel along `axis`, or for each `group_size` of a row.

    symmetric: codes -(2**(bits-1) - 1) to 2**(bits-1) - 1 around zero point 0. Otherwise affine: codes 0 to 2**bits - 1, and the zero
    point, a whole number, is the code of 0, so that 0 stays 0 exactly. clip chooses the range of each group: "minmax" takes all of it,
    "percentile" leaves out what is beyond the percentile of the magnitudes (affine: at each end), "mse" searches the range with the
    least mean squared error. Values beyond the range get the outermost code.
    Raises ValueError for bits outside 2 to 16, values that are empty or not finite, a group size that does not divide the last axis.
    """
    raw, scale, zero_point = _rounded(values, bits, symmetric, axis, group_size, clip, percentile)
    kind = torch.int32 if bits > 8 else torch.int8 if symmetric else torch.uint8
    codes = raw.clamp(*_code_range(bits, symmetric)).to(kind)
    return UniformQuantized(_from_groups(codes, values.shape, axis), scale, zero_point, bits, symmetric, axis, group_size)


def _rounded(values: Tensor, bits: int, symmetric=True, axis=None, group_size=None, clip="minmax", percentile=99.9) -> tuple[Tensor, Tensor, Tensor]:
    """Codes that are not clipped yet, (groups, values of a group), with scale and zero_point."""
    rows = _to_groups(_checked(values), axis, group_size)
    scale, zero_point = _scale(rows, bits, symmetric, clip, percentile)
    return (rows / scale).round() + zero_point, scale, zero_point


def _code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    if not 2 <= bits <= 16:
        raise ValueError(f"bits is {bits}: choose 2 to 16")
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def _checked(values: Tensor) -> Tensor:
    values = values.detach().float()
    if values.numel() == 0 or not values.isfinite().all():
        raise ValueError(f"values of shape {tuple(values.shape)} are empty or hold nan or infinity: quantize finite numbers only")
    return values


def _to_groups(values: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """(groups, values of a group)."""
    if axis is not None and group_size is not None:
        raise ValueError("axis and group_size were both given: choose channels or groups")
    if group_size is not None:
        if group_size < 1 or values.ndim == 0 or values.shape[-1] % group_size:
            raise ValueError(f"group_size {group_size} does not divide the last axis of {tuple(values.shape)}: choose a divisor")
        return values.reshape(-1, group_size)
    if axis is None:
        return values.reshape(1, -1)
    if not -values.ndim <= axis < values.ndim:
        raise ValueError(f"axis is {axis} for values of shape {tuple(values.shape)}: choose 0 to {values.ndim - 1}")
    return values.movedim(axis, 0).reshape(values.shape[axis], -1)


def _from_groups(rows: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    if axis is None:
        return rows.reshape(shape)
    moved = (shape[axis], *(size for i, size in enumerate(shape) if i != axis % len(shape)))
    return rows.reshape(moved).movedim(0, axis).contiguous()


def _scale(rows: Tensor, bits: int, symmetric: bool, clip: str, percentile: float) -> tuple[Tensor, Tensor]:
    """scale and zero_point, (groups, 1) each."""
    if clip not in CLIPS:
        raise ValueError(f"clip is {clip!r}: choose one of {', '.join(CLIPS)}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}: choose more than 50, at most 100")
    low, high = _code_range(bits, symmetric)
    steps = high  # from 0 to the largest magnitude, or from the lowest value to the highest

    def fit(lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        # 0 belongs to every range; a group of zeros gets scale 1.
        lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
        scale = (torch.maximum(-lowest, highest) if symmetric else highest - lowest) / steps
        scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)
        return scale, torch.zeros_like(scale, dtype=torch.int32) if symmetric else (-lowest / scale).round().int()

    if clip == "percentile":
        rank = max(1, math.ceil(percentile / 100 * rows.shape[1]))
        if symmetric:
            limit = rows.abs().kthvalue(rank, dim=1, keepdim=True).values
            return fit(-limit, limit)
        return fit(-(-rows).kthvalue(rank, dim=1, keepdim=True).values, rows.kthvalue(rank, dim=1, keepdim=True).values)
    lowest, highest = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    best = fit(lowest, highest)
    if clip == "mse":
        least = torch.full_like(lowest, torch.inf)
        for part in torch.linspace(1, 0.1, 91).tolist():
            scale, zero_point = fit(part * lowest, part * highest)
            codes = ((rows / scale).round() + zero_point).clamp(low, high)
            error = ((codes - zero_point) * scale - rows).square().mean(1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
    return best


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantized values. Backward: the gradient as if nothing had happened, and zero where a value was clipped."""

    @staticmethod
    def forward(ctx, values: Tensor, quantized: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return quantized.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient if inside is None else gradient * inside, None, None


def straight_through(values: Tensor, quantized: Tensor, inside: Tensor | None = None) -> Tensor:
    """`quantized` in the forward pass; the gradient goes to `values` unchanged, or only where the mask `inside` holds.

    The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432): rounding has gradient zero almost everywhere.
    """
    return _StraightThrough.apply(values, quantized.detach(), inside)


def fake_quantize(values: Tensor, bits: int = 8, *, symmetric: bool = True, axis: int | None = None, **options) -> Tensor:
    """Quantize and dequantize at once, with straight-through gradients, for quantization-aware training; options as `quantize_uniform`.

    The result has the dtype of `values`. The gradient is zero for values beyond the clipped range.
    """
    raw, scale, zero_point = _rounded(values, bits, symmetric, axis, **options)
    codes = raw.clamp(*_code_range(bits, symmetric))
    quantized = _from_groups((codes - zero_point) * scale, values.shape, axis).to(values.dtype)
    return straight_through(values, quantized, _from_groups(raw == codes, values.shape, axis))


@dataclass(frozen=True)
class Tensors:
    """`count` parameters of one shape. kind: "linear" (a weight matrix of a layer), "embedding", "other" or "head"."""

    name: str
    shape: tuple[int, ...]
    count: int = 1
    kind: str = "other"

    @property
    def each(self) -> int:
        """Numbers in one of them."""
        return math.prod(self.shape)


def parameters_from_config(config, num_labels: int | None = None) -> list[Tensors]:
    """Every parameter of a model, from its transformers config alone, nothing built; a tied output layer is not counted twice.

    num_labels: None gives a decoder with its language-model head and an encoder without one; a number gives BERT or DistilBERT with a
    classification head. Raises ValueError for a model type that it does not know.
    """
    kind = config.model_type
    if kind in ("llama", "mistral", "qwen2"):
        return _llama(config, kind)
    if kind in ("bert", "distilbert"):
        return _bert(config, kind, num_labels)
    if kind == "gpt2":
        return _gpt2(config)
    raise ValueError(f"the layout of model type {kind!r} is not known here: use one of llama, mistral, qwen2, bert, distilbert, gpt2")


def _linear(name: str, out: int, into: int, count: int, bias: bool = False) -> list[Tensors]:
    return [Tensors(name, (out, into), count, "linear")] + ([Tensors(f"{name}.bias", (out,), count)] if bias else [])


def _llama(config, kind: str) -> list[Tensors]:
    hidden, layers, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, value = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    bias, mlp_bias = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
    tensors = [Tensors("embed_tokens", (config.vocab_size, hidden), 1, "embedding"), Tensors("norm", (hidden,), 2 * layers + 1)]
    for name, out in (("q_proj", query), ("k_proj", value), ("v_proj", value)):
        tensors += _linear(name, out, hidden, layers, bias or kind == "qwen2")
    tensors += _linear("o_proj", hidden, query, layers, bias)
    for name, out, into in (("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner)):
        tensors += _linear(name, out, into, layers, mlp_bias)
    return tensors + ([] if config.tie_word_embeddings else [Tensors("lm_head", (config.vocab_size, hidden), 1, "head")])


def _bert(config, kind: str, num_labels: int | None) -> list[Tensors]:
    hidden, layers, inner = config.hidden_size, config.num_hidden_layers, getattr(config, "intermediate_size", None) or config.hidden_dim
    tables = [("word", config.vocab_size), ("position", config.max_position_embeddings)]
    tables += [("token_type", config.type_vocab_size)] if kind == "bert" else []
    tensors = [Tensors(name, (rows, hidden), 1, "embedding") for name, rows in tables] + [Tensors("norm", (hidden,), 2 * (2 * layers + 1))]
    names = ("query", "key", "value", "attention.output") if kind == "bert" else ("q_lin", "k_lin", "v_lin", "out_lin")
    for name in names:
        tensors += _linear(name, hidden, hidden, layers, True)
    tensors += _linear("intermediate" if kind == "bert" else "lin1", inner, hidden, layers, True)
    tensors += _linear("output" if kind == "bert" else "lin2", hidden, inner, layers, True)
    tensors += _linear("pooler", hidden, hidden, 1, True) if kind == "bert" else []
    # A new task's layers, which are trained whole. DistilBERT has two of them.
    new = ([("pre_classifier", hidden)] if kind == "distilbert" else []) + [("classifier", num_labels)] if num_labels else []
    return tensors + [Tensors(name, shape, 1, "head") for name, out in new for shape in ((out, hidden), (out,))]


def _gpt2(config) -> list[Tensors]:
    hidden, layers = config.n_embd, config.n_layer
    inner = config.n_inner or 4 * hidden
    tensors = [Tensors("wte", (config.vocab_size, hidden), 1, "embedding"), Tensors("wpe", (config.n_positions, hidden), 1, "embedding")]
    tensors.append(Tensors("norm", (hidden,), 2 * (2 * layers + 1)))
    for name, out, into in (("c_attn", 3 * hidden, hidden), ("c_proj", hidden, hidden), ("c_fc", inner, hidden), ("mlp.c_proj", hidden, inner)):
        tensors += _linear(name, out, into, layers, True)
    return tensors + ([] if config.tie_word_embeddings else [Tensors("lm_head", (config.vocab_size, hidden), 1, "head")])


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training needs before any activation, and the numbers of parameters behind them."""

    weights: int
    gradients: int
    optimizer: int
    parameters: int = field(kw_only=True)
    trainable: int = field(kw_only=True)

    @property
    def total(self) -> int:
        """weights + gradients + optimizer."""
        return self.weights + self.gradients + self.optimizer


METHODS = ("full", "lora", "int8", "nf4", "nf4-double")


def training_memory(
    config,
    method: str,
    *,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    rank: int = 8,
    targets: Iterable[str] | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    block_size: int = 64,
) -> TrainingMemory:
    """Bytes of weights, gradients and optimizer state when a model of this config is trained by `method`, by arithmetic alone.

    method: "full" trains all of it in `dtype`. The others freeze it and train LoRA matrices of `rank` beside the linear layers, and a
    classification head, in `adapter_dtype`: "lora" keeps the base in `dtype`, "int8" has 1 byte a weight and a 4-byte scale a row,
    "nf4" half a byte a weight and 4 bytes a block, "nf4-double" 1 byte a block, 4 more every 256 blocks and 4 a matrix. Embeddings,
    norms, biases and a language-model head stay in `dtype`. targets: names of the linear layers with LoRA; default all.
    optimizer: "adamw" keeps two numbers a parameter in its dtype, "adamw8bit" two bytes and 8 bytes every 256, in tensors of at least
    4,096 values (others 8 bytes), as bitsandbytes does.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(METHODS)}")
    if optimizer not in ("adamw", "adamw8bit"):
        raise ValueError(f"optimizer is {optimizer!r}: choose adamw or adamw8bit")
    tensors = parameters_from_config(config, num_labels)
    linears = [t for t in tensors if t.kind == "linear"]
    wanted = set(targets) if targets is not None else {t.name for t in linears}
    unknown = wanted - {t.name for t in linears}
    if unknown or rank < 1:
        raise ValueError(f"rank {rank}, unknown targets {sorted(unknown)}: rank is at least 1, targets among {', '.join(t.name for t in linears)}")
    if method == "full":
        trained, size, frozen = tensors, dtype.itemsize, 0
    else:
        # A language-model head stays frozen; only a classifier is new.
        trained = [t for t in tensors if t.kind == "head" and num_labels]
        frozen = sum(t.count * _frozen_bytes(t, method, dtype, block_size) for t in tensors if t not in trained)
        for t in linears:
            if t.name in wanted:
                trained += [Tensors("A", (rank, t.shape[1]), t.count), Tensors("B", (t.shape[0], rank), t.count)]
        size = adapter_dtype.itemsize
    trainable = sum(t.count * t.each for t in trained)
    small = 2 * size if optimizer == "adamw" else 8
    state = sum(t.count * (2 * t.each + 8 * math.ceil(t.each / 256) if optimizer != "adamw" and t.each >= 4096 else small * t.each) for t in trained)
    total = sum(t.count * t.each for t in tensors)
    return TrainingMemory(frozen + size * trainable, size * trainable, state, parameters=total, trainable=trainable)


def _frozen_bytes(tensor: Tensors, method: str, dtype: torch.dtype, block_size: int) -> int:
    if tensor.kind != "linear" or method == "lora":
        return tensor.each * dtype.itemsize
    if method == "int8":
        return tensor.each + 4 * tensor.shape[0]
    blocks = math.ceil(tensor.each / block_size)
    return math.ceil(tensor.each / 2) + (4 * blocks if method == "nf4" else blocks + 4 * math.ceil(blocks / 256) + 4)


def activation_memory(
    config, batch_size: int, seq: int, method: str = "full", *, rank: int = 8, targets_per_layer: int = 6, device: str = "cpu"
) -> int:
    """Bytes that autograd keeps of one forward pass of BERT's or DistilBERT's body in training, for the backward pass, by arithmetic.

    In fp32, with plain attention, dropout on hidden vectors and none on attention weights. A token needs, in each layer: its input, query,
    key, value, mixed value, one or two dropout masks, the inputs of both layer norms and the first one's output; both sides of the
    activation function; a row of attention weights for each head; four statistics. method: "full", or any of METHODS for frozen layers
    with LoRA of `rank` on so many of them in each layer: that saves what the embeddings keep, and nothing else. PyTorch keeps a dropout mask
    in 4 bytes a number on a "cpu", and in one byte on any other device.
    Raises ValueError for another type of model or method.
    """
    if config.model_type not in ("bert", "distilbert"):
        raise ValueError(f"what {config.model_type!r} keeps for the backward pass is not known here: use bert or distilbert")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(METHODS)}")
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or config.hidden_dim
    masks = 2 if config.model_type == "bert" else 1  # DistilBERT has no dropout after attention
    mask = hidden if device == "cpu" else hidden / 4  # in numbers of 4 bytes
    layer = 8 * hidden + masks * mask + 2 * inner + config.num_attention_heads * seq + 4 + (0 if method == "full" else targets_per_layer * rank)
    embeddings = hidden + mask + 2 if method == "full" else 0
    return round(4 * batch_size * seq * (config.num_hidden_layers * layer + hidden + embeddings))
