"""Training from the same images in several forms is the same training, and a run goes on with another form of them."""

import io
import json
import sys
import tarfile

import pytest
import torch
from support.commands import run
from support.train_command import command, meta, pictures, start, weights


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """A folder of two classes, the same pictures in tar shards, and prepared."""
    made = tmp_path_factory.mktemp("forms")
    folder = pictures(made / "folder", ["cat", "dog"])
    (made / "shards").mkdir()
    for name in ("cat", "dog"):
        with tarfile.open(made / "shards" / f"{name}.tar", "w") as tar:
            for path in sorted((folder / name).iterdir()):
                label = json.dumps({"kind": name}).encode()
                for member, data in ((f"{path.stem}.png", path.read_bytes()), (f"{path.stem}.json", label)):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    result = run("prepare", "--data", folder, "--out", made / "prepared", "--classes")
    assert result.exit_code == 0, result.stderr
    return made


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_the_same_images_give_the_same_training_in_every_form(forms, tmp_path, crop):
    options = ("--steps=3", f"--crop={crop}", "--image-size", 8 if crop == "centre" else 6)
    start(forms / "folder", tmp_path / "folder", "--classes", *options)
    start(forms / "shards", tmp_path / "shards", "--label-column=kind", *options)
    start(forms / "prepared", tmp_path / "prepared", *options)
    expected = weights(tmp_path / "folder")
    assert meta(tmp_path / "folder")["label_names"] == ["cat", "dog"]
    for form in ("shards", "prepared"):
        assert meta(tmp_path / form)["label_names"] == ["cat", "dog"]
        found = weights(tmp_path / form)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), form


def test_a_run_goes_on_with_another_form_of_its_images(forms, tmp_path):
    start(forms / "shards" / "{cat,dog}.tar", tmp_path / "run", "--label-column=kind", "--steps=2")
    assert meta(tmp_path / "run")["arguments"]["data"] == str(forms / "shards" / "{cat,dog}.tar")
    command("--resume", f"--out={tmp_path / 'run'}", "--steps=3")
    # The prepared folder has no columns, and those of the shards are not asked of it.
    command("--resume", f"--out={tmp_path / 'run'}", "--steps=4", f"--data={forms / 'prepared'}")
    start(forms / "folder", tmp_path / "whole", "--classes", "--steps=4")
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(tmp_path / "whole").items())


def test_the_name_of_a_data_set_of_the_hub_is_kept_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    failed = start("hf:someone/pets:train", tmp_path / "run", status=2)
    assert "someone/pets:train needs Hugging Face's library" in failed.stderr + failed.stdout
