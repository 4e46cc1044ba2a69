"""Runs that go on: from the newest good state, with the same images and options unless others are asked for."""

import re
import shlex

import numpy as np
import pytest
import torch
from support.train_command import SMALL, command, meta, pictures, start, weights

from ddpm_fast.data import load_dataset
from ddpm_fast.files import checkpoint
from ddpm_fast.files.lock import FolderLock
from ddpm_fast.loops import training

pytestmark = pytest.mark.usefixtures("wide_terminal")


@pytest.fixture
def out(tmp_path, data):
    """A run of two steps on them, with a state after each."""
    start(data, tmp_path / "out", "--classes", "--steps=2", "--save-every=1")
    return tmp_path / "out"


def rewrite(path, change):
    """Change what a state says about itself."""
    tensors, said = checkpoint.read_training(path)
    change(said)
    checkpoint.save_training(path, tensors, said)


# The images


def test_state_and_model_say_which_images_they_were_trained_on(data, out):
    expected = {"data": "data", "count": 8, "digest": load_dataset(data, classes=True).digest}
    for training_part in (meta(out)["training"], checkpoint.load_model(out / "model.safetensors").config["training"]):
        assert {name: training_part[name] for name in expected} == expected


def test_more_pictures_are_refused_unless_asked_for(data, out):
    pictures(data, ["cat"], first=100)
    before = (out / "step-00000002.safetensors").read_bytes()
    refused = command("--out", out, "--resume", "--steps=3", status=2).stderr
    assert "data is not what this run was trained on" in refused and "12 images instead of 8" in refused
    assert "digest" in refused and "--new-data" in refused
    assert (out / "step-00000002.safetensors").read_bytes() == before
    told = command("--out", out, "--resume", "--steps=3", "--new-data").stdout
    assert "count 8 -> 12" in told
    history = checkpoint.load_model(out / "model.safetensors").config["training"]["history"]
    assert history[0]["step"] == 2 and history[0]["count"] == [8, 12] and meta(out)["training"]["count"] == 12
    assert "count" not in command("--out", out, "--resume", "--steps=4").stdout, "these are the run's images now"


def test_other_pixels_of_the_same_count_are_refused(data, out):
    (data / "dog" / "0.png").write_bytes((data / "cat" / "1.png").read_bytes())
    refused = command("--out", out, "--resume", "--steps=3", status=2).stderr
    assert "digest" in refused and "images instead of" not in refused


def test_a_renamed_class_is_refused_even_with_new_data(data, out):
    (data / "cat").rename(data / "zebra")
    for options in ([], ["--new-data"]):
        refused = command("--out", out, "--resume", "--steps=3", *options, status=2).stderr
        assert "dog, zebra instead of cat, dog" in refused and "--new-data" not in refused


def test_the_classes_of_new_data_are_matched_by_name(tmp_path, data, out, monkeypatch):
    dogs = pictures(tmp_path / "dogs", ["dog"], first=7)
    seen = []
    load = training.Trainer.load
    monkeypatch.setattr(training.Trainer, "load", lambda self, path: (seen.append(self.dataset), load(self, path))[1])
    command("--data", dogs, "--out", out, "--resume", "--new-data", "--steps=3")
    assert seen[0].labels.tolist() == [1] * 4 and seen[0].label_names == ["cat", "dog"]
    assert meta(out)["label_names"] == ["cat", "dog"]
    command("--out", out, "--resume", "--steps=4")  # the same dogs as before
    command("--data", data, "--out", out, "--resume", "--steps=5", status=2)


def test_new_data_of_another_size_is_brought_to_the_network_s(tmp_path, out):
    np.savez(tmp_path / "big.npz", images=np.zeros((5, 12, 12, 3), np.uint8), labels=[0] * 5, label_names=["dog"])
    command("--data", tmp_path / "big.npz", "--out", out, "--resume", "--new-data", "--steps=3")
    assert meta(out)["unet"]["image_size"] == 8 and meta(out)["training"]["count"] == 5


