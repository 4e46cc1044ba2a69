"""MkDocs hook: equations become MathML when the site is built, which browsers show without a script.

`pymdownx.arithmatex` marks the TeX between dollar signs and latex2mathml translates it. The font is STIX Two Math (SIL
Open Font License 1.1), from the package ziamath: not every machine has one with brackets of all sizes.
"""

import html
import re
import unicodedata
from importlib.util import find_spec
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

log = get_plugin_logger("mathematics")
FONT = Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
MARKED = re.compile(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL)
IN_HEADING = re.compile(r"\\\((.*?)\\\)")  # a table of contents has the text of headings alone
# What latex2mathml does not know, by what it knows.
SYNONYMS = {
    r"\\(begin|end)\{aligned\}": r"\\\1{split}",
    r"(\\[bB]igg?[lr]?)\\\|": r"\1‖",
}
# Browsers know no other variant of letters than "normal": the others are letters of their own in Unicode.
VARIANT = re.compile(r'<(m[ino])([^>]*?) mathvariant="(double-struck|script|bold|bold-italic|fraktur)">([^<]+)</\1>')
BAR = re.compile(r'<mover>((?:(?!<mover>).)*?)<mo stretchy="true">&#x000AF;</mo></mover>')
# TeX leaves a thin space between the name of a function and a letter or number beside it.
FUNCTION = "<mi>[a-z]{2,}</mi>"
SPACED = re.compile(rf"</(?:mn|mfrac|mstyle)>(?={FUNCTION})|(?<!<msup>)(?<!<msub>){FUNCTION}(?=<m[^o])")
UNKNOWN = re.compile(r"\\[A-Za-z|]+|<mi>&</mi>|linebreak=\"newline\"")


def _letters(match):
    tag, attributes, variant, text = match.groups()
    letters = [_letter(variant.upper().replace("BOLD-", "BOLD "), letter) for letter in html.unescape(text)]
    return f"<{tag}{attributes}>{''.join(letters)}</{tag}>"


def _letter(variant, letter):
    name = unicodedata.name(letter)
    for word in ("LATIN ", "GREEK ", "LETTER "):
        name = name.replace(word, "")
    for prefix in ("MATHEMATICAL ", "", "BLACK-LETTER "):  # ℝ and some others are older than the block of the rest
        try:
            return unicodedata.lookup(f"{prefix}{variant} {name}")
        except KeyError:
            continue
    return letter


def to_mathml(tex, display):
    """The MathML of an equation; a warning, which a strict build does not pass, says what was not understood."""
    for pattern, known in SYNONYMS.items():
        tex = re.sub(pattern, known, tex)
    found = VARIANT.sub(_letters, convert(tex, display="block" if display else "inline"))
    # As an accent it is as large as the letter; otherwise it would be of the size of an exponent.
    found = BAR.sub(r'<mover accent="true">\1<mo stretchy="false">&#x000AF;</mo></mover>', found)
    found = SPACED.sub(r'\g<0><mspace width="0.167em" />', found)
    if unknown := UNKNOWN.search(found):
        log.warning("%r is not understood in the equation %r", unknown[0], tex)
    return found


def on_files(files, config):
    """Add the font."""
    files.append(File.generated(config, "fonts/stix-two-math.ttf", content=FONT.read_bytes()))
    return files


def on_page_content(content, page, config, files):
    """Translate the equations of a page and of its table of contents."""
    waiting = list(page.toc)
    while waiting:
        entry = waiting.pop()
        entry.title = IN_HEADING.sub(lambda found: to_mathml(html.unescape(found[1]), False), entry.title)
        waiting += entry.children
    return MARKED.sub(lambda found: to_mathml(html.unescape(found[2]).strip(), found[1] == "["), content)
