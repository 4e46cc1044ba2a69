"""`ddpm-fast` and `python -m ddpm_fast`: the list of the commands, running one of them, and completion by the shell.
Nothing of that imports torch but the command that is chosen."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ddpm_fast as df
from ddpm_fast.commands.front import COMMANDS, app, page

PACKAGE = Path(df.__file__).parent
# What `ddpm-fast` is when it is installed: pip writes a script like this one.
SCRIPT = "import sys; sys.argv[0] = 'ddpm-fast'; from ddpm_fast.__main__ import main; main()"
NO_TORCH = "raise SystemExit('torch was imported')"


@pytest.fixture
def without_torch(tmp_path):
    """An environment in which importing torch ends the process with a message."""
    (tmp_path / "torch.py").write_text(NO_TORCH)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])}


def front(*arguments, env, start=("-c", SCRIPT)):
    return subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, timeout=120, env=env, cwd=PACKAGE.parent
    )


@pytest.mark.parametrize("start", [("-c", SCRIPT), ("-m", "ddpm_fast")], ids=["script", "module"])
@pytest.mark.parametrize("arguments", [(), ("--help",)], ids=["alone", "help"])
def test_the_list_names_every_command_without_torch(without_torch, start, arguments):
    result = front(*arguments, env=without_torch, start=start)
    assert result.returncode == 0 and result.stderr == ""
    prefix = "ddpm-fast " if start[0] == "-c" else "python -m ddpm_fast."
    assert re.findall(rf"^  {re.escape(prefix)}(\w+) {{2,}}\w", result.stdout, flags=re.M) == list(COMMANDS)


def test_the_version_and_a_wrong_name_need_no_torch(without_torch):
    assert front("--version", env=without_torch).stdout == f"ddpm_fast {df.__version__}\n"
    wrong = front("tarin", env=without_torch)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
    assert "'tarin'" in wrong.stderr and "'train'" in wrong.stderr


def test_an_error_stays_on_one_line_however_long_the_path_in_it(without_torch):
    path = "a folder/" + "long/" * 200 + "file.png"
    result = front(path, env={**without_torch, "COLUMNS": "40"})  # its output is a pipe
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and path in result.stderr


def test_ctrl_c_while_the_chosen_command_is_imported_ends_quietly(tmp_path, without_torch):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    result = front("train", "--help", env=without_torch)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


# How each shell asks for completions of `ddpm-fast e`.
ASKED = {
    "bash": {"COMP_WORDS": "ddpm-fast e", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "ddpm-fast e"},
    "fish": {"_TYPER_COMPLETE_ARGS": "ddpm-fast e", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize("shell", ASKED)
def test_a_shell_completes_the_names_without_torch(without_torch, shell):
    asked = {**without_torch, "_DDPM_FAST_COMPLETE": f"complete_{shell}", **ASKED[shell]}
    result = front(env=asked)
    found = {name for name in COMMANDS if re.search(rf"\b{name}\b", result.stdout)}
    assert result.returncode == 0 and {"evaluate", "export"} <= found and "train" not in found


def test_a_shell_completes_the_options_of_a_command():
    asked = {
        "_DDPM_FAST_COMPLETE": "complete_bash",
        "COMP_WORDS": "ddpm-fast sample --guid",
        "COMP_CWORD": "2",
    }
    result = CliRunner().invoke(app, [], env=asked, prog_name="ddpm-fast")
    assert result.stdout.split() == ["--guidance", "--guidance-rescale"]


def test_the_script_of_the_completion_calls_the_script(without_torch):
    # Typer looks for the shell among the processes that started this one, unless it is told not to.
    result = front(
        "--show-completion", "bash", env={**without_torch, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert "_DDPM_FAST_COMPLETE=complete_bash" in result.stdout and result.stdout.endswith("ddpm-fast\n")


def test_a_command_is_chosen_and_run():
    result = CliRunner().invoke(app, ["info"], catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout.startswith(f"ddpm_fast {df.__version__}")
    result = CliRunner().invoke(app, ["evaluate", "nll", "--help"], prog_name="ddpm-fast", env={"COLUMNS": "300"})
    assert "ddpm-fast evaluate nll [OPTIONS]" in result.stdout and "--config" in result.stdout


def test_every_door_is_in_the_list_in_its_own_words():
    doors = [path for path in PACKAGE.glob("*.py") if f"from ddpm_fast.commands.{path.stem} import" in path.read_text()]
    assert len(doors) >= 9
    for path in doors:
        summary = path.read_text().splitlines()[0].split("`: ")[1].rstrip('."')
        assert COMMANDS[path.stem].startswith(summary), path.name
    for name in COMMANDS.keys() - {path.stem for path in doors}:
        assert not (PACKAGE / "commands" / f"{name}.py").exists(), f"{name} has no door"


def test_the_list_fits_a_page():
    assert max(map(len, page("python -m ddpm_fast.").splitlines())) <= 120
