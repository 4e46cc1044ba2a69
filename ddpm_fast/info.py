"""`python -m ddpm_fast.info`: which backends are active, and why the others are not."""

from ddpm_fast.commands.info import app

if __name__ == "__main__":
    app()
