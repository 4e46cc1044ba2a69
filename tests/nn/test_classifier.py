"""The classifier of noised images: its sizes, refusals and precisions. Its numbers are compared with guided-diffusion's
own code in formats/test_openai_classifier.py."""

import pytest
import torch
from support.networks import random_classifier

from ddpm_fast.errors import InputError
from ddpm_fast.nn import ClassifierConfig, UNetConfig
from ddpm_fast.nn.classifier import POOLS

FIELDS = {"image_size": 8, "in_channels": 2, "model_channels": 8, "channel_mult": (1, 2), "norm_groups": 4}
X, T = torch.linspace(-1, 1, 512).view(4, 2, 8, 8), torch.tensor([0, 1, 500, 999])


@pytest.mark.parametrize("pool", POOLS)
def test_each_sample_has_its_own_logits_in_every_precision(pool):
    classifier = random_classifier(pool, **FIELDS)
    logits = classifier(X, T)
    assert logits.shape == (4, 3)
    for i in range(4):
        torch.testing.assert_close(classifier(X[i : i + 1], T[i : i + 1]), logits[i : i + 1], rtol=1e-4, atol=1e-5)
    exact = classifier.double()(X.double(), T)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-5)
    rough = classifier.to(torch.bfloat16)(X, T)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.double(), exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("pool", POOLS)
def test_the_gradient_is_the_difference_quotients(pool):
    classifier = random_classifier(pool, **FIELDS, attention_resolutions=(4,)).double()
    x = X[:1].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: classifier(x, T[2:3]).log_softmax(1)[:, 1], x, fast_mode=True)


def test_other_sizes_but_for_positions():
    large = torch.zeros(1, 2, 12, 16)
    for pool in POOLS:
        classifier = random_classifier(pool, **FIELDS)
        if pool == "attention":
            with pytest.raises(
                InputError, match=r"is given torch.float32 \[1, 2, 12, 16\]; expected floats \[N, 2, 8, 8\]"
            ):
                classifier(large, T[:1])
        else:
            assert classifier(large, T[:1]).shape == (1, 3)
    assert random_classifier(**FIELDS | {"image_size": (8, 12)})(torch.zeros(1, 2, 8, 12), T[:1]).shape == (1, 3)


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (X[:, :1], T, r"\[4, 1, 8, 8\]; expected floats \[N, 2, H, W\]"),
        (X.long(), T, "is given torch.int64"),
        (X[0], T, r"\[2, 8, 8\]"),
        (X[..., :7], T, "cannot be halved"),
        (X, T[:2], r"t is torch.int64 \[2\]; expected one timestep for each sample, \[4\]"),
        (X, T.bool(), "t is torch.bool"),
    ],
)
def test_refusals(x, t, message):
    with pytest.raises(InputError, match=message):
        random_classifier("adaptive", **FIELDS)(x, t)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool": "max"}, "pool is 'max'; expected one of adaptive, attention, spatial, spatial_v2"),
        ({"num_classes": 0}, "num_classes is 0; expected an integer in 1"),
        ({"num_classes": 2.0}, "num_classes is 2.0"),
        ({"unet": {}}, "unet is a dict; expected a UNetConfig"),
        ({"unet": UNetConfig(num_classes=3)}, "the classifier's U-Net has num_classes 3; expected 0"),
        ({"unet": UNetConfig(condition_channels=3)}, "has condition_channels 3; expected 0"),
        ({"unet": UNetConfig(augment_channels=9)}, "has augment_channels 9; expected 0"),
        (
            {"unet": UNetConfig(norm_groups=3, model_channels=96), "pool": "spatial_v2"},
            "expected a divisor of the 2048",
        ),
        (
            {"unet": UNetConfig(middle_attention="none", attention_resolutions=(), num_heads=3)},
            "the last level has 256 channels, not divisible by num_heads 3: the pool attends there",
        ),
    ],
)
def test_configs_that_make_no_classifier(fields, message):
    with pytest.raises(InputError, match=message):
        ClassifierConfig(**fields)


def test_a_config_comes_back_from_its_dict():
    config = ClassifierConfig(UNetConfig(**FIELDS, scale_shift=True, attention_resolutions=(4,)), 7, "spatial")
    assert ClassifierConfig.from_dict(config.to_dict()) == config
