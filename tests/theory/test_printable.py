"""Text that is shown holds nothing that a terminal obeys."""

import pytest

from ddpm_fast.errors import printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a cat/1.png", "a cat/1.png"),
        ("Füße 猫 \N{FAMILY} e\u0301", "Füße 猫 \N{FAMILY} e\u0301"),
        ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("one\ntwo\rthree\tfour\x00\x7f", r"one\x0atwo\x0dthree\x09four\x00\x7f"),
        ("one\u2028two\u2029three\x85", r"one\u2028two\u2029three\x85"),
        ("gpj\u202e.png\u2066", r"gpj\u202e.png\u2066"),
        (b"latin-1 \xfc".decode("utf-8", "surrogateescape"), r"latin-1 \udcfc"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text, shown):
    assert printable(text) == shown
    shown.encode("utf-8")
