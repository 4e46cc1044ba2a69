"""The commands and the Python code of the first page, the start page and the tutorials run, with smaller numbers."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.commands import run, save_small_model
from support.made_features import save_network
from support.pages import DOCS, blocks, commands, run_python
from torch.distributed.run import get_args_parser

import ddpm_fast as df

FEW = {"--n": "2", "--steps": "2", "--device": "cpu"}
SMALL = {
    "--model-channels": "8",
    "--channel-mult": "1,1",
    "--num-res-blocks": "1",
    "--attention": "16",
    "--steps": "2",
    "--batch-size": "4",
    "--sample-every": "0",
    "--device": "cpu",
}
NAMES = ["start.md", *sorted(f"tutorials/{page.name}" for page in (DOCS / "tutorials").glob("*.md"))]


def text(name: str) -> str:
    return (DOCS / name).read_text()


def python(name: str) -> str:
    return "\n".join(blocks(text(name), "python"))


def succeed(name: str, words: list[str]) -> str:
    done = run(name, *words)
    assert done.exit_code == 0, f"{name} {words}: {done.stderr}{done.stdout}"
    return done.stdout + done.stderr


def photos(folder: Path) -> None:
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 30), (60 * i, 0, 200)).save(folder / f"{i}.png")


@pytest.mark.parametrize("name", NAMES)
def test_every_option_exists(name):
    found = list(commands(text(name)))
    assert found or name == "tutorials/index.md" or name == "tutorials/own-loop.md"
    assert not {(command.name, *command.unknown_options()) for command in found if command.unknown_options()}


@pytest.mark.parametrize("name", NAMES)
def test_torchrun_understands_its_lines(name):
    for block in blocks(text(name), "bash"):
        for line in re.findall(r"^torchrun (.*)$", block.replace("\\\n", " "), flags=re.MULTILINE):
            assert get_args_parser().parse_args(line.split()).training_script.startswith("ddpm_fast.")


def test_the_code_of_the_first_page():
    names = run_python(python("index.md"), "index.md", {"n=8": "n=1", "steps=50": "steps=2"})
    assert names["sevens"].shape == (1, 1, 28, 28)


def test_the_start_page_installs_as_the_readme_does():
    (line,) = re.findall(r"^python3 -m venv .*ddpm_fast.sample$", (DOCS.parent / "README.md").read_text(), flags=re.M)
    install = blocks(text("start.md"), "bash")[0].splitlines()
    assert " && ".join(install[:2]) == line.removesuffix(" && python -m ddpm_fast.sample")


def test_the_commands_of_the_start_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    info, first, other, emoji, train, last = commands(text("start.md"))
    succeed(info.name, info.words)
    for sample in (first, other, emoji):
        succeed(sample.name, sample.smaller(FEW))
    succeed(train.name, train.smaller(SMALL))
    succeed(last.name, last.smaller(FEW))
    assert {path.name for path in tmp_path.iterdir()} >= {
        "samples.png",
        "threes.png",
        "threes.gif",
        "flags.png",
        "photos.png",
    }


def test_the_code_of_the_start_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_python(python("start.md"), "start.md", {"n=16, sampler": "n=2, sampler", "steps=10": "steps=2"})
    assert names["output"].grad.abs().sum() > 0 and Path("sevens.png").exists()


def test_own_images_from_the_folder_to_the_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = text("tutorials/own-images.md")
    first, second = blocks(page, "python")
    run_python(
        first,
        "own-images.md",
        {"zip(emoji.images,": "zip(emoji.images[::200],", "labels.tolist()": "labels[::200].tolist()"},
    )
    assert len(list(Path("photos").rglob("*.png"))) == 19
    train, resume, *draw, evaluate, export, _ = commands(page)  # the last one publishes
    succeed(train.name, train.smaller(SMALL))
    succeed(resume.name, resume.smaller({"--steps": "3"}))
    for command in draw:
        succeed(command.name, command.smaller(FEW))
    features = str(save_network(tmp_path / "made.pt"))
    succeed(evaluate.name, evaluate.smaller(FEW | {"--n": "12", "--features": features}))
    assert "quality.json" in {path.name for path in tmp_path.iterdir()}
    succeed(export.name, export.words)
    assert (tmp_path / "photos-for-diffusers" / "model_index.json").exists()
    names = run_python(second, "own-images.md", {"steps=20": "steps=2"})
    assert names["x"].shape == (4, 3, 32, 32) and len(list((tmp_path / "samples").glob("*.png"))) == 2


def test_the_fused_ops_in_a_loop():
    """The page itself asserts that the numbers are those of the plain loop."""
    names = run_python(
        python("tutorials/own-loop.md"), "own-loop.md", {"(16,)": "(4,)", "n=16": "n=4", "[:16]": "[:4]"}
    )
    assert names["images"].shape == (4, 1, 28, 28) and names["step"] == 1


def test_two_runs_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = text("tutorials/many-gpus.md")
    one, two, *_ = commands(page)
    assert {"--out": "x"} | dict(zip(one.words, one.words[1:], strict=False)) == dict(
        zip(two.smaller({"--out": "runs/one"}), two.smaller({"--out": "runs/one"})[1:], strict=False)
    )
    succeed(one.name, one.smaller(SMALL | {"--attention": "14", "--steps": "1"}))
    (tmp_path / "runs" / "two").symlink_to("one")
    capsys.readouterr()
    run_python(python("tutorials/many-gpus.md"), "many-gpus.md", {})
    assert float(capsys.readouterr().out) == 0


@pytest.mark.peers
@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is missing (the extra 'peers')")
def test_from_diffusers_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    small = df.load_model(save_small_model(tmp_path / "small.safetensors", classes=0))
    df.export_diffusers(small, None, "ddpm-cifar10-32")
    names = run_python(python("tutorials/from-diffusers.md"), "from-diffusers.md", {"steps=50": "steps=3"})
    assert names["images"].shape == names["half"].shape == (4, 3, 8, 8) and len(names["pictures"]) == 2
    theirs, ours = names["again"].unet, names["loaded"].model
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    torch.testing.assert_close(theirs(x, t).sample, ours(x, t), rtol=1e-4, atol=1e-5)
    sample, train = commands(text("tutorials/from-diffusers.md"))
    succeed(sample.name, sample.smaller(FEW))
    tuned = {name: SMALL[name] for name in ("--steps", "--batch-size", "--sample-every", "--device")}
    succeed(train.name, train.smaller(tuned | {"--image-size": "8"}))


@pytest.mark.peers
@pytest.mark.skipif(find_spec("denoising_diffusion_pytorch") is None, reason="the package is missing")
def test_from_lucidrains():
    names = run_python(python("tutorials/from-lucidrains.md"), "from-lucidrains.md", {"steps=20": "steps=2"})
    assert names["pictures"].shape == (2, 3, 16, 16) and names["loss"].isfinite()
    assert next(names["unet"].parameters()).grad is not None
