"""`python -m labkit pretrain`: train a small decoder from scratch, from text files to a folder that transformers loads."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from labkit.checkpoint import load_checkpoint, save_checkpoint
from labkit.files import sha256, whole_file, write_text
from labkit.muon import Muon
from labkit.tokens import END_OF_TEXT, Source, encode_documents, held_out_texts, join_documents, prepare, training_rows
from labkit.training import TrainingDiverged, interrupt_between_steps, progress_bar

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VALIDATION_TOKENS = 65_536  # of each held-out source, while training; `--evaluate` measures on the whole
LOGITS_AT_ONCE = {"cpu": 512, "cuda": 16_384}  # rows of logits computed at a time: they stay in a processor's cache, and keep a GPU busy


@dataclass(frozen=True)
class Settings:
    """One pretraining run. Two runs with equal settings and texts end with equal weights.

    tokens: how many are trained on; batch_tokens: in one step of the optimizer; micro_rows: rows in one forward pass.
    learning_rate: the peak, reached after the `warmup` share of the steps, then a cosine down to its `decay_to` share.
    optimizer: "adamw", or "muon" for the matrices inside the blocks (AdamW for the rest).
    """

    tokens: int = 2_000_000
    vocab_size: int = 6144
    hidden_size: int = 288
    layers: int = 8
    heads: int = 6
    intermediate_size: int = 704
    context: int = 256
    batch_tokens: int = 8192
    micro_rows: int = 8
    learning_rate: float = 3e-3
    warmup: float = 0.03
    decay_to: float = 0.1
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    optimizer: str = "muon"
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer is {self.optimizer!r}: choose adamw or muon")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} and {self.heads} heads: a head's size must be a whole, even number")
        if self.batch_tokens < self.context or self.steps < 1:
            raise ValueError(
                f"{self.tokens} tokens in batches of {self.batch_tokens} with a context of {self.context}: a batch needs a row, a run needs a batch"
            )

    @property
    def rows(self) -> int:
        """Rows in a batch."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        return self.tokens // (self.rows * self.context)


def pretrain(
    settings: Settings,
    sources: Sequence[Source],
    out: Path,
    *,
    validation: Sequence[Source] = (),
    validate_every: int = 100,
    checkpoint_every: int = 100,
    resume: bool = False,
    start_from: Path | None = None,
) -> LlamaForCausalLM:
    """Train, and write the model to `out` in transformers' layout: config.json, model.safetensors (fp16), tokenizer files.

    start_from: the folder of a model made here before; its weights and its tokenizer begin this run (continued pretraining).
    What only the run needs lies in `out`/run: the token stream, the checkpoint, log.jsonl. An interrupted run goes on with
    resume=True to the same final weights bit for bit. Raises FileExistsError when `out` holds a finished model, or an unfinished run
    and resume is not asked for; ValueError when `start_from` has another shape than settings; TrainingDiverged when the loss is not finite.
    """
    from transformers import AutoTokenizer

    if validate_every < 1 or checkpoint_every < 1:
        raise ValueError(f"validate_every {validate_every}, checkpoint_every {checkpoint_every}: each is a number of steps from 1 up")
    run = out / "run"
    checkpoint = run / "checkpoint.safetensors"
    if (out / "model.safetensors").exists():
        raise FileExistsError(f"{out} holds a finished model: choose another folder, or delete this one first")
    if checkpoint.exists() and not resume:
        raise FileExistsError(f"{checkpoint} holds an unfinished run: add --resume to go on with it, or delete {out} to start again")
    run.mkdir(parents=True, exist_ok=True)
    for left in run.glob(".*.part"):  # of a process that was killed while it wrote
        left.unlink()
    started = time.monotonic()
    stream, made = prepare(
        sources, tokens=settings.tokens + 1, vocab_size=settings.vocab_size, context=settings.context, seed=settings.seed, folder=run,
        tokenizer_from=start_from,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(run)
    for name, counts in made["sources"].items():
        print(f"{name}: " + ", ".join(f"{value:,} {key}" for key, value in counts.items()))
    print(f"{len(stream):,} tokens ready after {time.monotonic() - started:.0f} s")

    with torch.random.fork_rng(devices=[]):  # training draws nothing more: the order of rows is computed from the seed
        torch.manual_seed(settings.seed)
        model = build_model(settings, tokenizer)
    device, dtype = _device_and_dtype()
    identity = asdict(settings) | {"stream": made["sha256"], "dtype": str(dtype)}
    if start_from is not None:
        identity["start_from"] = load_weights(model, settings, start_from)
    model.to(device)
    optimizers = make_optimizers(model, settings, dtype)
    body = torch.compile(model.model, dynamic=False) if settings.compile else model.model
    held_out = {source.name: held_out_rows(source, tokenizer, settings.context) for source in validation}
    done = 0
    if resume and checkpoint.exists():
        done = load_checkpoint(checkpoint, model, optimizers, identity)[0]["step"]
    log = run / "log.jsonl"
    earlier = log.read_text(encoding="utf-8").splitlines(keepends=True) if done else []
    write_text(log, "".join(line for line in earlier if json.loads(line)["step"] <= done))  # what came after the checkpoint is done again
    meter = Meter(model, settings, matmul_peak(device, dtype))
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {settings.steps:,} steps of {settings.rows * settings.context:,} tokens, "
        f"{done} done; {dtype}, {torch.get_num_threads()} threads, measured peak of matrix products {meter.peak / 1e9:.0f} GFLOP/s",
        flush=True,
    )
    with interrupt_between_steps() as interrupted, progress_bar(settings.steps, done, "pretraining") as bar:
        recent: list[float] = []
        for step in range(done, settings.steps):
            batch = torch.from_numpy(training_rows(stream, step, rows=settings.rows, context=settings.context, seed=settings.seed)).to(device)
            rate = cosine_schedule(step, settings.steps, settings.warmup, settings.decay_to)
            recent.append(train_step(model, body, optimizers, batch, settings, rate, dtype))
            if not math.isfinite(recent[-1]):
                raise TrainingDiverged(
                    f"the loss is {recent[-1]} at step {step + 1} of {settings.steps} (learning rate {settings.learning_rate * rate:.2g}): "
                    f"lower --learning-rate or lengthen --warmup; the last checkpoint is {checkpoint}"
                )
            meter.count(batch.shape[0] * settings.context)
            bar.update()
            bar.set_postfix_str(f"loss {recent[-1]:.3f}", refresh=False)
            last = step + 1 == settings.steps
            if (step + 1) % validate_every == 0 or last:
                entry = {"step": step + 1, "loss": float(np.mean(recent)), "learning_rate": settings.learning_rate * rate} | meter.read()
                entry["bits_per_byte"] = {name: bits_per_byte_of_rows(model, rows, settings, dtype) for name, rows in held_out.items()}
                _log(log, entry)
                meter.restart()
                recent = []
            if (step + 1) % checkpoint_every == 0 or interrupted.is_set():
                save_checkpoint(checkpoint, model, optimizers, None, {"step": step + 1, "settings": identity})
            if interrupted.is_set():
                raise KeyboardInterrupt(f"stopped after step {step + 1} of {settings.steps}; add --resume to go on from {checkpoint}")
    write_model(model, tokenizer, out)
    checkpoint.unlink(missing_ok=True)
    return model


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama (Touvron et al. 2023, arXiv 2302.13971) with tied embeddings, new weights from torch's global generator.

    The projections that write into the residual stream start smaller by sqrt(2 x layers), as in GPT-2.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_((2 * settings.layers) ** 0.5)
    return model


