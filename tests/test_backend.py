"""Choosing a backend: by default, by name, for a block, from the environment; and what is said when it cannot be."""

import os
import subprocess
import sys

import pytest
import torch

import ddpm_fast
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import active_backend, backend_status, native, normal, q_sample, use_backend
from ddpm_fast.ops import triton as triton_backend

interpreted = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def default_backend(monkeypatch):
    monkeypatch.setattr("ddpm_fast.ops.backend._chosen", None)


def in_subprocess(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(ddpm_fast.__file__)),
    )


def test_the_extension_is_here():
    # Not a skip: without it everything else would pass on plain torch and nobody would know.
    assert native.unavailable == "", native.unavailable
    assert native._C.isa() in native.isas()
    assert active_backend("q_sample", "cpu", torch.float32) == "cpu"


def test_status_names_every_backend_with_its_ops():
    status = {line.name: line for line in backend_status()}
    assert list(status) == ["cpu", "triton", "reference"]  # fastest first
    assert set(status["cpu"].ops) == set(status["reference"].ops)
    assert {"diffusion_loss", "hybrid_loss", "vlb_terms", "loss_backward", "reverse_step"} <= set(status["cpu"].ops)
    assert set(triton_backend.OPS) <= set(status["reference"].ops)
    assert status["reference"].unavailable == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
def test_default_on_the_cpu(dtype):
    assert active_backend("q_sample", "cpu", dtype) == "cpu"


def test_default_for_float64_is_the_reference():
    assert active_backend("q_sample", "cpu", torch.float32, torch.float64) == "reference"


def test_by_name_until_told_otherwise():
    use_backend("reference")
    assert active_backend("normal") == "reference"
    use_backend(None)
    assert active_backend("normal", "cpu", torch.float32) == "cpu"


def test_a_block_restores_what_was_before():
    use_backend("reference")
    with use_backend("cpu"):
        assert active_backend("normal") == "cpu"
        with use_backend(None):
            assert active_backend("normal", "cpu", torch.float64) == "reference"
        assert active_backend("normal") == "cpu"
    assert active_backend("normal") == "reference"


def test_a_block_restores_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert active_backend("normal", "cpu", torch.float32) == "cpu"


def test_the_chosen_backend_is_the_one_that_runs(monkeypatch):
    ran = []
    for module, name in ((native, "cpu"), (ddpm_fast.ops.reference, "reference")):
        original = module.OPS["normal"]
        monkeypatch.setitem(
            module.OPS, "normal", lambda *a, original=original, name=name: (ran.append(name), original(*a))
        )
    normal(NoiseKey.of(0, 1), (4,))
    with use_backend("reference"):
        normal(NoiseKey.of(0, 1), (4,))
    normal(NoiseKey.of(0, 1), (4,), dtype=torch.float64)
    assert ran == ["cpu", "reference", "reference"]


def test_unknown_name_changes_nothing():
    use_backend("reference")
    with pytest.raises(InputError, match="backend 'cuda9' is unknown; there are cpu, triton, reference"):
        use_backend("cuda9")
    assert active_backend("normal") == "reference"


def test_float64_on_the_cpu_backend_is_refused_with_the_way_out():
    x0 = torch.zeros(1, 2, dtype=torch.float64)
    with use_backend("cpu"), pytest.raises(InputError) as error:
        q_sample(x0, torch.tensor([0]), torch.ones(1, 2), x0)
    for fragment in ("backend 'cpu' cannot run q_sample", "no torch.float64", "use the reference backend"):
        assert fragment in str(error.value)


def test_cpu_kernels_refuse_other_devices():
    with use_backend("cpu"), pytest.raises(InputError, match="its kernels are for CPU tensors and these are on meta"):
        active_backend("normal", "meta", torch.float32)


def test_without_the_extension(monkeypatch):
    reason = "the C++ extension is not there (simulated). Install the package with a C++ compiler at hand"
    monkeypatch.setattr(native, "unavailable", reason)
    with pytest.raises(InputError) as error:
        use_backend("cpu")
    assert "backend 'cpu' is not available" in str(error.value) and reason in str(error.value)
    assert {line.name: line.unavailable for line in backend_status()}["cpu"] == reason
    # Picked by default, it falls to the next that can, and the numbers stay.
    assert active_backend("normal", "cpu", torch.float32) == ("triton" if interpreted else "reference")
    key = NoiseKey.of(0, 1)
    fallen = normal(key, (10,))
    monkeypatch.undo()
    assert torch.equal(fallen, normal(key, (10,)))


def test_the_extension_that_goes_after_it_was_chosen(monkeypatch):
    use_backend("cpu")
    monkeypatch.setattr(native, "unavailable", "it went")
    with pytest.raises(InputError, match="backend 'cpu' is not available: it went"):
        normal(NoiseKey.of(0, 1), (4,))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(
        triton_backend, "unavailable", "the package triton is not there. Install it: pip install triton"
    )
    with pytest.raises(InputError, match=r"backend 'triton' is not available: .*pip install triton"):
        use_backend("triton")


@pytest.mark.skipif(bool(triton_backend.unavailable), reason="the package triton is not installed")
@pytest.mark.skipif(interpreted, reason="the interpreter runs on CPU tensors")
def test_triton_refuses_cpu_tensors_without_its_interpreter():
    with use_backend("triton"), pytest.raises(InputError, match=r"compiles for GPUs.*on cpu.*set TRITON_INTERPRET=1"):
        active_backend("normal", "cpu", torch.float32)


def test_instruction_sets_by_name():
    before = native.isa()
    try:
        for name in native.isas():
            native.use_isa(name)
            assert native.isa() == name
        with pytest.raises(InputError, match=r"instruction set 'mmx': this machine runs generic"):
            native.use_isa("mmx")
    finally:
        native.use_isa(before)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DDPM_FAST_BACKEND": "reference"}, "reference"),
        ({"DDPM_FAST_BACKEND": "", "DDPM_FAST_CPU_ISA": "generic"}, "cpu"),
        ({"DDPM_FAST_BACKEND": "abacus"}, "backend 'abacus' is unknown; there are cpu, triton, reference"),
        ({"DDPM_FAST_CPU_ISA": "mmx"}, "DDPM_FAST_CPU_ISA=mmx: this machine runs generic"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_environment(environment, expected):
    code = (
        "import torch; from ddpm_fast.ops import active_backend, native\n"
        "print(active_backend('q_sample', 'cpu', torch.float32), native.isa())"
    )
    done = in_subprocess(code, **environment)
    if " " in expected:
        assert done.returncode != 0 and f"InputError: {expected}" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[0] == expected
        if "DDPM_FAST_CPU_ISA" in environment:
            assert done.stdout.split()[1] == environment["DDPM_FAST_CPU_ISA"]
