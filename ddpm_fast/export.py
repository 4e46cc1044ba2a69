"""`python -m ddpm_fast.export`: a model for other libraries and programs, and on the Hugging Face Hub."""

from ddpm_fast.commands.export import app

if __name__ == "__main__":
    app()
