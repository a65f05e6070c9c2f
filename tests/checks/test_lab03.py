"""Every check of lab 03 takes a right answer written differently from ours, and turns down wrong ones, each with its own message."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab03 as check

# ---------------------------------------------------------------- collate_batch


def right_collate(rows, pad_token_id=0):
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def collate_mask_all_ones(rows, pad_token_id=0):
    batch = right_collate(rows, pad_token_id)
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def collate_mask_from_ids(rows, pad_token_id=0):
    batch = right_collate(rows, pad_token_id)
    return batch | {"attention_mask": (batch["input_ids"] != pad_token_id).long()}


def collate_left(rows, pad_token_id=0):
    batch = right_collate([row | {"input_ids": row["input_ids"][::-1]} for row in rows], pad_token_id)
    return batch | {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}


def collate_truncates(rows, pad_token_id=0):
    shortest = min(len(row["input_ids"]) for row in rows)
    return right_collate([row | {"input_ids": row["input_ids"][:shortest]} for row in rows], pad_token_id)


def collate_always_zero(rows, pad_token_id=0):
    return right_collate(rows, 0)


def collate_float_mask(rows, pad_token_id=0):
    batch = right_collate(rows, pad_token_id)
    return batch | {"attention_mask": batch["attention_mask"].float()}


def collate_float_labels(rows, pad_token_id=0):
    batch = right_collate(rows, pad_token_id)
    return batch | {"labels": batch["labels"].float()}


# ---------------------------------------------------------------- attention


def right_attention(query, key, value, attention_mask):
    keep = attention_mask.bool()[:, None, None, :].expand(-1, -1, query.shape[2], -1)
    bias = torch.where(keep, 0.0, -1e9)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def plain_attention(query, key, value, attention_mask, *, scale=None, axis=-1, mask_value=-1e9, where="keys", masked=True):
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / (scale or math.sqrt(query.shape[-1]))
    if masked:
        gone = attention_mask[:, None, None, :] == 0 if where == "keys" else attention_mask[:, None, :, None] == 0
        scores = scores.masked_fill(gone, mask_value)
    return scores.softmax(axis) @ value


def attention_after_softmax(query, key, value, attention_mask):
    weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(-1)
    return (weights * attention_mask[:, None, None, :]) @ value


# ---------------------------------------------------------------- masked_mean


def right_mean(hidden, attention_mask):
    count = attention_mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bsh,bs->bh", hidden, (attention_mask / count).to(hidden.dtype))


def mean_no_clamp(hidden, attention_mask):
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def mean_float(hidden, attention_mask):
    mask = attention_mask.unsqueeze(-1).float()
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


# ---------------------------------------------------------------- TransformerClassifier


class Right(nn.Module):
    """Built on PyTorch's own encoder layer instead of ours."""

    batch_first, positions, use_mask, masked_pooling, softmax, dropout_on = True, True, True, True, False, True

    def __init__(self, vocab_size, num_labels, *, hidden_size, num_layers, num_heads, max_length, dropout):
        super().__init__()
        self.words, self.places = nn.Embedding(vocab_size, hidden_size), nn.Embedding(max_length, hidden_size)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(hidden_size, num_heads, 4 * hidden_size, dropout if self.dropout_on else 0.0, batch_first=self.batch_first)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, num_labels)

    def forward(self, input_ids, attention_mask):
        hidden = self.words(input_ids)
        if self.positions:
            hidden = hidden + self.places.weight[: input_ids.shape[1]]
        if self.dropout_on:
            hidden = self.dropout(hidden)
        gone = attention_mask == 0
        hidden = self.encoder(hidden, src_key_padding_mask=(gone if self.batch_first else gone.T) if self.use_mask else None)
        hidden = self.norm(hidden)
        pooled = right_mean(hidden, attention_mask) if self.masked_pooling else hidden.mean(1)
        out = self.head(pooled)
        return out.softmax(-1) if self.softmax else out


class AcrossTheBatch(Right):
    batch_first, use_mask = False, False


class NoPositions(Right):
    positions = False


class PositionsFromOne(Right):
    def forward(self, input_ids, attention_mask):
        self.places(torch.arange(1, input_ids.shape[1] + 1))
        return super().forward(input_ids, attention_mask)


