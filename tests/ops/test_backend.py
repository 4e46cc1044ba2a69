"""A backend is chosen by default, by name, for a `with` block or by the environment; one that cannot be used is refused
with the reason."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import ddpm_fast
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import active_backend, backend_status, diffusion_loss, dispatch, normal, q_sample, use_backend
from ddpm_fast.ops.backends import cpu, cuda
from ddpm_fast.ops.backends import triton as triton_backend

interpreted = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def default_backend(monkeypatch):
    monkeypatch.setattr("ddpm_fast.ops.dispatch._environment", None)
    monkeypatch.setattr("ddpm_fast.ops.dispatch._calls", [])


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
    assert cpu.unavailable == "", cpu.unavailable
    assert cpu._C.isa() in cpu.isas()
    assert active_backend("q_sample", "cpu", torch.float32) == "cpu"


def test_status_names_every_backend_with_its_ops():
    status = {line.name: line for line in backend_status()}
    assert list(status) == ["cuda", "cpu", "triton", "reference"]  # fastest first
    of_a_gpu = {"add_bias", "channel_sums"}
    assert set(status["cpu"].ops) == set(status["reference"].ops) - of_a_gpu
    of_a_cpu = {"winograd", "winograd_filters", "winograd_weight_gradient"}
    assert set(status["cuda"].ops) == set(status["reference"].ops) - of_a_cpu
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
    monkeypatch.setattr("ddpm_fast.ops.direct._direct", None)  # test_direct.py says when the short way is taken
    ran = []
    for module, name in ((cpu, "cpu"), (ddpm_fast.ops.backends.reference, "reference")):
        original = module.OPS["normal"]
        monkeypatch.setitem(
            module.OPS, "normal", lambda *a, original=original, name=name: (ran.append(name), original(*a))
        )
    normal(NoiseKey.of(0, 1), (4,))
    with use_backend("reference"):
        normal(NoiseKey.of(0, 1), (4,))
    normal(NoiseKey.of(0, 1), (4,), dtype=torch.float64)
    assert ran == ["cpu", "reference", "reference"]


def test_a_block_is_that_of_its_thread():
    # Every thread is within a block of its own, or within none, and sees no other's at any moment.
    wrong, done = [], threading.Event()

    def look(name, expected):
        while not done.is_set():
            with use_backend(name) if name else contextlib.nullcontext():
                for _ in range(20):
                    found = active_backend("normal", "cpu", torch.float32)
                    if found != expected:
                        wrong.append((found, expected))

    looks = [("reference", "reference"), ("cpu", "cpu"), ("reference", "reference"), (None, "cpu")]
    threads = [threading.Thread(target=look, args=look_for) for look_for in looks]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        time.sleep(0.5)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert wrong == []


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_plain_call_is_for_every_thread():
    use_backend("reference")
    assert in_another_thread(lambda: active_backend("normal")) == "reference"
    in_another_thread(lambda: use_backend("cpu") and None)
    assert active_backend("normal") == "cpu"
    with use_backend("reference"):
        assert in_another_thread(lambda: active_backend("normal")) == "cpu"
        in_another_thread(lambda: use_backend(None) and None)
        assert active_backend("normal") == "reference"
    assert active_backend("normal", "cpu", torch.float32) == "cpu"


def test_a_plain_call_whose_object_is_kept():
    kept = use_backend("reference")
    assert active_backend("normal") == "reference"
    assert in_another_thread(lambda: active_backend("normal")) == "reference"
    with kept:
        assert active_backend("normal") == "reference"
        assert in_another_thread(lambda: active_backend("normal", "cpu", torch.float32)) == "cpu"
    assert active_backend("normal", "cpu", torch.float32) == "cpu"


def test_a_plain_call_within_a_block_is_for_the_rest_of_it():
    with use_backend("reference"):
        use_backend("cpu")
        assert active_backend("normal") == "cpu"
        with use_backend("reference"):
            assert active_backend("normal") == "reference"
        assert active_backend("normal") == "cpu"
    assert active_backend("normal", "cpu", torch.float64) == "reference"
    assert active_backend("normal", "cpu", torch.float32) == "cpu"


def test_many_plain_calls_are_not_collected():
    for name in ("reference", "cpu") * 50:
        use_backend(name)
    assert len(dispatch._calls) <= 2


def test_a_gradient_runs_where_its_forward_ran(monkeypatch):
    ran = []
    for module, name in ((cpu, "cpu"), (ddpm_fast.ops.backends.reference, "reference")):
        original = module.OPS["loss_backward"]
        monkeypatch.setitem(
            module.OPS, "loss_backward", lambda *a, original=original, name=name: (ran.append(name), original(*a))
        )
    output, x0, t = torch.ones(1, 2, requires_grad=True), torch.zeros(1, 2), torch.tensor([0])
    with use_backend("reference"):
        loss = diffusion_loss(output, x0, t, torch.ones(1, 3), x0)
    loss.backward(retain_graph=True)
    in_another_thread(loss.backward)
    assert ran == ["reference", "reference"]
    with use_backend("reference"):
        diffusion_loss(output, x0, t, torch.ones(1, 3), x0).backward()
    diffusion_loss(output, x0, t, torch.ones(1, 3), x0).backward()
    assert ran == ["reference", "reference", "reference", "cpu"]


def test_unknown_name_changes_nothing():
    use_backend("reference")
    with pytest.raises(InputError, match="backend 'cuda9' is unknown; there are cuda, cpu, triton, reference"):
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
    monkeypatch.setattr(cpu, "unavailable", reason)
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
    monkeypatch.setattr(cpu, "unavailable", "it went")
    with pytest.raises(InputError, match="backend 'cpu' is not available: it went"):
        normal(NoiseKey.of(0, 1), (4,))


def test_cuda_kernels_refuse_cpu_tensors(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", "")
    x0 = torch.zeros(1, 2)
    with use_backend("cuda"), pytest.raises(InputError, match="kernels are for CUDA tensors and these are on cpu"):
        q_sample(x0, torch.tensor([0]), torch.ones(1, 2), x0)


def test_the_extension_without_its_cuda_kernels():
    done = in_subprocess(
        "import importlib, torch; from ddpm_fast import _C; vars(_C).pop('cuda', None)\n"
        "from ddpm_fast.ops import use_backend\n"
        "from ddpm_fast.ops.backends import cuda; importlib.reload(cuda); print(cuda.unavailable)\n"
        "use_backend('cuda')"
    )
    assert "was built without nvcc. Put CUDA's nvcc on the PATH and reinstall" in done.stdout
    assert "InputError: backend 'cuda' is not available: the C++ extension was built without nvcc" in done.stderr


BUILT = SimpleNamespace(archs=[80, 90], ptx=80, driver_version=lambda: 13000, runtime_version=lambda: 13000)


@pytest.mark.parametrize(
    ("capability", "built", "reason"),
    [
        ((8, 0), {}, ""),
        ((8, 9), {}, ""),  # machine code for an earlier minor version
        ((12, 0), {}, ""),  # PTX
        ((7, 5), {}, r"built for compute capabilities 8.0, 9.0 and cuda:0 \(a GPU\) has 7.5: set .*ARCHS=75"),
        ((8, 0), {"archs": [86], "ptx": 86}, "set DDPM_FAST_CUDA_ARCHS=80"),
        ((9, 0), {"driver_version": lambda: 12040}, r"built with CUDA 13.0 and this driver supports 12.4: update"),
        ((9, 0), {"driver_version": lambda: 13010}, ""),
    ],
)
def test_what_a_gpu_needs_of_the_cuda_kernels(monkeypatch, capability, built, reason):
    monkeypatch.setattr(cuda, "_kernels", SimpleNamespace(**(vars(BUILT) | built)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    for function in (cuda._driver_refusal, cuda._device_refusal):
        function.cache_clear()
    try:
        found = cuda.refusal(torch.device("cuda", 0))
    finally:
        for function in (cuda._driver_refusal, cuda._device_refusal):
            function.cache_clear()
    assert re.search(reason, found) if reason else found == ""


def test_on_rocm_the_cuda_kernels_say_whose_gpus_they_are_for():
    """Torch calls AMD's GPUs "cuda" too. There Triton's kernels run the ops, or plain torch."""
    done = in_subprocess(
        "import torch; torch.version.hip, torch.version.cuda = '7.0.1', None\n"
        "torch.cuda.is_available = lambda: True\n"
        "from ddpm_fast import ops; from ddpm_fast.ops.backends import cuda, triton\n"
        "print(cuda.unavailable); print(triton.refusal(torch.device('cuda', 0)) or 'ready')\n"
        "print(ops.active_backend('q_sample', 'cuda', torch.float32), ops.active_backend('winograd', 'cuda'))\n"
        "ops.use_backend('cuda')"
    )
    assert "for NVIDIA's GPUs, and this torch computes on AMD's (ROCm 7.0.1)\nready\n" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] in ("triton reference", "reference reference")
    assert "InputError: backend 'cuda' is not available: its kernels are for NVIDIA's GPUs" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_cuda_kernels_import_and_say_what_is_missing():
    cuda._driver_refusal.cache_clear()
    missing = "this torch was built without CUDA|torch finds no GPU or driver"
    assert cuda.unavailable or re.search(missing, cuda.refusal(torch.device("cuda", 0)))
    if cuda.unavailable:
        return
    # The module is here with its kernels; a launch reports the runtime's own error.
    key = (0, 1, False), 0, 0, 0, 0
    with pytest.raises(RuntimeError, match=r"normal could not be launched on cuda:0: .+ddpm_fast\.info"):
        cpu._C.cuda.normal((1, 1, 4), key, (16, 1, False), (0, 0, 0))


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
    before = cpu.isa()
    try:
        for name in cpu.isas():
            cpu.use_isa(name)
            assert cpu.isa() == name
        with pytest.raises(InputError, match=r"instruction set 'mmx': this machine runs generic"):
            cpu.use_isa("mmx")
    finally:
        cpu.use_isa(before)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DDPM_FAST_BACKEND": "reference"}, "reference"),
        ({"DDPM_FAST_BACKEND": "", "DDPM_FAST_CPU_ISA": "generic"}, "cpu"),
        ({"DDPM_FAST_BACKEND": "abacus"}, "backend 'abacus' is unknown; there are cuda, cpu, triton, reference"),
        ({"DDPM_FAST_CPU_ISA": "mmx"}, "DDPM_FAST_CPU_ISA=mmx: this machine runs generic"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_environment(environment, expected):
    code = (
        "import torch; from ddpm_fast.ops import active_backend; from ddpm_fast.ops.backends import cpu\n"
        "print(active_backend('q_sample', 'cpu', torch.float32), cpu.isa())"
    )
    done = in_subprocess(code, **environment)
    if " " in expected:
        assert done.returncode != 0 and f"InputError: {expected}" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[0] == expected
        if "DDPM_FAST_CPU_ISA" in environment:
            assert done.stdout.split()[1] == environment["DDPM_FAST_CPU_ISA"]
