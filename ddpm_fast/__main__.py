"""`ddpm-fast COMMAND` and `python -m ddpm_fast COMMAND`: what the commands are, and any of them."""

import importlib

from ddpm_fast import starting


def main() -> None:
    """The console script `ddpm-fast`."""
    starting.begin()
    importlib.import_module("ddpm_fast.commands.front").run()


if __name__ == "__main__":
    main()
