"""The bound of a small trained network's weights against OpenAI's code (tests/golden/make_bits_per_dim.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_fast as df

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "bits_per_dim.npz")
IMAGES = 2  # of four: an image's noise and terms do not depend on the others


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What ours finds with a file of those weights, the flags they are loaded with, and the same noise."""
    path = tmp_path_factory.mktemp("openai") / "model.pt"
    names = [key.removeprefix("weights/") for key in GOLDEN if key.startswith("weights/")]
    state = {name: GOLDEN[f"weights/{name}"].astype(np.float32) * GOLDEN[f"scales/{name}"] for name in names}
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
    loaded = df.load_model(path, flags=str(GOLDEN["flags"]))
    images = torch.from_numpy(GOLDEN["images"])[:IMAGES]
    return loaded.diffusion.bits_per_dim(loaded.model, images, seed=int(GOLDEN["seed"]))


def test_the_network_has_learnt_something(found):
    # Eight bits are those of a model that has not: of pixels that are equally likely to have any of 256 values.
    assert found.total.max() < 5


def test_the_total_of_each_image_is_theirs(found):
    np.testing.assert_allclose(found.total.numpy(), GOLDEN["total_bpd"][:IMAGES], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.prior.numpy(), GOLDEN["prior_bpd"][:IMAGES], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("ours", "theirs"), [("terms", "vb"), ("mse_x0", "xstart_mse"), ("mse_eps", "mse")])
def test_each_term_and_error_is_theirs(found, ours, theirs):
    # Their columns begin with the last timestep.
    np.testing.assert_allclose(getattr(found, ours).numpy(), GOLDEN[theirs][:IMAGES, ::-1], rtol=1e-4, atol=1e-6)
