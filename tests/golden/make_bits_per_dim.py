"""Makes bits_per_dim.npz: a small network, trained here by this package, and the bound that OpenAI's code finds.

    PYTHONPATH=. python tests/golden/make_bits_per_dim.py GUIDED_DIFFUSION IMPROVED_DIFFUSION

The arguments are checkouts of github.com/openai/guided-diffusion and github.com/openai/improved-diffusion. The network
is trained for half a minute on the emoji set at 16x16 and written as a file for their code. Its weights are rounded to
8 bits, so that they take little room. Their networks and diffusions get those, four images that were not trained on,
and noise that this package generates; the test gives ours the same.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.formats.openai.export import export_openai
from ddpm_fast.noise import NoiseKey, Stream, normals

HERE = Path(__file__).parent
TIMESTEPS, IMAGES, SEED, STEPS = 100, 4, 7, 400
CONFIG = df.UNetConfig(
    image_size=16,
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    scale_shift=True,
    learned_variance=True,
)


def main() -> None:
    guided, improved = (
        load(name, checkout)
        for name, checkout in zip(("guided_diffusion", "improved_diffusion"), sys.argv[1:], strict=True)
    )
    images = small_emoji()
    flags, state = trained(images[IMAGES:])
    packed = {name: rounded(value) for name, value in state.items()}
    state = {name: unpacked(*pair) for name, pair in packed.items()}
    held_out = images[:IMAGES]
    model, diffusion = made(guided, flags, state)
    found = bound(diffusion, model, held_out)
    # The other code's loop, with the same network, gives the same.
    for name, value in bound(diffusion_of_improved(improved), model, held_out).items():
        torch.testing.assert_close(value, found[name], rtol=1e-5, atol=1e-6)
    print({name: value.mean().item() for name, value in found.items()}, "bits/dim of each image:", found["total_bpd"])
    arrays: dict[str, np.ndarray] = {f"weights/{name}": codes for name, (codes, _) in packed.items()}
    arrays |= {f"scales/{name}": scale for name, (_, scale) in packed.items()}
    arrays |= {name: value.numpy() for name, value in found.items()}
    arrays |= {"images": held_out.numpy(), "flags": np.array(flags), "seed": np.array(SEED)}
    np.savez_compressed(HERE / "bits_per_dim.npz", **arrays)


def load(package: str, checkout: str) -> ModuleType:
    sys.path.insert(0, checkout)
    return importlib.import_module(f"{package}.script_util")


def small_emoji() -> Tensor:
    """uint8 [N, 3, 16, 16], in an order that mixes the classes."""
    images = df.load_dataset("emoji32").images
    halved = torch.nn.functional.avg_pool2d(images.float(), 2).round().to(torch.uint8)
    return halved[torch.randperm(len(halved), generator=torch.Generator().manual_seed(0))]


def trained(images: Tensor) -> tuple[str, dict[str, Tensor]]:
    """A trained network of ours under their names, and its flags."""
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(TIMESTEPS), variance="learned_range", loss="hybrid")
    config = df.TrainConfig(batch_size=32, lr=2e-3, warmup=50, ema_decay=0.98, timestep_sampling="uniform")
    trainer = df.Trainer(CONFIG, diffusion, config, Dataset(images, None, None, "emoji16"))
    for _ in range(STEPS):
        loss, _ = trainer.train_step()
    print("loss of the last training step:", float(loss))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        return export_openai(trainer.averaged_model(), diffusion, path), torch.load(path, weights_only=True)


def rounded(value: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and a scale, of which the weight is the product."""
    largest = float(value.abs().max())
    scale = np.float32(max(float(value.std()) / 12, largest / 127, 1e-30))
    return (value.numpy() / scale).round().astype(np.int8), scale


def unpacked(codes: np.ndarray, scale: np.ndarray) -> Tensor:
    return torch.from_numpy(codes.astype(np.float32) * scale)


def made(code: ModuleType, flags: str, state: dict[str, Tensor]) -> tuple[torch.nn.Module, object]:
    defaults = code.model_and_diffusion_defaults()
    parser = argparse.ArgumentParser()
    code.add_dict_to_argparser(parser, defaults)
    args = parser.parse_args(flags.split())
    model, diffusion = code.create_model_and_diffusion(**code.args_to_dict(args, defaults))
    model.load_state_dict(state)
    return model.eval(), diffusion


def diffusion_of_improved(code: ModuleType) -> object:
    return code.create_gaussian_diffusion(
        steps=TIMESTEPS, learn_sigma=True, noise_schedule="cosine", rescale_timesteps=False
    )


def bound(diffusion: object, model: torch.nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What their calc_bpd_loop finds; where it draws noise for a timestep, from the last to the first, it gets ours."""
    x0 = images.float() / 127.5 - 1
    steps = iter(reversed(range(TIMESTEPS)))

    def noise_like(x: Tensor) -> Tensor:
        key = NoiseKey.of(SEED, len(x), step=next(steps), stream=Stream.EVALUATION)
        return normals(key, x[0].numel()).view_as(x)

    with mock.patch.object(torch, "randn_like", noise_like):
        return diffusion.calc_bpd_loop(model, x0)


if __name__ == "__main__":
    main()
