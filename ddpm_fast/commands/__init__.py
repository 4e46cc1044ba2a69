"""What stands behind each `python -m ddpm_fast.X`: parse, check, act."""
