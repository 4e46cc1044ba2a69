"""--json: one line of JSON on standard output, and everything else on standard error."""

import json
from typing import Annotated

import pytest
import typer
from support.commands import run, save_small_model
from typer.testing import CliRunner

import ddpm_fast as df
from ddpm_fast.commands.common import App, console, plain_errors, say_written
from ddpm_fast.commands.outcome import note
from ddpm_fast.errors import InputError


def command(action):
    app = App()

    @app.command()
    def main(text: Annotated[str, typer.Option()] = "") -> None:
        with plain_errors():
            action()

    return app


def answer(action, *arguments):
    return CliRunner().invoke(command(action), list(arguments), catch_exceptions=False)


def test_the_answer_is_one_line_and_the_rest_is_on_standard_error(tmp_path):
    def act():
        console.print("working")
        note(loss=float("nan"), parts=[1.5, float("inf")], name="\u2028é")
        say_written(tmp_path / "a b.png")

    result = answer(act, "--json")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 1 and result.stdout.isascii()
    said = json.loads(result.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert said.pop("seconds") >= 0 and said.pop("command")
    path = str((tmp_path / "a b.png").resolve())
    assert said == {"status": 0, "written": [path], "loss": None, "parts": [1.5, None], "name": "\u2028é"}
    assert "working" in result.stderr and path in result.stderr
    result = answer(act)
    assert "working" in result.stdout and result.stderr == ""


def test_what_fails_says_so_with_its_status_and_answers_nothing():
    def fail():
        raise InputError("no")

    result = answer(fail, "--json")
    assert result.exit_code == 2 and result.stdout == "" and result.stderr == "Error: no\n"

    def differ():
        note(difference=1.0)
        raise typer.Exit(1)

    result = answer(differ, "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == said["status"] == 1 and said["difference"] == 1.0


def test_several_processes_answer_once(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    result = answer(lambda: None, "--json")
    assert result.exit_code == 0 and result.stdout == ""


def test_info_answers_with_what_is_active_and_what_a_model_is(tmp_path):
    said = json.loads(run("info", "--json").stdout)
    assert said["version"] == df.__version__ and said["models"] == df.available_models()
    assert said["active"]["cpu"]["normal"] == df.ops.active_backend("normal", "cpu")
    assert {backend["name"] for backend in said["backends"]} >= {"cpu", "reference"}
    model = save_small_model(tmp_path / "m.safetensors")
    said = json.loads(run("info", model, "--json").stdout)
    assert said["status"] == 0 and said["difference"] is None and "8" in json.dumps(said["model"])


def test_sample_and_convert_answer_with_what_they_wrote(tmp_path):
    model = save_small_model(tmp_path / "m.safetensors")
    result = run("sample", "--model", model, "--n", 3, "--steps", 2, "--out", tmp_path / "s.png", "--json")
    said = json.loads(result.stdout)
    assert said["written"] == [str((tmp_path / "s.png").resolve())] and said["drawn"] == said["images"] == 3
    assert said["shape"] == [3, 8, 8] and 0 < said["drawing_seconds"] <= said["seconds"]
    said = json.loads(run("convert", model, "--out", tmp_path / "c.safetensors", "--json").stdout)
    assert said["written"] == [str((tmp_path / "c.safetensors").resolve())] and said["difference"] < 1e-3
