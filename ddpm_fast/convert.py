"""`python -m ddpm_fast.convert`: keep another library's model as a file of ours."""

from ddpm_fast.commands.convert import app

if __name__ == "__main__":
    app()
