"""`python -m ddpm_fast.evaluate`: measure a model (likelihood.py), compare samplers (comparing.py), or compare samples
with real images (quality/)."""

from ddpm_fast.commands.common import App
from ddpm_fast.commands.comparing import samplers
from ddpm_fast.commands.likelihood import nll
from ddpm_fast.commands.quality.command import HELP, quality

app = App()
app.command()(nll)
app.command()(samplers)
for name, text in HELP.items():
    app.command(name, help=text)(quality)


@app.callback()
def evaluate() -> None:
    """Measure a model, compare samplers, or compare samples with real images."""
