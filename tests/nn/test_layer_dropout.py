"""The network's dropout: each layer has its own mask, which is that of its number and the samples; without a key it is
torch's own."""

import pytest
import torch

import ddpm_fast as df
from ddpm_fast import ops
from ddpm_fast.errors import InputError
from ddpm_fast.nn.layers import Dropout
from ddpm_fast.noise import NoiseKey
from tests.support.networks import random_unet

SHARE = 0.3
SMALL = {
    "image_size": 4, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 4,
    "attention_resolutions": (), "dropout": SHARE,
}  # fmt: skip
KEY = NoiseKey.of(3, 4, first_sample_id=2**32 - 2)
T = torch.tensor([3, 500, 999, 0])


def images(n=4):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def unet(**more: object) -> df.UNet:
    return random_unet(0.05, **(SMALL | more)).train()


def layers_of(model: df.UNet) -> list[Dropout]:
    """In the order of construction: the encoder from its first stage on, the middle, the decoder."""
    stages = [*model.encoder, model.middle, *model.decoder]
    return [module for stage in stages for module in stage.modules() if isinstance(module, Dropout)]


def seen(model: df.UNet, *arguments: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input, output) of each dropout layer in one call."""
    found, hooks = {}, []
    for i, layer in enumerate(layers_of(model)):
        hooks.append(layer.register_forward_hook(lambda _, given, made, i=i: found.update({i: (given[0], made)})))
    try:
        model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[i] for i in sorted(found)]


def test_each_layer_takes_the_mask_of_its_number():
    made = seen(unet(), images(), T, None, KEY.seed, KEY.sample_id)
    assert len(made) == 8  # two in the encoder, two in the middle, four in the decoder
    for number, (given, result) in enumerate(made):
        assert torch.equal(result, ops.dropout(given, KEY, number, SHARE)) and (result == 0).any()


def test_masks_do_not_depend_on_the_batch():
    model, x = unet(), images()
    whole = seen(model, x, T, None, KEY.seed, KEY.sample_id)
    for part in (slice(0, 1), slice(1, 4)):
        some = seen(model, x[part], T[part], None, KEY.seed, KEY.sample_id[part])
        for (_, one), (_, other) in zip(whole, some, strict=True):
            assert torch.equal(one[part] == 0, other == 0)


@pytest.mark.parametrize("pick", [lambda: (KEY.seed, KEY.sample_id), lambda: ()], ids=["a key", "no key"])
def test_torchs_generator_draws_without_a_key_alone(pick):
    model = unet()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model(images(), T, None, *pick())
    assert torch.equal(before, torch.get_rng_state()) == bool(pick())


def test_in_eval_mode_nothing_is_dropped():
    model = unet().eval()
    assert torch.equal(model(images(), T, None, KEY.seed, KEY.sample_id), model(images(), T))


def test_a_key_that_advances_in_place_gives_other_masks():
    model, ids = unet(), KEY.sample_id.clone()
    first = model(images(), T, None, KEY.seed, ids)
    ids.add_(4)
    second = model(images(), T, None, KEY.seed, ids)
    assert torch.equal(first, model(images(), T, None, KEY.seed, KEY.sample_id))
    assert torch.equal(second, model(images(), T, None, KEY.seed, KEY.sample_id + 4))
    assert not torch.equal(first, second)


def test_dropout_has_no_part_in_the_state_dict():
    assert not [name for name in df.UNet(df.UNetConfig(**SMALL)).state_dict() if "dropout" in name]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((KEY.seed, None), "seed and sample_id belong together"),
        ((None, KEY.sample_id), "seed and sample_id belong together"),
        ((KEY.seed, KEY.sample_id[:3]), "names 3 samples and the batch has 4"),
        ((KEY.seed, KEY.sample_id.to("meta")), "sample_id is on meta but its seed on cpu"),
        ((KEY.seed.int(), KEY.sample_id), "seed is torch.int32"),
    ],
    ids=["no ids", "no seed", "another batch", "another device", "int32"],
)
def test_refused(given, message):
    with pytest.raises(InputError, match=message):
        unet()(images(), T, None, *given)
