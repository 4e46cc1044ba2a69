"""The precision that a command computes in: what a processor is fast in, and what `--precision auto` chooses."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.markup import escape

from ddpm_fast import compat
from ddpm_fast.commands.common import console
from ddpm_fast.errors import InputError
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.loops.guidance import null_class, predictor
from ddpm_fast.loops.network import Network, evaluating
from ddpm_fast.loops.options import SamplingOptions

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# What comparing the precisions may take: a second, or this share of the work that is expected. Work of fewer seconds
# than the last number is done before a comparison could pay.
_SECONDS, _SHARE, _LEAST = 1.0, 0.03, 10.0
# bf16 rounds more, so it has to save more than the clock's own noise.
_PAYS = 0.95


# What is known of a processor


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 on this device: on a GPU or a CPU with bf16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":  # not known
        return False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and compat.cpu_has_bf16()


def fast_fp16(device: torch.device) -> bool:
    """Whether fp16 is faster than fp32 on this device: on a GPU that has units of their own for its products."""
    if device.type != "cuda" or torch.version.hip is not None:  # where bf16 is as fast
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def automatic_precision(device: torch.device) -> str:
    """What `--precision auto` trains in on this device: the fastest of "fp32", "bf16" and "fp16".

    The loss scale keeps the gradients of fp16 in its range. Nothing does so for samples, where fp16 must be asked for.
    """
    return "bf16" if fast_bf16(device) else "fp16" if fast_fp16(device) else "fp32"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bf16 where that is faster, else fp32. Raises InputError for an unknown name."""
    choices = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    if name == "auto":
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    if name not in choices:
        raise InputError(f"precision {name!r} is unknown; expected auto, {', '.join(choices)}")
    return choices[name]


# What sampling measures


def settle(
    loaded: LoadedModel,
    options: SamplingOptions,
    n: int,
    rows: int,
    recorded: object = None,
    may_measure: bool = True,
) -> LoadedModel:
    """What `--precision auto` samples in: the model in that precision. It is said in one line.

    Known is that bf16 is the faster one on a GPU that has it, and fp32 on a processor without bf16 instructions. On a
    CPU that has them it depends on the network and on the batch, because the 3x3 convolutions are computed in fp32
    (nn/convolution.py): both are called a few times, if there is enough to draw.

    Args:
        loaded: The model, in fp32.
        options: How images are drawn.
        n: How many.
        rows: How many sampling steps each batch takes.
        recorded: The precision that a folder's images were drawn in, which its other images must have; None for none.
        may_measure: False where several processes must choose the same, each by itself.
    """
    device = Network.of(loaded.model).device
    fast = fast_bf16(device)
    chosen = torch.bfloat16 if fast else torch.float32
    if recorded in DTYPE_NAMES.values():
        chosen, why = choose_dtype(str(recorded), device), "the folder's images are in it"
    elif not fast:
        why = f"{_processor(device)} has no fast bf16"
    elif device.type != "cpu" or options.compile or not may_measure:
        why = f"{_processor(device)} has fast bf16"
    else:
        other = copy.deepcopy(loaded.model).to(torch.bfloat16)
        exact, rounded = (_Calls(model, loaded, options) for model in (loaded.model, other))
        batch = min(n, options.batch_size or n)
        share = bf16_share(exact, rounded, batch, -(-n // batch) * rows)
        if share is None:
            why = f"{_processor(device)} has fast bf16, and there is too little to draw for measuring it"
        else:
            chosen = torch.bfloat16 if share < _PAYS else torch.float32
            why = f"bf16 takes {share:.2f} of fp32's time here"
        if chosen == torch.bfloat16:
            loaded = replace(loaded, model=other)
    name = DTYPE_NAMES[chosen]
    console.print(escape(f"{why}: sampling in {name} (--precision {name} draws the same images again)"))
    loaded.model.to(chosen)
    return loaded


def bf16_share(
    exact: Callable[[int], object], rounded: Callable[[int], object], batch: int, calls: int
) -> float | None:
    """How long bf16 takes, as a share of fp32's time.

    Args:
        exact: exact(n) calls the network in fp32 with n images.
        rounded: The same in bf16.
        batch: How many images a call will have. As many are measured, or as fit into a second or 3% of the work.
        calls: How many calls there will be.

    Returns:
        The share; None if the work is too little for measuring, or one image takes too long.
    """
    exact(1)  # the first call makes what later ones find
    one = _seconds(exact, 1)
    work = calls * batch * one / 2  # in a batch an image takes about half as long
    budget = max(_SECONDS, _SHARE * work)
    measured = min(batch, int(budget / (8 * one)))  # by a first call and two or three others in each precision
    if work < _LEAST or not measured:
        return None
    rounded(1)
    if (other := _seconds(rounded, 1)) > 2 * one:
        return other / one
    exact(measured)
    rounded(measured)
    times: list[tuple[float, float]] = []
    while not times or (len(times) < 5 and sum(map(sum, times)) + sum(times[-1]) < budget / 2):
        times.append((_seconds(exact, measured), _seconds(rounded, measured)))
    exacts, others = zip(*times, strict=True)
    return min(others) / min(exacts)


def _seconds(call: Callable[[int], object], n: int) -> float:
    started = time.perf_counter()
    call(n)
    return max(time.perf_counter() - started, 1e-6)


class _Calls:
    """Calls a model as sampling does, in its own dtype."""

    def __init__(self, model: torch.nn.Module, loaded: LoadedModel, options: SamplingOptions):
        self._network, self._diffusion, self._options = Network.of(model), loaded.diffusion, options

    @torch.inference_mode()
    def __call__(self, n: int) -> None:
        """One call with n images, or with twice as many where guidance needs them."""
        network, options = self._network, self._options
        labels = options.labels if options.labels is None or isinstance(options.labels, int) else options.labels[:n]
        # With a classifier they may be the classifier's alone.
        labels = labels if network.takes_labels else None
        shape = network.sample_shape(options.shape)
        condition = torch.zeros(n, network.condition_channels, *shape[1:])
        predict = predictor(
            network.called(),
            network.check_labels(labels, n),
            learned=self._diffusion.objective.learned,
            guidance=options.guidance,
            rescale=options.guidance_rescale,
            null_label=null_class(network, labels, options.guidance, options.null_label),
            condition=condition if network.condition_channels else None,
        )
        x = torch.randn((n, *shape), generator=torch.Generator().manual_seed(0))
        x = x.to(dtype=network.dtype, memory_format=torch.channels_last)
        t = torch.tensor([self._diffusion.num_timesteps // 2])
        with evaluating(network.model):
            predict(x, t.expand(n))


def _processor(device: torch.device) -> str:
    return "this CPU" if device.type == "cpu" else f"{device}"
