"""Other people's networks are called in their own way, and what they answer is checked before it is used."""

import functools
import types

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.nn import Foreign, UNet


class Diffusers(torch.nn.Module):
    """What UNet2DModel looks like from outside: a mapping for a config, class_labels, an object for an answer."""

    def __init__(self, **changes):
        super().__init__()
        self.config = {
            "sample_size": 8,
            "in_channels": 2,
            "out_channels": 4,
            "num_class_embeds": None,
            "class_embed_type": None,
            "block_out_channels": (4, 8, 8),
            **changes,
        }
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        answer = self.scale * torch.cat([sample, sample + timestep.view(-1, 1, 1, 1)], dim=1)
        if class_labels is not None:
            answer = answer + class_labels.view(-1, 1, 1, 1)
        return types.SimpleNamespace(sample=answer) if return_dict else (answer,)


X, T = torch.arange(256.0).view(2, 2, 8, 8), torch.tensor([3, 5])


def test_a_config_of_diffusers_says_everything():
    found = Foreign(Diffusers(sample_size=[8, 16], num_class_embeds=10))
    assert (found.shape, found.out_channels, found.classes, found.divisor) == ((2, 8, 16), 4, 10, 4)
    assert found.takes_labels and found.needs_labels
    plain = Foreign(Diffusers())
    assert (plain.shape, plain.classes, plain.takes_labels, plain.needs_labels) == ((2, 8, 8), 0, False, False)
    assert Foreign(Diffusers(sample_size=None)).shape is None
    numbers = Foreign(Diffusers(class_embed_type="timestep"))
    assert numbers.classes is None and numbers.takes_labels and numbers.needs_labels
    assert Foreign(Diffusers(), shape=(2, 16, 16), classes=3).shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": 768}, "needs more than an image and a timestep"),
        ({"class_embed_type": "identity"}, "class_embed_type of the Diffusers is 'identity'"),
        ({"in_channels": 0}, "in_channels is 0; expected an integer in 1"),
        ({"sample_size": (8, "8")}, r"shape\[2\] is '8'"),
        ({"num_class_embeds": 2**40}, "num_class_embeds is 1099511627776"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Foreign(Diffusers(**changes))


def test_the_output_object_and_the_labels_by_name():
    network = Diffusers()
    expected = torch.cat([2 * X, 2 * (X + T.view(-1, 1, 1, 1))], dim=1)
    assert torch.equal(Foreign(network)(X, T), expected)
    assert torch.equal(
        Foreign(network)(X, T, torch.tensor([1, 0])), expected + torch.tensor([1.0, 0]).view(-1, 1, 1, 1)
    )


def test_a_parameter_called_class_labels_is_given_the_labels_by_name():
    def network(x, t, mask=None, *, class_labels=None):
        assert mask is None
        return x + class_labels.view(-1, 1, 1, 1)

    assert torch.equal(Foreign(network)(X, T, torch.tensor([1, 1])), X + 1)


MODULE = Diffusers().to(torch.float64)


def names_a_global(x, t):
    return MODULE(x, t).sample


@pytest.mark.parametrize(
    "make",
    [
        lambda module: functools.partial(module, return_dict=True),
        lambda module: module.forward,
        lambda module: lambda x, t: module(x, t).sample,
        lambda module: functools.wraps(names_a_global)(lambda *given: names_a_global(*given)),
        lambda module: functools.partial(lambda x, t, inner: inner(x, t), inner=module),
    ],
    ids=["partial", "method", "closure", "wrapped", "keyword"],
)
def test_the_modules_that_a_function_names_are_part_of_it(make):
    foreign = Foreign(make(MODULE))
    assert [parameter is MODULE.scale for parameter in foreign.parameters()] == [True]
    assert not list(foreign.buffers())
    MODULE.eval()
    foreign.train()
    assert MODULE.training


def test_a_function_without_modules_goes_where_it_is_sent():
    foreign = Foreign(torch.add).to("meta")
    assert [buffer.device.type for buffer in foreign.buffers()] == ["meta"]
    assert not foreign.state_dict()


@pytest.mark.parametrize(
    ("network", "takes", "needs"),
    [
        (lambda x, t: x, False, False),
        (lambda x, t, y: x, True, True),
        (lambda x, t, y=None: x, True, False),
        (lambda *given: given[0], True, False),
        (torch.add, True, False),
    ],
)
def test_a_function_says_whether_it_takes_labels(network, takes, needs):
    foreign = Foreign(network)
    assert (foreign.takes_labels, foreign.needs_labels) == (takes, needs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("model.pt", "the model is a str; expected a torch.nn.Module or a function"),
        (UNet, "the model is the class UNet; expected"),
        (types.SimpleNamespace(model=MODULE), r"the model is a SimpleNamespace; expected .*: give its \.model"),
        (types.SimpleNamespace(unet=MODULE, scheduler=1), r"expected .*: give its \.unet"),
        (None, "the model is a NoneType"),
    ],
    ids=str,
)
def test_what_is_no_network_is_refused(model, message):
    with pytest.raises(InputError, match=message):
        Foreign(model)


def test_a_pipeline_is_refused_though_it_can_be_called():
    class Pipeline:
        unet = scheduler = None

        def __call__(self, batch_size, generator):
            raise AssertionError

    with pytest.raises(InputError, match=r"a Pipeline, a whole pipeline; expected .*: give its \.unet"):
        Foreign(Pipeline())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: None, "answered with None; expected a tensor of floats"),
        (lambda x: (x,), r"answered with a tuple; .* model\(x, t\)\[0\]"),
        (lambda x: {"out": x}, r"answered with a dict; .* model\(x, t\)\['out'\]"),
        (lambda x: x.numpy(), "answered with a ndarray"),
        (lambda x: np.float32(1), "answered with a float32"),
        (lambda x: torch.distributions.Normal(x, 1), "answered with a Normal"),
        (lambda x: x.long(), "answered with torch.int64"),
        (lambda x: x.to(torch.complex64), "answered with torch.complex64"),
        (lambda x: x.to_sparse(), "answered with torch.float32, torch.sparse_coo"),
        (lambda x: x[:1], r"answered \[2, 2, 8, 8\] with \[1, 2, 8, 8\]; expected floats \[2, C, 8, 8\]"),
        (lambda x: x[..., :7], r"with \[2, 2, 8, 7\]"),
        (lambda x: x.sum(), r"with \[\]"),
        (lambda x: x.flatten(2), r"with \[2, 2, 64\]"),
        (lambda x: x.to("meta"), "answered on meta; expected floats .* on cpu"),
    ],
)
def test_an_answer_of_another_kind_is_refused_by_name(answer, message):
    def network(x, t):
        return answer(x)

    with pytest.raises(InputError, match=f"the network .*{message}"):
        Foreign(network)(X, T)
