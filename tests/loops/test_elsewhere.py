"""On a device for which the package has no kernels, and which has no float64, plain torch does what the CPU does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json
import traceback
from support.pretended_device import pretended  # before the package
import torch
import ddpm_fast as df
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.wide import wide

config = df.UNetConfig(
    image_size=8, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, num_heads=2,
    attention_resolutions=(4,), num_classes=2, in_channels=1, learned_variance=True, dropout=0.1
)


def network(seed=0):
    torch.manual_seed(seed)
    made = df.UNet(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


diffusion = df.GaussianDiffusion(df.Schedule.cosine(50), prediction="v", variance="learned_range", loss="hybrid")
images = (torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
data = Dataset(images, torch.arange(32) % 2, ["even", "odd"], "noise")


def sampled(device, **keywords):
    return [df.sample(network().to(device), diffusion, 3, steps=4, labels=[0, 1, 1], seed=3, **keywords).cpu()]


def trained(device, **settings):
    settings = df.TrainConfig(batch_size=4, warmup=2, label_drop=0.3, **settings)
    trainer = df.Trainer(config, diffusion, settings, data, device)
    losses = [trainer.train_step()[0] for _ in range(3)]
    return [torch.stack(losses).cpu(), *(weight.detach().cpu() for weight in trainer.model.parameters())]


CASES = {
    "the steps of Ho et al.": lambda device: sampled(device, sampler="ddpm"),
    "DDIM": lambda device: sampled(device, sampler="ddim", eta=0.5),
    "DPM-Solver++ with guidance": lambda device: sampled(device, sampler="dpmpp_2m", guidance=2.0),
    "dynamic thresholding": lambda device: sampled(device, dynamic_threshold=0.9),
    "training": lambda device: trained(device, average_widths=(0.1,)),
    "timesteps by their losses": lambda device: trained(device, timestep_sampling="loss_second_moment"),
}
REFUSED = {
    "float64": lambda device: torch.ones(2, device=device).double(),
    "a mixture": lambda device: torch.ones(2, device=device) + torch.ones(2),
}
with pretended() as device:
    network().to(device)
    print(json.dumps({"wide": str(wide(device))}))
    for name, case in (CASES | REFUSED).items():
        try:
            ours = case(device)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps({name: f"{type(error).__name__}: {error}"[:300]}))
            continue
        theirs = case(torch.device("cpu"))
        print(json.dumps({name: max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))}))
"""


@pytest.fixture(scope="module")
def found():
    """What the script printed: for each case the largest difference from the CPU, or the error."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot pretend a device")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: value for line in lines for name, value in line.items()} | {"stderr": done.stderr}


def test_the_device_has_no_float64(found):
    assert found["wide"] == "torch.float32"


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        # The square root of a normal's radius is off by one unit in the last place at most.
        ("the steps of Ho et al.", 1e-6),
        ("DDIM", 1e-6),
        ("DPM-Solver++ with guidance", 2e-6),
        ("dynamic thresholding", 1e-6),
        # Adam divides by the root of a gradient's square, which makes much of a small difference.
        ("training", 1e-4),
        ("timesteps by their losses", 1e-4),
    ],
)
def test_it_computes_what_the_cpu_does(found, case, tolerance):
    assert not isinstance(found[case], str), f"{found[case]}\n{found['stderr']}"
    assert found[case] <= tolerance


def test_the_pretended_device_refuses_what_it_should(found):
    """The test of the tests: with float64 on the device, a case would have failed."""
    assert found["float64"].startswith("TypeError: pretended has no torch.float64")
    assert "beside one on pretended" in found["a mixture"]
