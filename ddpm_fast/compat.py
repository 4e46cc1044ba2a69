"""Every private part of torch that the package uses: why it is needed, in which versions it is, and what happens
without it. Nothing else in the package may touch torch._C or an underscored name of torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, profiler

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)

_included: Any = getattr(torch._C, "_dispatch_tls_local_include_set", None)
_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", None)

# Whether an op's gradient can be registered without torch.library.register_autograd. See below_autograd().
HAS_BELOW_AUTOGRAD = _below_autograd is not None


def current_stream(index: int) -> int:
    """The handle (cudaStream_t) of the current stream of GPU `index`, as an integer.

    Private part: torch._C._cuda_getCurrentRawStream, seen in torch 2.13 with CUDA; Triton calls it too.
    Reason: torch.cuda.current_stream() makes a Stream object at each call of an op.
    Without it: that public function.
    """
    return torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index)


def below_autograd() -> AbstractContextManager[None]:
    """A block in which ops run without autograd, as within an autograd.Function's forward.

    Private part: torch._C._AutoDispatchBelowAutograd, seen in torch 2.13, whose torch.library uses it itself.
    Reason: torch.library.register_autograd lists the schema's arguments anew at each call, to fill in defaults and pass
    keywords on. Our schemas have neither, and a tiny loss takes less time without it: docs/measured.md has the figures.
    Without it: HAS_BELOW_AUTOGRAD is False, and ops/declare.py registers gradients by torch.library.register_autograd.
    """
    return _below_autograd()


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is entered, by torch.func.jvp or torch.autograd.forward_ad.dual_level.

    Private part: torch.autograd.forward_ad._current_level, seen in torch 1.11 to 2.13.
    Reason: the fused ops have no derivative in forward mode. torch's public unpack_dual shows a tensor's tangent, but
    not the one that torch.func.jvp keeps, and takes a microsecond for each tensor where a small op takes ten.
    Without it: False. In forward mode an op's result then has the tangent 0.
    """
    return getattr(forward_ad, "_current_level", -1) >= 0


def in_functorch() -> bool:
    """Whether one of torch.func's transforms (vmap, grad, jvp) is entered.

    Private part: torch._C._are_functorch_transforms_active, seen in torch 2.13, whose autograd.Function asks it itself.
    Reason: the fused ops have no rules for these transforms, and a tensor within one looks like any other. A layer that
    is torch's own in all else must not fail there.
    Without it: False. Such a layer then raises within a transform, and says that its op does not support it.
    """
    is_active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(is_active and is_active())


def _usual_keys() -> tuple[object, ...]:
    """What a thread adds to every call's dispatch keys while nothing special goes on, outside of inference mode and in
    it."""
    keys, key = getattr(torch._C, "DispatchKeySet", None), getattr(torch._C, "DispatchKey", None)
    if keys is None or key is None or _included is None or _function_modes is None:
        return ()
    inference = keys(key.BackendSelect)
    return inference.add(key.ADInplaceOrView), inference


_USUAL_KEYS = _usual_keys()


