"""The backends for GPUs as backends for the tests' CPU tensors: every operand is copied to the GPU with its memory
layout, the kernel runs there, and what it wrote is copied back. So the tests of the ops run on a GPU unchanged.
"""

import contextlib
import importlib
from unittest import mock

import torch

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import Drawn, ReverseStep, VlbTerms, use_backend
from ddpm_fast.ops.tensors import Draw


def _moved(argument, copies):
    if isinstance(argument, torch.Tensor):
        for here, there in copies:  # a step in place is given a tensor twice
            same = here.data_ptr() == argument.data_ptr() and here.shape == argument.shape
            if same and here.stride() == argument.stride() and here.numel():
                return there
        there = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="cuda")
        there.copy_(argument)
        copies.append((argument, there))
        return there
    if isinstance(argument, NoiseKey):
        parts = (_moved(part, copies) for part in (argument.seed, argument.sample_id, argument.step))
        return NoiseKey(*parts, argument.stream)
    if isinstance(argument, ReverseStep | VlbTerms | Draw | Drawn):
        return argument._make(_moved(part, copies) for part in argument)
    return argument


def _through(kernel):
    def run(*arguments):
        copies = []
        with torch.no_grad():
            kernel(*[_moved(argument, copies) for argument in arguments])
            for here, there in copies:
                back = there.cpu()
                if back.numel() and not torch.equal(_bytes(back), _bytes(here)):
                    here.data.copy_(back)

    return run


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


@contextlib.contextmanager
def on_gpu(name: str):
    """Inside, the backend `name` takes CPU tensors, runs on the GPU, and is the one in use."""
    module = importlib.import_module(f"ddpm_fast.ops.backends.{name}")
    device = torch.device("cuda", torch.cuda.current_device())
    assert not module.unavailable and not module.refusal(device), module.unavailable or module.refusal(device)
    through = {op: _through(kernel) for op, kernel in module.OPS.items()}
    with (
        mock.patch.dict(module.OPS, through),
        mock.patch.object(module, "refusal", lambda device: ""),
        use_backend(name),
    ):
        yield
