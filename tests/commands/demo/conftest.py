"""What the tests of the page share: a small model, and what all visitors of a page share."""

import pytest
import torch
from support.commands import save_small_model

from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.models import Models
from ddpm_fast.commands.demo.runs import Runs


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The file of a model of 8x8 images in colour, with three classes and 20 timesteps."""
    return save_small_model(tmp_path_factory.mktemp("model") / "small.safetensors", names=["cat", "dog", "hen"])


@pytest.fixture(scope="session")
def models(small):
    return Models([str(small)], torch.device("cpu"))


@pytest.fixture
def desk(models):
    return Desk(models, Runs([]), torch.device("cpu"))


@pytest.fixture
def values(models):
    """The fields of the tab Sample, filled in."""
    return {
        "model": models.names[0],
        "labels": "",
        "sampler": "ddpm",
        "steps": 4,
        "eta": 0,
        "guidance": 1,
        "seed": 3,
        "n": 4,
        "view": "x0",
    }
