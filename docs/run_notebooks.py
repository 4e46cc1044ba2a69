"""Executes notebooks of docs/notebooks and keeps their outputs: python docs/run_notebooks.py [NAME ...]

`--heads` executes nothing and writes only what the first two cells of every notebook share: the badge that opens it in
Colab, and the installation there. Both name the project's repository, which is stated once: as `repo_url` in
mkdocs.yml, or as PLACEHOLDER here while that has none. tests/docs/test_notebooks.py checks it.
"""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
PLACEHOLDER = "https://github.com/OWNER/ddpm_fast"  # OWNER: whoever publishes the project


def repository() -> str:
    """The address of the project's repository."""
    site = ROOT / "mkdocs.yml"
    stated = re.search(r"^repo_url: *(\S+)", site.read_text(), flags=re.M) if site.exists() else None
    return stated[1].rstrip("/") if stated else PLACEHOLDER


def badge(name: str) -> str:
    """The first line of the notebook of this name."""
    path = repository().removeprefix("https://github.com/")
    opened = f"https://colab.research.google.com/github/{path}/blob/main/docs/notebooks/{name}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({opened})"


def installation() -> str:
    """The first cell of code of each notebook."""
    return f"""# In Colab this installs the package; it does nothing where it is installed already.
import importlib.util
import os

if importlib.util.find_spec("ddpm_fast") is None:
    %pip install -q git+{repository()}

QUICK = os.environ.get("DDPM_FAST_QUICK") == "1"  # smaller sizes, to test that every cell runs"""


def write_head(notebook: nbformat.NotebookNode, name: str) -> None:
    """Put the badge and the installation where they belong."""
    title, code = notebook.cells[:2]
    lines = title.source.splitlines()
    title.source = "\n".join([badge(name), *(lines[1:] if lines[0].startswith("[![Open in Colab]") else ["", *lines])])
    code.source = installation()


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave out what differs from one execution or machine to the next: times, versions, progress bars."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}
        if cell.cell_type == "code":
            cell.outputs = _joined(output for output in cell.outputs if output.get("name") != "stderr")


def _joined(outputs: Iterable[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs, with what was printed in several pieces as one, and each picture in one format."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        output.get("data", {}).pop("image/jpeg", None)  # Pillow gives every picture as a PNG and as a JPEG
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main(names: list[str]) -> None:
    heads_only = names == ["--heads"]
    os.environ.pop("DDPM_FAST_QUICK", None)
    os.environ["PYTHONPATH"] = str(ROOT)
    paths = sorted(FOLDER.glob("*.ipynb")) if heads_only or not names else [FOLDER / f"{name}.ipynb" for name in names]
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        write_head(notebook, path.stem)
        if not heads_only:
            NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
        clean(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
