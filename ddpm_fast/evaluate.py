"""`python -m ddpm_fast.evaluate`: measure a model."""

from ddpm_fast.commands.evaluate import app

if __name__ == "__main__":
    app()
