"""--config: options from a file, and what must not be in one."""

import json
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from support.commands import run, save_small_model
from typer.testing import CliRunner

from ddpm_fast.commands import config
from ddpm_fast.commands.common import App, path_option, plain_errors
from ddpm_fast.commands.sizes import size_option
from ddpm_fast.errors import InputError

seen: dict = {}
app = App()


@app.command()
def main(
    source: Annotated[str, typer.Argument()],
    out: Annotated[Path, path_option("required")],
    n: Annotated[int | None, typer.Option("--n", "-n")] = None,
    lr: Annotated[float, typer.Option()] = 1e-3,
    flip: Annotated[bool, typer.Option("--flip")] = False,
    scale_shift: Annotated[bool, typer.Option()] = True,
    labels: Annotated[str | None, typer.Option()] = None,
    precision: Annotated[str, typer.Option("--precision", "--dtype")] = "fp32",
    sweep: Annotated[list[str] | None, typer.Option()] = None,
    image_size: Annotated[str | None, size_option("a size")] = None,
) -> None:
    """A command with an option of each kind."""
    seen.clear()
    seen.update({name: value for name, value in locals().items() if name != "seen"})
    with plain_errors():
        if n is not None and n < 1:
            raise InputError(f"--n is {n}; expected at least 1")
        if precision not in ("fp32", "bf16"):
            raise InputError(f"precision {precision!r} is unknown")


def given(tmp_path, text, *arguments):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return CliRunner().invoke(app, ["--config", str(path), *arguments], catch_exceptions=False)


ALL = """
source: mine
out: ~/runs/mine
n: 7
lr: 2e-4
flip: true
scale-shift: false
labels: 3
dtype: bf16
sweep: [steps=1, "sampler=ddpm"]
image_size: 64
"""


def test_every_kind_of_option_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert given(tmp_path, ALL).exit_code == 0
    assert seen == {
        "source": "mine",
        "out": Path("/home/me/runs/mine"),
        "n": 7,
        "lr": 2e-4,
        "flip": True,
        "scale_shift": False,
        "labels": "3",
        "precision": "bf16",
        "sweep": ["steps=1", "sampler=ddpm"],
        "image_size": 64,
    }


def test_the_command_line_goes_first_and_what_neither_gives_keeps_its_default(tmp_path):
    text = "source: a\nout: b\nn: 7\nlr: 1\nlabels: null\nsweep: one=1\n"
    result = given(tmp_path, text, "theirs", "--lr", "0.5", "--out", "c", "--flip", "--sweep", "x=2")
    assert result.exit_code == 0, result.stderr
    assert (seen["source"], seen["out"], seen["n"], seen["lr"]) == ("theirs", Path("c"), 7, 0.5)
    assert (seen["flip"], seen["labels"], seen["sweep"]) == (True, None, ["x=2"])
    assert seen["scale_shift"] is True and seen["precision"] == "fp32"


def test_what_is_written_is_read_back(tmp_path):
    assert given(tmp_path, ALL).exit_code == 0
    before = dict(seen)
    config.write(tmp_path / "again.yaml", "it", before)
    assert CliRunner().invoke(app, ["--config", str(tmp_path / "again.yaml")], catch_exceptions=False).exit_code == 0
    assert seen == before
    # It is YAML that anything reads, with the names that the command line has.
    written = yaml.safe_load((tmp_path / "again.yaml").read_text())
    assert written["scale-shift"] is False and written["lr"] == 2e-4 and written["sweep"][0] == "steps=1"


@pytest.mark.parametrize(
    "text", ["010", "1:30", "yes", "2026-01-01", "null", "", "a: b", "#x", "é\u2028", "\udcff", "1e5"]
)
def test_texts_that_yaml_would_take_for_something_else_survive(tmp_path, text):
    path = tmp_path / "a name\nwith: lines \udcff.yaml"
    config.write(path, "it", {"source": "a", "out": Path("b"), "labels": text})
    result = CliRunner().invoke(app, ["--config", str(path)], catch_exceptions=False)
    assert result.exit_code == 0 and seen["labels"] == text, result.stderr