class CallsTheList(Right):
    def forward(self, input_ids, attention_mask):
        return nn.ModuleList([self.norm])(self.words(input_ids))


class NoMask(Right):
    use_mask = False


class MeanOverPadding(Right):
    masked_pooling = False


class Probabilities(Right):
    softmax = True


class NoDropout(Right):
    dropout_on = False


# ---------------------------------------------------------------- evaluate


def run(model, rows, batch_size, training=False, drop_last=False, mean_of_means=False):
    model.train(training)
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    losses, hits, sizes = [], [], []
    for part in parts[:-1] if drop_last else parts:
        batch = right_collate(part)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        losses.append(F.cross_entropy(logits, batch["labels"]).item())
        hits.append((logits.argmax(-1) == batch["labels"]).float().mean().item())
        sizes.append(1 if mean_of_means else len(part))
    total = sum(sizes)
    return sum(a * n for a, n in zip(losses, sizes)) / total, sum(a * n for a, n in zip(hits, sizes)) / total


def keeping_mode(**options):
    def evaluate(model, rows, batch_size=64):
        mode = model.training
        out = run(model, rows, batch_size, **options)
        model.train(mode)
        return out

    return evaluate


def right_evaluate(model, rows, batch_size=64):
    mode = model.training
    with torch.inference_mode():
        loss, accuracy = run(model, rows, batch_size)
    model.train(mode)
    return loss, round(accuracy * len(rows)) / len(rows)


def evaluate_stays_in_eval(model, rows, batch_size=64):
    return run(model, rows, batch_size)


def evaluate_to_train_mode(model, rows, batch_size=64):
    out = right_evaluate(model, rows, batch_size)
    model.train()
    return out


def evaluate_with_gradients(model, rows, batch_size=64):
    batch = right_collate(rows)
    mode = model.training
    model.eval()
    loss = F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
    loss.backward()
    model.train(mode)
    return right_evaluate(model, rows, batch_size)


# ---------------------------------------------------------------- train_model


def loop(*, zero=True, schedule=True, train_mode=True, step=True, every_epoch=True, seeded=True, thaw=False, flip=False, clip=True, round_up=True):
    """A right training loop, unlike the notebook's (hand-made schedule, plain batches), with one thing wrong at a time."""

    def train_model(model, train_rows, validation_rows, *, epochs, learning_rate, batch_size=16, seed=0):
        if thaw:
            model.requires_grad_(True)
        if seeded:
            torch.manual_seed(seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
        history = {name: [] for name in ("train_loss", "learning_rate", "validation_loss", "validation_accuracy")}
        rounding = math.ceil if round_up else math.floor
        total, done = epochs * rounding(len(train_rows) / batch_size), 0
        for epoch in range(epochs):
            if train_mode:
                model.train()
            order = torch.randperm(len(train_rows)).tolist()
            for start in range(0, len(order), batch_size):
                batch = right_collate([train_rows[i] for i in order[start : start + batch_size]])
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * (max(0.0, min((done + 1) / 5, (total - done) / total)) if schedule else 1.0)
                labels = 1 - batch["labels"] if flip else batch["labels"]
                loss = F.cross_entropy(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]), labels)
                if zero:
                    optimizer.zero_grad()
                loss.backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if step:
                    optimizer.step()
                history["train_loss"].append(loss.item())
                history["learning_rate"].append(optimizer.param_groups[0]["lr"])
                done += 1
            if every_epoch or epoch == epochs - 1:
                loss, accuracy = (right_evaluate if train_mode else evaluate_stays_in_eval)(model, validation_rows)
                history["validation_loss"].append(loss)
                history["validation_accuracy"].append(accuracy)
        return history

    return train_model


RIGHT = {
    check.collate_batch: right_collate,
    check.attention: right_attention,
    check.masked_mean: right_mean,
    check.transformer_classifier: Right,
    check.evaluate: right_evaluate,
    check.train_model: loop(),
}

