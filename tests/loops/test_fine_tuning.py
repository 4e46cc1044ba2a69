"""A training that begins with a model's weights: what is kept of them, and what of the classes."""

import dataclasses
import hashlib

import pytest
import torch

import ddpm_fast as df
from ddpm_fast.data import Dataset
from ddpm_fast.loops.fine_tuning import starting_weights
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.nn import UNet
from tests.support.commands import save_small_model

TABLE = "label_embedding.weight"


@pytest.fixture
def loaded(tmp_path):
    return lambda **options: df.load_model(save_small_model(tmp_path / "m.safetensors", **options))


def network(model, classes, **changes):
    torch.manual_seed(1)
    return UNet(dataclasses.replace(model.model.config, num_classes=classes, **changes))


def same_but_for(weights, model, names):
    theirs = model.model.state_dict()
    return all(torch.equal(weights[name], theirs[name]) for name in theirs if name not in names)


def test_classes_are_matched_by_name(loaded):
    model = loaded(classes=3, names=["cat", "dog", "owl"])
    new = network(model, 4)
    start = starting_weights(model, new, ["owl", "ant", "cat", "bee"])
    theirs, fresh = model.model.state_dict()[TABLE], new.state_dict()[TABLE]
    assert same_but_for(start.weights, model, {TABLE})
    assert torch.equal(start.weights[TABLE], torch.stack([theirs[2], fresh[1], theirs[0], fresh[3], theirs[3]]))
    assert (start.known, start.new) == (2, [1, 3])
    twice = starting_weights(model, network(model, 2), ["cat", "cat"])  # which of them is meant?
    assert (twice.known, twice.new) == (0, [0, 1])


def test_classes_without_names_are_matched_by_number(loaded):
    model = loaded(classes=3)
    start = starting_weights(model, network(model, 3), ["a", "b", "c"])
    assert same_but_for(start.weights, model, ()) and (start.known, start.new) == (3, [])
    start = starting_weights(model, network(model, 2), None)
    assert (start.known, start.new) == (0, [0, 1])
    assert torch.equal(start.weights[TABLE][-1], model.model.state_dict()[TABLE][-1])


def randomised(model):
    """The same model with weights that are nowhere zero, so that its output depends on all of its inputs."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_without_classes_it_is_the_model_under_its_null_class(loaded):
    model = randomised(loaded(classes=3))
    new = network(model, 0)
    new.load_state_dict(starting_weights(model, new, None).weights)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 17])
    torch.testing.assert_close(new.eval()(x, t), model.model(x, t), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.model(x, t), model.model(x, t, torch.tensor([0, 1])), atol=1e-3)


def test_with_first_classes_the_null_class_is_the_model(loaded):
    model = randomised(loaded(classes=0))
    new = network(model, 5)
    start = starting_weights(model, new, list("abcde"))
    new.load_state_dict(start.weights)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 17])
    assert torch.equal(new.eval()(x, t), model.model(x, t)) and start.new == [0, 1, 2, 3, 4]


def test_another_network_is_refused(loaded):
    model = loaded(classes=0)
    with pytest.raises(df.InputError, match=r"another network than this \(norm_groups is 4 and here 2\)"):
        starting_weights(model, network(model, 0, image_size=16, norm_groups=2), None)
    with pytest.raises(df.InputError, match=r"another network .*channel_mult is \(1, 2\) and here \(1,\)"):
        starting_weights(model, network(model, 0, image_size=3, channel_mult=(1,)), None)


def test_the_weights_go_on_with_images_of_another_size(loaded):
    model = randomised(loaded(classes=3))
    new = UNet(model.model.config.resized(16, 6))
    start = starting_weights(model, new, None)
    assert same_but_for(start.weights, model, ()) and (start.known, start.new) == (3, [])
    new.load_state_dict(start.weights)
    x, t = torch.randn(2, 3, 16, 6), torch.tensor([3, 17])
    assert torch.equal(new.eval()(x, t), model.model(x, t))


def test_a_trainer_starts_from_a_model(loaded):
    model = loaded(classes=3, names=list("abc"))
    labels = torch.tensor([0, 1, 2, 0])
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    dataset = Dataset(images, labels, list("abc"), "some")
    config = TrainConfig(batch_size=2, warmup=1)
    trainer = Trainer(model.model.config, model.diffusion, config, dataset, torch.device("cpu"))
    trainer.start_from(model)
    theirs, averages = model.model.state_dict(), trainer.ema.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trainer.model.state_dict().items())
    assert all(torch.equal(averages[name], theirs[name]) for name in averages)
    assert not trainer.optimizer.state
    digest = hashlib.sha256(model.path.read_bytes()).hexdigest()
    expected = [{"step": 0, "weights": ["random", f"m.safetensors, SHA-256 {digest}"]}]
    assert trainer.model_config()["training"]["history"] == expected
    trainer.train_step()
    assert any(not torch.equal(tensor, theirs[name]) for name, tensor in trainer.model.state_dict().items())
    with pytest.raises(df.InputError, match="1 steps have been taken already"):
        trainer.start_from(model)
