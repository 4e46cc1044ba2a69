"""The exception that means "your input was wrong", as opposed to "the package has a bug"; checks of plain numbers; and
text that is safe to show.

Commands print its message and exit with status 2. Every other exception keeps its traceback.
"""

from __future__ import annotations

import operator
import unicodedata
from collections.abc import Callable
from numbers import Real

# Marks that change the direction of the text around them, so that a name can pass for another one.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSAFE = ("Cc", "Cs", "Zl", "Zp")  # controls (ESC and newlines among them), lone surrogates, line separators


class InputError(ValueError):
    """Wrong input. The message says what was wrong, what was expected, and what to do."""


def check_integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as a Python int.

    Args:
        name: What the number is, for the error message.
        value: Whatever counts as an integer in Python (it has __index__), such as NumPy's integers. A bool does not,
            and neither does a float, not even 3.0.
        low: The smallest integer that is allowed.
        high: The largest one, or None if there is none.

    Raises:
        InputError: If the value is no integer or outside low..high.
    """
    if type(value) is int:
        number = value
    else:
        # NumPy's and torch's bools have __index__ too, and say what they are by their dtype.
        is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
        try:
            if is_bool:
                raise TypeError
            number = operator.index(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):  # the last two are torch's
            raise InputError(
                f"{name} is {value!r:.200}, a {type(value).__name__}; expected an integer {_range(low, high)}"
            ) from None
    if number < low or (high is not None and number > high):
        raise InputError(f"{name} is {number}; expected an integer {_range(low, high)}")
    return number


def check_number(name: str, value: object, is_allowed: Callable[[float], bool], expected: str) -> float:
    """The value as a Python float.

    Args:
        name: What the number is, for the error message.
        value: A real number of Python's or NumPy's types. A bool is none.
        is_allowed: Whether a number is within the range.
        expected: The range in words, for the error message.

    Raises:
        InputError: If the value is no number or not allowed.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, Real) or not is_allowed(float(value)):
            raise OverflowError
        return float(value)
    except OverflowError:  # an int may be larger than any float
        raise InputError(f"{name} is {value!r:.200}; expected {expected}") from None


def _range(low: int, high: int | None) -> str:
    return f"of at least {_short(low)}" if high is None else f"in {_short(low)}..{_short(high)}"


def _short(number: int) -> str:
    """The number in digits, or as a power of two where it is close to one and has many digits."""
    size = abs(number)
    for rest in (0, 1):
        bits = (size + rest).bit_length() - 1
        if bits > 32 and size + rest == 1 << bits:
            return ("-" if number < 0 else "") + f"2^{bits}" + ("-1" if rest else "")
    return str(number)


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