WRONG = {
    check.collate_batch: {
        "mask all ones": (collate_mask_all_ones, "1 for a real token, 0 for padding"),
        "mask from ids": (collate_mask_from_ids, "build the mask from lengths"),
        "padding first": (collate_left, "its tokens come first"),
        "cuts rows off": (collate_truncates, "pad to the longest row"),
        "ignores pad_token_id": (collate_always_zero, "fill the empty places with pad_token_id"),
        "float labels": (collate_float_labels, "torch.long"),
        "float mask": (collate_float_mask, "attention_mask has dtype torch.float32: make it torch.long"),
    },
    check.attention: {
        "no scaling": (lambda q, k, v, m: plain_attention(q, k, v, m, scale=1.0), "divide the scores by the square root"),
        "divides by head_size": (lambda q, k, v, m: plain_attention(q, k, v, m, scale=4.0), "divide the scores by the square root"),
        "no mask": (lambda q, k, v, m: plain_attention(q, k, v, m, masked=False), "mask the scores of padded keys"),
        "masks queries": (lambda q, k, v, m: plain_attention(q, k, v, m, where="queries"), "mask the scores of padded keys"),
        "softmax over queries": (lambda q, k, v, m: plain_attention(q, k, v, m, axis=-2), "softmax over keys"),
        "mask after softmax": (attention_after_softmax, "do not sum to 1"),
        "minus infinity": (lambda q, k, v, m: plain_attention(q, k, v, m, mask_value=-math.inf), "large negative number"),
    },
    check.masked_mean: {
        "plain mean": (lambda hidden, mask: hidden.mean(1), "multiply by the mask"),
        "divides by seq": (lambda hidden, mask: (hidden * mask.unsqueeze(-1)).mean(1), "divide by mask.sum"),
        "nan on empty": (mean_no_clamp, "clamp the divisor"),
        "always float": (mean_float, "convert the mask"),
        "first token": (lambda hidden, mask: hidden[:, 0], "divide by mask.sum"),
    },
    check.transformer_classifier: {
        "across the batch": (AcrossTheBatch, "attention is running across the batch"),
        "positions from one": (PositionsFromOne, "IndexError"),
        "calls the list of blocks": (CallsTheList, "stopped with NotImplementedError: Module"),
        "no positions": (NoPositions, "add the position embeddings"),
        "attention without mask": (NoMask, "pass attention_mask to every block"),
        "mean over padding": (MeanOverPadding, "pass attention_mask to every block"),
        "softmax at the end": (Probabilities, "without a softmax"),
        "no dropout": (NoDropout, "apply self.dropout"),
    },
    check.evaluate: {
        "dropout on": (keeping_mode(training=True), "model.eval() first"),
        "stays in eval": (evaluate_stays_in_eval, "left in eval mode"),
        "drops the last batch": (keeping_mode(drop_last=True), "the last, smaller batch"),
        "mean of batch means": (keeping_mode(mean_of_means=True), "the last, smaller batch"),
        "always train mode": (evaluate_to_train_mode, "put back the mode it had"),
        "order swapped": (lambda model, rows, batch_size=64: right_evaluate(model, rows, batch_size)[::-1], "return loss, then accuracy"),
        "gradients": (evaluate_with_gradients, "@torch.no_grad()"),
    },
    check.train_model: {
        "no zero_grad": (loop(zero=False), "optimizer.zero_grad()"),
        "schedule never stepped": (loop(schedule=False), "schedule.step()"),
        "never back in train mode": (loop(train_mode=False), "model.train() at the start"),
        "no clipping": (loop(clip=False), "clip_grad_norm_"),
        "steps rounded down": (loop(round_up=False), "round the steps of an epoch up"),
        "no step": (loop(step=False), "optimizer.step() every step"),
        "validates once": (loop(every_epoch=False), "after every epoch"),
        "no seed": (loop(seeded=False), "seed torch before the first step"),
        "thaws": (loop(thaw=True), "requires_grad=False changed"),
        "wrong labels": (loop(flip=True), "look at the labels"),
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
    with pytest.raises(CheckFailed, match="(?s).*" + advice.replace("(", r"\(").replace(")", r"\)")):
        checker(candidate)


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

    with pytest.raises(CheckFailed, match=r'stopped with TypeError: unsupported operand\n  in broken, at: raise TypeError\("unsupported operand"\)'):
        checker(broken)


def test_leaves_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    check.masked_mean(right_mean)
    assert torch.equal(torch.rand(1), expected)
