"""Folders as diffusers saves them, made without it: a network of made-up weights and a scheduler."""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from tests.support.diffusers_configs import KINDS, SCHEDULERS
from tests.support.made_weights import made_state

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusers.npz")
HO_2020 = "as Ho et al."
WEIGHTS = "diffusion_pytorch_model"


def state_of(kind: str) -> dict[str, Tensor]:
    """The weights that the golden output was computed with, under diffusers' names."""
    return made_state(json.loads(str(GOLDEN[f"{kind}, shapes"])))


def write(folder: Path, kind: str = HO_2020, **changes: object) -> Path:
    """Makes a pipeline's folder, with changes to the fields of its network."""
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | KINDS[kind] | changes))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS["DDPM by default"]))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    save_file(state_of(kind), folder / "unet" / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    return folder
