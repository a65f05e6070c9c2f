"""labkit's DPO loss and RLOO advantages against trl's trainers: loss and gradients; advantages with and without the KL penalty."""

import copy

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from labkit import preferences
from labkit.models import load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

PAIRS = [
    {"prompt": "Where is Mia?", "chosen": " Mia is in the park.", "rejected": " At the pond, I think, or somewhere else."},
    {"prompt": "Who has the red ball now? Tell me.", "chosen": " Tom has it.", "rejected": " Who cares?"},
    {"prompt": "Go on.", "chosen": " And so they all went home together, hand in hand.", "rejected": " The end."},
]


QUIET = {"bf16": False, "use_cpu": True, "report_to": "none", "activation_checkpointing": False, "disable_tqdm": True}  # of every trainer


def tiny() -> nn.Module:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(load_tokenizer("decoder")),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def models():
    model = tiny()
    reference = preferences.frozen_copy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model, reference


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_dpo_equals_trl_in_value_and_gradient(models, tmp_path, beta):
    from trl import DPOConfig, DPOTrainer

    theirs, reference = models
    ours = copy.deepcopy(theirs)
    settings = DPOConfig(str(tmp_path), beta=beta, disable_dropout=True, max_length=None, **QUIET)
    trainer = DPOTrainer(theirs, reference, settings, train_dataset=Dataset.from_list(PAIRS), processing_class=load_tokenizer("decoder"))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()

    ids, mask, completion = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    policy = preferences.sequence_logps(ours(input_ids=ids, attention_mask=mask).logits, ids, completion).chunk(2)
    with torch.no_grad():
        fixed = preferences.sequence_logps(reference(input_ids=ids, attention_mask=mask).logits, ids, completion).chunk(2)
    result = preferences.dpo_loss(*policy, *fixed, beta=beta)
    result.loss.backward()

    assert torch.allclose(result.loss, loss, atol=1e-5)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-3), name
    found = trainer._metrics["train"]
    assert found["rewards/chosen"][0] == pytest.approx(result.chosen_rewards.mean().item(), abs=1e-4)
    assert found["rewards/rejected"][0] == pytest.approx(result.rejected_rewards.mean().item(), abs=1e-4)
    assert found["rewards/accuracies"][0] == pytest.approx(result.accuracy)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_rloo_advantages_equal_trl(tmp_path, models, beta):
    """trl samples itself. What it sampled is scored again with labkit's functions."""
    from trl import RLOOConfig, RLOOTrainer

    policy, reference = models
    reference.save_pretrained(tmp_path / "reference")
    policy.config._name_or_path = str(tmp_path / "reference")  # where trl loads its reference from
    settings = RLOOConfig(
        str(tmp_path),
        beta=beta,
        num_generations=4,
        per_device_train_batch_size=8,
        steps_per_generation=1,
        max_completion_length=6,
        temperature=1.0,
        normalize_advantages=False,
        **QUIET,
    )
    drawn = []

    def reward(completions, **unused):
        drawn.append(torch.randn(len(completions)).tolist())
        return drawn[-1]

    rows = Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS])
    trainer = RLOOTrainer(policy, reward, settings, train_dataset=rows, processing_class=load_tokenizer("decoder"))
    out = trainer._generate_and_score_completions([rows[0]] * 4 + [rows[2]] * 4)

    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
    mask = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
    completion = torch.cat([torch.zeros_like(out["prompt_mask"]), out["completion_mask"]], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logps = [preferences.token_logps(m(input_ids=ids, attention_mask=mask, position_ids=places).logits, ids) for m in (policy, reference)]
    rewards = preferences.penalised_rewards(torch.tensor(drawn[-1]), *logps, completion[:, 1:], beta)
    assert torch.allclose(preferences.rloo_advantages(rewards.view(2, 4)).flatten(), out["advantages"], atol=1e-3)


def test_bradley_terry_equals_the_reward_trainers_loss(tmp_path):
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(6)
    model = LlamaForSequenceClassification(tiny().config)
    model.config.num_labels, model.config.pad_token_id = 1, load_tokenizer("decoder").pad_token_id
    model.score = nn.Linear(32, 1, bias=False)
    settings = RewardConfig(str(tmp_path), **QUIET)
    trainer = RewardTrainer(model, settings, train_dataset=Dataset.from_list(PAIRS), processing_class=load_tokenizer("decoder"))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    with torch.no_grad():
        rewards = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1).chunk(2)
    assert torch.allclose(preferences.bradley_terry_loss(*rewards), theirs, atol=1e-5)
