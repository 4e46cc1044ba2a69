"""`python -m ddpm_fast.train`: train a model on your images."""

from ddpm_fast.commands.train import app

if __name__ == "__main__":
    app()
