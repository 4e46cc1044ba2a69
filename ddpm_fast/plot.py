"""`python -m ddpm_fast.plot`: draw the theory."""

from ddpm_fast.commands.plot import app

if __name__ == "__main__":
    app()
