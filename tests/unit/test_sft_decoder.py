import json
import os
import subprocess
import sys

import pytest
import torch

from labkit import instructions, models
from labkit.data import load_instructions
from labkit.files import DATA, read_sums, sha256
from labkit.models import load_decoder, load_sft_decoder, load_tokenizer, save_adapter

FOLDER = DATA / "models" / "decoder-sft-lora"


def asked(row: dict, tokenizer) -> str:
    return tokenizer.apply_chat_template(instructions.as_prompt_completion(row)["prompt"], tokenize=False, add_generation_prompt=True)


def answer(model, tokenizer, row: dict) -> list[int]:
    batch = tokenizer([asked(row, tokenizer)], return_tensors="pt", add_special_tokens=False)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    ids = model.generate(**batch, max_new_tokens=16, do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return ids[0, batch["input_ids"].shape[1] :].tolist()


def test_it_is_the_decoder_with_the_adapter_merged_in():
    from peft import PeftModel

    merged, tokenizer = load_sft_decoder(), load_tokenizer("sft_decoder")
    assert type(merged) is type(load_decoder()) and not merged.training and merged.dtype == torch.float32
    assert merged.lm_head.weight is merged.model.embed_tokens.weight, "still tied"
    batch = tokenizer(["<|user|> Which comes next?<|end|><|assistant|>"], return_tensors="pt", add_special_tokens=False)
    apart = PeftModel.from_pretrained(load_decoder(), str(FOLDER)).eval()
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, apart(**batch).logits, atol=1e-3)


def test_a_dtype_rounds_the_merged_weights_and_leaves_the_positions_exact():
    merged, rounded = load_sft_decoder(), load_sft_decoder(dtype=torch.bfloat16)
    assert rounded.lm_head.weight is rounded.model.embed_tokens.weight, "still tied"
    for (name, parameter), exact in zip(rounded.named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(parameter, exact.to(torch.bfloat16)), name
    assert torch.equal(rounded.model.rotary_emb.inv_freq, merged.model.rotary_emb.inv_freq)
    assert load_decoder(dtype=torch.bfloat16).model.rotary_emb.inv_freq.dtype == torch.float32


def test_it_answers_and_stops_where_the_base_tells_on():
    rows = load_instructions()["validation"].select(range(0, 120, 4))
    tokenizer = load_tokenizer("sft_decoder")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    found = {}
    for name, model in (("base", load_decoder()), ("tuned", load_sft_decoder())):
        ids = [answer(model, tokenizer, row) for row in rows]
        right = [instructions.exact_match(tokenizer.decode(i, skip_special_tokens=True), row["answer"]) for i, row in zip(ids, rows)]
        found[name] = sum(i[-1] == end for i in ids) / len(rows), sum(right) / len(rows)
    assert found["base"] == (0, 0)
    assert found["tuned"][0] > 0.9 and found["tuned"][1] > 0.2


def test_nothing_is_said_at_loading():
    code = "import labkit; labkit.start('x'); from labkit.models import load_sft_decoder; load_sft_decoder()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ).stderr == ""


def test_the_adapter_names_its_base_and_no_path_of_a_machine():
    config = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "data/models/decoder"
    assert sorted(config["trainable_token_indices"]["embed_tokens"]) == sorted(
        load_tokenizer("decoder").convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
    )


def test_decoder_and_adapter_fit_into_20_megabytes():
    assert sum(path.stat().st_size for name in ("decoder", "decoder-sft-lora") for path in (DATA / "models" / name).iterdir()) < 20e6


def test_a_missing_adapter_names_the_remedy(monkeypatch, tmp_path):
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  models/decoder-sft-lora/adapter_model.safetensors\n")
    monkeypatch.setattr(models, "load_decoder", lambda: None)
    monkeypatch.setattr(models, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="git restore data.*make_sft_adapter.py"):
        load_sft_decoder()


def test_what_is_saved_again_is_listed_and_the_same(monkeypatch, tmp_path):
    from peft import PeftModel

    base = load_decoder()
    (tmp_path / "SHA256SUMS").write_text("1" * 64 + "  reviews/test.jsonl\n")
    monkeypatch.setattr(models, "DATA", tmp_path)
    model = PeftModel.from_pretrained(base, str(FOLDER))
    weights = save_adapter(model.half(), "models/again", "data/models/decoder")
    assert read_sums(tmp_path / "SHA256SUMS") == {"models/again/adapter_model.safetensors": sha256(weights), "reviews/test.jsonl": "1" * 64}
    assert sha256(weights) == sha256(FOLDER / "adapter_model.safetensors")
    config = json.loads((weights.parent / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "data/models/decoder" and config["target_modules"] == sorted(config["target_modules"])
    assert sorted(path.name for path in weights.parent.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
