"""MkDocs hook: a name of ours in a page's text, such as `df.UNet` or `ddpm_fast.ops.normal`, leads to the reference."""

import re

NAME = re.compile(r"<a\b.*?</a>|<code>((?:df|ddpm_fast)(?:\.\w+)+)</code>", re.DOTALL)  # what is a link stays one
ELSEWHERE = {"ddpm_fast.sample": "ddpm_fast.loops.sampling.sample"}  # the module of that name is a command


def _link(match):
    if match[1] is None:
        return match[0]
    name = re.sub(r"^df\b", "ddpm_fast", match[1])
    if match[1].startswith("df."):
        name = ELSEWHERE.get(name, name)
    return (
        f'<autoref optional identifier="{name}">{match[0]}</autoref>'  # mkdocs-autorefs finds the page, if there is one
    )


def on_page_content(content, page, config, files):
    """Mark the names on a page."""
    return NAME.sub(_link, content)
