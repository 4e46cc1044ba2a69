"""MkDocs hook: pages that lie outside docs/, and links that lead out of docs/.

On GitHub a page links to any file of the repository. In the site a link to a page in PAGES becomes one to that page of
the site, and a link to any other file of the repository becomes one to a copy of it below files/. Where the text of a
link is the name of a page's file, it becomes the page's title.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {  # from the path in the repository to the path in the site
    "README.md": "index.md",  # index.md is there already
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "measuring.md",
    "benchmarks/results/h200-2026-11-26/README.md": "h200.md",
    "ddpm_fast/datasets/CREDITS.md": "credits.md",
}
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)  # what is in brackets there is no link
NAMED = re.compile(
    r"\[[\w./-]+\.md\]\(((?!\w+:|#|/)[^)#\s]+)"
)  # its text is the name of a file: on the site, its title
LINK = re.compile(r'(\]\(|<img src=")(?!\w+:|#|/)([^)#"\s]+)')


def _in_repository(page: str) -> str:
    """The path in the repository of the site's page of that path."""
    return next((path for path, name in PAGES.items() if name == page and path != "README.md"), f"docs/{page}")


def _in_site(path: str) -> str:
    """The path in the site of the repository's file of that path."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")


def _target(page: str, link: str) -> str:
    """The file of the repository that a link on the site's page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(page)), link))


def on_files(files, config):
    """Add the pages of PAGES, and the files that some page links to."""
    for path, name in PAGES.items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    for page in list(files.documentation_pages()):
        for _, link in LINK.findall(CODE.sub("", page.content_string)):
            target = _target(page.src_uri, link)
            name = _in_site(target)
            if name.startswith("files/") and (ROOT / target).is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links lead to where their targets are in the site."""
    here = page.file.src_uri

    def moved(match):
        name = _in_site(_target(here, match[2]))
        return match[1] + posixpath.relpath(name, posixpath.dirname(here) or ".")

    def titled(match):
        other = files.get_file_from_path(_in_site(_target(here, match[1])))
        return f"[{other.page.title}]({match[1]}" if other and other.page else match[0]

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(moved, NAMED.sub(titled, part)) for part in parts[::2]]
    return "".join(parts)