def test_images_read_on_demand_are_compared_by_their_index_or_once_by_their_pixels(data, out, monkeypatch):
    monkeypatch.setattr("ddpm_fast.data.load.IN_MEMORY", 0)
    told = command("--out", out, "--resume", "--steps=3").stdout
    assert "All images of data are read once" in told and "from data, read on demand" in told
    assert meta(out)["training"]["digest"].startswith("index:")
    assert "read once" not in command("--out", out, "--resume", "--steps=4").stdout
    (data / "dog" / "0.png").write_bytes((data / "dog" / "0.png").read_bytes() + b"more")
    assert "digest" in command("--out", out, "--resume", "--steps=5", status=2).stderr


def test_a_run_older_than_reading_on_demand_stays_in_memory(data, out, monkeypatch):
    monkeypatch.setattr("ddpm_fast.data.load.IN_MEMORY", 0)
    rewrite(checkpoint.latest_checkpoint(out), lambda said: said["training"].pop("order"))
    assert "read once" not in command("--out", out, "--resume", "--steps=3").stdout
    assert meta(out)["training"]["digest"] == load_dataset(data, classes=True).digest


def test_random_crops_are_read_on_demand(data, tmp_path):
    start(data, tmp_path / "out", "--crop=random", "--image-size=8", "--steps=1")
    training_part = meta(tmp_path / "out")["training"]
    assert training_part["crop"] == "random" and training_part["digest"].startswith("index:")
    wrong = ("--data", data, "--out", tmp_path / "other", "--crop=random", "--steps=1")
    assert "needs pictures that are not cut yet" in command(*wrong, status=2).stderr


def test_a_state_without_a_digest_goes_on_with_a_word_of_it(data, out):
    newest = checkpoint.latest_checkpoint(out)
    rewrite(newest, lambda said: [said["training"].pop(name) for name in ("count", "digest")])
    told = command("--out", out, "--resume", "--steps=3").stdout
    assert "could not be compared" in told
    assert "could not be compared" not in command("--out", out, "--resume", "--steps=4").stdout
    rewrite(checkpoint.latest_checkpoint(out), lambda said: [said["training"].pop(n) for n in ("count", "digest")])
    (data / "cat").rename(data / "zebra")
    assert "zebra" in command("--out", out, "--resume", "--steps=5", status=2).stderr


def test_class_names_do_not_matter_to_a_run_without_classes(tmp_path, data):
    start(data, tmp_path / "out", "--steps=1")
    (data / "cat").rename(data / "bird")  # the same images in the same order
    command("--out", tmp_path / "out", "--resume", "--steps=2")


