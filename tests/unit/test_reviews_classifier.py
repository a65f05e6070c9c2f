import json
import os
import subprocess
import sys

import pytest
import torch

from labkit import models
from labkit.catalog import entry
from labkit.data import load_reviews, subset
from labkit.files import DATA
from labkit.models import load_classifier, load_encoder, load_tokenizer
from labkit.training import encode_rows, evaluate

FOLDER = DATA / "models" / "reviews-lora"


def test_it_is_the_encoder_with_the_adapter_merged_in():
    from peft import PeftModel

    classifier, tokenizer = load_classifier(), load_tokenizer("reviews_classifier")
    assert classifier.config.id2label == {0: "neg", 1: "pos"} and not classifier.training
    assert type(classifier) is type(load_encoder(2)), "merged, so nothing of peft is left that a pipeline would not know"
    batch = tokenizer(["A warm, clever film.", "Dull from the first minute to the last, and far too long."], padding=True, return_tensors="pt")
    apart = PeftModel.from_pretrained(load_encoder(2), str(FOLDER)).eval()
    with torch.no_grad():
        assert torch.allclose(classifier(**batch).logits, apart(**batch).logits, atol=1e-4)


def test_it_knows_reviews():
    rows = encode_rows(subset(load_reviews()["validation"], 60, seed=0), load_tokenizer("reviews_classifier"))
    assert evaluate(load_classifier(), rows).accuracy > 0.75


def test_a_pipeline_takes_it_and_nothing_is_said():
    code = (
        "import labkit; labkit.start('x'); from transformers import pipeline; from labkit.models import load_classifier, load_tokenizer; "
        "p = pipeline('text-classification', model=load_classifier(), tokenizer=load_tokenizer('reviews_classifier')); "
        "print(p('A warm, clever film.')[0]['label'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "pos"


def test_the_adapter_names_its_base_by_package_and_no_path():
    config = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == entry("encoder").package
    assert "/" not in json.dumps(config)


def test_a_missing_or_changed_adapter_names_the_remedy(monkeypatch, tmp_path):
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  models/reviews-lora/adapter_model.safetensors\n")
    monkeypatch.setattr(models, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is not in .*git restore data"):
        load_classifier()
    (tmp_path / "models" / "reviews-lora").mkdir(parents=True)
    (tmp_path / "models" / "reviews-lora" / "adapter_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="damaged or not the published file: run `git restore data`"):
        load_classifier()
