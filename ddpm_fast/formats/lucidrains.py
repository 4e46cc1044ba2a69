"""model-N.pt of lucidrains' denoising-diffusion-pytorch: its own Unet, run by its package, and its diffusion as ours.

The network is another one than ours (a 7x7 stem, norms by the root mean square, linear attention), so the package
denoising-diffusion-pytorch has to be installed. Its Trainer writes a whole GaussianDiffusion and the average of one.
The shapes of the weights tell what the Unet was made with, and the tables beside them the schedule and what is
predicted. The flags are the arguments that neither tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError, check_integer, printable
from ddpm_fast.files.checkpoint import take_prefix
from ddpm_fast.files.fit import check_finite, offenders
from ddpm_fast.files.memory import memory_for
from ddpm_fast.files.pickles import state_dict
from ddpm_fast.formats.flags import parse_flags
from ddpm_fast.formats.imported import Wrapped
from ddpm_fast.formats.known_schedules import schedule_of
from ddpm_fast.nn.foreign import Foreign
from ddpm_fast.schedule import Schedule

CODE = "lucidrains' denoising-diffusion-pytorch"
_PACKAGE = "denoising-diffusion-pytorch"
_CLAIMED = ("betas", "model.init_conv.weight", "model.final_conv.weight")
_OBJECTIVES = {"pred_noise": "eps", "pred_v": "v", "pred_x0": "x0"}
_FLAGS: dict[str, Any] = {
    "image_size": "64",
    "objective": "pred_v",
    "sinusoidal_pos_emb_theta": 10000,
    "dropout": 0.0,
    "flash_attn": False,
}
_AGAIN = "fetch the file again"
_CLOSE = 1e-3  # relative: the tables are in float32, and the SNR is a difference of numbers near 1


def claims(content: object) -> bool:
    """Whether what a file holds is a diffusion of this code. It never raises."""
    state = _average(content)
    return all(name in state for name in _CLAIMED)


def read(content: object, path: Path, flags: str | None) -> Wrapped:
    """The network of a file in its package's code, called as ours is, and its diffusion.

    Args:
        content: What the file holds.
        path: The file, for messages.
        flags: "--image_size 64", or "--image_size 64x32" for a height of 64 and a width of 32: the file does not say
            it. Also those arguments of Unet and GaussianDiffusion that were not left at their defaults and that the
            file does not say: --sinusoidal_pos_emb_theta and --dropout.

    Raises:
        InputError: For weights of another network or version, for a kind of it that is not supported (self_condition,
            learned or random sinusoids, classes), for flags that are missing, unknown or contradict the file, and if
            the package cannot be imported.
    """
    try:
        return _read(_average(content), flags)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _average(content: object) -> dict[str, Tensor]:
    """The averaged GaussianDiffusion of a file, or the one that was trained if there is no average."""
    averaged = take_prefix("ema_model.", state_dict(content, "ema"))
    return averaged or state_dict(content, "model")


def _read(state: dict[str, Tensor], flags: str | None) -> Wrapped:
    given = parse_flags(flags, _FLAGS, f"{CODE} (arguments of Unet and GaussianDiffusion)")
    weights = take_prefix("model.", state)
    arguments = _arguments(weights)
    channels, levels = arguments["channels"], len(arguments["dim_mults"])
    if "image_size" not in given:
        raise InputError("it does not say the size of its images: give it as a flag, such as --flags '--image_size 64'")
    size = _size(given["image_size"], levels)
    schedule = _schedule(state)
    diffusion = _diffusion(state, schedule, given, arguments["learned_variance"])
    arguments |= {name: given[name] for name in ("sinusoidal_pos_emb_theta", "dropout") if name in given}
    outputs = channels * (1 + arguments["learned_variance"])
    model = Foreign(_network(arguments, weights), (channels, *size), outputs, classes=0)
    model.divisor = 2 ** (levels - 1)
    return Wrapped(model, diffusion, {"format": CODE, "flags": flags or ""})


def _size(text: str, levels: int) -> tuple[int, int]:
    """(height, width) of the images."""
    numbers = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if numbers is None:
        raise InputError(f"--image_size is {text!r:.50}; expected the side of a square, or such as 64x32")
    height = check_integer("--image_size", int(numbers[1]), 1, 2**14)
    width = check_integer("--image_size", int(numbers[2] or height), 1, 2**14)
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        raise InputError(
            f"--image_size is {text}; expected a multiple of {2 ** (levels - 1)}, as the network has {levels} levels"
        )
    return height, width


# The network


def _arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of Unet that the shapes of its weights say.

    Raises:
        InputError: For a Unet that is not supported.
    """
    _refuse(weights)
    inputs, init_dim = _shape(weights, "init_conv.weight", 4)[1::-1]
    dim = _shape(weights, "time_mlp.1.weight", 2)[1]
    out_dim = _shape(weights, "final_conv.weight", 4)[0]
    if inputs not in (out_dim, 2 * out_dim) and 2 * inputs != out_dim:
        raise InputError(f"its Unet takes {inputs} channels and gives {out_dim}; expected as many, or twice as many")
    if inputs == 2 * out_dim:
        raise InputError(
            "self_condition = True is not supported: the sampler would have to give the network its last prediction. "
            "Train without it"
        )
    mults, full, heads, widths = [], [], [], []
    for level in count():
        if f"downs.{level}.3.weight" not in weights and f"downs.{level}.3.1.weight" not in weights:
            break
        last = f"downs.{level}.3.weight" in weights  # others have a rearrangement before their convolution
        mults.append(_shape(weights, f"downs.{level}.3.{'' if last else '1.'}weight", 4)[0] / max(dim, 1))
        full.append(f"downs.{level}.2.to_out.weight" in weights)
        memory = _shape(weights, f"downs.{level}.2.mem_kv", 4)
        heads.append(memory[1])
        widths.append(memory[3] if full[-1] else memory[2])
    if dim < 1 or not mults or any(mult < 1 or mult % 1 for mult in mults):
        raise InputError(f"its levels have {mults} times the channels of dim = {dim}; expected whole numbers")
    return {
        "dim": dim,
        "init_dim": init_dim,
        "dim_mults": tuple(map(int, mults)),
        "channels": inputs,
        "learned_variance": out_dim == 2 * inputs,
        "attn_heads": tuple(heads),
        "attn_dim_head": tuple(widths),
        "full_attn": tuple(full),
    }


