"""`python -m ddpm_fast.sample`: draw images from a model, or edit some with it."""

import sys

from ddpm_fast.commands.sample import app
from ddpm_fast.loops.sampling import sample

if __name__ == "__main__":
    app()
else:
    # `ddpm_fast.sample` is the public function: importing this door must not put a module in its place.
    sys.modules[__name__] = sample  # type: ignore[assignment]
