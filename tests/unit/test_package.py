"""labkit's shape: light to import, offline by default, imports in one direction, short modules."""

import ast
import json
import os
import subprocess
import sys

import pytest

from labkit.files import ROOT

MODULES = sorted((ROOT / "labkit").rglob("*.py"))
# Modules that hold a taught idea: they import torch and nothing of labkit.
LABKIT_OF_IDEAS: set[str] = {"classifier", "adapters", "lora", "quantization", "nf4", "codebook", "pruning"}


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, cwd=ROOT)


def test_import_is_light_and_takes_under_half_a_second():
    code = (
        "import sys, time, json; t = time.perf_counter(); import labkit; s = time.perf_counter() - t; "
        "print(json.dumps([s, [m for m in ('torch', 'transformers', 'datasets', 'numpy', 'matplotlib') if m in sys.modules]]))"
    )
    runs = [json.loads(python(code).stdout) for _ in range(3)]
    assert [heavy for _, heavy in runs] == [[], [], []]
    assert min(seconds for seconds, _ in runs) < 0.5


def test_offline_switches_are_set_before_any_library_reads_them():
    code = "import labkit, huggingface_hub.constants as c, datasets; assert c.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE; print('offline')"
    done = python(code)
    assert done.stdout.strip() == "offline", done.stderr


def test_hub_profile_leaves_the_switches_alone():
    code = "import os; os.environ.pop('HF_HUB_OFFLINE', None); import labkit; print(labkit.PROFILE, 'HF_HUB_OFFLINE' in os.environ)"
    assert python(code, LABKIT_PROFILE="hub").stdout.split() == ["hub", "False"]


def test_freed_memory_is_kept_for_the_next_tensor():
    code = (
        "import resource, torch; from labkit.runtime import keep_freed_memory; kept, faults = keep_freed_memory(), []\n"
        "for _ in range(30): [torch.zeros(1_000_000) for _ in range(40)]; faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "print(kept, faults[-1] - faults[-11])"
    )
    kept, faults = python(code).stdout.split()
    if kept == "False":
        pytest.skip("no glibc here")
    assert int(faults) < 39_000, "160 MB are 39,000 pages, and they were handed out anew more than once in ten times"


def test_unknown_profile_names_the_choices():
    done = python("import labkit", LABKIT_PROFILE="hubb")
    assert "LABKIT_PROFILE is 'hubb': set it to 'offline' (default) or 'hub'" in done.stderr


def test_tests_run_with_the_network_blocked():
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert "the tests block the network, and something asked for 192.0.2.1" in python(code).stderr
    assert "asked for example.org" in python("import socket; socket.getaddrinfo('example.org', 443)").stderr
    assert (
        python("import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname()); print('ok')").stdout == "ok\n"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modules_are_short_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), "a module says what it is for"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    ours = {name for name in imported if name.split(".")[0] == "labkit"}
    if path.parent.name != "checks":
        assert not any(name.startswith("labkit.checks") for name in ours), "nothing imports checks but notebooks and tests"
    if path.stem in LABKIT_OF_IDEAS:
        assert not ours, "an idea module imports nothing of labkit"
    assert not {"pickle", "dill"} & imported


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_public_functions_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert path.stem == "doctor" or not bare, f"no docstring: {bare}"


def test_what_bitsandbytes_says_when_it_is_imported_is_not_seen():
    """On processors with bf16 it reports a kernel that it cannot fetch; other warnings of that logger still show."""
    code = "import labkit, logging, bitsandbytes; log = logging.getLogger('bitsandbytes.backends.cpu.ops'); "
    code += "log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: no'); log.warning('something else')"
    assert python(code).stderr.splitlines() == ["something else"]


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({}, "float32"),
        ({"cpu_name": "AMD EPYC"}, "float32"),
        ({"avx512_bf16": True}, "float32"),  # measured slower than fp32
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "bfloat16"),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, "bfloat16"),
    ],
)
def test_bf16_is_chosen_only_where_the_processor_is_faster_in_it(monkeypatch, capabilities, dtype):
    import torch

    from labkit.runtime import choose_dtype

    monkeypatch.delenv("LABKIT_DTYPE", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype(torch.device("cpu")) == getattr(torch, dtype)
    monkeypatch.setenv("LABKIT_DTYPE", "bf16")
    assert choose_dtype(torch.device("cpu")) == torch.bfloat16
