"""Makes ho2020.npz with the code of w86763777 and pesser.

    PYTHONPATH=.:tests python tests/golden/make_ho2020.py PYTORCH_DDPM PYTORCH_DIFFUSION

The arguments are checkouts of github.com/w86763777/pytorch-ddpm and github.com/pesser/pytorch_diffusion. Of each
network the file has the names and shapes of its weights (JSON, as bytes) and what it answers; weights and inputs are
made up.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from support.ho2020_cases import DIFFUSIONS, NETWORKS, PESSER, PUBLISHED, W86763777, network_inputs, step_inputs
from support.made_weights import made_state
from torch import nn

TABLE = "time_embedding.timembedding.0.weight"


def main() -> None:
    codes = {W86763777: load(sys.argv[1], "model", "diffusion")}
    sys.path.insert(0, sys.argv[2])
    codes[PESSER] = load(f"{sys.argv[2]}/pytorch_diffusion", "model", "diffusion")
    golden = {}
    for name, case in NETWORKS.items():
        network = made(codes[case.code][0], case.options).eval()
        golden[f"{name}/shapes"] = shapes_of(network)
        with torch.no_grad():
            golden[f"{name}/output"] = network(*network_inputs(name, case)).numpy()
    for name, case in PUBLISHED.items():
        network = made(codes[case.code][0], case.options, weights=False)
        golden[f"{name}/shapes"] = shapes_of(network)
        golden[f"{name}/parameters"] = sum(p.numel() for n, p in network.named_parameters() if n != TABLE)
    for name, case in DIFFUSIONS.items():
        steps = w86763777_steps if case.code == W86763777 else pesser_steps
        golden[f"{name}/mean"], golden[f"{name}/log_variance"] = steps(codes[case.code][1], case.options)
    np.savez_compressed(Path(__file__).parent / "ho2020.npz", **golden)


def load(folder: str, *names: str) -> list[ModuleType]:
    modules = []
    for name in names:
        spec = importlib.util.spec_from_file_location(f"peer_{abs(hash(folder))}_{name}", f"{folder}/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules.append(module)
    return modules


def made(code: ModuleType, options: dict, weights: bool = True) -> nn.Module:
    network = (code.UNet if hasattr(code, "UNet") else code.Model)(**options)
    if weights:
        state = network.state_dict()
        shapes = {name: tensor.shape for name, tensor in state.items() if name != TABLE}
        network.load_state_dict({**state, **made_state(shapes)})
    return network


def shapes_of(network: nn.Module) -> np.ndarray:
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    return np.frombuffer(json.dumps(shapes).encode(), np.uint8)


def w86763777_steps(code: ModuleType, options: dict) -> tuple[np.ndarray, np.ndarray]:
    x_t, t, eps = step_inputs()
    sampler = code.GaussianDiffusionSampler(lambda x, t: eps, mean_type="epsilon", **options)
    mean, log_variance = sampler.p_mean_variance(x_t, t)
    return mean.numpy(), log_variance.expand(x_t.shape).numpy()


def pesser_steps(code: ModuleType, options: dict) -> tuple[np.ndarray, np.ndarray]:
    x_t, t, eps = step_inputs()
    diffusion = object.__new__(code.Diffusion)
    diffusion.init_diffusion_parameters(**options)
    tables = (
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    )
    kept = {name: getattr(diffusion, name) for name in tables}
    with mock.patch.object(torch, "randn_like", torch.zeros_like):
        mean = code.denoising_step(x_t, t, model=lambda x, t: eps, logvar=diffusion.logvar, **kept)
    return mean.numpy(), code.extract(diffusion.logvar, t, x_t.shape).expand(x_t.shape).numpy()


if __name__ == "__main__":
    main()
