"""Makes openai.npz and openai_published.json with the code of improved-diffusion and guided-diffusion.

    PYTHONPATH=. python tests/golden/make_openai.py IMPROVED_DIFFUSION GUIDED_DIFFUSION

The arguments are checkouts of github.com/openai/improved-diffusion and github.com/openai/guided-diffusion. The networks
and diffusions are those that their scripts make of a line of flags (tests/support/openai_cases.py); weights and inputs
are made up. At the end, networks of ours that were exported are loaded into their code, which has to give our outputs.
"""

import argparse
import hashlib
import importlib
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from ddpm_fast.formats.openai.export import export_openai
from ddpm_fast.nn.unet import UNet
from tests.support.made_weights import made_state
from tests.support.openai_cases import (
    DIFFUSIONS,
    EXPORTS,
    NETWORKS,
    PUBLISHED,
    Case,
    diffusion_inputs,
    export_inputs,
    network_inputs,
    thinned,
)

HERE = Path(__file__).parent


def main() -> None:
    codes = {"improved": load("improved_diffusion", sys.argv[1]), "guided": load("guided_diffusion", sys.argv[2])}
    golden = {name: network_output(codes[case.code], case) for name, case in NETWORKS.items()}
    for name, case in DIFFUSIONS.items():
        golden |= {f"{name}/{what}": value for what, value in diffusion_numbers(codes[case.code], case).items()}
    np.savez_compressed(HERE / "openai.npz", **golden)
    published = {name: published_model(codes[case.code], case) for name, case in PUBLISHED.items()}
    (HERE / "openai_published.json").write_text(json.dumps(published, indent=1) + "\n")
    for name in EXPORTS:
        check_export(codes, name)


def load(package: str, checkout: str) -> ModuleType:
    sys.path.insert(0, checkout)
    return importlib.import_module(f"{package}.script_util")


def made(code: ModuleType, case: Case) -> tuple[torch.nn.Module, object]:
    """Their network, with weights that are made up, and their diffusion."""
    upsamples = "--large_size" in case.flags or case.upsampler
    defaults = code.sr_model_and_diffusion_defaults() if upsamples else code.model_and_diffusion_defaults()
    parser = argparse.ArgumentParser()
    code.add_dict_to_argparser(parser, defaults)
    make = code.sr_create_model_and_diffusion if upsamples else code.create_model_and_diffusion
    args, others = parser.parse_known_args(case.flags.split())
    assert others in ([], ["--use_fp16", "True"]), others  # it has no effect on a file
    kwargs = code.args_to_dict(args, defaults)
    if "use_fp16" in kwargs:
        kwargs["use_fp16"] = False
    return make(**kwargs)


def network_output(code: ModuleType, case: Case) -> np.ndarray:
    model, diffusion = made(code, case)
    model.load_state_dict(made_state({name: value.shape for name, value in model.state_dict().items()}))
    x, t, labels, condition = network_inputs(case)
    kwargs = {name: value for name, value in {"y": labels, "low_res": condition}.items() if value is not None}
    with torch.no_grad():
        output = diffusion._wrap_model(model.eval())(x, t, **kwargs)
    return thinned(output).numpy()


def diffusion_numbers(code: ModuleType, case: Case) -> dict[str, np.ndarray]:
    """The tables of their diffusion at some timesteps, the reverse step from one output, and the loss of one."""
    _, diffusion = made(code, case)
    x0, noise, output, t = diffusion_inputs(case, diffusion.num_timesteps)

    def answers(*_: object, **__: object) -> torch.Tensor:
        return output

    names = ("betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped")
    tables = {name: getattr(diffusion, name) for name in (*names, "posterior_mean_coef1", "posterior_mean_coef2")}
    numbers = {name: np.append(table[t.numpy()], table.sum()) for name, table in tables.items()}
    x_t = diffusion.q_sample(x0, t, noise=noise)
    step = diffusion.p_mean_variance(answers, x_t, t)
    numbers |= {what: step[what].numpy() for what in ("mean", "log_variance", "pred_xstart")}
    return numbers | {"loss": diffusion.training_losses(answers, x0, t, noise=noise)["loss"].numpy()}


def published_model(code: ModuleType, case: Case) -> dict[str, object]:
    """How many parameters a published network has, a digest of their names and shapes, and its diffusion."""
    with torch.device("meta"):
        model, diffusion = made(code, case)
    shapes = sorted(f"{name} {list(value.shape)}" for name, value in model.state_dict().items())
    count = sum(value.numel() for value in model.state_dict().values())
    return {
        "parameters": count,
        "shapes": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
        "timesteps": diffusion.num_timesteps,
        "betas": diffusion.betas.sum(),
        "prediction": diffusion.model_mean_type.name,
        "variance": diffusion.model_var_type.name,
        "loss": diffusion.loss_type.name,
        "rescale_timesteps": diffusion.rescale_timesteps,
    }


def check_export(codes: dict[str, ModuleType], name: str) -> None:
    """Load a network that we exported into their code, and compare its outputs with ours."""
    export = EXPORTS[name]
    model = UNet(export.config).eval()
    model.load_state_dict(made_state({key: value.shape for key, value in model.state_dict().items()}))
    with tempfile.TemporaryDirectory() as folder:
        flags = export_openai(model, export.diffusion, Path(folder) / "model.pt")
        state = torch.load(Path(folder) / "model.pt", weights_only=True)
    code = codes[export.code]
    code.NUM_CLASSES = export.config.label_rows
    theirs, diffusion = made(code, Case(export.code, flags))
    theirs.load_state_dict(state)
    x, t, labels, condition = export_inputs(export)
    kwargs = {key: value for key, value in {"y": labels, "low_res": condition}.items() if value is not None}
    with torch.no_grad():
        answer = diffusion._wrap_model(theirs.eval())(x, t, **kwargs)
        torch.testing.assert_close(answer, model(x, t, labels, condition=condition), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(diffusion.betas, export.diffusion.schedule.betas, rtol=1e-9)


if __name__ == "__main__":
    main()
