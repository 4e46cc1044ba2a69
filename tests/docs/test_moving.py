"""The page for those who come from other libraries: its code runs, and every option that it names exists, on our side
and, where it can be asked, on the other."""

import dataclasses
import importlib
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from support.commands import run, save_small_model
from support.pages import DOCS, blocks, commands, options

import ddpm_fast as df
from ddpm_fast.formats.openai import flags as openai_flags
from ddpm_fast.loops.options import SamplingKeywords

TEXT = (DOCS / "guides" / "moving.md").read_text()
LUCIDRAINS = ("Unet", "GaussianDiffusion", "Trainer")
TABLES = {"train_unconditional.py": "train", "image_train.py": "train", "image_sample.py": "sample"}


def sections() -> dict[str, list[tuple[str, str, str]]]:
    """The rows of each section's table: theirs, ours, and the note."""
    found = {}
    for part in re.split(r"^##+ ", TEXT, flags=re.M)[1:]:
        rows = re.findall(r"^\| (`.*?`) \| (.*?) \| ?(.*?) ?\|$", part, flags=re.M)
        if rows:
            found[part.splitlines()[0]] = rows
    return found


def section(name: str) -> list[tuple[str, str, str]]:
    return next(rows for title, rows in sections().items() if name in title)


def exists(name: str) -> bool:
    """Whether a name of ours exists: a class's field or argument, a function's argument, or a public name."""
    owner, _, rest = name.partition(".")
    if owner == "df":
        return hasattr(df, rest)
    if owner == "sample":
        return rest in SamplingKeywords.__optional_keys__
    thing = getattr(df, owner)
    fields = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    return rest in fields or rest in inspect.signature(thing).parameters or callable(getattr(thing, rest, None))


def named(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_page_has_a_table_for_each_library():
    assert len(sections()) == len(LUCIDRAINS) + len(TABLES)
    for title, rows in sections().items():
        theirs = [row[0] for row in rows]
        assert len(set(theirs)) == len(theirs), f"{title} has an option twice"
        for name, ours, note in rows:
            assert ours == "none" or named(ours), f"{name}: name ours, or none"
            assert ours != "none" or note, f"{name}: why is there none?"


@pytest.mark.parametrize("name", TABLES)
def test_every_option_that_is_named_exists(name):
    theirs = {token for row in section(name) for token in named(row[0])}
    known = options(TABLES[name])
    others = {option for command in ("sample", "export", "convert", "evaluate") for option in options(command)}
    for _, ours, note in section(name):
        assert set(named(ours)) <= known, ours
        flags = {token for token in named(note) if token.startswith("-")}
        assert flags <= known | others | theirs, note
        assert all(exists(token) for token in named(note) if re.fullmatch(r"[A-Za-z_]+\.\w+", token)), note


@pytest.mark.parametrize("name", [f"`{name}`" for name in LUCIDRAINS])
def test_every_name_that_is_named_exists(name):
    for _, ours, note in section(name):
        tokens = [token for token in named(ours) + named(note) if re.fullmatch(r"[A-Za-z_]+\.\w+", token)]
        assert ours == "none" or tokens
        assert all(exists(token) for token in tokens), (ours, note)


def test_every_flag_of_openais_scripts_has_its_line():
    lines = {token.removeprefix("--") for name in ("image_train.py", "image_sample.py") for row in section(name)
             for token in named(row[0])}  # fmt: skip
    assert lines == openai_flags.KNOWN.keys()


@pytest.mark.peers
@pytest.mark.skipif(find_spec("denoising_diffusion_pytorch") is None, reason="the package is missing")
@pytest.mark.parametrize("name", LUCIDRAINS)
def test_every_argument_of_lucidrains_has_its_line(name):
    theirs = inspect.signature(getattr(importlib.import_module("denoising_diffusion_pytorch"), name)).parameters
    assert [row[0].strip("`") for row in section(f"`{name}`")] == list(theirs)


def photos(folder: Path, size: int) -> None:
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (size, size), (60 * i, 0, 200)).save(folder / f"{i}.png")


def test_the_code_for_lucidrains_users_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 20)
    (block,) = blocks(TEXT, "python")
    smaller = {
        "128": "16",
        "channels=64": "channels=8",
        "(1, 2, 4, 8)": "(1, 1, 1, 1)",
        "(16,)": "(2,)",
        "64, micro_batch=32": "4, micro_batch=2",
        "700_000": "2",
        "250": "3",
    }
    for before, after in smaller.items():
        assert block.count(before) == 1, before
        block = block.replace(before, after)
    names: dict = {}
    exec(compile(block, "moving.md", "exec"), names)
    assert names["pictures"].shape == (4, 3, 16, 16)
    # What lucidrains' own defaults are: pred_v, sigmoid, the posterior's variance.
    assert names["loaded"].diffusion.objective.to_dict()["loss_weighting"] == "snr"


def test_the_commands_have_options_that_exist():
    found = list(commands(TEXT))
    assert [command for command, _ in found] == ["sample", "train", "train", "sample"]
    for command, words in found:
        assert {word for word in words if word.startswith("-") and " " not in word} <= options(command)


@pytest.mark.parametrize("number", [1, 2])
def test_the_commands_for_training_run_on_small_images(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 64)
    command, words = list(commands(TEXT))[number]
    small = {
        "--image-size": "32",
        "--model-channels": "8",
        "--num-res-blocks": "1",
        "--steps": "1",
        "--batch-size": "2",
        "--sample-every": "0",
        "--attention": "4",
        "--device": "cpu",
        "--log-every": "1",
        "--warmup": "0",
        "--num-heads": "1",
    }
    given = dict(zip(words, [*words[1:], ""], strict=True))
    flags = [word for word in words if word.startswith("--") and (given[word].startswith("--") or not given[word])]
    pairs = {word: given[word] for word in words if word.startswith("--") and word not in flags}
    done = run(command, *flags, *(text for pair in (pairs | small).items() for text in pair))
    assert done.exit_code == 0, done.stderr + done.stdout
    model = df.load_model("runs/photos")
    assert model.diffusion.objective.prediction == "eps"
    assert model.diffusion.objective.variance == ("fixed_small" if number == 1 else "learned_range")


def test_the_command_for_sampling_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_small_model(tmp_path / "model.safetensors", classes=0)
    command, words = list(commands(TEXT))[3]
    at = words.index("--flags")
    words = words[:at] + words[at + 2 :]
    small = {"--model": "model.safetensors", "-n": "2", "--steps": "2", "--device": "cpu"}
    for name, value in small.items():
        words += [name, value]
    done = run(command, *words)
    assert done.exit_code == 0, done.stderr + done.stdout
    assert list((tmp_path / "samples").rglob("*.npz"))
