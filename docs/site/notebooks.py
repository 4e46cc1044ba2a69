"""MkDocs hook: the notebooks of docs/notebooks/ as pages, with what their cells printed and drew where the file has it.

A notebook is a list of cells, whose text is Markdown or Python (https://nbformat.readthedocs.io). The file itself is in
the site as well, beside its page.
"""

import json
import re
from pathlib import PurePosixPath

from mkdocs.structure.files import File

BADGE = re.compile(r"\[!\[([^\]]*)\]\(https?:[^)]*\)\]")  # a picture of another host, as a link: its text will do
LINK = re.compile(r"(\]\((?!\w+:|#|/)[^)#\s]*)\.ipynb(?=[)#])")


def _fenced(text, language=""):
    return f"````{language}\n{text.rstrip()}\n````"


def _shown(output):
    """What a cell printed, drew or gave, as Markdown."""
    if output["output_type"] == "stream":
        return _fenced("".join(output["text"]), "text")
    data = output.get("data", {})
    if "image/png" in data:
        return f"![Drawn by the cell above](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})"
    return _fenced("".join(data["text/plain"]), "text") if "text/plain" in data else ""


def to_markdown(notebook):
    """The Markdown of a notebook, given as its JSON."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts += [_fenced(text, "python"), *map(_shown, cell["outputs"])]
        else:
            parts.append(BADGE.sub(r"[\1]", text))
    return "\n\n".join(part for part in parts if part) + "\n"


def on_files(files, config):
    """Add a page for each notebook."""
    for file in [file for file in files if PurePosixPath(file.src_uri).match("notebooks/*.ipynb")]:
        name, link = file.src_uri.removesuffix(".ipynb"), PurePosixPath(file.src_uri).name
        content = to_markdown(json.loads(file.content_string))
        content += f'\n<a class="md-button" href="{link}" download>Download this notebook</a>\n'
        files.append(File.generated(config, f"{name}.md", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links to a notebook lead to its page."""
    return LINK.sub(r"\1.md", markdown)
