"""`python -m ddpm_fast.evaluate`: measure a model, or compare samplers."""

from ddpm_fast.commands.evaluate import app

if __name__ == "__main__":
    app()
