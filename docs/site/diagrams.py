"""MkDocs hook: mermaid diagrams become SVG when the site is built, so that no page needs mermaid's script."""

import re

from merm import render_diagram

DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```", re.DOTALL | re.MULTILINE)


def _drawn(match):
    svg = render_diagram(match[1].replace("<br>", "<br/>"))
    # In one line, because a blank line would end the block of HTML.
    return f'<div class="diagram">{"".join(line.strip() for line in svg.splitlines())}</div>'


def on_page_markdown(markdown, page, config, files):
    """Draw the diagrams of a page."""
    return DIAGRAM.sub(_drawn, markdown)
