"""What a compiled GPU kernel consists of: registers, memory it spills to, and its machine instructions, read from a
cubin (or any file that holds some) without a GPU. Tests compare these numbers with budgets.

The disassembler is CUDA's cuobjdump: the one on the PATH, or the one that the triton package carries.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_ARCH = re.compile(r"^\s*code for (sm_\w+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_USAGE = re.compile(r"^\s*Function (\S+):$")
# Instructions of four 32-bit registers, or eight on the newest generation.
_WIDE = re.compile(r"^(LDG|STG|LD|ST)\.E\S*\.(128|256)\b")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. instructions: (opcode with its modifiers, operands), without padding. loops: the
    first and the last instruction of each, by backward branches."""

    name: str  # demangled where c++filt is there
    arch: str  # such as sm_90
    registers: int
    stack: int  # bytes a thread
    local: int  # bytes a thread
    shared: int  # bytes a block
    instructions: tuple[tuple[str, str], ...]
    loops: tuple[tuple[int, int], ...]

    def turn(self, pattern: str) -> int:
        """The instructions of one turn of the innermost loop around an opcode that starts with the pattern, without the
        loops within it; where no loop is around one, all."""
        found = [i for i, (opcode, _) in enumerate(self.instructions) if re.match(pattern, opcode)]
        around = [(a, b) for a, b in self.loops if any(a <= i <= b for i in found)]
        if not around:
            return len(self.instructions)
        first, last = min(around, key=lambda loop: loop[1] - loop[0])
        within = [(a, b) for a, b in self.loops if first <= a and b <= last and (a, b) != (first, last)]
        return last - first + 1 - len({i for a, b in within for i in range(a, b + 1)})

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode that starts with the pattern (a regular expression)."""
        return sum(bool(re.match(pattern, opcode)) for opcode, _ in self.instructions)

    @property
    def spills(self) -> bool:
        """Whether registers, or arrays indexed at run time, went to memory."""
        return self.stack > 0 or self.local > 0 or self.count(r"LDL|STL") > 0

    @property
    def wide_accesses(self) -> int:
        """Loads and stores of 16 bytes (or more) of global memory."""
        return self.count(_WIDE.pattern)

    @property
    def doubles(self) -> int:
        """Instructions of the fp64 units."""
        return self.count(r"D(ADD|MUL|FMA|SETP|MNMX)\b|MUFU\.\w*64|[IF]2[IF]\S*F64")


def cuobjdump() -> Path | None:
    """The disassembler, or None where there is none."""
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if carried.exists():
            return carried
    found = shutil.which("cuobjdump")
    return Path(found) if found else None


def nvcc() -> Path | None:
    """CUDA's compiler, or None where there is none."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return Path(found) if found else None


def kernels(binary: Path, arch: str = "") -> list[Kernel]:
    """Every kernel in a cubin, object file or shared library: once for each architecture it was compiled for, or for
    the one that is named (such as sm_90), which saves the time of disassembling the others."""
    only = ["-arch", arch] if arch else []
    usage = _resource_usage(binary, only)
    found = [
        # A cubin names its architecture only next to the code.
        Kernel(name, arch, *(usage.get((arch, name)) or usage["", name]), *_parsed(lines))
        for arch, name, lines in _functions(binary, only)
    ]
    if not found or not shutil.which("c++filt"):
        return found
    names = _run("c++filt", *(kernel.name for kernel in found)).splitlines()
    return [replace(kernel, name=name) for kernel, name in zip(found, names, strict=True)]


def _run(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def _functions(binary: Path, only: list[str]) -> Iterator[tuple[str, str, list[tuple[int, str, str]]]]:
    """(architecture, mangled name, [(address, opcode, operands), ...])"""
    arch, name, lines = "", "", []
    for line in _run(cuobjdump(), "--dump-sass", *only, binary).splitlines():
        if match := _INSTRUCTION.match(line):
            lines.append((int(match[1], 16), match[2], match[3]))
            continue
        architecture, function = _ARCH.match(line), _FUNCTION.match(line)
        if (architecture or function) and name:
            yield arch, name, lines
            name, lines = "", []
        if architecture:
            arch = architecture[1]
        if function:
            name = function[1]
    if name:
        yield arch, name, lines


def _parsed(
    lines: list[tuple[int, str, str]],
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[int, int], ...]]:
    """(instructions, loops), without the branch to itself and the NOPs that fill a function's last cache line."""
    end = len(lines)
    while end and lines[end - 1][1] == "NOP":
        end -= 1
    if end and lines[end - 1][1] == "BRA":
        end -= 1
    at = {address: i for i, (address, _, _) in enumerate(lines[:end])}
    loops = set()
    for i, (address, opcode, operands) in enumerate(lines[:end]):
        target = re.search(r"\b0x([0-9a-f]+)$", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) <= address:
            loops.add((at[int(target[1], 16)], i))
    return tuple((opcode, operands) for _, opcode, operands in lines[:end]), tuple(sorted(loops))


def _resource_usage(binary: Path, only: list[str]) -> dict[tuple[str, str], tuple[int, int, int, int]]:
    """(registers, stack, local, shared) by architecture and mangled name."""
    usage, arch, name = {}, "", ""
    for line in _run(cuobjdump(), "--dump-resource-usage", *only, binary).splitlines():
        if match := re.match(r"^\s*arch = (sm_\w+)", line):
            arch = match[1]
        elif match := _USAGE.match(line):
            name = match[1]
        elif name and (numbers := dict(re.findall(r"(\w+):(\d+)", line))):
            usage[arch, name] = tuple(int(numbers[key]) for key in ("REG", "STACK", "LOCAL", "SHARED"))
            name = ""
    return usage
