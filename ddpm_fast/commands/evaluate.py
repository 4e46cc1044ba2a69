"""`python -m ddpm_fast.evaluate`: measure a model (likelihood.py), or compare samplers (comparing.py)."""

from ddpm_fast.commands.common import App
from ddpm_fast.commands.comparing import samplers
from ddpm_fast.commands.likelihood import nll

app = App()
app.command()(nll)
app.command()(samplers)


@app.callback()
def evaluate() -> None:
    """Measure a model, or compare samplers."""
