"""The package's public names, which come when one of them is first used."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_fast as df
from ddpm_fast import public

ROOT = Path(df.__file__).parents[1]


def in_process(code, tmp_path, torch):
    """What a program prints that finds this torch.py before the real one, or None for the real one."""
    if torch is not None:
        (tmp_path / "torch.py").write_text(torch)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path)


def test_importing_the_package_alone_does_not_import_torch(tmp_path):
    code = "import ddpm_fast as df; print(df.__version__, hasattr(df, '__wrapped__')); df.UNet"
    result = in_process(code, tmp_path, "raise ImportError('no torch')")
    assert result.stdout == f"{df.__version__} False\n" and "no torch" in result.stderr


def test_names_and_modules_come_in_any_order(tmp_path):
    code = (
        "from ddpm_fast.ops.norm import group_norm\n"  # deep within, before anything else
        "import ddpm_fast as df\n"
        "import ddpm_fast.sample\n"  # a command of that name
        "assert callable(df.sample) and df.samplers.SAMPLERS and df.nn.UNet is df.UNet\n"
        "from ddpm_fast import *\n"
        "assert Schedule is df.Schedule and ops.normal is df.ops.normal\n"
        "assert set(df.__all__) <= set(dir(df))\n"
    )
    result = in_process(code, tmp_path, None)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(df, name) is getattr(public, name) for name in public.__all__)
    with pytest.raises(AttributeError, match="'ddpm_fast' has no attribute 'unet'"):
        _ = df.unet
    with pytest.raises(ImportError, match="cannot import name 'Unet'"):
        exec("from ddpm_fast import Unet")


def test_a_type_checker_finds_what_a_program_finds():
    tree = ast.parse(Path(public.__file__).read_text())
    imported = {alias.asname or alias.name for node in tree.body for alias in getattr(node, "names", [])}
    assert imported == set(public.__all__) == set(importlib.import_module("ddpm_fast").__all__)