def shape_of(folder: Path) -> dict[str, int]:
    """The shape settings of the Llama in `folder`, from its config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    names |= {"intermediate_size": "intermediate_size", "context": "max_position_embeddings"}
    return {ours: config[theirs] for ours, theirs in names.items()}


def load_weights(model: LlamaForCausalLM, settings: Settings, folder: Path) -> str:
    """Set the model's weights from `folder`; returns the weight file's SHA-256. Raises ValueError when the shapes differ."""
    from safetensors.torch import load_file

    for name, value in shape_of(folder).items():
        if getattr(settings, name) != value:
            raise ValueError(f"{name} is {getattr(settings, name)}, the model in {folder} has {value}: leave the option out, or give {value}")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied, and stored once
    model.load_state_dict(weights)
    return sha256(folder / "model.safetensors")


def make_optimizers(model: nn.Module, settings: Settings, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the blocks' matrices and AdamW for the rest. Weight decay is on matrices only."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    embeddings = [p for p in model.parameters() if p.ndim == 2 and id(p) not in inside]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    decay, rate = settings.weight_decay, settings.learning_rate
    muon = [Muon(matrices, lr=rate, weight_decay=decay, dtype=dtype)] if settings.optimizer == "muon" else []
    decayed = embeddings if muon else embeddings + matrices
    groups = [{"params": decayed, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True), *muon]


def cosine_schedule(step: int, steps: int, warmup: float = 0.03, floor: float = 0.1) -> float:
    """The factor on the learning rate at `step` (from 0): up linearly over the `warmup` share of the steps, a cosine down to `floor`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def train_step(model, body, optimizers, batch: Tensor, settings: Settings, rate: float, dtype: torch.dtype) -> float:
    """One step on (rows, context + 1) ids, at `rate` times the learning rate; returns the mean loss in nats a token."""
    total = 0.0
    targets = batch.shape[0] * (batch.shape[1] - 1)
    for part in batch.split(settings.micro_rows):
        with torch.autocast(part.device.type, dtype, enabled=dtype != torch.float32):
            hidden = body(input_ids=part[:, :-1], use_cache=False).last_hidden_state
            loss = linear_cross_entropy(hidden, model.lm_head.weight, part[:, 1:], dtype) / targets
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Logits, their softmax and both gradients for a few rows at a time, so that the (tokens, vocabulary) table never exists whole."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        narrow, to_hidden, to_weight = weight.to(dtype), torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros((), device=hidden.device)
        at_once = LOGITS_AT_ONCE.get(hidden.device.type, 512)
        for start in range(0, len(hidden), at_once):
            rows, wanted = hidden[start : start + at_once].to(dtype), targets[start : start + at_once, None]
            logits = (rows @ narrow.t()).float()
            normalizer = logits.logsumexp(-1, keepdim=True)
            total += (normalizer - logits.gather(1, wanted)).sum()
            surprise = logits.sub_(normalizer).exp_().scatter_add_(1, wanted, torch.full_like(normalizer, -1.0)).to(dtype)
            to_hidden[start : start + at_once] = surprise @ narrow
            if dtype == torch.float32:
                to_weight.addmm_(surprise.t(), rows)
            else:
                to_weight += surprise.t() @ rows
        ctx.save_for_backward(to_hidden, to_weight)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden * gradient, to_weight * gradient, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The summed cross-entropy, in nats, of softmax(hidden @ weight.T) at `targets`: hidden (..., hidden_size), targets (...)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), dtype)


