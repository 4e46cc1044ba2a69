"""A command that needs more memory than there is says so, without a traceback."""

import re

import pytest
import torch
import typer

from ddpm_fast.commands.common import plain_errors


def ask_torch():
    torch.empty(2**60, dtype=torch.uint8)


def ask_python():
    raise MemoryError


def ask_the_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")


@pytest.mark.parametrize("ask", [ask_torch, ask_python, ask_the_gpu])
def test_a_lack_of_memory_is_told_in_one_line(capfd, ask):
    with pytest.raises(typer.Exit) as ended, plain_errors():
        ask()
    said = capfd.readouterr().err
    assert ended.value.exit_code == 2
    assert re.match(r"Error: there is not enough memory \(.*\): take a smaller --batch-size, .*\n$", said)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="another"), plain_errors():
        raise RuntimeError("another")
    with pytest.raises(typer.Exit) as ended, plain_errors():
        raise typer.Exit(7)
    assert ended.value.exit_code == 7
