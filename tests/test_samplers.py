"""The samplers' tables against the golden steps of the papers' code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.samplers import ddpm_table, make_table
from ddpm_fast.schedule import Schedule

GOLDEN = np.load(Path(__file__).parent / "golden" / "steps.npz")
CHAINS = sorted({name.split("/")[0] for name in GOLDEN.files})


def diffusion_of(chain, **options):
    kind, steps = chain.split("_")
    return GaussianDiffusion({"linear": Schedule.linear, "cosine": Schedule.cosine}[kind](int(steps)), **options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("chain", CHAINS)
def test_ancestral_step_equals_the_golden_p_sample(chain, variance, backend):
    def golden(name):
        return torch.from_numpy(GOLDEN[f"{chain}/{name}"])

    diffusion = diffusion_of(chain, prediction="eps", variance=variance)
    table = ddpm_table(diffusion).coefficients.float()
    expected = golden(f"epsilon/{variance}/p_sample")
    for i, t in enumerate(golden("t").tolist()):
        row = torch.tensor(diffusion.num_timesteps - 1 - t)
        # The golden step starts from q_sample, as the files' description says.
        x, output, z = (golden(name)[i : i + 1] for name in ("q_sample", "model_output", "z"))
        with ops.use_backend(backend):
            step = ops.reverse_step(x, output, table, row, z, return_x0=True)
        torch.testing.assert_close(step.x, expected[i : i + 1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.x0, golden(f"epsilon/{variance}/clip/pred_x0")[i : i + 1], rtol=1e-5, atol=1e-5)


def test_first_step_is_always_at_the_last_timestep():
    # Pitfall: "leading" spacing starts from pure noise at a step that expects less of it.
    diffusion = GaussianDiffusion(Schedule.cosine(1000))
    for steps in (1, 2, 3, 7, 50, 299, 600, 999, 1000):
        timesteps = make_table(diffusion, "ddpm", steps).timesteps
        assert timesteps[0] == 999 and len(timesteps) == steps
        assert (timesteps.diff() < 0).all()


def test_last_step_adds_no_noise():
    for variance in ("fixed_small", "fixed_large"):
        table = ddpm_table(GaussianDiffusion(Schedule.linear(100), variance=variance)).coefficients
        assert table[-1, 5] == 0 and (table[:-1, 5] > 0).all()