def held_out_rows(source: Source, tokenizer: PreTrainedTokenizerFast, context: int) -> tuple[Tensor, int]:
    """Held-out text as rows (rows, context + 1) of ids, the last one filled up with -1, and the text's bytes in UTF-8.

    The first documents until there are VALIDATION_TOKENS.
    """
    texts, encoded, count = [], [], 0
    for text in held_out_texts(source):
        if count < VALIDATION_TOKENS:
            texts.append(text)
            encoded += encode_documents(tokenizer, [text])
            count += len(encoded[-1]) + 1
    stream = join_documents(encoded, tokenizer.convert_tokens_to_ids(END_OF_TEXT)).astype(np.int64)
    rows = math.ceil((len(stream) - 1) / context)
    table = torch.full((rows, context + 1), -1)
    for i in range(rows):
        piece = stream[i * context : (i + 1) * context + 1]
        table[i, : len(piece)] = torch.from_numpy(piece)
    return table, sum(len(text.encode()) for text in texts)


@torch.no_grad()
def bits_per_byte_of_rows(model, rows: tuple[Tensor, int], settings: Settings, dtype: torch.dtype) -> float:
    """Bits a byte on `held_out_rows`: each token is predicted once, from what precedes it in its row; the marks' bits count too."""
    table, size = rows
    nats = 0.0
    device = next(model.parameters()).device
    for part in table.split(4 * settings.micro_rows):
        part = part.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = model.model(input_ids=part[:, :-1].clamp(min=0), use_cache=False).last_hidden_state
            for states, targets in zip(hidden, part[:, 1:]):
                logits = (states @ model.lm_head.weight.t()).float()
                nats += nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum").item()
    return nats / math.log(2) / size


class Meter:
    """Tokens a second and the share of the processor's measured peak that the model's own arithmetic reaches."""

    def __init__(self, model: nn.Module, settings: Settings, peak: float):
        self.peak = peak
        parameters = sum(p.numel() for p in model.parameters())
        # 6 for each parameter (2 forward, 4 backward); the tied table counts once, as the output layer: looking a row up is no arithmetic.
        # Attention: scores and weighted sum, 2 x 2 x hidden x context, halved by the causal mask, tripled by the backward pass.
        self.flops_per_token = 6 * parameters + 6 * settings.layers * settings.hidden_size * settings.context
        self.restart()

    def restart(self) -> None:
        self.tokens, self.started = 0, time.monotonic()

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def read(self) -> dict[str, float]:
        rate = self.tokens / (time.monotonic() - self.started)
        return {"tokens_per_second": round(rate), "utilisation": round(rate * self.flops_per_token / self.peak, 6)}


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 1536, repeats: int = 5) -> float:
    """The best rate of a square matrix product measured now, in FLOP/s. Other programs running at the same time lower it."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # .item() waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def write_model(model, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """transformers' layout in fp16; the weights come last, so that a folder with weights is a finished one."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.config.dtype = torch.float16
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    weights = {name: p.detach().to("cpu", torch.float16).contiguous() for name, p in model.named_parameters()}
    with whole_file(out / "model.safetensors") as part:
        save_file(weights, part, metadata={"format": "pt"})


def _log(path: Path, entry: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    held_out = "".join(f", {name} {value:.3f}" for name, value in entry["bits_per_byte"].items())
    print(
        f"step {entry['step']}: loss {entry['loss']:.3f}{held_out and ', bits a byte' + held_out[1:]}; {entry['tokens_per_second']:,} tokens/s, "
        f"{entry['utilisation']:.0%} of peak",
        flush=True,
    )


def _device_and_dtype() -> tuple[torch.device, torch.dtype]:
    from labkit.runtime import choose_device, choose_dtype

    device = choose_device()
    return device, choose_dtype(device)
