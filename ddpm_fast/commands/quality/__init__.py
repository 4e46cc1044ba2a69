"""What stands behind `python -m ddpm_fast.evaluate fid|kid|pr|is|all` and `card`: samples compared with real images.

settings.py has the options, and opening.py opens and checks all that they name: the real images (reference.py,
files.py) and the samples (samples.py, drawing.py, classes.py). session.py measures, batch by batch (counting.py), in
several ranks (running.py). report.py is what is written and printed, sweep.py does that for many ways of drawing,
page.py and card.py put it on pages, and command.py is the command.
"""
