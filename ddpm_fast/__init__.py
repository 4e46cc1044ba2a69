"""ddpm_fast: train denoising diffusion models and sample from them, at the speed of the hardware.

    import ddpm_fast as df
    loaded = df.load_model("mnist")
    images = df.sample(loaded.model, loaded.diffusion, 64, steps=50, seed=0, labels=7)

The fused ops for a training or sampling loop of your own are in df.ops: q_sample, diffusion_loss, reverse_step, normal
and others.

The public names are in public.py. They come from there when one of them is first used, because that imports torch,
which takes seconds, and a list of the commands or a completion by the shell must not.
"""

__version__ = "0.2.0"

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import ddpm_fast.starting as _starting  # noqa: F401  # first, because the other imports take seconds

if TYPE_CHECKING:
    from ddpm_fast.public import *  # noqa: F403

_DOOR = "sample"  # this name is a function, and also that of a command's module


def __getattr__(name: str) -> Any:
    """A public name or a module of the package, when it is first used."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # A module is imported alone, because the modules of the package ask for each other so.
    if name != _DOOR and find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    public = importlib.import_module("ddpm_fast.public")
    names = {"__all__": public.__all__} | {each: getattr(public, each) for each in public.__all__}
    globals().update(names)
    if name not in names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return names[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("ddpm_fast.public").__all__})
