"""The libraries that ours is compared with: which, whether they can be used here, and how they are set up."""

import contextlib
import functools
import importlib
import importlib.util
import io
from collections.abc import Callable, Iterator

import torch
from torch import nn

DIFFUSERS = "diffusers"
LUCIDRAINS = "denoising-diffusion-pytorch"
# A peer's name, the module it is imported as, and what installs it.
MODULES = {DIFFUSERS: "diffusers", LUCIDRAINS: "denoising_diffusion_pytorch"}
EXTRAS = {DIFFUSERS: "peers", LUCIDRAINS: "all-peers"}


@functools.cache
def absent(peer: str) -> str:
    """Why a peer cannot be used here and what would install it, or the empty string."""
    module = MODULES[peer]
    if importlib.util.find_spec(module) is None:
        return f"{peer} is not installed: pip install -e '.[{EXTRAS[peer]}]'"
    try:
        importlib.import_module(module)
        if peer == DIFFUSERS:
            importlib.import_module("diffusers.models.unets.unet_2d")  # it loads its parts when they are asked for
    except Exception as error:  # whatever a library's import may raise, it is that library which is absent
        first = f"{type(error).__name__}: {str(error).strip()}".splitlines()[-1]
        hint = " (torchvision and torch must come from the same index)" if "torchvision" in str(error) else ""
        return f"{peer} is installed and cannot be imported here: {first}{hint}"
    return ""


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Inside, what a peer prints, its progress bars among it, is not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def lucidrains_diffusion(
    model: nn.Module, size: int | tuple[int, int], steps: int | None = None, learned: bool = False
) -> nn.Module:
    """denoising-diffusion-pytorch's GaussianDiffusion with the betas of Schedule.linear(1000), of a network that
    predicts the noise of images in [-1, 1]. steps: of its sample(), which is DDIM with eta 1 where they are fewer.
    learned: its LearnedGaussianDiffusion instead, with the bound's term weighed as L_hybrid has it for 1000 steps."""
    from denoising_diffusion_pytorch import GaussianDiffusion, LearnedGaussianDiffusion

    kind = functools.partial(LearnedGaussianDiffusion, vb_loss_weight=1.0) if learned else GaussianDiffusion
    options = {"objective": "pred_noise", "beta_schedule": "linear", "ddim_sampling_eta": 1.0, "auto_normalize": False}
    return kind(model, image_size=size, timesteps=1000, sampling_timesteps=steps, **options)


def lucidrains_network(size: str, channels: int) -> nn.Module:
    """denoising-diffusion-pytorch's own Unet for a size of networks.py: it cannot hold our weights. That of its README,
    which at CIFAR-10's size has as many parameters as the network of Ho et al., and smaller ones for smaller ones."""
    from denoising_diffusion_pytorch import Unet

    return Unet(channels=channels, **lucidrains_options(size))


def lucidrains_options(size: str) -> dict:
    smaller = {"digits": {"dim": 32, "dim_mults": (1, 2, 4)}, "quick": {"dim": 32, "dim_mults": (1, 2)}}
    return smaller.get(size, {"dim": 64, "dim_mults": (1, 2, 4, 8), "flash_attn": True})


def freshly_compiled(formula: Callable) -> Callable:
    """torch.compile of a formula for one case. After eight recompilations of one function dynamo gives up and runs it
    uncompiled, which would make the peer a straw man: so every case starts anew."""
    torch.compiler.reset()
    return compiled(formula)


def compiled(formula: Callable, mode: str | None = None) -> Callable:
    """torch.compile of a formula for tensors of one shape. mode: of torch.compile; where it replays CUDA graphs, each
    call may overwrite what the call before it returned."""
    made = torch.compile(formula, dynamic=False, mode=mode)
    if mode is None:
        return made

    def call(*arguments, **options):
        torch.compiler.cudagraph_mark_step_begin()
        return made(*arguments, **options)

    return call


def fastest_layout(model: nn.Module) -> nn.Module:
    """The network in the memory format in which it is fastest: on a GPU channels_last, which cuDNN computes in."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    return model.to(memory_format=torch.channels_last) if on_gpu else model
