"""Where and with what something was measured, and the ceilings of a machine: bytes, instructions, operations of matrix
products and normals a second.

A ceiling is what a machine reaches at best, a second. A floor is the time that work takes at least: how much of it there
is, over the ceiling. A GPU issues one warp instruction a clock for each of the four schedulers of an SM. That rate is
for the cheapest instructions: on sm_90 32-bit integer ones run at half of it, so Philox cannot reach it.
"""

from __future__ import annotations

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
from ddpm_fast.commands.common import DTYPE_NAMES
from ddpm_fast.ops.backends import cpu

SCHEDULERS = 4  # of an SM, on every generation since 2017
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}  # many times the L2, or the caches of most CPUs
COPY_ROUNDS = 20
MATRIX_SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024)}  # in a CPU's caches, and beyond
MATRIX_ROUNDS = 5
NORMALS = {"cuda": (256, 2**18), "cpu": (64, 2**14)}  # samples and elements of each
BUSY_SECONDS = 0.5  # until the clocks are up
_SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


def environment(device: torch.device) -> dict:
    """What a result was measured on and with: machine, versions, commit."""
    where = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa() if not cpu.unavailable else None,
        "backend": df.ops.active_backend("q_sample", device, torch.float32),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        where["gpu"] = gpu(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": where,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            **{peer: _version(peer) for peer in peers.MODULES},
            "ddpm_fast": df.__version__,
        },
        "git": {
            "commit": _output("git", "rev-parse", "HEAD") or None,
            "changed_files": _output("git", "diff", "--name-only", "HEAD").splitlines(),
        },
    }


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu(device: torch.device) -> dict:
    """The GPU: what it is, and its clocks while it is busy (an idle one clocks down)."""
    properties = torch.cuda.get_device_properties(device)
    state = nvidia_smi(f"GPU-{getattr(properties, 'uuid', '')}", device)
    clock = state.get("clocks.sm")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "state": state,
        "sm_clock_hz": 1e6 * float(clock) if clock and clock.isdigit() else None,
    }


def nvidia_smi(uuid: str, device: torch.device) -> dict[str, str]:
    """The driver's version, clocks in MHz, power and temperature as nvidia-smi gives them of a GPU that copies until it
    has answered; empty where it does not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits", f"--id={uuid}"]
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(100):
            target.copy_(source)
        torch.cuda.synchronize(device)

    until = time.monotonic() + BUSY_SECONDS
    while time.monotonic() < until:
        copy()
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return {}
    while process.poll() is None:
        copy()
    return smi_state(process.communicate()[0])


def smi_state(text: str) -> dict[str, str]:
    """What nvidia-smi was asked for, by its own names; empty if the text is not one line of as many values."""
    values = [value.strip() for value in text.strip().split(",")]
    return dict(zip(_SMI, values, strict=True)) if len(values) == len(_SMI) and "\n" not in text.strip() else {}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on the device: the ceiling of what only moves bytes."""
    source = torch.randint(0, 256, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = timing.batch([lambda: target.copy_(source)], device)
    return 2 * source.numel() / float(np.median(timing.interleaved([copies], COPY_ROUNDS, device)))


def issue_rate(card: dict | None) -> float | None:
    """Warp instructions a second that a GPU of environment() issues at most; None without one or without its clock."""
    if not card or not card["sm_clock_hz"]:
        return None
    return card["multiprocessors"] * SCHEDULERS * card["sm_clock_hz"]


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
        found |= {f"flops {name}": matrix_rate(device, dtype) for dtype, name in DTYPE_NAMES.items()}
    return found


def _output(*command: str) -> str:
    try:
        made = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return made.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
