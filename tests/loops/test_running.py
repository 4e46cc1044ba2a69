"""Training from Python: from a folder of pictures to a model in a few lines, in micro-batches, and what load takes
over."""

import inspect

import pytest
import torch
from PIL import Image
from support import two_ranks

import ddpm_fast as df
from ddpm_fast.files import checkpoint


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index in range(6):
        (tmp_path / "photos" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (40 * index, 0, 0)).save(tmp_path / "photos" / "ab"[index % 2] / f"{index}.png")


def test_from_a_folder_to_a_model_in_five_lines(photos, monkeypatch):
    monkeypatch.setattr(df.Trainer, "train", few(df.Trainer.train))
    data = df.load_dataset("photos", image_size=8, classes=True)
    network = df.UNetConfig.for_images(data, model_channels=8)
    trainer = df.Trainer(network, df.GaussianDiffusion(df.Schedule.cosine(1000)), df.TrainConfig(batch_size=4), data)
    trainer.train(10_000, out="run")
    images = df.sample(trainer.averaged_model(), trainer.diffusion, 2, steps=2, labels=[0, 1])
    assert images.shape == (2, 3, 8, 8)
    loaded = df.load_model("run")
    assert loaded.config["training"]["steps"] == 3 and loaded.label_names == ["a", "b"]
    trainer.close()


def few(train):
    """train with three steps, whatever was asked for."""
    return lambda self, steps, out: train(self, 3, out, save_every=2)


def test_a_network_for_images_is_the_commands(photos):
    data = df.load_dataset("photos", image_size=8, classes=True)
    network = df.UNetConfig.for_images(data, num_heads=2)
    options = inspect.signature(df.UNetConfig).parameters
    assert (network.image_size, network.in_channels, network.num_classes) == (8, 3, 2)
    assert (network.model_channels, network.norm_groups, network.num_heads) == (64, 16, 2)
    assert options["model_channels"].default == 128, "the defaults of UNetConfig itself are the papers'"


def test_training_goes_on_from_a_state_and_not_over_another_run(tmp_path):
    subject = two_ranks.trainer()
    subject.train(3, tmp_path / "run", save_every=2)
    assert [path.name for path in sorted((tmp_path / "run").glob("*.safetensors"))] == [
        "model.safetensors",
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    ]
    other = two_ranks.trainer()
    with pytest.raises(df.InputError, match=r"has step-00000003.safetensors, and this training is at step 0"):
        other.train(5, tmp_path / "run")
    other.load(checkpoint.latest_checkpoint(tmp_path / "run"))
    other.train(5, tmp_path / "run")
    subject.train(5)
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_a_wish_to_stop_ends_a_training_with_a_save(tmp_path):
    subject = two_ranks.trainer()
    subject.wants_stop = True
    subject.train(100, tmp_path)
    assert subject.step == 1 and subject.stopping
    assert checkpoint.latest_checkpoint(tmp_path).name == "step-00000001.safetensors"


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_keeps_the_order_and_the_dropout_that_it_began_with(tmp_path, version):
    straight = two_ranks.trainer(order=version, dropout_version=version)
    straight.train(3, tmp_path)
    path = checkpoint.latest_checkpoint(tmp_path)
    tensors, meta = checkpoint.read_training(path)
    assert (meta["training"]["order"], meta["training"]["dropout"]) == (version, version)
    if version == 1:  # as the states before version 2, which do not say it
        del meta["training"]["order"], meta["training"]["dropout"]
        checkpoint.save_training(path, tensors, meta)
    resumed = two_ranks.trainer()
    resumed.load(path)
    assert (resumed.config.order, resumed.config.dropout_version) == (version, version)
    for _ in range(2):
        assert torch.equal(torch.stack(resumed.train_step()), torch.stack(straight.train_step()))
    other = two_ranks.trainer(order=3 - version, dropout_version=3 - version)
    fresh = two_ranks.trainer(order=version, dropout_version=version)
    assert not torch.equal(torch.stack(other.train_step()), torch.stack(fresh.train_step()))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_give_the_step_of_the_whole_batch_to_rounding(size):
    whole, parts = two_ranks.trainer(), two_ranks.trainer(micro_batch=size)
    for _ in range(4):
        expected, found = (torch.stack(subject.train_step()) for subject in (whole, parts))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_micro_batches_are_replayed_from_three_graphs(recording):
    eager = two_ranks.trainer(micro_batch=2)
    replayed = two_ranks.trainer(micro_batch=2, cuda_graph=None)
    for _ in range(5):
        assert torch.equal(torch.stack(eager.train_step()), torch.stack(replayed.train_step()))
    # The first of four, the three others, and the update; the others are warm within the first step.
    assert (recording.captures, recording.replays) == (3, 3 + (5 * 3 - 2) + 3)


def test_a_step_of_micro_batches_that_is_broken_off_changes_nothing():
    subject, straight = (two_ranks.trainer(micro_batch=4, **two_ranks.TRAININGS["loss_second_moment"]) for _ in "ab")

    def broken():
        raise KeyError

    for _ in range(3):
        with pytest.raises(KeyError):
            subject.train_step(broken)
        assert torch.equal(torch.stack(subject.train_step()), torch.stack(straight.train_step()))
    for name, value in straight.snapshot({}).tensors.items():
        assert torch.equal(value, subject.snapshot({}).tensors[name]), name


def test_adamw_has_the_betas_that_were_given():
    subject = two_ranks.trainer(betas=(0.8, 0.95))
    subject.train_step()
    first = subject.optimizer.state[subject.model.conv_in.weight]
    gradient = subject.model.conv_in.weight.grad
    torch.testing.assert_close(first["exp_avg"], 0.2 * gradient)
    torch.testing.assert_close(first["exp_avg_sq"], 0.05 * gradient.square())
