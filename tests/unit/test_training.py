"""The training loop: it learns, it steps its schedule, it stops where it should, and an interrupted run ends as if nothing had happened."""

import math
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from labkit.classifier import TransformerClassifier
from labkit.files import ROOT
from labkit.training import (
    History,
    TrainingDiverged,
    bucket_batches,
    collate_batch,
    evaluate,
    linear_schedule,
    sorted_batches,
    train_model,
)


def rows(count, seed=0, noise=0.0):
    """Rows whose label is told by which half of the vocabulary they use."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=(1,)):
        return torch.randint(low, high, size, generator=generator).tolist()

    made = []
    for _ in range(count):
        label, length = draw(0, 2)[0], draw(2, 12)[0]
        flipped = bool(torch.rand(1, generator=generator) < noise)
        made.append({"input_ids": draw(1 + 15 * label, 16 + 15 * label, (length,)), "label": label ^ flipped})
    return made


def classifier(**options):
    torch.manual_seed(0)
    return TransformerClassifier(32, 2, **{"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 16, "dropout": 0.2} | options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_and_records_a_learning_rate_that_moves():
    model = classifier()
    history = train_model(model, rows(128), rows(48, seed=1), epochs=6, learning_rate=5e-3)
    assert history.best["accuracy"] > 0.9
    rate = history.learning_rate
    peak = rate.index(max(rate))
    assert len(rate) == 48 and 0 < peak < 10 and rate[peak] == pytest.approx(5e-3)
    assert (
        all(a < b for a, b in zip(rate[:peak], rate[1 : peak + 1]))
        and all(a >= b for a, b in zip(rate[peak:], rate[peak + 1 :]))
        and rate[-1] < 0.05 * rate[peak]
    )
    assert [entry["step"] for entry in history.validation] == [8, 16, 24, 32, 40, 48]
    assert evaluate(model, rows(48, seed=1)).loss == pytest.approx(history.best["loss"], abs=1e-6)
    assert not model.training


def test_same_seed_same_weights_and_the_global_random_state_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    finals = []
    for _ in range(2):
        torch.manual_seed(7)
        model = classifier()
        torch.manual_seed(7)
        train_model(model, rows(64), rows(16, seed=1), epochs=2, seed=3)
        finals.append(weights(model))
        assert torch.equal(torch.rand(1), expected)
    assert torch.equal(*finals)


def test_early_stopping_keeps_the_best_weights():
    model = classifier(hidden_size=32, dropout=0.0)
    validation = rows(40, seed=1, noise=0.4)
    history = train_model(model, rows(40, noise=0.4), validation, epochs=60, learning_rate=1e-2, patience=3)
    assert history.stopped_early and len(history.train_loss) < 60 * 3
    assert history.best["loss"] == min(entry["loss"] for entry in history.validation)
    assert evaluate(model, validation).loss == pytest.approx(history.best["loss"], abs=1e-6)


def test_without_keep_best_the_last_weights_stay():
    model = classifier()
    history = train_model(model, rows(64), rows(16, seed=1), epochs=3, keep_best=None)
    assert history.best_step == 12 and evaluate(model, rows(16, seed=1)).loss == pytest.approx(history.validation[-1]["loss"], abs=1e-6)


def test_frozen_parameters_stay_and_nothing_to_train_is_an_error():
    model = classifier()
    model.blocks.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_model(model, rows(32), rows(16, seed=1), epochs=1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not any(name.startswith("blocks.") for name in changed)
    with pytest.raises(ValueError, match="no parameter has requires_grad: unfreeze something"):
        train_model(model.requires_grad_(False), rows(32), rows(16), epochs=1)


@pytest.mark.parametrize("keep_best", ["loss", None])
def test_frozen_matrices_are_in_their_dtype_while_it_trains_and_themselves_afterwards(keep_best):
    model, seen = classifier(), []
    model.blocks.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.register_forward_hook(lambda *_: seen.append({name: p.dtype for name, p in model.named_parameters()}))
    train_model(model, rows(32), rows(16, seed=1), epochs=2, dtype=torch.bfloat16, frozen_dtype=torch.bfloat16, keep_best=keep_best)
    rounded = {name for name, dtype in seen[0].items() if dtype == torch.bfloat16}
    assert len(seen) > 4 and all(dtypes == seen[0] for dtypes in seen)
    assert rounded == {name for name, p in before.items() if name.startswith("blocks.") and p.ndim > 1}
    after = dict(model.named_parameters())
    assert all(p.dtype == torch.float32 for p in after.values())
    assert all(torch.equal(after[name], p) for name, p in before.items() if name.startswith("blocks."))
    assert not all(torch.equal(after[name], p) for name, p in before.items())


def test_frozen_matrices_come_back_when_training_stops_by_an_error():
    model = classifier()
    model.blocks.requires_grad_(False)
    model.classifier.weight.data.fill_(math.nan)
    before = [p.clone() for p in model.blocks.parameters()]
    with pytest.raises(TrainingDiverged):
        train_model(model, rows(64), rows(16), epochs=1, frozen_dtype=torch.bfloat16, dtype=torch.bfloat16)
    assert all(torch.equal(p, old) for p, old in zip(model.blocks.parameters(), before, strict=True))


def test_a_loss_that_is_not_finite_stops_with_a_remedy():
    model = classifier()
    model.classifier.weight.data.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match=r"the loss is nan at step 1 of 4 \(learning rate .*\): lower learning_rate"):
        train_model(model, rows(64), rows(16), epochs=1)


def test_best_by_accuracy_keeps_the_most_accurate_weights():
    model, validation = classifier(hidden_size=32, dropout=0.0), rows(40, seed=1, noise=0.4)
    history = train_model(model, rows(40, noise=0.4), validation, epochs=30, learning_rate=1e-2, keep_best="accuracy")
    assert evaluate(model, validation).accuracy == pytest.approx(max(entry["accuracy"] for entry in history.validation))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "0 epochs on 8 rows"),
        ({"resume": True}, "resume=True needs the checkpoint file"),
        ({"keep_best": "f1"}, "keep_best is 'f1': choose"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        train_model(classifier(), rows(8), rows(8), **options)


def test_sorted_batches_hold_every_row_once_shortest_first():
    lengths = [5, 2, 9, 2, 7]
    assert sorted_batches(lengths, 2) == [[1, 3], [0, 4], [2]] and sorted_batches([], 2) == []


def test_evaluate_is_pure_and_gives_the_same_numbers_for_any_batch_size():
    model, data = classifier(dropout=0.5), rows(37)
    model.train()
    model.blocks[0].eval()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    results = [evaluate(model, data, batch_size=size) for size in (1, 5, 37, 64)] + [evaluate(model, data)]
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and not model.blocks[0].training and all(p.grad is None for p in model.parameters())
    assert len({result.accuracy for result in results}) == 1
    assert all(torch.allclose(result.logits, results[0].logits, atol=1e-5) for result in results)
    order = torch.randperm(37).tolist()
    shuffled = evaluate(model, [data[i] for i in order])
    assert torch.allclose(shuffled.logits, results[0].logits[order], atol=1e-5), "rows come back in their own order"
    with pytest.raises(ValueError, match="no rows"):
        evaluate(model, [])


def test_buckets_use_every_row_once_and_save_padding():
    lengths = [int(x) for x in torch.randint(5, 120, (1000,), generator=torch.Generator().manual_seed(0))]
    batches = bucket_batches(lengths, 16, seed=1)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert batches == bucket_batches(lengths, 16, seed=1) != bucket_batches(lengths, 16, seed=2)
    paid = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    plain = sum(16 * max(lengths[i : i + 16]) for i in range(0, 992, 16)) + 8 * max(lengths[992:])
    assert paid < 1.15 * sum(lengths) < 0.7 * plain


def test_schedule_ends_near_zero_and_never_goes_below():
    assert [round(linear_schedule(step, 10, 0.2), 3) for step in range(11)] == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
    assert linear_schedule(0, 1) == 1.0


def test_collate_pads_to_the_longest_and_masks_padding():
    batch = collate_batch([{"input_ids": [5, 0, 6], "label": 1}, {"input_ids": [7], "label": 0}], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 0, 6], [7, 9, 9]] and batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="at least one row"):
        collate_batch([])


# ---------------------------------------------------------------- interruption and resumption

SCRIPT = """
    import sys, time
    from pathlib import Path
    import torch
    sys.path.insert(0, {tests!r})
    from test_training import classifier, rows, weights
    from labkit.training import train_model, collate_batch

    path, pause = Path({path!r}), {pause}
    def collate(batch):
        time.sleep(pause)
        print("step", flush=True)
        return collate_batch(batch)

    model = classifier()
    train_model(model, rows(160), rows(32, seed=1), epochs=4, learning_rate=3e-3, patience=9, collate=collate,
                checkpoint=path / "run.safetensors", checkpoint_every=3, resume=True)
    torch.save(weights(model), path / "final.pt")
