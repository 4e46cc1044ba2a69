"""torchrun reads its own options before ours, and refuses one of ours that could be short for several of its own."""

import contextlib
import io

import pytest
import typer.main
from torch.distributed.run import get_args_parser

from ddpm_fast.commands import evaluate, prepare, sample, train


def spellings():
    """The spellings of each option of the commands that run in several processes."""
    for name, app in (("sample", sample.app), ("train", train.app), ("prepare", prepare.app)):
        for option in typer.main.get_command(app).params:
            yield pytest.param([*option.opts, *option.secondary_opts], id=f"{name} {option.name}")
    for name in ("nll", "all", "card"):
        for option in typer.main.get_command(evaluate.app).commands[name].params:
            yield pytest.param(option.opts, id=f"{name} {option.name}")


def reads(arguments):
    with contextlib.redirect_stderr(io.StringIO()):
        return get_args_parser().parse_args(["-m", "ddpm_fast.x", *arguments]).training_script_args == arguments


@pytest.mark.parametrize("options", list(spellings()))
def test_torchrun_passes_on_each_option_in_one_spelling_at_least(options):
    passed = []
    for option in options:
        with contextlib.suppress(SystemExit):
            passed += [option] * reads([option, "4"])
    assert passed