def test_a_relative_path_and_a_home_folder_are_found_from_anywhere(tmp_path, data, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    start("data", "~/here", "--steps=1")
    start("~/data", "~/there", "--steps=1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("here", "there"):
        command("--out", f"../{name}", "--resume", "--steps=2")
        assert meta(tmp_path / name)["arguments"]["data"] == str(data)
    assert not list((tmp_path / "elsewhere").iterdir())


# The options


def test_options_change_only_when_that_is_asked_for(out):
    options = ["--out", out, "--resume", "--steps=3"]
    refused = command(*options, "--lr=5e-4", status=2).stderr
    assert "--lr 0.0005 differs from the 0.001" in refused and "add --change" in refused
    told = command(*options, "--change", "--lr=5e-4", "--batch-size=3", "--flip").stdout
    assert "lr 0.001 -> 0.0005" in told
    changed = {"step": 2, "lr": [1e-3, 5e-4], "batch_size": [4, 3], "flip": [False, True]}
    for kept in (meta(out)["training"], checkpoint.load_model(out / "model.safetensors").config["training"]):
        assert kept["history"] == [changed] and kept["lr"] == 5e-4
    told = command("--out", out, "--resume", "--steps=4").stdout  # the new ones are the run's now
    assert "Changed" not in told and meta(out)["arguments"]["batch_size"] == 3
    assert meta(out)["training"]["history"] == [changed]


def test_how_a_run_learns_is_kept_and_may_change(tmp_path, data):
    out = tmp_path / "out"
    start(data, out, "--steps=2", "--lr-schedule=cosine", "--beta1=0.8", "--beta2=0.99", "--micro-batch=2")
    kept = meta(out)["training"]
    assert (kept["lr_schedule"], kept["lr_steps"], kept["betas"]) == ("cosine", 2, [0.8, 0.99])
    refused = command("--out", out, "--resume", "--steps=3", status=2).stderr
    assert "the learning rate has fallen to 0 at --lr-steps 2" in refused
    assert "add --change" in command("--out", out, "--resume", "--lr-steps=4", "--steps=3", status=2).stderr
    more = ["--change", "--lr-steps=4", "--beta2=0.95", "--steps=3", "--micro-batch=4", "--grad-checkpoint"]
    told = command("--out", out, "--resume", *more).stdout
    assert "beta2 0.99 -> 0.95" in told and "lr_steps 2 -> 4" in told and "micro_batch 2 ->" not in told
    assert "in micro-batches of 2 until here, and goes on in micro-batches of 4" in told
    kept = meta(out)["training"]
    assert (kept["lr_steps"], kept["betas"], kept["history"][0]["beta2"]) == (4, [0.8, 0.95], [0.99, 0.95])


def test_a_micro_batch_that_does_not_divide_says_what_would(tmp_path, data):
    assert "give micro_batch 2" in start(data, tmp_path / "out", "--micro-batch=3", status=2).stderr


def test_a_run_that_is_older_than_the_versions_keeps_the_first(out):
    def forget(said):
        for name in ("order", "dropout", "micro_batch", "lr_schedule", "lr_steps", "betas"):
            said["training"].pop(name)
        for name in ("micro_batch", "grad_checkpoint", "lr_schedule", "lr_steps", "beta1", "beta2"):
            said["arguments"].pop(name)

    assert (meta(out)["training"]["order"], meta(out)["training"]["dropout"]) == (2, 2)
    rewrite(checkpoint.latest_checkpoint(out), forget)
    command("--out", out, "--resume", "--steps=3")
    assert (meta(out)["training"]["order"], meta(out)["training"]["dropout"]) == (1, 1)


def test_a_file_of_options_does_not_say_what_an_older_run_had(tmp_path, out):
    rewrite(checkpoint.latest_checkpoint(out), lambda said: said["arguments"].pop("weight_decay"))
    (tmp_path / "run.yaml").write_text("weight-decay: 0.25\nsteps: 3\n")
    told = command("--out", out, "--resume", "--config", tmp_path / "run.yaml", status=2).stderr
    assert "--weight-decay 0.25 differs from the 0.0 this run was started with" in told


@pytest.mark.parametrize("option", ["--model-channels=8", "--prediction=eps", "--timesteps=30", "--seed=1"])
def test_what_makes_another_model_never_changes(out, option):
    refused = command("--out", out, "--resume", "--change", option, "--steps=3", status=2).stderr
    assert "start a new run" in refused and "--change" not in refused


@pytest.mark.parametrize("option", ["--change", "--new-data"])
def test_options_about_going_on_are_refused_in_a_new_run(tmp_path, data, option):
    assert f"{option} is about a run that goes on" in start(data, tmp_path / "new", option, status=2).stderr
    assert not (tmp_path / "new").exists()


def test_advice_after_an_overflow_can_be_followed(tmp_path, data):
    out = tmp_path / "my run"
    start(data, out, "--steps=3", "--save-every=1")
    wild = ["--change", "--lr=1e18", "--warmup=400", "--grad-clip=1e30", "--save-every=1", "--steps=30"]
    told = command("--out", out, "--resume", *wild, status=1).stdout
    assert "gave the loss" in told and "step-00000003.safetensors. Continue from it" in told
    # The state that was saved after the first wild step is not one to continue from.
    assert [path.name for path in sorted(out.glob("step-*"))] == [
        "step-00000003.safetensors",
        "step-00000004.safetensors.diverged",
    ]
    advised = re.search(r"python -m ddpm_fast\.train (--out .*? --lr \S+?)\.? A longer", told)[1]
    went_on = command(*shlex.split(advised), "--steps=8").stdout
    assert "Resuming at step 3" in went_on and "Done" in went_on
    assert all(value.isfinite().all() for value in weights(out).values())
    assert checkpoint.load_model(out / "model.safetensors").config["training"]["steps"] == 8


def test_an_overflow_before_anything_was_saved_says_so(tmp_path, data):
    wild = ["--lr=1e18", "--warmup=400", "--grad-clip=1e30", "--save-every=1", "--steps=30"]
    told = start(data, tmp_path / "out", *wild, status=1).stdout
    assert "No good state had been saved: start again" in told and "--lr 0.0002" in told
    start(data, tmp_path / "out", "--steps=1")  # nothing is in its way


def test_auto_resume_starts_and_goes_on_with_one_command(tmp_path, data):
    one = [f"--data={data}", f"--out={tmp_path / 'out'}", *SMALL, "--auto-resume", "--classes"]
    assert "Resuming" not in command(*one, "--steps=1").stdout
    assert "Resuming at step 1" in command(*one, "--steps=2").stdout
    assert "Done" in command(*one, "--steps=2").stdout
    assert "--lr 0.5 differs" in command(*one, "--steps=3", "--lr=0.5", status=2).stderr


# The folder


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b""], ids=["truncated", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_is_used(out, damage):
    newest = out / "step-00000002.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    told = command("--out", out, "--resume", "--steps=3", "--save-every=9").stdout
    assert str(newest) in told and "going on from step-00000001.safetensors" in told
    assert "Resuming at step 1" in told and meta(out)["step"] == 3
    # The damaged one does not count among those that are kept.
    assert [path.name for path in sorted(out.glob("step-*"))] == [
        "step-00000001.safetensors",
        "step-00000002.safetensors.damaged",
        "step-00000003.safetensors",
    ]


def test_a_run_whose_states_are_all_damaged_is_not_started_anew(out):
    for state in out.glob("step-*"):
        state.write_bytes(b"")
    for option in ("--resume", "--auto-resume"):
        refused = command("--out", out, option, status=2).stderr
        assert "step-00000001.safetensors" in refused and "step-00000002.safetensors" in refused
    assert len(list(out.glob("step-*.safetensors"))) == 2


def lose(model, other):
    model.unlink()


def damage(model, other):
    model.write_bytes(model.read_bytes()[:-1])


def replace(model, other):
    model.write_bytes(other.read_bytes())


@pytest.mark.parametrize("harm", [lose, damage, replace])
@pytest.mark.parametrize("steps", [2, 3], ids=["finished", "unfinished"])
def test_resuming_writes_a_model_that_is_not_the_state_s_again(tmp_path, data, out, harm, steps):
    start(data, tmp_path / "other", "--classes", "--steps=2", "--seed=1")  # of the same step, but not the same
    model = out / "model.safetensors"
    expected = model.read_bytes()
    harm(model, tmp_path / "other" / "model.safetensors")
    # The state of the last step is not written again, so what is written is the model of step 2.
    command("--out", out, "--resume", f"--steps={steps}", "--save-every=99")
    if steps == 2:
        assert model.read_bytes()[-1000:] == expected[-1000:], "the weights differ"
    assert checkpoint.load_model(model).config["training"]["steps"] == steps


def test_resuming_a_finished_run_removes_what_a_killed_one_left(tmp_path, out):
    checkpoint.checkpoint_path(out, 0).write_bytes(checkpoint.checkpoint_path(out, 1).read_bytes())
    (out / ".ddpm_fast-0123456789abcdef.tmp").write_bytes(b"half a state")
    command("--out", out, "--resume")
    found = sorted(path.name for path in out.iterdir())
    told = ["config.yaml", "curves", "environment.json", "log.csv"]
    assert found == [*told, "model.safetensors", "step-00000001.safetensors", "step-00000002.safetensors"]


def test_a_model_without_a_state_is_not_overwritten(tmp_path, data, out):
    for state in out.glob("step-*"):
        state.unlink()
    before = (out / "model.safetensors").read_bytes()
    for option in ([], ["--auto-resume"]):
        assert "would overwrite it" in start(data, out, *option, status=2).stderr
    assert (out / "model.safetensors").read_bytes() == before


def test_two_runs_do_not_share_a_folder(tmp_path, data, out):
    with FolderLock(out):
        for arguments in ([f"--data={data}", f"--out={out}", *SMALL, "--auto-resume"], ["--out", out, "--resume"]):
            assert "another process" in command(*arguments, status=2).stderr
    command("--out", out, "--resume", "--steps=3")


def test_a_new_run_that_fails_leaves_no_folder(tmp_path, data):
    start(tmp_path / "nowhere", tmp_path / "new", status=2)
    command("--out", tmp_path / "new", "--resume", status=2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said.update(step=0.5), "step"),
        (lambda said: said.pop("arguments"), "arguments"),
        (lambda said: said["arguments"].update(lr="fast"), "its --lr is 'fast'"),
        (lambda said: said["arguments"].update(warmup="long"), "its --warmup is 'long'"),
        (lambda said: said.update(label_names=5, training=[]), "label_names, training"),
        (lambda said: said.update(unet={}), "another network"),
        (lambda said: said["arguments"].update(model_channels=8192), "another network"),
    ],
)
def test_an_edited_state_is_refused(out, change, message):
    rewrite(checkpoint.latest_checkpoint(out), change)
    assert message in command("--out", out, "--resume", "--steps=3", status=2).stderr


