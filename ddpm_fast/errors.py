"""The exception that means "your input was wrong", as opposed to "the package has a bug"; text that is safe to show.

Commands print its message and exit with status 2. Every other exception keeps its traceback.
"""

import unicodedata

# Marks that change the direction of the text around them, so that a name can pass for another one.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSAFE = ("Cc", "Cs", "Zl", "Zp")  # controls (ESC and newlines among them), lone surrogates, line separators


class InputError(ValueError):
    """Wrong input. The message says what was wrong, what was expected, and what to do."""


def printable(text: str) -> str:
    r"""The text on one line, with nothing in it that a terminal obeys or that cannot be encoded.

    Names of files and classes come from other people. A control character, a line separator, a bidirectional mark or
    a lone surrogate (a byte of a file name that is not UTF-8) becomes its escape, such as \x1b or \u202e.
    """
    if text.isprintable():
        return text
    return "".join(_escape(char) if char in _BIDI or unicodedata.category(char) in _UNSAFE else char for char in text)


def _escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}"
