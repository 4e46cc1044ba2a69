"""What stands behind `python -m ddpm_fast.evaluate fid|kid|pr|is|all`: samples compared with real images.

settings.py has the options, reference.py the real images, samples.py the samples (drawing.py draws them), counting.py
their features, session.py what a command has opened and checked, report.py what is written and printed, and command.py
the command.
"""
