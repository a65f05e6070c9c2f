"""Measurements: parameters, bytes, latency, memory, and how sure a comparison is."""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters. `trainable` leaves the task head out, which every method trains; `head` counts it apart."""

    total: int
    trainable: int
    head: int

    @property
    def share(self) -> float:
        """Trainable parameters without the head, as a share of the whole model."""
        return self.trainable / self.total

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} trainable ({self.share:.2%}), and a head of {self.head:,}"


def count_parameters(model: nn.Module, head: nn.Module | None = None) -> ParameterCount:
    """Count a model's parameters (each once, shared ones too), those that train, and those of its `head`.

    head: defaults to `model.classifier` where there is one. Raises ValueError when `head` is not part of the model.
    """
    head = head if head is not None else getattr(model, "classifier", None)
    in_head = {id(p) for p in head.parameters()} if head is not None else set()
    parameters = {id(p): p for p in model.parameters()}
    if not in_head <= parameters.keys():
        raise ValueError("the head is not part of this model: pass one of the model's own modules")
    return ParameterCount(
        total=sum(p.numel() for p in parameters.values()),
        trainable=sum(p.numel() for i, p in parameters.items() if p.requires_grad and i not in in_head),
        head=sum(p.numel() for i, p in parameters.items() if i in in_head),
    )


def bytes_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files under a folder. Raises FileNotFoundError when there is nothing there."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: save it first")
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def median_latency(call: Callable[[], object], *, repeats: int = 20, warmup: int = 3) -> float:
    """Median seconds of `call()`, after `warmup` calls that are not counted. On a GPU each call is waited for."""
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats {repeats} and warmup {warmup}: at least 1 and 0")
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    seconds = []
    for i in range(warmup + repeats):
        wait()
        started = time.perf_counter()
        call()
        wait()
        if i >= warmup:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@dataclass
class Memory:
    """Bytes used at most inside a `peak_memory` block, above what was in use before it. Read it after the block."""

    bytes: int = 0


@contextlib.contextmanager
def peak_memory(interval: float = 0.005) -> Iterator[Memory]:
    """Measure the peak memory of a block: CUDA's own counter on a GPU, else resident memory sampled every `interval` seconds.

    Resident memory is what the operating system sees: memory that the process had freed but kept may hide an allocation.
    """
    memory = Memory()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield memory
        torch.cuda.synchronize()
        memory.bytes = torch.cuda.max_memory_allocated() - before
        return
    import psutil

    process, stop = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def sample() -> None:
        while not stop.wait(interval):
            memory.bytes = max(memory.bytes, process.memory_info().rss - before)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        memory.bytes = max(memory.bytes, process.memory_info().rss - before)
        stop.set()
        thread.join()


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval. `difference` prints it with its sign."""

    value: float
    low: float
    high: float
    difference: bool = False

    def __str__(self) -> str:
        sign = "+" if self.difference else ""
        return f"{self.value:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def accuracy_interval(correct: Sequence[bool], *, level: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """Accuracy with a percentile bootstrap interval (Efron 1979): correct, one bool a test row."""
    values = _as_numbers(correct)
    return _bootstrap(values, level, samples, seed)


def paired_bootstrap(correct_a: Sequence[bool], correct_b: Sequence[bool], *, level: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """The difference accuracy(a) - accuracy(b) on the same test rows, with a paired percentile bootstrap interval.

    Rows are resampled together, so what is hard for both models does not blur the difference (Efron and Tibshirani 1993).
    Raises ValueError when the two do not have the same number of rows.
    """
    a, b = _as_numbers(correct_a), _as_numbers(correct_b)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} rows against {len(b)}: a paired comparison needs the same test rows in the same order")
    return replace(_bootstrap(a - b, level, samples, seed), difference=True)


def _bootstrap(values: np.ndarray, level: float, samples: int, seed: int) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: choose a share between 0 and 1, such as 0.95")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), size=(samples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def _as_numbers(correct: Sequence[bool]) -> np.ndarray:
    values = np.asarray(correct, dtype=float)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"expected one value a test row, got shape {values.shape}")
    return values


def confusion_matrix(labels: Sequence[int], predicted: Sequence[int], num_labels: int) -> np.ndarray:
    """How often each class was taken for each: (num_labels, num_labels) counts, the true class down, the predicted one across.

    Raises ValueError when the two do not have the same number of rows, or one of them holds a class outside 0 to num_labels - 1.
    """
    true, answered = np.asarray(labels), np.asarray(predicted)
    if true.shape != answered.shape or true.ndim != 1:
        raise ValueError(f"labels of shape {true.shape} against predictions of shape {answered.shape}: give one of each for every row")
    for name, values in (("label", true), ("prediction", answered)):
        wrong = values[(values < 0) | (values >= num_labels)]
        if len(wrong):
            raise ValueError(f"a {name} is {wrong[0]}, and the classes are 0 to {num_labels - 1}: take such rows out first")
    return np.bincount(num_labels * true + answered, minlength=num_labels**2).reshape(num_labels, num_labels)


@dataclass(frozen=True)
class CalibrationBin:
    """Rows whose confidence (the largest probability) lies in one interval: their mean confidence, their accuracy, their number."""

    confidence: float
    accuracy: float
    count: int


def calibration_bins(probabilities: Sequence[Sequence[float]], labels: Sequence[int], bins: int = 10) -> list[CalibrationBin]:
    """Rows sorted by confidence into `bins` intervals (0, 1/bins], (1/bins, 2/bins] … of equal width; empty ones are left out.

    probabilities: (rows, num_labels). Raises ValueError when they are not probabilities, or there is not a label for each row.
    """
    p, true = np.asarray(probabilities, dtype=float), np.asarray(labels)
    if bins < 1:
        raise ValueError(f"bins is {bins}: at least 1")
    if p.ndim != 2 or true.shape != p.shape[:1] or not len(p):
        raise ValueError(f"probabilities of shape {p.shape} and labels of shape {true.shape}: give (rows, num_labels) and (rows,)")
    if p.min() < 0 or np.abs(p.sum(1) - 1).max() > 1e-3:
        raise ValueError("the rows do not sum to 1: give probabilities, for example logits after a softmax")
    confidence, right = p.max(1), p.argmax(1) == true
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    inside = [index == i for i in range(bins)]
    return [CalibrationBin(float(confidence[rows].mean()), float(right[rows].mean()), int(rows.sum())) for rows in inside if rows.any()]


def expected_calibration_error(probabilities: Sequence[Sequence[float]], labels: Sequence[int], bins: int = 10) -> float:
    """The gap between confidence and accuracy, averaged over the rows (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599). 0 is best.

    Rows are binned as in `calibration_bins`, which says what it raises; in each bin the gap is that of the means.
    """
    found = calibration_bins(probabilities, labels, bins)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in found) / sum(one.count for one in found)


def perplexity(model: nn.Module, tokenizer, texts: str | Sequence[str], **options) -> float:
    """exp of the mean loss a token, in nats: between how many tokens the model is torn. Options as in `bits_per_byte`.

    It depends on the tokenizer. To compare models with different vocabularies, use `bits_per_byte`.
    """
    nats, tokens, _ = _surprise(model, tokenizer, texts, **options)
    return math.exp(nats / tokens)


def bits_per_byte(model: nn.Module, tokenizer, texts: str | Sequence[str], **options) -> float:
    """Bits the model needs for each byte (UTF-8) of the texts: its summed loss in bits over their length. Less is better.

    Every token of a text is predicted once, the first from the beginning-of-text token alone. A text longer than `context` tokens is
    read through a window that moves by `stride`: then each token has at least context - stride tokens before it.
    context: default the model's own, 512 at most. stride: default half of it. dtype: of autocast. The model is left as it was.
    Raises ValueError when there is no text, or stride is not between 1 and context.
    """
    nats, _, size = _surprise(model, tokenizer, texts, **options)
    return nats / math.log(2) / size


@torch.no_grad()
def _surprise(
    model: nn.Module,
    tokenizer,
    texts: str | Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, int, int]:
    """The summed loss in nats, the number of tokens, and the number of bytes of the texts."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not any(texts):
        raise ValueError("there is no text to measure: give at least one that is not empty")
    context = context or min(model.config.max_position_embeddings, 512)
    stride = stride or max(1, context // 2)
    if not 1 <= stride <= context:
        raise ValueError(f"stride is {stride}: choose 1 to {context}, the context")
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    # Not verbose, because a text longer than the model's context is no mistake here: windows are cut from it.
    encoded = [[begin, *ids] for ids in tokenizer([t for t in texts if t], add_special_tokens=False, verbose=False)["input_ids"]]
    windows = [window for ids in encoded for window in _windows(ids, context, stride)]
    windows.sort(key=lambda window: len(window[0]))
    device, nats, count = next(model.parameters()).device, 0.0, 0
    with _in_eval_mode(model):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            table = torch.zeros(len(batch), max(len(ids) for ids, _ in batch), dtype=torch.long)
            wanted = torch.full_like(table, -100)
            for row, (ids, scored) in enumerate(batch):
                table[row, : len(ids)] = torch.tensor(ids)
                wanted[row, len(ids) - scored : len(ids)] = table[row, len(ids) - scored : len(ids)]
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                # Filled up on the right: in a causal model no token sees what comes after it, so no mask is needed.
                logits = model(input_ids=table[:, :-1].to(device)).logits
            for scores, targets in zip(logits, wanted[:, 1:].to(device)):  # a row at a time, because a copy of all logits is large
                nats += nn.functional.cross_entropy(scores.float(), targets, reduction="sum").item()
            count += sum(scored for _, scored in batch)
    return nats, count, sum(len(text.encode()) for text in texts)


def _windows(ids: list[int], context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Cut ids into (context + 1 ids at most, how many of the last ones are scored), each id but the first scored once."""
    done = 1
    while done < len(ids):
        end = min(len(ids), context + 1 if done == 1 else done + stride)
        yield ids[max(0, end - context - 1) : end], end - done
        done = end


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
