"""`python -m ddpm_fast.prepare`: decode images once, so that training need not."""

from ddpm_fast.commands.prepare import app

if __name__ == "__main__":
    app()
