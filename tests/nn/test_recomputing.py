"""A network whose stages the backward computes again has the gradients of one that keeps all, bit for bit, and keeps
less."""

import contextlib
import threading
from collections.abc import Iterable

import pytest
import torch
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.nn.layers import Embedding, ResBlock
from ddpm_fast.nn.recomputing import recomputed
from ddpm_fast.nn.unet import Stage
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import use_backend
from tests.nn import test_pending
from tests.nn.test_pending import CONFIGS, batch, fused

KEY = NoiseKey.of(1, 3)
KEYS = {"keyed dropout": (KEY.seed, KEY.sample_id), "torch's dropout": ()}


def network(name, **more):
    return test_pending.network(name, **more).train()


def gradients(model, recompute, key=KEYS["keyed dropout"], autocast=False, around=contextlib.nullcontext, weights=None):
    """The output, and the gradients of the images and of the weights. The backward runs outside of `around`."""
    model.recompute = recompute
    x, t, labels = batch(model)
    x.requires_grad_()
    torch.manual_seed(0)
    leaves = list((weights or dict(model.named_parameters())).values())
    with around(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        arguments = (x, t, labels, *key)
        output = model(*arguments) if weights is None else functional_call(model, weights, arguments)
    loss = output.float().square().sum()
    return [output, *torch.autograd.grad(loss, [x, *leaves])]


def assert_same(found, expected):
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), i


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("taken", [fused, contextlib.nullcontext], ids=["a GPU's path", "a CPU's path"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.pairwise
def test_the_gradients_are_the_same_bits(name, taken, autocast, key):
    model = network(name, dropout=0.3)
    with taken():
        expected, found = (gradients(model, recompute, KEYS[key], autocast) for recompute in (False, True))
    assert_same(found, expected)


def test_on_the_backend_of_the_forward():
    model = network("as Ho et al.", dropout=0.3)

    def reference():
        return use_backend("reference")

    expected, found = (gradients(model, recompute, around=reference) for recompute in (False, True))
    assert_same(found, expected)
    assert not torch.equal(found[1], gradients(model, True)[1])  # the kernels' bits are others


def test_with_hooks_and_a_backward_in_another_thread():
    """A hook is given whole images, also the second time, in a thread that knows nothing of the first."""
    model, seen = network("as Nichol and Dhariwal", dropout=0.3), []
    model.middle[0].register_forward_hook(lambda _, given, made: seen.append((type(given[0]), type(made))))
    x, t, labels = batch(model)
    found = []
    for model.recompute in (False, True):
        model.zero_grad()
        loss = model(x, t, labels, *KEYS["keyed dropout"]).square().sum()
        # Both in a thread, which may have another number of OpenMP's, and with that other sums.
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        found.append([p.grad.clone() for p in model.parameters()])
    assert_same(found[1], found[0])
    assert seen == [(torch.Tensor, torch.Tensor)] * 3


def test_with_weights_that_are_in_the_module_during_the_forward_alone():
    model = network("resampling residual blocks", dropout=0.3)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: (p.detach() + 0.1 * torch.randn(p.shape, generator=generator)).requires_grad_()
        for name, p in model.named_parameters()
    }
    expected, found = (gradients(model, recompute, weights=weights) for recompute in (False, True))
    assert_same(found, expected)


def test_without_gradients_nothing_is_called_twice(monkeypatch):
    model = network("as Ho et al.")
    model.recompute = True
    monkeypatch.setattr("ddpm_fast.nn.unet.recomputed", None)  # calling it would raise
    with torch.no_grad():
        model(*batch(model))


class Alive(TorchDispatchMode):
    """Remembers what its block allocates."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return made

    def bytes(self, but: Iterable[torch.Tensor]) -> int:
        """What is left of it now, but for the storages of these tensors."""
        others = {StorageWeakRef(tensor.untyped_storage()) for tensor in but}
        return sum(size for storage, size in self.sizes.items() if not storage.expired() and storage not in others)


def test_a_forward_keeps_less():
    model = network("as Ho et al.", dropout=0.3, num_res_blocks=2)
    kept = {}
    for recompute in (False, True):
        model.recompute = recompute
        with Alive() as alive:
            output = model(*batch(model), *KEYS["keyed dropout"])
        kept[recompute] = alive.bytes(but=model.parameters())
        del output
    assert kept[True] < 0.35 * kept[False]


def test_compiled_as_one_graph():
    block = ResBlock(4, 8, 6, groups=2, eps=1e-5, dropout=0.3, scale_shift=False)
    stage, x, emb = Stage(block), torch.randn(3, 4, 2, 2), torch.randn(3, 6)
    torch.nn.init.normal_(block.conv2.weight)

    def run(x, emb, seed, sample_id):
        given = Embedding(emb, key=NoiseKey(seed, sample_id, seed))
        return recomputed(stage, emb, draws=False)(x, given)

    torch._dynamo.reset()
    found = torch.compile(run, backend="eager", fullgraph=True)(x, emb, KEY.seed, KEY.sample_id)
    expected = stage(x, Embedding(emb, key=KEY))
    torch.testing.assert_close(found, expected)
    probe = torch.randn(found.shape)
    for one, other in zip(*(torch.autograd.grad(y, stage.parameters(), probe) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compiled_with_torchs_dropout_nothing_is_computed_again():
    """Its masks would be others the second time."""
    stage = torch.nn.Dropout(0.5)

    def run(x):
        return x + (recomputed(stage, x, draws=True) is stage)

    assert torch.compile(run, backend="eager", fullgraph=True)(torch.zeros(())) == 1
