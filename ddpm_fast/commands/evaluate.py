"""`python -m ddpm_fast.evaluate`: measure a model (likelihood.py), compare samplers (comparing.py), or compare samples
with real images and put all that is known of a model on a page (quality/)."""

from ddpm_fast.commands.common import App
from ddpm_fast.commands.comparing import samplers
from ddpm_fast.commands.likelihood import nll
from ddpm_fast.commands.quality.card import card
from ddpm_fast.commands.quality.command import HELP, quality

app = App(keeps_config=True)
app.command()(nll)
app.command()(samplers)
for name, text in HELP.items():
    app.command(name, help=text)(quality)
app.command()(card)


@app.callback()
def evaluate() -> None:
    """Measure a model, compare samplers, compare samples with real images, or put all of it on a card."""
