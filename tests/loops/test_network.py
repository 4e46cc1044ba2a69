"""What the loops need to know of a network: its device and dtype, its mode, and its labels."""

import pytest
import torch
from support.networks import random_unet

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops.editing import decode, encode, image_to_image, inpaint, interpolate
from ddpm_fast.loops.likelihood import bits_per_dim
from ddpm_fast.loops.network import Network, evaluating
from ddpm_fast.loops.sampling import sample
from ddpm_fast.schedule import Schedule


class Normalised(torch.nn.Module):
    """A network in training with one part frozen."""

    def __init__(self):
        super().__init__()
        self.frozen, self.live = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
        self.train()
        self.frozen.eval()

    def forward(self, x, t):
        return self.live(self.frozen(x))


@pytest.mark.parametrize(
    "use",
    [
        lambda model, diffusion: sample(model, diffusion, 4, shape=(3,)),
        lambda model, diffusion: bits_per_dim(diffusion, model, torch.zeros(4, 3)),
    ],
    ids=["sample", "bits_per_dim"],
)
def test_every_module_gets_its_mode_back(use):
    model = Normalised()
    before = model.live.running_mean.clone()
    use(model, GaussianDiffusion(Schedule.cosine(3), "v"))
    assert model.training and model.live.training and not model.frozen.training
    assert torch.equal(model.live.running_mean, before), "statistics were gathered while sampling"


def test_modes_come_back_after_an_error():
    model = Normalised()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.live.training
        raise KeyError
    assert model.live.training and not model.frozen.training


def test_a_unet_answers_everything():
    model = random_unet(
        image_size=8,
        in_channels=2,
        model_channels=8,
        channel_mult=(1, 2),
        num_classes=3,
        norm_groups=4,
        learned_variance=True,
    )
    found = Network.of(model.to(torch.bfloat16))
    assert found.model is model
    assert (found.device, found.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert (found.shape, found.in_channels, found.out_channels) == ((2, 8, 8), 2, 4)
    assert (found.classes, found.may_wait) == (3, False)


def test_a_network_of_ones_own_does_not_say_its_shape_or_classes():
    found = Network.of(torch.nn.Linear(2, 2).to(torch.bfloat16))
    assert (found.device, found.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert found.shape is found.in_channels is found.out_channels is found.classes is None and found.may_wait
    assert Network.of(torch.nn.Identity()).dtype is None
    with pytest.raises(InputError, match=r"the model is a str; expected a torch\.nn\.Module or a function"):
        Network.of("mnist")


@pytest.mark.parametrize("labels", [3, [3, 3], torch.tensor([3, 3]), torch.tensor(3)], ids=str)
def test_labels_are_one_or_one_each(labels):
    assert Network.of(torch.nn.Identity()).check_labels(labels, 2).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.7, 0.0], "labels are torch.float32; expected integers"),
        ([True, False], "labels are torch.bool; expected integers"),
        ("abc", "labels are 'abc'; expected one class, or 2"),
        ([None, 1], "expected one class, or 2, one for each sample"),
        ([0, 1, 2], "expected one class, or 2, one for each sample"),
    ],
    ids=str,
)
def test_labels_that_are_none(labels, message):
    with pytest.raises(InputError, match=message):
        Network.of(torch.nn.Identity()).check_labels(labels, 2)


def test_no_labels():
    assert Network.of(torch.nn.Identity()).check_labels(None, 2) is None
    assert Network.of(torch.nn.Identity()).check_labels([], 0).shape == (0,)


@pytest.mark.parametrize("shape", [(), 3, "22"])
def test_what_is_no_shape_is_refused(shape):
    with pytest.raises(InputError, match="expected that of one sample"):
        Network.of(torch.nn.Linear(1, 1)).sample_shape(shape)


# ---- sizes ----


class Wrapped(torch.nn.Module):
    """A network as one of one's own, which is given any shape without a question."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x, t)


SMALL = {"in_channels": 2, "model_channels": 8, "channel_mult": (1, 2, 2), "norm_groups": 4}
PICTURES = torch.randint(0, 256, (3, 2, 12, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
MASK = torch.rand(12, 20, generator=torch.Generator().manual_seed(2)) < 0.5


@pytest.mark.parametrize(
    "use",
    [
        lambda m, d: sample(m, d, 3, shape=(2, 12, 20), steps=3),
        lambda m, d: image_to_image(m, d, PICTURES, 0.5, steps=4),
        lambda m, d: inpaint(m, d, PICTURES, MASK, steps=4, resamplings=2, jump_length=2),
        lambda m, d: interpolate(m, d, PICTURES[0], PICTURES[1], 3, steps=4),
        lambda m, d: decode(m, d, encode(m, d, PICTURES, steps=3), steps=3),
        lambda m, d: bits_per_dim(d, m, PICTURES, steps=3).total,
    ],
    ids=["sample", "image_to_image", "inpaint", "interpolate", "encode and decode", "bits_per_dim"],
)
def test_a_unet_takes_images_of_other_sizes_than_it_was_made_for(use):
    diffusion = GaussianDiffusion(Schedule.cosine(20), "v")
    found = use(random_unet(image_size=8, **SMALL), diffusion)
    assert torch.equal(found, use(Wrapped(random_unet(image_size=(12, 20), **SMALL)), diffusion))
    if found.ndim == 4:
        assert found.shape[1:] == (2, 12, 20)
