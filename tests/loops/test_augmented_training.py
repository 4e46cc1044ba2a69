"""A training whose images are augmented: what the network is given and told, and what is kept of it."""

import dataclasses

import pytest
import torch
from support import two_ranks
from support.train_command import command, pictures, start

import ddpm_fast as df
from ddpm_fast.data import Augmentation
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.loops.training import TrainConfig, Trainer

TEXT = "rotate90,shift,small:0.3"


@pytest.fixture
def given(monkeypatch):
    """The noised images that networks were given, and what they were told, one entry for each call."""
    seen = []
    forward = df.UNet.forward

    def watched(self, x, *others):
        seen.append((x.clone(), others[5].clone() if len(others) > 5 else None))
        return forward(self, x, *others)

    monkeypatch.setattr(df.UNet, "forward", watched)
    return seen


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("dropout_version", [1, 2])
def test_the_network_is_given_the_changed_images_and_told_how(given, micro_batch, dropout_version):
    subject = two_ranks.trainer(augment=TEXT, flip=False, micro_batch=micro_batch, dropout_version=dropout_version)
    for _ in range(3):
        subject.train_step()
    images, told = map(torch.cat, zip(*given, strict=True))
    drawn = Augmentation.of(TEXT).draw(0, 0, 24, 8, 8)
    assert told.shape == (24, 11) and torch.equal(told, drawn.told)
    given.clear()
    plain = two_ranks.trainer(flip=False)
    for _ in range(3):
        plain.train_step()
    unchanged = torch.cat([x for x, _ in given])
    same = (images == unchanged).flatten(1).all(1)
    assert same[~told.any(1)].all() and 4 < same.sum() < 20  # a change may be less than half a grey level


def test_told_of_nothing_it_learns_what_it_learns_without():
    """A network that may be told, whose images are not augmented, and one whose every probability is 0."""
    plain = two_ranks.trainer()
    network = dataclasses.replace(plain.model.config, augment_channels=11)
    able = Trainer(network, plain.diffusion, plain.config, plain.dataset, "cpu", False)
    never = dataclasses.replace(plain.config, augment=TEXT.replace("0.3", "0"))
    never = Trainer(network, plain.diffusion, never, plain.dataset, "cpu", False)
    for _ in range(3):
        losses = [subject.train_step()[0] for subject in (plain, able, never)]
        assert losses[0] == losses[1] == losses[2]
    for subject in (able, never):
        state = subject.model.state_dict()
        assert not state["augment_embedding.weight"].any()
        assert all(torch.equal(weight, state[name]) for name, weight in plain.model.state_dict().items())


def test_the_network_learns_from_what_it_is_told():
    subject = two_ranks.trainer(augment=TEXT)
    for _ in range(5):  # until the layers after it, which begin at zero, let something through
        subject.train_step()
    assert subject.model.augment_embedding.weight.any(0).sum() > 2


def test_the_model_says_how_it_was_trained_and_samples_as_it_is(tmp_path):
    subject = two_ranks.trainer(augment=TEXT)
    subject.train(2, tmp_path)
    loaded = df.load_model(tmp_path / "model.safetensors")
    assert loaded.config["training"]["augment"] == str(Augmentation.of(TEXT))
    assert loaded.unet.config.augment_channels == 11
    x, t, labels = torch.randn(2, 2, 8, 8), torch.tensor([3, 60]), torch.tensor([0, 2])
    with torch.no_grad():
        assert torch.equal(loaded.model(x, t, labels), loaded.model(x, t, labels, augment=torch.zeros(2, 11)))
    assert df.sample(loaded.model, loaded.diffusion, 2, labels=1, steps=2).shape == (2, 2, 8, 8)


def test_a_fine_tuning_is_told_anew(tmp_path):
    two_ranks.trainer(augment=TEXT).train(5, tmp_path)
    loaded = df.load_model(tmp_path / "model.safetensors")
    for text in ("", "xflip:1"):
        subject = two_ranks.trainer(augment=text, flip=False)
        subject.start_from(loaded)
        own, theirs = subject.model.state_dict(), loaded.model.state_dict()
        told = theirs.pop("augment_embedding.weight")
        assert told.any()
        assert all(torch.equal(own[name], weight) for name, weight in theirs.items())
        assert ("augment_embedding.weight" in own) == bool(text)
        assert not text or not own["augment_embedding.weight"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "xflip", "flip": True}, "flip mirrors images without telling"),
        ({"augment": "small:7"}, "the probability of translate is '7'"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**options)


def test_a_network_that_cannot_be_told_is_refused():
    plain = two_ranks.trainer()
    config = dataclasses.replace(plain.config, augment=TEXT)
    with pytest.raises(InputError, match=r"told by 11 numbers, and the network's augment_channels is 0: make it with"):
        Trainer(plain.model.config, plain.diffusion, config, plain.dataset, "cpu")


def test_the_command_makes_the_network_and_goes_on_with_what_the_words_meant(tmp_path, wide_terminal):
    data, out = tmp_path / "pictures", tmp_path / "run"
    pictures(data, ["a", "b"])
    start(data, out, "--augment=small:0.5", "--steps=2")
    meta = checkpoint.read_training(checkpoint.latest_checkpoint(out))[1]
    whole = str(Augmentation.of("small:0.5"))
    assert meta["arguments"]["augment"] == meta["training"]["augment"] == whole
    assert meta["unet"]["augment_channels"] == 7
    assert "Resuming at step 2" in command(f"--out={out}", "--resume", "--augment=small:0.5", "--steps=3").stdout
    other = command(f"--out={out}", "--resume", "--augment=small", "--steps=4", status=2)
    assert "--augment scale=0.1:0.12" in other.stderr and "differs from the" in other.stderr
    wrong = start(data, tmp_path / "new", "--augment=turn", status=2)
    assert "augment has 'turn'; expected a list of xflip" in wrong.stderr
    start(data, tmp_path / "tuned", f"--init-from={out / 'model.safetensors'}", "--augment=xflip", "--steps=1")
    tuned = df.load_model(tmp_path / "tuned" / "model.safetensors")
    assert tuned.unet.config.augment_channels == 1