def is_watched() -> bool:
    """Whether something of torch may want to see a call of an op: a TorchDispatchMode or TorchFunctionMode, tracing, a
    transform of torch.func, forward-mode differentiation, or a profiler. A call that nothing sees need not go through
    torch's dispatch.

    Private part: torch._C._dispatch_tls_local_include_set with DispatchKeySet and DispatchKey, which tell of all but
    function modes, torch.compile, forward mode and profilers; torch._C._len_torch_function_stack;
    torch.autograd.profiler._is_profiler_enabled; torch.autograd.forward_ad._current_level; seen in torch 2.13.
    Reason: torch's two dispatches of an op written in Python take two fifths of the time of a small call.
    Without it: True, and every call is dispatched. So too with a version that adds other keys.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or is_profiling()
        or in_forward_mode()
        or _included is None
        or _included() not in _USUAL_KEYS
        or _function_modes() > 0
    )


def tensor_exchange() -> object | None:
    """The capsule by which C code sees what a tensor is (DLPack's exchange, version 1), or None where torch has none.

    Not private, but new: torch.Tensor.__dlpack_c_exchange_api__, seen in torch 2.13.
    Without it: a call reads tensors by their Python attributes, and goes through torch's dispatch.
    """
    return getattr(Tensor, "__dlpack_c_exchange_api__", None)


def changes_of(tensor: Tensor) -> int:
    """How often the tensor has been written to in place.

    Private part: Tensor._version, seen in torch 2.13, and described in PyTorch's notes on autograd.
    Reason: filters that were made of a weight have to be made anew when an optimiser, or load_state_dict, changes it.
    Without it: 0. Changes are then seen by a sample of the weight's values only, as those through `.data` always are.
    """
    return getattr(tensor, "_version", 0)


def copy_all(to: list[Tensor], given: list[Tensor]) -> None:
    """Copy tensors, of which all on one side have one dtype, in a few launches.

    Private part: torch._foreach_copy_, seen in torch 2.2 to 2.13; its neighbours are what torch's own optimisers use.
    Reason: on a GPU a copy of its own for each of some 100 gradients takes two microseconds each.
    Without it: that.
    """
    if hasattr(torch, "_foreach_copy_") and to:
        torch._foreach_copy_(to, given)
        return
    for tensor, source in zip(to, given, strict=True):
        tensor.copy_(source)


def add_all(to: list[Tensor], given: list[Tensor]) -> None:
    """Add tensors to others where these are, in a few launches.

    Private part: torch._foreach_add_, seen in torch 1.9 to 2.13. Reason and what happens without it: as in copy_all.
    """
    if hasattr(torch, "_foreach_add_") and to:
        torch._foreach_add_(to, given)
        return
    for tensor, addend in zip(to, given, strict=True):
        tensor.add_(addend)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether forward hooks are registered on this module.

    Private part: Module._forward_hooks and ._forward_pre_hooks, seen in torch 1.0 to 2.13.
    Reason: a CUDA graph does not call hooks, so a network with hooks must not be replayed from one. torch has no public
    way to ask whether there are any.
    Without it: False. A hook is then not called while a graph is replayed.
    """
    return bool(getattr(module, "_forward_hooks", None) or getattr(module, "_forward_pre_hooks", None))


def end_failed_capture(device: int, pool: tuple[int, int] | None) -> bool:
    """Tell CUDA's allocator that a capture which failed is over. Returns whether the allocator did not know it already.

    Private part: torch._C._cuda_endAllocateToPool, seen in torch 2.10 to 2.13 with CUDA.
    Reason: after a failed capture torch up to 2.11 allocates as if the capture went on, raises at every empty_cache(),
    and keeps a pointer to the graph, which must therefore stay alive (pytorch/pytorch#180395). Newer versions raise
    RuntimeError here, because nothing is left to end.
    Without it: False, and nothing is done.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is None:
        return False
    try:
        end(device, pool)
    except RuntimeError:
        return False
    return True


def is_profiling() -> bool:
    """Whether one of torch's profilers, or emit_nvtx, runs in this process.

    Private part: torch.autograd.profiler._is_profiler_enabled, seen in torch 2.3 to 2.13.
    Reason: a record_function that nobody looks at takes 25 times as long as to ask this, 8 times in a training step.
    Without it: True, and these microseconds of the host are lost.
    """
    return bool(getattr(profiler, "_is_profiler_enabled", True))


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor, divisor: Tensor) -> None:
    """Let a fused optimiser take its step with the gradients divided by a number; or none, where `skip` is true.

    Nothing is read from the device, so a CUDA graph can hold this.

    Private part: a fused optimiser's attributes grad_scale and found_inf, which torch.amp.GradScaler sets for one step,
    and ._step_supports_amp_scaling, which says that they are heard; seen in torch 2.0 to 2.13.
    Reason: GradScaler itself reads on the host whether it has to do the same, which waits for the device.
    Without it: RuntimeError, before anything is changed. Training in fp16 is not possible then.

    Args:
        optimizer: One with fused=True.
        skip: A bool scalar on the parameters' device.
        divisor: An fp32 scalar there.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise RuntimeError(
            f"{type(optimizer).__name__} of torch {torch.__version__} takes no loss scale: train in fp32"
        )
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = divisor, skip.float()
    try:
        fused.step()
    finally:
        del fused.grad_scale, fused.found_inf


def cpu_has_bf16() -> bool:
    """Whether the CPU has the bf16 instructions of AVX-512.

    Private part: torch.cpu._is_avx512_bf16_supported, seen in torch 2.10 to 2.13.
    Reason: the public torch.cpu.get_capabilities() says the same, and is asked first, but older versions lack it.
    Without it: False. Then the commands' --precision auto chooses fp32 on such a version.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(is_supported and is_supported())


def cpu_has_fp16() -> bool:
    """Whether the CPU multiplies fp16 matrices itself, with AVX-512's instructions or AMX.

    Private part: none. torch.cpu.get_capabilities(), which says so, is missing in torch 2.10.
    Without it: False. Products of fp16 are then computed in fp32.
    """
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_fp16", False) or found.get("amx_fp16", False))


def is_compile_error(error: RuntimeError) -> bool:
    """Whether torch.compile raised this because it could not compile.

    Private part: torch._dynamo.exc.TorchDynamoException, seen in torch 2.10 to 2.13.
    Reason: a missing compiler shows as a page of text that does not say what to do, and torch has no public class for
    it. The module is imported only here, when there is an error, because that takes a second.
    Without it: False. Then the page of text is what the user sees.
    """
    exceptions = getattr(getattr(torch, "_dynamo", None), "exc", None)
    base = getattr(exceptions, "TorchDynamoException", None)
    return base is not None and isinstance(error, base)
