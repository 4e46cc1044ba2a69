"""What every command does at the terminal: errors and warnings on unbroken lines, nothing that a terminal obeys, home
folders, and quiet ends."""

import os
import pickle
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import pytest
from support.commands import run
from typer.testing import CliRunner

import ddpm_fast as df
from ddpm_fast.commands.common import App, console, expand_home, path_option, plain_errors, say_written
from ddpm_fast.errors import InputError
from ddpm_fast.ops.backends import extension

DOORS = ("sample", "train", "prepare", "info", "evaluate", "plot", "convert", "export")


def command(action):
    """A command that does what action(path, text) does."""
    app = App()

    @app.command()
    def main(
        path: Annotated[Path | None, path_option("a path")] = None,
        text: Annotated[str, path_option("a path or a name")] = "~/default",
    ) -> None:
        with plain_errors():
            action(path, text)

    return app


def invoke(action, *arguments):
    return CliRunner().invoke(command(action), list(arguments), catch_exceptions=False)


def door(name, *arguments, **options):
    """What `python -m ddpm_fast.NAME` does, in a process of its own."""
    command = [sys.executable, "-m", f"ddpm_fast{'.' if name else ''}{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def refuse(path, text):
    raise InputError(f"there is no {path}")


def test_a_path_in_an_error_is_on_one_line_and_its_markup_is_not_obeyed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/tmp/[bold]a folder/:smile:/" + "long/" * 50 + "file.png"
    result = invoke(refuse, "--path", path)
    assert result.exit_code == 2 and result.stderr == f"Error: there is no {path}\n"


HOSTILE = "a\x1b[31mred\x07\r\u202egnp.exe"
SHOWN = r"a\x1b[31mred\x07\x0d\u202egnp.exe"


def warn(path, text):
    warnings.warn(f"{path} is odd", stacklevel=1)


@pytest.mark.parametrize(
    "action",
    [refuse, warn, lambda path, text: console.print(f"it is {path}"), lambda path, text: say_written(path)],
    ids=["error", "warning", "output", "written"],
)
def test_control_characters_do_not_reach_the_terminal(action):
    result = invoke(action, "--path", HOSTILE)
    assert SHOWN in result.stdout + result.stderr
    assert not any(bad in result.stdout + result.stderr for bad in "\x1b\x07\r\u202e")


def test_a_file_that_the_system_refuses_is_an_error_and_not_a_traceback(tmp_path):
    result = invoke(lambda path, text: path.read_text(), "--path", str(tmp_path / ("x" * 300)))
    assert result.exit_code == 2 and result.stderr == f"Error: File name too long: {tmp_path / ('x' * 300)}\n"


LONG = "x" * 300 + ".png"


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--init-image", LONG),
        ("sample", "--model", LONG),
        ("sample", "--out", LONG),
        ("sample", "--gif", LONG.replace("png", "gif")),
        ("evaluate", "nll", "--data", LONG),
        ("evaluate", "nll", "--data", "mnist5k", "--out", LONG.replace("png", "json")),
        ("plot", "noising", "--image", LONG),
        ("plot", "bound", LONG),
        ("train", "--data", LONG, "--out", "run"),
    ],
    ids=lambda arguments: " ".join(arguments[:-1]),
)
def test_a_name_that_is_too_long_is_an_error_and_not_a_traceback(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and "x" * 200 in result.stderr


def test_a_warning_is_a_line_without_code_and_warnings_stay_as_they_were_outside():
    before = warnings.showwarning
    result = invoke(warn, "--path", "b.png")
    assert result.exit_code == 0 and result.stderr == "Warning: b.png is odd\n"
    assert warnings.showwarning is before


def test_the_home_folder_after_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    seen = []
    assert invoke(lambda *values: seen.extend(values), "--path=~/a", "--text=~/b").exit_code == 0
    assert seen == [tmp_path / "a", f"{tmp_path}{os.sep}b"]
    invoke(lambda *values: seen.extend(values), "--text", "a~b")
    assert seen[2:] == [None, "a~b"]


@pytest.mark.parametrize("name", DOORS)
def test_every_path_of_every_command_expands_the_home_folder(name):
    for command in import_module(f"ddpm_fast.commands.{name}").app.registered_commands:
        for option, hint in get_type_hints(command.callback, include_extras=True).items():
            if option in ("data", "model", "out") or "Path" in str(get_args(hint)[:1]):
                made_by = [extra.callback for extra in hint.__metadata__]
                assert made_by == [expand_home], f"{name}: --{option} is made without path_option"


def test_missing_kernels_are_said_on_one_line_by_every_command(monkeypatch):
    monkeypatch.setattr(extension, "unavailable", "no C++ compiler was found\x1b")
    result = invoke(lambda path, text: None)
    assert result.exit_code == 0 and len(result.stderr.splitlines()) == 1
    assert r"the fast kernels are missing, so all is slower: no C++ compiler was found\x1b" in result.stderr


def test_a_wrong_option_is_an_unbroken_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    app = command(refuse)
    for arguments, text in (
        (["/a/very/long/path/" + "x" * 99 + HOSTILE], "x" * 99 + SHOWN),
        (["--pat\x1bx=1"], r"--pat\x1bx"),
    ):
        with pytest.raises(SystemExit) as end:
            app(arguments)
        error = capsys.readouterr().err
        assert end.value.code == 2 and len(error.splitlines()) == 1 and text in error and "--help" in error


def test_a_command_ends_the_process_with_its_status(capsys):
    def interrupted(path, text):
        raise KeyboardInterrupt

    for action, arguments, status in ((refuse, [], 2), (interrupted, [], 130), (lambda *_: None, [], 0)):
        with pytest.raises(SystemExit) as end:
            command(action)(arguments)
        assert end.value.code == status
    assert "Traceback" not in capsys.readouterr().err


SLOW_TORCH = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"


@pytest.mark.parametrize("arguments", [(name,) for name in DOORS] + [("", "train")], ids=" ".join)
def test_ctrl_c_during_the_imports_ends_quietly(arguments, tmp_path):
    # A torch that sends SIGINT while it is imported, and which Python finds before the real one.
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    result = door(*arguments, "--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_ctrl_c_while_another_program_imports_the_package_is_that_programs(tmp_path):
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    result = subprocess.run(
        [sys.executable, "-c", "try:\n    import ddpm_fast.ops\nexcept KeyboardInterrupt:\n    print('mine')"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout == "mine\n", result.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no /bin/sh")
def test_a_reader_that_has_enough_ends_a_command_quietly():
    shell = f"{sys.executable} -m ddpm_fast.info | head -n 1"
    result = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("ddpm_fast") and result.stderr == ""


def test_the_sample_function_can_be_pickled_when_the_command_of_that_name_is_imported():
    import_module("ddpm_fast.sample")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(df.sample, protocol)) is df.sample


@pytest.mark.parametrize("name", DOORS)
def test_a_door_hides_no_public_name(name):
    before = getattr(df, name, None)
    import_module(f"ddpm_fast.{name}")
    assert name not in df.__all__ or getattr(df, name) is before
