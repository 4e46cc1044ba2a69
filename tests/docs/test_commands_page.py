"""docs/commands.md: its commands run, with fewer steps and a small network, and its lists are those of the code."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import yaml
from support.train_command import SMALL
from typer.testing import CliRunner

from ddpm_fast.commands import front
from ddpm_fast.commands.training.table import COLUMNS

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]


def shortened(number, arguments):
    """The arguments of a command with fewer steps. Later trainings take more, so that a resumed one has some left."""
    if arguments[0] == "train":
        return [*arguments, *SMALL, f"--steps={number + 1}"]
    return [*arguments, "--steps=2"] if arguments[0] == "sample" and "--help" not in arguments else arguments


def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    Path("run.yaml").write_text(text)
    done = 0
    for number, (program, *arguments) in enumerate(COMMANDS):
        assert program == "ddpm-fast"
        if not arguments or arguments[0].endswith("-completion"):  # which looks at the shell, and changes its files
            continue
        if any("wandb" in argument for argument in arguments) and importlib.util.find_spec("wandb") is None:
            continue
        result = CliRunner().invoke(front.app, shortened(number, arguments), prog_name=program, catch_exceptions=False)
        assert result.exit_code == 0, f"{arguments}: {result.stdout}{result.stderr}"
        if "--json" in arguments:
            said = json.loads(result.stdout)
            assert said["command"] == f"ddpm-fast {arguments[0]}" and all(map(Path.exists, map(Path, said["written"])))
        done += 1
    assert done >= 12 and Path("others.png").exists() and Path("others.yaml").exists()
    first, second = (yaml.safe_load(Path("runs", name, "config.yaml").read_text()) for name in ("digits", "second"))
    assert first["lr"] == second["lr"] == 1e-3 and (first["seed"], second["seed"]) == (0, 1)
    assert Path("runs/digits/config.yaml").read_text() != text


def test_the_list_is_that_of_the_code(capsys, monkeypatch):
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?)(?:: \[.*)? \|$", PAGE, flags=re.M))
    assert {name: rows.get(name) for name in front.COMMANDS} == front.COMMANDS
    monkeypatch.setattr(sys, "argv", ["ddpm-fast"])
    front.run()
    assert capsys.readouterr().out == front.page("ddpm-fast ")


def test_the_columns_are_those_of_the_code():
    (said,) = re.findall(r"The columns of `log\.csv` are (.*?)\n\n", PAGE, flags=re.DOTALL)
    named = re.findall(r"`(\w+)`", said)
    expected = [name for name in COLUMNS if name not in ("loss_q1", "loss_q2")]  # "to" stands for them
    assert [name for name in named if name in COLUMNS] == expected
