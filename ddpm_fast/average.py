"""`python -m ddpm_fast.average`: average the weights of a run otherwise, when it is over."""

from ddpm_fast.commands.average import app

if __name__ == "__main__":
    app()
