"""The page of `python -m ddpm_fast.demo`.

One file a tab (tab_*.py), made of Gradio's components; what the tabs say and draw is in the other files, which know
nothing of Gradio but for page.py, fields.py, gates.py and server.py. command.py has the options.
"""

from ddpm_fast.commands.demo.command import app

__all__ = ["app"]
