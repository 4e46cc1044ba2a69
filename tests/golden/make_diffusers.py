"""Makes diffusers.npz: outputs of diffusers' networks with made-up weights, and its schedulers' tables.

    PYTHONPATH=tests python tests/golden/make_diffusers.py     (with diffusers 0.42.1)

The networks and schedulers are those of support/diffusers_configs.py. Of each network there are the names and shapes of
its parameters, as JSON, and its output; of each scheduler every 20th alpha_bar.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from support.diffusers_configs import KINDS, SCHEDULERS, inputs
from support.made_weights import made_state

GOLDEN = Path(__file__).with_name("diffusers.npz")
STORED = (
    "as Ho et al.",
    "scale-shift, plain middle attention",
    "attention at other levels on the way up",
    "classes",
    "resampling in residual blocks",
    "not square",
)


@torch.no_grad()
def main() -> None:
    arrays = {}
    for kind in STORED:
        model = diffusers.UNet2DModel.from_config(KINDS[kind]).eval()
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        model.load_state_dict(made_state(shapes))
        x, t, labels = inputs(KINDS[kind])
        arrays[f"{kind}, shapes"] = np.array(json.dumps(shapes))
        arrays[f"{kind}, output"] = model(x, t, class_labels=labels).sample.numpy()
    for kind, fields in SCHEDULERS.items():
        chosen = {name: value for name, value in fields.items() if name != "_class_name"}
        chain = getattr(diffusers, fields["_class_name"])(**chosen)
        arrays[f"{kind}, alphas_cumprod"] = chain.alphas_cumprod[::20].double().numpy()
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
