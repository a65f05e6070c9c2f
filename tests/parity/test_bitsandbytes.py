"""labkit's four-bit format against bitsandbytes on the CPU, bit for bit."""

import bitsandbytes as bnb
import bitsandbytes.functional as library
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as library_portable
from torch import nn

from labkit.models import load_encoder
from labkit.nf4 import Linear4bit, dequantize_4bit, dynamic_levels, fp4_levels, nf4_levels, quantize_4bit

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1,), (2,), (63,), (64,), (65,), (5, 13), (7, 130), (3, 4096), (100, 333), (33, 8, 6), (257, 64), (40, 96), (4097,)]


@pytest.fixture(autouse=True)
def eager():
    """The library compiles some of its functions anew for every shape, which takes minutes here and changes no bit."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def bits(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def weights(dtype):
    """Weights of many shapes, and the awkward ones: zeros, parts of zeros, denormals, all sizes at once."""
    torch.manual_seed(0)
    cases = [0.05 * torch.randn(shape) for shape in SHAPES]
    cases += [torch.zeros(5, 40), torch.zeros(4, 64), torch.zeros(1), -torch.zeros(70), torch.full((3, 50), 0.25)]
    patchy = torch.randn(40, 128)
    patchy[3:9] = 0
    cases += [patchy, torch.randn(40, 130) * torch.logspace(-44, 4, 40)[:, None]]
    cases += [torch.randn(40, 130) * size for size in (1e-39, 3e-38, 1e-7, 1e-44)]
    midpoints = (nf4_levels()[:-1] + nf4_levels()[1:]) / 2
    cases += [torch.cat([torch.ones(1), midpoints, torch.nextafter(midpoints, torch.ones(1)), torch.nextafter(midpoints, -torch.ones(1))])]
    return [case.to(dtype) for case in cases]


def assert_equal(weight, kind, block_size, double):
    packed, state = library.quantize_4bit(weight, blocksize=block_size, quant_type=kind, compress_statistics=double)
    quantized = quantize_4bit(weight, kind, block_size=block_size, double=double)
    assert torch.equal(packed.view(-1), quantized.packed), f"codes of {tuple(weight.shape)}"
    absmax = state.absmax
    if double:
        assert torch.equal(quantized.absmax.codes, state.absmax)
        assert torch.equal(bits(quantized.absmax.scales), bits(state.state2.absmax))
        assert torch.equal(quantized.absmax.offset, state.offset)
        absmax = library.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(bits(quantized.absmax.dequantize()), bits(absmax))
    else:
        assert torch.equal(bits(quantized.absmax), bits(absmax))
    ours = dequantize_4bit(quantized)
    theirs = library_portable(packed.view(-1), absmax, state.code, block_size, weight.shape, weight.dtype)
    assert torch.equal(bits(ours), bits(theirs.view(weight.shape)))
    # The library's kernel for AVX-512 (0.50.2) takes scales from the wrong blocks where rows are not made of whole blocks. There it
    # contradicts its own portable code; elsewhere its public function is compared as well. Only its kernel of FP4 for processors
    # without AVX-512 is compared by value: it gives the second zero as -0, where the portable code gives +0.
    if weight.shape[-1] % block_size == 0:
        given = library.dequantize_4bit(packed, state).reshape(weight.shape)
        assert torch.equal(ours, given)
        if kind == "nf4" or torch.backends.cpu.get_cpu_capability() == "AVX512":
            assert torch.equal(bits(ours), bits(given))


def test_level_tables_are_the_librarys():
    assert torch.equal(nf4_levels(), library.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(bits(fp4_levels()), bits(library.get_4bit_type("fp4", device="cpu")))
    assert torch.equal(dynamic_levels(), library.create_dynamic_map())


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_absmax_and_values_are_equal_bit_for_bit(kind, block_size, dtype, double):
    for weight in weights(dtype):
        assert_equal(weight, kind, block_size, double)


def test_a_transposed_weight_too():
    assert_equal(torch.randn(128, 64).T, "nf4", 64, True)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_matrix_of_the_encoder(kind):
    matrices = [p.detach() for p in load_encoder().parameters() if p.ndim == 2]
    for weight in matrices:
        assert_equal(weight, kind, 64, True)


def pair(kind="nf4", double=True, bias=True, compute_dtype=None, shape=(40, 128)):
    """The library's layer, in train mode, and ours, from one weight."""
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    theirs = bnb.nn.Linear4bit(shape[1], shape[0], bias=bias, quant_type=kind, compress_statistics=double, compute_dtype=compute_dtype)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    assert theirs.weight.dtype == torch.uint8, "the library has quantized it"
    return theirs, Linear4bit.from_linear(linear, kind=kind, double=double, compute_dtype=compute_dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear4bit_output_and_gradient_are_equal(kind, double, bias, dtype):
    torch.manual_seed(0)
    theirs, ours = pair(kind, double, bias)
    x = torch.randn(3, 7, 128, dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    out, expected = ours(x), theirs(twin)
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(x.grad, twin.grad)


def test_compute_dtype_as_the_library_has_it():
    torch.manual_seed(0)
    theirs, ours = pair(compute_dtype=torch.bfloat16)
    x = torch.randn(5, 128, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    out, expected = ours(x), theirs(twin)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, twin.grad)


def test_in_eval_mode_the_library_may_compute_in_bf16():
    torch.manual_seed(0)
    theirs, ours = pair(shape=(64, 128))
    x = torch.randn(5, 128)
    with torch.no_grad():
        expected, out = theirs.eval()(x), ours.eval()(x)
    # Where the processor has AVX-512 BF16 the library takes another kernel for inference, which rounds the input and the scales.
    assert (out - expected).abs().max() < 0.02 * expected.abs().max()


def test_lora_on_top_trains_the_same():
    torch.manual_seed(0)
    layers = pair()
    a, b = torch.randn(4, 128) / 11, torch.zeros(40, 4)
    x, y, losses = torch.randn(64, 128), torch.randn(64, 40), []
    for base in layers:
        A, B = a.clone().requires_grad_(), b.clone().requires_grad_()
        optimizer = torch.optim.AdamW([A, B], lr=0.01)
        # As inside a network, the layer's input needs a gradient.
        inside = x.clone().requires_grad_()
        losses.append([])
        for _ in range(15):
            loss = (base(inside) + inside @ A.T @ B.T - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and losses[0][-1] < 0.9 * losses[0][0]
