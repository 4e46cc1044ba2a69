"""`python -m ddpm_fast.demo`: a page in the browser, to draw with models, edit pictures and look at trainings."""

from ddpm_fast.commands.demo import app

if __name__ == "__main__":
    app()
