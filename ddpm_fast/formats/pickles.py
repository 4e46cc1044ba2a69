"""Checkpoints that torch.save wrote, read without running the code that a pickle may hold."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from ddpm_fast.errors import InputError


def read_pickle(path: Path) -> object:
    """What a file of torch.save holds: tensors on the CPU, in dicts, lists and plain values.

    Raises:
        InputError: If the file is missing, damaged or foreign, or holds anything else, which might be code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} cannot be read as a file of torch.save: {str(error).splitlines()[0]:.300}") from error
