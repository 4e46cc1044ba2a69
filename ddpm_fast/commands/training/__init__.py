"""What stands behind `python -m ddpm_fast.train`: from its options to a trainer (setup.py, images.py, resuming.py,
fine_tuning.py), the run (run.py), and what it saves, shows and measures on the way."""
