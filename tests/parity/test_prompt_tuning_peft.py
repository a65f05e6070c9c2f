"""labkit's soft prompt against peft's prompt tuning with the same vectors: outputs, loss and gradients, padding on either side."""

import copy

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch.nn import functional as F

from labkit.prompts import SoftPrompt

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

N, SEQ, VOCABULARY = 5, 9, 60
LENGTHS = [9, 6, 2, 7]
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip


def tiny(kind: str):
    from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    if kind == "causal":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return (BertModel if kind == "encoder" else BertForSequenceClassification)(BertConfig(**SHAPE)).eval()


TASKS = {"encoder": "FEATURE_EXTRACTION", "classifier": "SEQ_CLS", "causal": "CAUSAL_LM"}


def batch_of(kind: str, padding: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (len(LENGTHS), SEQ), generator=generator)
    mask = torch.tensor([[1] * n + [0] * (SEQ - n) for n in LENGTHS])
    if padding == "left":
        mask = mask.flip(1)
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if kind == "classifier":
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    elif kind == "causal":
        batch["labels"] = torch.where(mask == 1, ids, -100)
    return batch


def pair(kind: str):
    base = tiny(kind)
    start = torch.randn(N, 32, generator=torch.Generator().manual_seed(4))
    theirs = get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type=TASKS[kind], num_virtual_tokens=N)).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(start)
    return SoftPrompt(base, start).eval(), theirs, theirs.prompt_encoder["default"].embedding.weight


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", list(TASKS))
def test_outputs_loss_and_gradients(kind, padding):
    ours, theirs, weight = pair(kind)
    batch = batch_of(kind, padding)
    mine, its = ours(**batch), theirs(**batch)
    if kind == "encoder":
        out, expected = mine.last_hidden_state, its.last_hidden_state
        assert out.shape == (len(LENGTHS), N + SEQ, 32)
        direction = torch.randn(32)  # a layer norm's squares have a constant sum, so they would give no gradient
        loss, reference = (out[:, N:] @ direction).square().mean(), (expected[:, N:] @ direction).square().mean()
    else:
        out, expected, loss, reference = mine.logits, its.logits, mine.loss, its.loss
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(loss, reference, rtol=1e-5) and loss > 0
    loss.backward()
    reference.backward()
    size = weight.grad.abs().max()
    assert size > 1e-4  # or there would be nothing to compare
    assert (ours.vectors.grad - weight.grad).abs().max() <= 1e-5 * size


@pytest.mark.parametrize("kind", list(TASKS))
def test_same_parameters_train(kind):
    ours, theirs, _ = pair(kind)
    mine = sorted(tuple(p.shape) for p in ours.parameters() if p.requires_grad)
    its = sorted(tuple(p.shape) for p in theirs.parameters() if p.requires_grad)
    assert mine == its


@pytest.mark.parametrize("padding", ["left", "right"])
def test_ten_steps_of_training_stay_together(padding):
    ours, theirs, weight = pair("causal")
    batch = batch_of("causal", padding)
    for model, p in ((ours, ours.vectors), (theirs, weight)):
        optimizer = torch.optim.SGD([p], lr=0.5)
        for _ in range(10):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    assert torch.allclose(ours.vectors, weight, atol=1e-5)
    assert not torch.allclose(ours.vectors, pair("causal")[0].vectors, atol=1e-3)


def test_the_loss_is_that_of_the_text_alone():
    ours, _, _ = pair("causal")
    batch = batch_of("causal", "right")
    out = ours(**batch)
    text = out.logits[:, N:-1].reshape(-1, VOCABULARY)
    first = out.logits[:, N - 1]  # the last vector predicts the first token of the text
    labels = torch.cat([batch["labels"][:, 0], batch["labels"][:, 1:].reshape(-1)])
    assert torch.allclose(out.loss, F.cross_entropy(torch.cat([first, text]), labels), atol=1e-6)


def test_generation():
    """Rows without padding: peft's text. Rows with it: what they get alone, where peft, which lets padding count as places, may differ."""
    ours, theirs, _ = pair("causal")
    batch = batch_of("causal", "left")
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mine = ours.generate(batch["input_ids"], batch["attention_mask"], **given)
    assert mine.shape == (len(LENGTHS), 6)
    for row, length in enumerate(LENGTHS):
        ids = batch["input_ids"][row : row + 1, SEQ - length :]
        alone = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)[:, length:]
        assert torch.equal(mine[row : row + 1], alone)
