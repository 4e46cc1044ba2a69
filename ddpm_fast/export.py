"""`python -m ddpm_fast.export`: write a model for another library, or publish it."""

from ddpm_fast.commands.export import app

if __name__ == "__main__":
    app()