"""


def start(tmp_path, pause=0.0):
    code = textwrap.dedent(SCRIPT.format(tests=str(ROOT / "tests" / "unit"), path=str(tmp_path), pause=pause))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def interrupt(process, after_steps, how):
    for seen, line in enumerate(process.stdout, start=1):
        assert line == "step\n"
        if seen == after_steps:
            process.send_signal(how)
            break
    _, errors = process.communicate(timeout=60)
    return errors


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not (folder / "run.safetensors").exists(), "a finished run leaves no checkpoint"
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_killed_in_mid_epoch_and_resumed_it_ends_with_the_same_weights_bit_for_bit(tmp_path, uninterrupted):
    first = start(tmp_path, pause=0.02)
    interrupt(first, after_steps=17, how=signal.SIGKILL)  # step 17 of 40: in the middle of the second epoch
    assert first.returncode == -signal.SIGKILL and (tmp_path / "run.safetensors").exists()
    again = start(tmp_path)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    # Steps left and validations: fewer than a whole run, so it did go on from the checkpoint.
    assert output.count("step") < 40
    assert torch.equal(torch.load(tmp_path / "final.pt", weights_only=True), uninterrupted)


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a child differ on Windows")
def test_ctrl_c_leaves_a_checkpoint_and_resuming_ends_with_the_same_weights(tmp_path, uninterrupted):
    first = start(tmp_path, pause=0.02)
    errors = interrupt(first, after_steps=14, how=signal.SIGINT)
    stopped = re.search(r"KeyboardInterrupt: stopped after step (\d+) of 40; call again with resume=True", errors)
    assert stopped and 12 <= int(stopped[1]) <= 15, errors
    again = start(tmp_path)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert torch.equal(torch.load(tmp_path / "final.pt", weights_only=True), uninterrupted)


class StopAt(nn.Module):
    """Raises after a number of passes in train mode, as a power cut would."""

    def __init__(self, model, passes):
        super().__init__()
        self.model, self.left = model, passes

    def forward(self, **inputs):
        if self.training:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("power cut")
        return self.model(**inputs)


def test_resuming_with_another_setting_is_refused_and_names_it(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="power cut"):
        train_model(StopAt(classifier(), 5), rows(64), rows(16), epochs=2, learning_rate=1e-3, checkpoint=path, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"had learning_rate 0\.001, this one has 0\.002: use the same setting to go on"):
        train_model(StopAt(classifier(), 99), rows(64), rows(16), epochs=2, learning_rate=2e-3, checkpoint=path, resume=True)
    with pytest.raises(FileExistsError, match=r"run\.safetensors holds an unfinished run: pass resume=True"):
        train_model(classifier(), rows(64), rows(16), epochs=2, checkpoint=path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"run\.safetensors is not a checkpoint .*: delete it and start again"):
        train_model(classifier(), rows(64), rows(16), epochs=2, checkpoint=path, resume=True)


def test_history_best_is_the_entry_that_was_kept():
    history = History(validation=[{"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}, {"step": 6, "loss": 0.7}], best_step=4)
    assert history.best == {"step": 4, "loss": 0.5}


def test_the_weights_are_copied_at_most_once_a_validation():
    model, copies = classifier(), []
    original = model.state_dict
    model.state_dict = lambda *arguments, **options: copies.append(1) or original(*arguments, **options)
    train_model(model, rows(160), rows(16, seed=1), epochs=2)
    assert len(copies) <= 2
