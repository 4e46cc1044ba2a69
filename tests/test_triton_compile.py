"""Triton kernels compiled for GPUs on a machine that has none: what the compiler's output must and must not hold."""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the package triton is not installed: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ddpm_fast.ops.triton.normal import BLOCK, _normal_kernel  # noqa: E402

pytestmark = [
    pytest.mark.cross_compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SIZES = ("elements", "channels", "positions", "counter_blocks")


@pytest.fixture(scope="module", params=[80, 90, 100], ids="sm_{}".format)
def capability(request):
    return request.param


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_normal(capability, dtype, channels_last, tmp_path):
    signature = {"out": f"*{dtype}", "seed": "*i64", "sample_id": "*i64", "step": "*i64"}
    signature |= dict.fromkeys(SIZES, "i64") | {"stream": "i32", "CHANNELS_LAST": "constexpr", "BLOCK": "constexpr"}
    source = ASTSource(
        fn=_normal_kernel, signature=signature, constexprs={"CHANNELS_LAST": channels_last, "BLOCK": BLOCK}
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    ptx = kernel.asm["ptx"]
    assert ".f64" not in ptx, "a Python float became a double"
    assert not re.search(r"\bfma\.|\bmad\.(rn\.)?f", ptx), "a fused multiply-add changes the normals' bits"
    assert "sqrt.rn.f32" in ptx and "sqrt.approx" not in ptx

    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(\w+):(\d+)", usage.stdout))
    assert numbers["STACK"] == "0" and numbers["LOCAL"] == "0", f"registers spilled to memory: {usage.stdout}"