@pytest.mark.parametrize("harm", ["missing", "unexpected", "another kind"])
def test_a_state_with_other_tensors_is_refused(out, harm):
    path = checkpoint.latest_checkpoint(out)
    tensors, said = checkpoint.read_training(path)
    name = "model.conv_in.weight"
    if harm == "unexpected":
        tensors["model.more"] = tensors[name]
    elif harm == "another kind":
        tensors[name] = tensors[name].double()
    else:
        del tensors[name]
    checkpoint.save_training(path, tensors, said)
    refused = command("--out", out, "--resume", "--steps=3", status=2).stderr
    assert harm in refused and (name.removeprefix("model.") in refused or "more" in refused)


def test_a_name_that_is_too_long_is_an_error(tmp_path, data):
    assert "name too long" in start(data, tmp_path / ("x" * 256), status=2).stderr


# The machine


def test_another_number_of_threads_is_said(out, monkeypatch):
    threads = torch.get_num_threads()
    expected = {"device": "cpu", "threads": threads, "torch": torch.__version__, "ranks": 1, "micro_batch": 4}
    assert meta(out)["machine"] == expected
    assert "bits" not in command("--out", out, "--resume", "--steps=3").stdout
    rewrite(checkpoint.latest_checkpoint(out), lambda said: said["machine"].update(threads=97, torch="1.0"))
    told = command("--out", out, "--resume", "--steps=4").stdout
    assert f"with 97 threads and with torch 1.0 until here, and goes on with {threads} threads" in told
    assert "OMP_NUM_THREADS=97" in told and "bits" in told


def test_the_command_s_defaults_are_those_that_the_documents_recommend(tmp_path, data):
    start(data, tmp_path / "out", "--steps=1")
    config = checkpoint.load_model(tmp_path / "out" / "model.safetensors").config
    assert config["diffusion"]["prediction"] == "v" and config["diffusion"]["variance"] == "fixed_small"