def _refuse(weights: Mapping[str, Tensor]) -> None:
    """Raise InputError for a Unet of another kind."""
    if "time_mlp.0.weights" in weights:
        raise InputError(
            "learned_sinusoidal_cond and random_fourier_features are not supported: their networks are not for "
            "GaussianDiffusion, whose timesteps are whole numbers"
        )
    if "null_classes_emb" in weights or "classes_emb.weight" in weights:
        raise InputError("classifier_free_guidance's Unet is not supported, only that of the package's front door")


def _shape(weights: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    if name not in weights:
        raise InputError(f"it lacks model.{name}; expected all weights of a Unet of {CODE} 2")
    shape = tuple(weights[name].shape)
    if len(shape) != ndim:
        raise InputError(f"model.{name} has shape {list(shape)}; expected {ndim} dimensions")
    return shape


def _network(arguments: dict[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """The package's Unet with the weights, which are copied as float32.

    Raises:
        InputError: If the package cannot be imported, or its Unet has other weights.
    """
    unet = _unet_class()
    with torch.device("meta"):
        try:
            network = unet(**arguments)
        except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(
                f"the Unet of the installed {_PACKAGE} cannot be made with {arguments} ({printable(str(error)):.200})"
            ) from error
    wanted = network.state_dict()
    problems = offenders("missing", [name for name in wanted if name not in weights])
    problems += offenders("unexpected", [f"{printable(name):.100}" for name in weights if name not in wanted])
    differ = [name for name, tensor in wanted.items() if name in weights and weights[name].shape != tensor.shape]
    problems += offenders("of another shape", [f"{name} {list(weights[name].shape)}" for name in differ])
    integers = [name for name, tensor in weights.items() if not tensor.is_floating_point()]
    problems += offenders("no floats:", [f"{printable(name):.100}" for name in integers])
    if problems:
        raise InputError(
            f"its weights do not fit the Unet of the installed {_PACKAGE}: {'; '.join(problems)}. Install the version "
            "that wrote the file, which its entry 'version' names"
        )
    with memory_for("it", 4 * sum(tensor.numel() for tensor in weights.values())):
        copied = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
    check_finite("it", copied)
    network.load_state_dict(copied, assign=True)
    return network.eval()


def _unet_class() -> Any:
    """The package's Unet. Raises InputError if it cannot be imported."""
    if find_spec("denoising_diffusion_pytorch") is None:
        raise InputError(f"its network needs the package that made it: pip install {_PACKAGE}")
    try:
        from denoising_diffusion_pytorch import Unet  # an optional dependency
    except Exception as error:  # a torchvision for another torch raises RuntimeError
        raise InputError(
            f"its network needs {_PACKAGE}, which is installed but cannot be imported ({printable(str(error)):.300}): "
            "install what is missing, and a torchvision that fits the installed torch"
        ) from error
    return Unet


# The diffusion


def _schedule(state: Mapping[str, Tensor]) -> Schedule:
    """The schedule of the tables, which the file has in float32."""
    betas, products = (state[name] if name in state else torch.empty(0) for name in ("betas", "alphas_cumprod"))
    if betas.ndim != 1 or betas.shape != products.shape or not 1 <= len(betas) <= 1_000_000:
        raise InputError(
            f"betas and alphas_cumprod have shapes {list(betas.shape)} and {list(products.shape)}; expected one number "
            "for each timestep"
        )
    betas, products = betas.double(), products.double()
    # A beta near 1 was rounded to 6e-8, which of 1 - beta may be 6e-5; the quotient of the products is exact to 1e-7.
    quotients = 1 - products / torch.cat([products.new_ones(1), products[:-1]])
    schedule = schedule_of(torch.where(betas < 0.5, betas, quotients))
    both = {"betas": (betas, schedule.betas), "alphas_cumprod": (products, schedule.alphas_cumprod)}
    for name, (found, expected) in both.items():
        if not torch.allclose(found, expected, rtol=_CLOSE, atol=0):
            raise InputError(f"its betas and alphas_cumprod contradict each other, as {name} shows: {_AGAIN}")
    return schedule


def _diffusion(
    state: Mapping[str, Tensor], schedule: Schedule, given: Mapping[str, Any], learned: bool
) -> GaussianDiffusion:
    """The diffusion, with the prediction and the weighting that the table of weights says."""
    prediction, gamma = _prediction(state.get("loss_weight"), schedule)
    asked = given.get("objective")
    if asked is not None and asked not in _OBJECTIVES:
        raise InputError(f"--objective is {asked!r:.50}; expected one of {', '.join(_OBJECTIVES)}")
    if prediction is None and asked is None:
        raise InputError("its loss_weight does not tell what the network predicts: give it, such as --objective pred_v")
    if prediction is not None and asked is not None and _OBJECTIVES[asked] != prediction:
        theirs = next(name for name, ours in _OBJECTIVES.items() if ours == prediction)
        raise InputError(f"--objective is {asked}, but its loss_weight is that of {theirs}: correct the flag")
    known = {} if gamma is None else {"min_snr_gamma": gamma}
    weighting = "min_snr" if gamma is not None else "none" if prediction in (None, "eps") else "snr"
    return GaussianDiffusion(
        schedule,
        prediction=prediction or _OBJECTIVES[str(asked)],
        variance="learned_range" if learned else "fixed_small",
        loss="hybrid" if learned else "simple",
        loss_weighting=weighting,
        **known,
    )


def _prediction(loss_weight: Tensor | None, schedule: Schedule) -> tuple[str | None, float | None]:
    """What the network predicts, and gamma if the loss is weighted by min(SNR, gamma). (None, None) if it is unclear.

    The weight of the output's error is min(SNR, gamma) divided by SNR for eps, by SNR + 1 for v and by 1 for x0.
    """
    snr = schedule.snr
    if loss_weight is None or loss_weight.shape != snr.shape:
        return None, None
    weight = loss_weight.double()
    for prediction, factor in {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}.items():
        clipped = weight * factor
        if torch.allclose(clipped, snr, rtol=_CLOSE, atol=0):
            return prediction, None
        gamma = clipped.max().item()
        if 0 < gamma < snr.max() and torch.allclose(clipped, snr.clamp(max=gamma), rtol=_CLOSE, atol=0):
            return prediction, float(f"{gamma:.4g}")
    return None, None
