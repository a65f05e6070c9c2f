import bz2
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from labkit import pretrain as pretrain_module
from labkit import tokens as tokens_module
from labkit.__main__ import main
from labkit.muon import Muon, orthogonalize
from labkit.pretrain import Settings, build_model, cosine_schedule, linear_cross_entropy, make_optimizers, pretrain
from labkit.tokens import Source, encode_documents, join_documents, prepare, read_documents, split_documents, train_tokenizer, training_rows

TINY = ["--tokens", "6k", "--vocab-size", "300", "--hidden-size", "16", "--layers", "2", "--heads", "2", "--intermediate-size", "32"]
TINY += ["--context", "32", "--batch-tokens", "256", "--micro-rows", "4"]
TINY_SETTINGS = Settings(
    tokens=6000, vocab_size=300, hidden_size=16, layers=2, heads=2, intermediate_size=32, context=32, batch_tokens=256, micro_rows=4
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A training file and a held-out file of made-up sentences."""
    folder = tmp_path_factory.mktemp("texts")
    for name, seed, count in (("train", 0, 120), ("held_out", 1, 10)):
        rng = random.Random(seed)
        words = ["the", "a", "dog", "cat", "bird", "saw", "met", "liked", "old", "red", "small", "house", "garden", "and", "then", "again"]
        documents = [" ".join(rng.choices(words, k=40)) + f" {i}." for i in range(count)]
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """A model trained without interruption, through the command."""
    out = tmp_path_factory.mktemp("finished") / "model"
    assert main(command(texts, out)) == 0
    return out


def command(texts, out, *more: str) -> list[str]:
    held_out = ["--validation", str(texts / "held_out.txt"), "--validate-every", "10", "--checkpoint-every", "2"]
    return ["pretrain", "--text", f"{texts / 'train.txt'}:2", *TINY, *held_out, "--out", str(out), *more]


def log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- the run


def test_the_command_trains_and_writes_what_transformers_loads(finished, texts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    entries = log(finished)
    assert [entry["step"] for entry in entries] == [10, 20, 23] and entries[-1]["loss"] < entries[0]["loss"]
    assert entries[-1]["bits_per_byte"]["held_out"] < entries[0]["bits_per_byte"]["held_out"]
    assert all(entry["tokens_per_second"] > 0 and entry["utilisation"] > 0 for entry in entries)
    assert {path.name for path in finished.iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "run",
    }  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    assert model.dtype == torch.float16 and model.lm_head.weight is model.model.embed_tokens.weight
    marks = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert tokenizer.convert_tokens_to_ids(marks) == [0, 1, 2, 3, 4] and tokenizer.pad_token_id == 1 != tokenizer.eos_token_id == 0
    assert tokenizer.bos_token_id == 0 == model.generation_config.eos_token_id and len(tokenizer) <= model.config.vocab_size
    text = "the old dog — saw Zoë 7 times\n\n  again 🐦"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("a<|user|>the")["input_ids"][1] == 2
    prompt = tokenizer("the dog", return_tensors="pt")
    assert model.float().generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 5


def test_killed_in_the_middle_and_resumed_it_ends_with_the_same_weights(texts, finished, tmp_path):
    out = tmp_path / "model"
    checkpoint = out / "run" / "checkpoint.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "labkit", *command(texts, out)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL) if hasattr(signal, "SIGKILL") else process.kill()
    process.wait()
    assert checkpoint.exists() and not (out / "model.safetensors").exists()
    (out / "run" / ".checkpoint.safetensors.x.part").write_bytes(b"half a checkpoint")
    made = (out / "run" / "tokens.npy").stat().st_mtime_ns
    assert main(command(texts, out)) == 1, "an unfinished run is not overwritten without --resume"
    assert main(command(texts, out, "--resume", "--learning-rate", "0.1")) == 1, "another learning rate is another run"
    assert main(command(texts, out, "--resume")) == 0
    assert (out / "run" / "tokens.npy").stat().st_mtime_ns == made, "the text was tokenized again"
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert not list((out / "run").glob(".*")) and not checkpoint.exists()
    assert [entry["step"] for entry in log(out)] == [10, 20, 23], "each step is logged once"


def test_ctrl_c_leaves_a_checkpoint_and_the_run_goes_on_to_the_same_weights(texts, finished, tmp_path, monkeypatch, capsys):
    out, steps, original = tmp_path / "model", [], pretrain_module.train_step

    def interrupted_step(*arguments):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(pretrain_module, "train_step", interrupted_step)
    assert main(command(texts, out)) == 130 and len(steps) == 5
    assert "stopped after step 5 of 23; add --resume to go on" in capsys.readouterr().err
    assert main(command(texts, out, "--resume")) == 0 and len(steps) == 23
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_finished_model_is_not_overwritten_and_nan_stops_the_run(texts, finished, tmp_path, monkeypatch, capsys):
    before = (finished / "model.safetensors").read_bytes()
    for more in ([], ["--resume"]):
        assert main(command(texts, finished, *more)) == 1
        assert "holds a finished model: choose another folder" in capsys.readouterr().err
    assert (finished / "model.safetensors").read_bytes() == before
    monkeypatch.setattr(pretrain_module, "linear_cross_entropy", lambda hidden, *_: hidden.sum() * math.nan)
    assert main(command(texts, tmp_path / "model")) == 1
    assert "the loss is nan at step 1 of 23" in capsys.readouterr().err and not (tmp_path / "model" / "model.safetensors").exists()


def test_a_run_goes_on_from_a_finished_model(texts, finished, tmp_path, capsys):
    """Its tokenizer and weights are where the new run starts; a shape that is not the model's is an error."""
    out = tmp_path / "model"
    more = ["--start-from", str(finished), "--validation", str(texts / "held_out.txt"), "--tokens", "2k", "--micro-rows", "4"]
    more += ["--batch-tokens", "256", "--learning-rate", "1e-5", "--decay-to", "0", "--validate-every", "1", "--out", str(out)]
    assert main(["pretrain", "--text", str(texts / "held_out.txt"), *more]) == 0
    assert (out / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((finished / "config.json").read_text())
    entries, before = log(out), log(finished)[-1]["bits_per_byte"]["held_out"]
    assert entries[-1]["step"] == 7 and entries[-1]["learning_rate"] < entries[2]["learning_rate"] / 10
    assert entries[0]["bits_per_byte"]["held_out"] == pytest.approx(before, rel=0.005), "a tiny step from where the first run ended"
    assert (out / "model.safetensors").read_bytes() != (finished / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["pretrain", "--text", str(texts / "train.txt"), *more[:-2], "--hidden-size", "32", "--out", str(tmp_path / "other")]) == 1
    assert "hidden_size is 32, the model in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["pretrain", "--text", "x.txt", *more, "--decay-to", "low"])


def test_evaluation_prints_the_model_next_to_what_it_must_beat(finished, texts, capsys):
    assert main(["pretrain", "--evaluate", str(finished), "--validation", str(texts / "held_out.txt")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = dict(line.strip().rsplit(maxsplit=1) for line in printed.out.splitlines()[1:])
    value = {name: float(text) for name, text in lines.items()}
    assert set(value) == {"this model", "untrained", "xz -9", "Kneser–Ney 5-gram", "a vocabulary of equal tokens"}
    assert value["this model"] < 0.9 * value["untrained"] and value["Kneser–Ney 5-gram"] < value["untrained"]
    assert value["untrained"] == pytest.approx(value["a vocabulary of equal tokens"], rel=0.05)
    assert main(["pretrain", "--evaluate", str(texts), "--validation", str(texts / "held_out.txt")]) == 1
    assert "holds no finished model" in capsys.readouterr().err


def test_settings_and_sources_that_cannot_work_are_named(texts):
    with pytest.raises(ValueError, match="optimizer is 'sgd': choose adamw or muon"):
        Settings(optimizer="sgd")
    with pytest.raises(ValueError, match="hidden_size 100 and 6 heads"):
        Settings(hidden_size=100)
    with pytest.raises(ValueError, match="a run needs a batch"):
        Settings(tokens=100)
    with pytest.raises(ValueError, match="the weight is 0"):
        Source.parse(f"{texts / 'train.txt'}:0")
    with pytest.raises(FileNotFoundError, match="nothing.txt does not exist"):
        Source.parse("nothing.txt:1")
    assert Source.parse(f"{texts / 'train.txt'}:0.25").weight == 0.25 and Source.parse("storyworld").weight == 1
    with pytest.raises(ValueError, match="vocab_size is 200: choose 261 to 65536"):
        train_tokenizer(iter(["a"]), 200, 32)
    with pytest.raises(ValueError, match="make 3 rows of 32, a batch needs 8"):
        training_rows(np.arange(100), 0, rows=8, context=32, seed=0)


# ---------------------------------------------------------------- the text


def test_documents_are_cut_at_marks_or_headings_cleaned_and_kept_once(tmp_path):
    fox = "A fox ran by and looked at “all” of us with its very curious eyes, then it went back to its den."
    marked = f"One day.\n{fox}\n<|endoftext|>\n\nTwo.\n<|endoftext|>\nTwo."
    assert split_documents(marked) == [f"One day.\n\n{fox}".replace("“", '"').replace("”", '"'), "Two."]
    articles = "Ants\n\nAnts are small. They\nlive together.\n\nBees\n\nBees fly.\n\nThey sting.\n"
    assert split_documents(articles) == ["Ants\n\nAnts are small. They\nlive together.", "Bees\n\nBees fly.\n\nThey sting."]
    line = "it was a long line of seventy characters that had been broken by hand"
    assert split_documents(f"CHAPTER I\n\n{line}\n{line}\nend.") == [f"CHAPTER I\n\n{line} {line} end."]
    long = "\n\n".join(f"Paragraph {i} " + "says much " * 40 + "." for i in range(40))
    parts = split_documents(long)
    assert len(parts) > 2 and max(map(len, parts)) <= tokens_module.LONGEST_DOCUMENT and "\n\n".join(parts) == long
    path = tmp_path / "a.txt.bz2"
    path.write_bytes(bz2.compress(articles.encode()))
    assert read_documents(Source(str(path))) == split_documents(articles) and Source(str(path)).name == "a"


def test_each_source_gives_its_share_and_runs_again_when_it_ends(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "STORIES_AT_ONCE", 20)
    sources = [Source(str(texts / "held_out.txt"), 3.0), Source("storyworld", 1.0)]
    stream, made = prepare(sources, tokens=8000, vocab_size=400, context=32, seed=0, folder=tmp_path)
    assert stream.dtype == np.uint16 and isinstance(stream, np.memmap)
    shares = {name: counts["tokens"] / 8000 for name, counts in made["sources"].items()}
    assert shares["held_out"] == pytest.approx(0.75, abs=0.02) and 0.25 <= shares["storyworld"] < 0.35
    assert made["sources"]["held_out"]["passes"] > 1
    # Another weight is another stream; the same request finds the same one; a damaged file is made again.
    first = np.array(stream)
    del stream  # a file that is mapped into memory must not be cut short
    made = (tmp_path / "tokens.npy").stat().st_mtime_ns
    assert np.array_equal(prepare(sources, tokens=8000, vocab_size=400, context=32, seed=0, folder=tmp_path)[0], first)
    assert (tmp_path / "tokens.npy").stat().st_mtime_ns == made
    (tmp_path / "tokens.npy").write_bytes(b"damaged")
    assert np.array_equal(prepare(sources, tokens=8000, vocab_size=400, context=32, seed=0, folder=tmp_path)[0], first)
    other, _ = prepare(sources[:1], tokens=8000, vocab_size=400, context=32, seed=0, folder=tmp_path)
    assert not np.array_equal(other, first)


def test_every_token_is_predicted_once_a_pass_and_the_order_depends_on_seed_and_step_alone():
    stream = np.arange(1000, dtype=np.uint16)
    rows = [training_rows(stream, step, rows=5, context=10, seed=1) for step in range(19)]
    assert rows[0].shape == (5, 11) and rows[0].dtype == np.int64
    targets = np.concatenate(rows)[:, 1:].ravel()
    assert len(set(targets)) == len(targets) == 950
    assert (np.concatenate(rows)[:, 1:] == np.concatenate(rows)[:, :-1] + 1).all()
    assert np.array_equal(rows[7], training_rows(stream, 7, rows=5, context=10, seed=1))
    assert not np.array_equal(rows[0], training_rows(stream, 0, rows=5, context=10, seed=2))
    assert not np.array_equal(rows[0], training_rows(stream, 19, rows=5, context=10, seed=1)), "a second pass has a new order"


def test_documents_are_joined_by_marks():
    tokenizer = train_tokenizer(iter(["the dog saw the dog"] * 3), 270, 16)
    documents = encode_documents(tokenizer, ["the dog", "saw"])
    stream = join_documents(documents, tokenizer.eos_token_id)
    assert tokenizer.decode(stream.tolist()) == "<|endoftext|>the dog<|endoftext|>saw<|endoftext|>"


# ---------------------------------------------------------------- the mathematics


def test_the_chunked_loss_and_its_gradients_equal_pytorchs(monkeypatch):
    monkeypatch.setattr(pretrain_module, "LOGITS_AT_ONCE", {"cpu": 7})
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 10, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (3, 10))
    loss = linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), targets.flatten(), reduction="sum")
    assert torch.allclose(loss, expected)
    found, wanted = (torch.autograd.grad(value / 30, (hidden, weight)) for value in (loss, expected))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted))
    narrow = linear_cross_entropy(hidden, weight, targets, torch.bfloat16)
    assert narrow.item() == pytest.approx(expected.item(), rel=0.02)
    for a, b in zip(torch.autograd.grad(narrow / 30, (hidden, weight)), wanted):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.03 * b.norm()


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    model = tiny_model()
    batch = torch.randint(300, (8, 33), generator=torch.Generator().manual_seed(0))
    gradients = []
    for micro_rows in (8, 3):
        settings = Settings(**(vars(TINY_SETTINGS) | {"micro_rows": micro_rows, "max_grad_norm": 1e9}))
        keeper = SimpleNamespace(
            param_groups=[],
            step=lambda: gradients.append([p.grad.clone() for p in model.parameters()]),
            zero_grad=lambda set_to_none: model.zero_grad(),
        )
        loss = pretrain_module.train_step(model, model.model, [keeper], batch, settings, 1.0, torch.float32)
        assert loss == pytest.approx(model(input_ids=batch, labels=batch).loss.item(), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_muon_takes_pytorchs_steps():
    torch.manual_seed(0)
    shapes = [(24, 16), (16, 24), (24, 16), (16, 16)]
    ours, theirs = (
        [torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(shapes)] for _ in range(2)
    )
    optimizers = (
        Muon(ours, lr=0.1, weight_decay=0.1, dtype=torch.bfloat16),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    for a, b, before in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - before).norm()  # bf16 keeps three digits
    values = torch.linalg.svdvals(orthogonalize(torch.randn(5, 12, 40)))
    assert values.min() > 0.6 and values.max() < 1.3
    with pytest.raises(ValueError, match=r"shape \(3,\): Muon is for matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_a_step_under_bf16_autocast_is_close_to_one_in_fp32():
    batch = torch.randint(300, (8, 33), generator=torch.Generator().manual_seed(0))
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model()
        optimizers = make_optimizers(model, TINY_SETTINGS, dtype)
        losses[dtype] = [pretrain_module.train_step(model, model.model, optimizers, batch, TINY_SETTINGS, 1.0, dtype) for _ in range(8)]
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[torch.float32][-1] < losses[torch.float32][0] - 0.1
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.01)


def test_only_matrices_decay_and_every_parameter_is_trained_once():
    model = tiny_model()
    for name in ("adamw", "muon"):
        optimizers = make_optimizers(model, Settings(**(vars(TINY_SETTINGS) | {"optimizer": name})), torch.float32)
        groups = [(group["weight_decay"], p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert sorted(id(p) for _, p in groups) == sorted(id(p) for p in model.parameters())
        assert all((decay > 0) == (p.ndim == 2) for decay, p in groups)
        assert any(isinstance(optimizer, Muon) for optimizer in optimizers) == (name == "muon")


def test_the_schedule_rises_then_falls_to_a_tenth():
    factors = [cosine_schedule(step, 100, warmup=0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1 and max(factors) == 1
    assert all(a > b for a, b in zip(factors[10:], factors[11:])) and factors[-1] == pytest.approx(0.1, abs=0.01)


def tiny_model():
    torch.manual_seed(0)
    return build_model(TINY_SETTINGS, SimpleNamespace(bos_token_id=0, eos_token_id=0, pad_token_id=1))


# ---------------------------------------------------------------- bits per byte


def test_bits_per_byte_equals_a_count_by_hand_and_a_window_counts_every_token_once(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from labkit.measure import bits_per_byte, perplexity

    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32), AutoTokenizer.from_pretrained(finished)
    texts = ["the dog", "a cat saw the dog — again", ""]
    nats = tokens = 0
    for text in texts[:2]:
        ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
        nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    size = sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert perplexity(model, tokenizer, texts) == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    long = "the old dog met a small red bird and then " * 20
    ids = torch.tensor([0, *tokenizer(long)["input_ids"]])
    with torch.no_grad():
        by_hand = sum(
            F.cross_entropy(model(input_ids=ids[None, max(0, i - 8) : i]).logits[0, -1:], ids[i : i + 1]).item() for i in range(1, len(ids))
        )
    one_by_one = bits_per_byte(model, tokenizer, long, context=8, stride=1)
    assert one_by_one == pytest.approx(by_hand / math.log(2) / len(long), rel=1e-5)
    assert bits_per_byte(model, tokenizer, long, context=8, stride=4, batch_size=3) == pytest.approx(one_by_one, rel=0.05)
    assert bits_per_byte(model, tokenizer, long, context=8, batch_size=1) == pytest.approx(bits_per_byte(model, tokenizer, long, context=8), rel=1e-6)
    model.train()
    bits_per_byte(model, tokenizer, "a dog")
    assert model.training
    with pytest.raises(ValueError, match="there is no text"):
        bits_per_byte(model, tokenizer, [""])
    with pytest.raises(ValueError, match="stride is 9: choose 1 to 8"):
        bits_per_byte(model, tokenizer, "a dog", context=8, stride=9)


def test_measured_while_training_it_is_the_same_quantity(finished, texts):
    """Rows of the joined stream instead of sliding windows, and the marks' bits as well: close to, not equal to, `bits_per_byte`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from labkit.measure import bits_per_byte

    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32), AutoTokenizer.from_pretrained(finished)
    found = bits_per_byte(model, tokenizer, read_documents(Source(str(texts / "held_out.txt"))), context=32)
    assert log(finished)[-1]["bits_per_byte"]["held_out"] == pytest.approx(found, rel=0.05)


def test_pretrain_takes_validation_text_from_storyworld(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "HELD_OUT_STORIES", 3)
    settings = Settings(**(vars(TINY_SETTINGS) | {"tokens": 512}))
    pretrain(settings, [Source(str(texts / "train.txt"))], tmp_path / "m", validation=[Source("storyworld")])
    assert log(tmp_path / "m")[-1]["bits_per_byte"]["storyworld"] > 1
