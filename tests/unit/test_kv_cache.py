"""The cache with room: the same logits as transformers' own, without a copy at every token."""

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from labkit.kv_cache import ROOM, RoomyLayer, roomy_cache, writing_cache


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=256)).eval()


@torch.no_grad()
def written(model, cache, attention="sdpa", tokens=100):
    """Logits of a prompt with padding on the left and of the tokens after it; on the way rows are repeated, then some are dropped."""
    model.set_attn_implementation(attention)
    ids, mask = torch.arange(1, 22).view(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    out = [model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]]
    cache.batch_repeat_interleave(2)
    mask = mask.repeat_interleave(2, 0)
    generator = torch.Generator().manual_seed(1)
    for k in range(tokens):
        if k == 5:
            kept = torch.tensor([0, 2, 3])
            cache.batch_select_indices(kept)
            mask = mask[kept]
        if k == 9:
            cache.crop(-2)
            mask = mask[:, :-2]
        new = torch.randint(1, 50, (len(mask), 1), generator=generator)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out.append(model(new, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.cat(out)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_logits_are_those_of_the_dynamic_cache(make, attention):
    model = make()
    ours, theirs = written(model, roomy_cache(), attention), written(model, DynamicCache(), attention)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_it_copies_once_for_all_the_tokens_that_fit():
    layer, new = RoomyLayer(), lambda: torch.randn(2, 3, 1, 4)
    layer.update(*(torch.randn(2, 3, 5, 4) for _ in range(2)))
    layer.update(new(), new())
    place = layer.keys.data_ptr()
    for _ in range(ROOM):
        layer.update(new(), new())
        assert layer.keys.data_ptr() == place
    before = layer.keys.clone()
    keys, values = layer.update(new(), new())
    assert keys.data_ptr() != place and keys.shape == values.shape == (2, 3, 5 + ROOM + 2, 4)
    assert torch.equal(keys[..., :-1, :], before)


def test_a_row_that_was_dropped_does_not_write_into_the_others():
    layer = RoomyLayer()
    layer.update(torch.zeros(2, 1, 3, 1), torch.zeros(2, 1, 3, 1))
    layer.update(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1))
    whole = layer.keys
    layer.batch_select_indices(torch.tensor([1]))
    layer.update(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 2.0))
    assert layer.keys.flatten().tolist() == [0, 0, 0, 1, 2] and whole[0].flatten().tolist() == [0, 0, 0, 1]


def test_training_through_it_is_an_error():
    with pytest.raises(RuntimeError, match="written in place .* use torch.no_grad"):
        llama()(torch.ones(1, 3, dtype=torch.long), past_key_values=roomy_cache(), use_cache=True)


@pytest.mark.parametrize(
    "dtype, tiles, attention, layer",
    [
        (torch.float32, False, "sdpa", RoomyLayer),
        (torch.bfloat16, True, "sdpa", RoomyLayer),
        (torch.bfloat16, False, "eager", DynamicLayer),
    ],
)
def test_the_cache_to_write_with_goes_with_an_attention(monkeypatch, dtype, tiles, attention, layer):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles})
    model = llama().to(dtype)
    cache = writing_cache(model)
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
    assert model.config._attn_implementation == attention
    assert {type(one) for one in cache.layers} == {layer}
