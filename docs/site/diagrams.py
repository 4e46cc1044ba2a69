"""MkDocs hook: mermaid diagrams become SVG when the site is built, so that no page needs mermaid's script."""

import re
from textwrap import wrap

from merm import render_diagram

DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```", re.DOTALL | re.MULTILINE)
LABEL = re.compile(r'(?<=\[")[^"]*(?="\])')
WIDTH = 22  # letters in a line of a label: merm breaks longer ones itself, but makes no room for the lines then


def _broken(match):
    lines = re.split(r"<br */?>", match[0])
    return "<br/>".join(part for line in lines for part in wrap(line, WIDTH))


def _drawn(match):
    svg = render_diagram(LABEL.sub(_broken, match[1]))
    # In one line, because a blank line would end the block of HTML.
    return f'<div class="diagram">{"".join(line.strip() for line in svg.splitlines())}</div>'


def on_page_markdown(markdown, page, config, files):
    """Draw the diagrams of a page."""
    return DIAGRAM.sub(_drawn, markdown)
