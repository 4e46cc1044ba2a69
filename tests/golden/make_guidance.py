"""Makes guidance.npz: what guided-diffusion's own code says of small classifiers, of the published ones, and of chains
that a classifier guides.

    PYTHONPATH=. python tests/golden/make_guidance.py CHECKOUT

CHECKOUT is a checkout of https://github.com/openai/guided-diffusion.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from ddpm_fast.formats.flags import parse_flags
from ddpm_fast.formats.openai.flags import KNOWN
from tests.support.classifier_cases import (
    CHAINS,
    CHANNELS,
    CLASSES,
    CLASSIFIERS,
    LABELS,
    PUBLISHED,
    SIZE,
    STEPS,
    Chain,
    Images,
    N,
    Network,
    T,
    chain_noise,
    classifier_inputs,
    shapes_of,
    thinned,
)
from tests.support.made_weights import made_state


def classifier(flags):
    from guided_diffusion import script_util

    known = script_util.classifier_defaults()
    given = {name: value for name, value in parse_flags(flags, KNOWN, "theirs").items() if name in known}
    return script_util.create_classifier(**known | given | {"classifier_use_fp16": False})


def chain(name: str, case: Chain) -> torch.Tensor:
    """The images of a chain, by their loops, with our normals."""
    from guided_diffusion import gaussian_diffusion, script_util

    diffusion = script_util.create_gaussian_diffusion(
        steps=T,
        learn_sigma=case.learned,
        sigma_small=case.small,
        noise_schedule="linear",
        rescale_timesteps=case.rescale,
        timestep_respacing=str(STEPS),
    )
    network, judge = Images(case.learned), Network(CLASSES, seed=2)
    labels = torch.tensor(LABELS)

    def gradient(x, t, **_):
        with torch.enable_grad():
            given = x.detach().requires_grad_(True)
            chosen = torch.log_softmax(judge(given, t), dim=-1)[range(N), labels]
            return torch.autograd.grad(chosen.sum(), given)[0] * case.scale

    first, *rest = chain_noise(name)
    normals = iter(rest)
    gaussian_diffusion.th.randn_like = lambda x: next(normals)
    options = {"noise": first, "clip_denoised": case.clip, "cond_fn": gradient, "model_kwargs": {}}
    shape, device = (N, CHANNELS, SIZE, SIZE), torch.device("cpu")
    call = lambda x, t: network(x, t)  # noqa: E731  # their wrapper wants a function of keywords
    if case.ddim:
        return diffusion.ddim_sample_loop(call, shape, eta=case.eta, device=device, **options)
    return diffusion.p_sample_loop(call, shape, device=device, **options)


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    found = {}
    for name, flags in CLASSIFIERS.items():
        network = classifier(flags).eval()
        network.load_state_dict(made_state(shapes_of(network)))
        found[f"shapes of {name}"] = np.array(json.dumps(shapes_of(network)))
        x, t = classifier_inputs(name)
        x.requires_grad_(True)
        logits = network(x, t)
        (gradient,) = torch.autograd.grad(torch.log_softmax(logits, 1)[:, 7].sum(), x)
        found[f"logits of {name}"] = thinned(logits.detach()).numpy()
        found[f"gradient of {name}"] = thinned(gradient).numpy()
    for size, flags in PUBLISHED.items():
        with torch.device("meta"):
            network = classifier(flags)
        found[f"parameters of {size}"] = np.array(sum(value.numel() for value in network.parameters()))
    randn_like = torch.randn_like
    for name, case in CHAINS.items():
        found[name] = chain(name, case).detach().numpy()
        torch.randn_like = randn_like
    np.savez_compressed(Path(__file__).parent / "guidance.npz", **found)


if __name__ == "__main__":
    main()
