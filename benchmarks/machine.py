"""Where and with what something was measured, and what a machine reaches at best, a second: its ceilings."""

import datetime
import importlib.metadata
import math
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import ddpm_fast as df
from benchmarks import peers, timing
from ddpm_fast.ops.backends import cpu as cpu_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # those that are measured
SCHEDULERS = 4  # of an SM, on every generation since 2017; each issues one warp instruction a clock
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}  # many times the L2, or the caches of most CPUs
COPY_ROUNDS = 20
MATRIX_SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024)}  # in a CPU's caches, and beyond
MATRIX_ROUNDS = 5
NORMALS = {"cuda": (256, 2**18), "cpu": (64, 2**14)}  # samples and elements of each
BUSY_SECONDS = 0.5  # until the clocks are up
SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


def environment(device: torch.device) -> dict:
    """What a result was measured on and with: machine, versions, commit."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    cpu, load = names[0] if names else platform.processor(), os.getloadavg() if hasattr(os, "getloadavg") else None
    where = {"cpu": cpu, "architecture": platform.machine(), "cores": cores(), "threads": torch.get_num_threads()}
    where |= {"isa": cpu_kernels.isa() if not cpu_kernels.unavailable else None, "load_average": load}
    where["backend"] = df.ops.active_backend("q_sample", device, torch.float32)
    if device.type == "cuda":
        where["gpu"] = gpu(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {name: _version(name) for name in ("triton", *peers.MODULES)} | {"ddpm_fast": df.__version__}
    commit, changed = _output("git", "rev-parse", "HEAD"), _output("git", "diff", "--name-only", "HEAD")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    git = {"commit": commit, "changed_files": changed.splitlines()}
    return {"date": date, "machine": where, "versions": versions, "git": git}


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu(device: torch.device) -> dict:
    """The GPU: what it is, and its clocks right after it was busy (an idle one clocks down)."""
    copy_bandwidth(device, seconds=BUSY_SECONDS)
    properties = torch.cuda.get_device_properties(device)
    uuid = f"--id=GPU-{getattr(properties, 'uuid', '')}"
    state = smi_state(_output("nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits", uuid))
    clock = state.get("clocks.sm", "")
    found = {"name": properties.name, "multiprocessors": properties.multi_processor_count, "state": state}
    found["sm_clock_hz"] = 1e6 * float(clock) if clock.isdigit() else None
    return found | {"l2_bytes": properties.L2_cache_size}


def smi_state(text: str) -> dict[str, str]:
    """What nvidia-smi was asked for, by its own names; empty if the text is not one line of as many values."""
    values = [value.strip() for value in text.strip().split(",")]
    return dict(zip(SMI, values, strict=True)) if len(values) == len(SMI) and "\n" not in text.strip() else {}


def copy_bandwidth(device: torch.device, seconds: float = 0.0) -> float:
    """Bytes a second, read and written, of a large copy: the ceiling of what only moves bytes. seconds: at least."""
    source = torch.randint(0, 256, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target, until = torch.empty_like(source), time.monotonic() + seconds
    copies = timing.batch([lambda: target.copy_(source)], device)
    while True:
        median = float(np.median(timing.interleaved([copies], COPY_ROUNDS, device)))
        if time.monotonic() >= until:
            return 2 * source.numel() / median


def issue_rate(card: dict | None) -> float | None:
    """Warp instructions a second that a GPU of gpu() issues at most; None without one or without its clock. It is the
    rate of the cheapest ones: on sm_90 32-bit integer ones run at half of it, so Philox cannot reach it."""
    return card["multiprocessors"] * SCHEDULERS * card["sm_clock_hz"] if card and card["sm_clock_hz"] else None


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the fastest square matrix product, alone and as a convolution of 1x1, which
    on a CPU are two libraries: the ceiling of what only multiplies. The best time, as of a ceiling, not the median."""
    best = 0.0
    for side in MATRIX_SIDES[device.type]:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        image = left.view(1, 16, side // 16, side).permute(0, 3, 1, 2)
        kernel = right.view(side, side, 1, 1).contiguous(memory_format=torch.channels_last)
        calls = [lambda a=left, b=right: a @ b, lambda a=image, b=kernel: F.conv2d(a, b)]
        with torch.inference_mode():
            seconds = timing.interleaved([timing.batch([call], device) for call in calls], MATRIX_ROUNDS, device)
        best = max(best, 2 * side**3 / float(seconds.min()))
    return best


def normal_rate(device: torch.device) -> float:
    """Normals a second that ddpm_fast draws there, with all threads: the ceiling of what only draws noise."""
    key = df.NoiseKey.of(0, NORMALS[device.type][0], device=device)
    draws = timing.batch([lambda: df.ops.normal(key, NORMALS[device.type][1:])], device)
    return math.prod(NORMALS[device.type]) / float(np.median(timing.interleaved([draws], COPY_ROUNDS, device)))


def ceilings(device: torch.device, matrices: bool) -> dict[str, float]:
    """What the machine reaches at best, measured: "bytes" a second, "normals" a second, warp "instructions" a second of
    a GPU, and, if matrices are wanted, operations a second by dtype ("flops fp32")."""
    found = {"bytes": copy_bandwidth(device), "normals": normal_rate(device)}
    if device.type == "cuda" and (rate := issue_rate(gpu(device))):
        found["instructions"] = rate
    if matrices:
        found |= {f"flops {name}": matrix_rate(device, dtype) for name, dtype in DTYPES.items()}
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
