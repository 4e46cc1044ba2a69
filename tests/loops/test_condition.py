"""A second image beside the noised one, such as the small image that an upsampler enlarges."""

import pytest
import torch
import torch.nn.functional as F
from support.networks import random_unet

import ddpm_fast as df

DIFFUSION = df.GaussianDiffusion(df.Schedule.cosine(20), prediction="v", variance="fixed_small")


def upsampler(**changes):
    fields = {"image_size": 8, "in_channels": 2, "model_channels": 8, "channel_mult": (1, 2), "norm_groups": 4}
    return random_unet(**fields | {"condition_channels": 3} | changes)


SMALL = torch.linspace(-1, 1, 3 * 3 * 4 * 4).view(3, 3, 4, 4)


def by_hand(model, chosen=slice(None)):
    """The same network with the condition closed over, scaled to the samples' size; of the samples chosen in turn."""
    large = F.interpolate(SMALL, (8, 8), mode="bilinear")
    batches = iter([large[chosen]] * 1000) if isinstance(chosen, slice) else iter(large[part] for part in chosen)
    return lambda x, t: model(x, t, condition=next(batches))


def test_every_sample_has_its_own_and_batches_take_their_parts():
    model = upsampler()
    whole = df.sample(model, DIFFUSION, 3, steps=4, condition=SMALL)
    assert torch.equal(whole, df.sample(by_hand(model), DIFFUSION, 3, steps=4, shape=(2, 8, 8)))
    parts = [slice(0, 2)] * 4 + [slice(2, 3)] * 4
    apart = df.sample(model, DIFFUSION, 3, steps=4, condition=SMALL, batch_size=2)
    assert torch.equal(apart, df.sample(by_hand(model, parts), DIFFUSION, 3, steps=4, shape=(2, 8, 8), batch_size=2))
    torch.testing.assert_close(whole, apart, rtol=1e-4, atol=1e-5)


def test_one_for_all_and_eight_bits():
    model = upsampler()
    one = df.sample(model, DIFFUSION, 3, steps=3, condition=SMALL[:1])
    assert torch.equal(one, df.sample(model, DIFFUSION, 3, steps=3, condition=SMALL[:1].expand(3, -1, -1, -1)))
    bits = ((SMALL + 1) * 127.5).round().to(torch.uint8)
    exact = df.sample(model, DIFFUSION, 3, steps=3, condition=bits.float() / 127.5 - 1)
    torch.testing.assert_close(df.sample(model, DIFFUSION, 3, steps=3, condition=bits), exact, rtol=1e-5, atol=1e-5)


def test_guidance_and_low_precision():
    model = upsampler(num_classes=3)
    given = {"steps": 3, "labels": [0, 1, 2], "guidance": 2.0}
    found = df.sample(model, DIFFUSION, 3, condition=SMALL, **given)
    large = F.interpolate(SMALL, (8, 8), mode="bilinear")

    def twice(x, t, y):
        return model(x, t, y, condition=torch.cat([large, large]))

    assert torch.equal(found, df.sample(twice, DIFFUSION, 3, null_label=3, shape=(2, 8, 8), **given))
    low = df.sample(upsampler(num_classes=3).to(torch.bfloat16), DIFFUSION, 3, condition=SMALL, **given)
    torch.testing.assert_close(low, found, rtol=0, atol=0.2)


def test_edits_and_the_likelihood():
    model, images = upsampler(), torch.linspace(-1, 1, 384).view(3, 2, 8, 8)
    other = by_hand(model)
    for use in (df.encode, df.decode, df.image_to_image):
        assert torch.equal(
            use(model, DIFFUSION, images, steps=4, condition=SMALL), use(other, DIFFUSION, images, steps=4)
        )
    mask = torch.eye(8)
    assert torch.equal(
        df.inpaint(model, DIFFUSION, images, mask, steps=4, jump_length=2, condition=SMALL),
        df.inpaint(other, DIFFUSION, images, mask, steps=4, jump_length=2),
    )
    ways = [
        df.interpolate(model, DIFFUSION, images[0], images[1], 3, steps=3, sampler="ddim", condition=condition)
        for condition in (SMALL, SMALL[:1])
    ]
    # Between the same ends, of which the first has the same condition.
    assert not torch.equal(*ways)
    torch.testing.assert_close(ways[0][0], ways[1][0], rtol=1e-4, atol=1e-4)
    bits = DIFFUSION.bits_per_dim(model, images, steps=3, condition=SMALL).total
    assert torch.equal(bits, DIFFUSION.bits_per_dim(other, images, steps=3).total)


def test_a_replayed_loop_is_the_eager_one_and_reads_another_condition(recording):
    model = upsampler()
    for condition in (SMALL, -SMALL):
        eager = df.sample(model, DIFFUSION, 3, steps=5, condition=condition, cuda_graph=False)
        assert torch.equal(df.sample(model, DIFFUSION, 3, steps=5, condition=condition), eager)
    assert recording.captures == 1 and recording.replays == 3 + 5


@pytest.mark.parametrize(
    ("changes", "condition", "message"),
    [
        ({}, None, "needs a second image of 3 channels, such as the small image that it enlarges: give condition"),
        ({"condition_channels": 0}, SMALL, "the UNet takes no second image: leave condition out"),
        ({}, SMALL[:2], r"condition is \[2, 3, 4, 4\]; expected \[3, 3, h, w\], or one for all"),
        ({}, SMALL[:, :2], r"condition is \[3, 2, 4, 4\]"),
        ({}, SMALL[0], r"condition is \[3, 4, 4\]"),
        ({}, SMALL[..., :0], r"condition is \[3, 3, 4, 0\]"),
        ({}, SMALL.long(), "condition is torch.int64; expected a tensor of floats"),
        ({}, SMALL.numpy(), "condition is ndarray"),
        ({}, SMALL / 0, "condition has NaN or infinite values"),
    ],
)
def test_refusals(changes, condition, message):
    model = upsampler(**changes)
    with pytest.raises(df.InputError, match=message):
        df.sample(model, DIFFUSION, 3, steps=2, condition=condition)
    with pytest.raises(df.InputError, match=message):
        DIFFUSION.bits_per_dim(model, torch.zeros(3, 2, 8, 8), steps=2, condition=condition)


def test_a_function_takes_none():
    with pytest.raises(df.InputError, match="the <lambda> takes no second image"):
        df.sample(lambda x, t: x, DIFFUSION, 3, shape=(2, 8, 8), condition=SMALL)
