"""How a lack of memory is told from other errors: Python, the operating system, torch and safetensors differ in it."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from ddpm_fast.errors import InputError

# torch's allocators and safetensors raise general errors, which only their texts tell apart.
_TEXTS = re.compile(
    r"(can't|cannot|unable to|failed to) (allocate|mmap)|out of memory|not enough memory", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return bool(_TEXTS.search(str(error)))


@contextlib.contextmanager
def memory_for(what: str | os.PathLike, size: int) -> Iterator[None]:
    """Inside, a lack of memory is raised as InputError.

    Args:
        what: What the memory is for, such as the path of a file that is loaded.
        size: How many bytes are needed, about.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{what} needs about {size / 2**20:,.0f} MiB of memory, and there is not so much ({reason:.200}): close "
            "other programs, or use a machine with more memory"
        ) from error