def test_a_folder_stands_for_its_config_and_a_file_of_others_is_kept(tmp_path):
    (tmp_path / "config.yaml").write_text("source: a\nout: b\n")
    assert CliRunner().invoke(app, ["--config", str(tmp_path)], catch_exceptions=False).exit_code == 0
    with pytest.raises(InputError, match="is kept"):
        config.write(tmp_path / "config.yaml", "it", {"n": 1})
    assert (tmp_path / "config.yaml").read_text() == "source: a\nout: b\n"


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
REFUSED = {
    "an unknown key": ("bach: 3\nn: 1", "bach is no option of this command; there are"),
    "a key with a typing error": ("lable: 3", "lable is no option of this command; did you mean labels?"),
    "a list for a number": ("lr: [1]", "lr is [1], a list; expected a number"),
    "a fraction for an integer": ("n: 1.5", "n is 1.5, a float; expected an integer"),
    "a bool for an integer": ("n: true", "n is True, a bool; expected an integer"),
    "an integer for a bool": ("flip: 1", "flip is 1, a int; expected true or false"),
    "nothing for what must be something": ("lr:", "lr is None, a NoneType; expected a number"),
    "a bool for a text": ("labels: no", "labels is False, a bool; expected a text: put it in quotes"),
    "a date for a path": ("out: 2026-01-01", "expected a path: put it in quotes"),
    "a huge number": ("n: 0x" + "f" * 5000, "n is too large a number"),
    "too many digits": ("n: " + "9" * 5000, "holds a value that cannot be read"),
    "base 8": ("labels: 010", "line 1: 010 is a number of base 8 or 60 in YAML"),
    "the same key twice": ("n: 1\nn: 2", "n is given twice"),
    "two names of one option": ("scale_shift: true\nscale-shift: true", "scale-shift is given twice"),
    "a list": ("- a", "holds no mapping"),
    "a text": ("hello", "holds no mapping"),
    "two documents": ("n: 1\n---\nn: 2", "is no YAML: but found another document"),
    "an alias": (BOMB, "line 2: aliases (*a) are not read"),
    "a program": ("out: !!python/object/apply:os.system [ls]", "line 1: tags (tag:yaml.org,2002:python/object/apply"),
    "a tag of YAML": ("n: !!int 3", "line 1: tags"),
    "nesting": ("sweep: [[a]]", "values inside of values are not read"),
    "very deep nesting": ("[" * 30_000, "values inside of values are not read"),
    "no YAML": ("n: [", "is no YAML"),
    "a control character": ("n: \x1b[31m", "is no YAML"),
    "no UTF-8": (b"n: \xff", "is not UTF-8 (byte 3)"),
    "too much": ("# " + "x" * config.MOST_BYTES, f"is larger than {config.MOST_BYTES} bytes"),
    "a number out of range": ("source: a\nout: b\nn: 0", "--n is 0; expected at least 1 (n in "),
    "a name that is unknown": ("source: a\nout: b\nprecision: fp7", "precision 'fp7' is unknown (precision in "),
}


@pytest.mark.usefixtures("wide_terminal")  # a box of 80 columns would break the path
@pytest.mark.parametrize("word", REFUSED)
def test_what_is_refused_and_where_it_stands(tmp_path, word):
    text, message = REFUSED[word]
    result = given(tmp_path, text)
    assert result.exit_code == 2 and "Traceback" not in result.output
    # Typer draws a box around its own errors where a test calls it: what is said is in it.
    said = " ".join(result.stderr.replace("│", " ").split())
    assert message in said and "run.yaml" in said, said
    assert "\x1b" not in result.stderr.replace("\x1b[", "")


def test_an_error_of_a_file_is_one_line_however_long_its_path(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path.joinpath(*["long folder " + "x" * 60] * 6)
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("source: a\nout: b\nimage-size: big")
    for arguments in (["--config", str(folder / "none.yaml")], ["--config", str(folder / "run.yaml")]):
        with pytest.raises(SystemExit) as end:
            app(arguments)
        error = capfd.readouterr().err
        assert end.value.code == 2 and len(error.splitlines()) == 1 and str(folder) in error


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "none.yaml", "x" * 300])
def test_what_is_no_file_is_not_read(path):
    result = CliRunner().invoke(app, ["--config", path])
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_sample_repeats_a_run_from_the_file_that_it_wrote(tmp_path):
    model = save_small_model(tmp_path / "m.safetensors")
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    result = run("sample", "--model", model, "--n", 2, "--steps", 2, "--seed", 5, "--labels", 1, "--out", first)
    assert result.exit_code == 0, result.stderr
    written = yaml.safe_load((tmp_path / "first.yaml").read_text())
    assert (written["n"], written["steps"], written["seed"], written["labels"]) == (2, "2", 5, "1")
    result = run("sample", "--config", tmp_path / "first.yaml", "--out", again)
    assert result.exit_code == 0 and first.read_bytes() == again.read_bytes()
    run("sample", "--config", tmp_path / "first.yaml", "--out", again, "--seed", 6)
    assert first.read_bytes() != again.read_bytes()


def test_a_folder_of_samples_has_its_options_in_it(tmp_path):
    model = save_small_model(tmp_path / "m.safetensors")
    run("sample", "--model", model, "--n", 2, "--steps", 2, "--out", tmp_path / "s")
    assert yaml.safe_load((tmp_path / "s" / "config.yaml").read_text())["n"] == 2
    result = run("sample", "--config", tmp_path / "s")
    assert result.exit_code == 0 and "2 of 2 images are in" in result.stdout


def test_a_run_that_fails_writes_no_options(tmp_path):
    result = run("sample", "--model", tmp_path / "none.safetensors", "--out", tmp_path / "x.png")
    assert result.exit_code == 2 and not list(tmp_path.iterdir())


def test_a_measurement_is_repeated_and_answers_with_its_report(tmp_path):
    model = save_small_model(tmp_path / "m.safetensors")
    arguments = ("--model", model, "--n", 2, "--samplers", "ddpm:2,ddim:2", "--reference", "ddim:3", "--json")
    first = json.loads(run("evaluate", "samplers", *arguments, "--out", tmp_path / "a.json").stdout)
    assert first["report"] == json.loads((tmp_path / "a.json").read_text())
    again = run("evaluate", "samplers", "--config", tmp_path / "a.yaml", "--out", tmp_path / "b.json", "--json")
    (*_, before), (*_, after) = (said["report"]["samplers"] for said in (first, json.loads(again.stdout)))
    assert before["mean_levels"] == after["mean_levels"] > 0 and (tmp_path / "b.yaml").exists()
