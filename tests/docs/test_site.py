"""The site builds without a warning, its links lead somewhere, and it loads nothing from other hosts."""

import html
import importlib
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers", "latex2mathml", "ziamath", "merm")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing (install the 'docs' extra)")
PUBLIC = ("", ".ops", ".metrics", ".metrics.features", ".nn", ".data", ".loops.editing")
# Editing is public by its functions; what prepares them is for the commands.
EDITING = ("encode", "decode", "image_to_image", "inpaint", "interpolate", "round_trip")
INSIDE = {
    *(f"ddpm_fast.loops.editing.prepare_{name}" for name in EDITING),
    "ddpm_fast.loops.editing.RoundTrip",
    "ddpm_fast.loops.editing.LatentInterpolation",
}


class Page(HTMLParser):
    """What a page has to be checked for: the names in it, where it leads, and what a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if name := given.get("id") or (tag == "a" and given.get("name")):
            self.ids[name] += 1
        if tag == "a" and given.get("href") is not None:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given["href"])
        self.loaded += [given[name] for name in ("src", "poster", "data") if given.get(name)]
        self.loaded += re.findall(r"url\([\"']?([^\"')]+)", given.get("style") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built strictly: a warning is an error."""
    commands, config = importlib.import_module("mkdocs.commands.build"), importlib.import_module("mkdocs.config")
    folder = tmp_path_factory.mktemp("site")
    commands.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.fixture(scope="module")
def pages(site):
    # The page for addresses that do not exist has no address of its own, so its links are absolute.
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def local(page: Path, target: str) -> Path | None:
    """The file that a target on a page names, or None for one of another host."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return None
    return (page.parent / unquote(parts.path)).resolve() if parts.path else page


def test_every_link_and_anchor_leads_somewhere(site, pages):
    missing = []
    for path, page in pages.items():
        for link in page.links:
            other, anchor = local(path, link), unquote(urldefrag(link).fragment)
            if other is None:
                continue
            other = other / "index.html" if other.is_dir() else other
            if not other.exists() or (anchor and anchor not in pages[other].ids):
                missing.append(f"{path.relative_to(site)}: {link}")
    assert not missing
    assert sum(len(page.links) for page in pages.values()) > 1000


def test_every_picture_script_and_style_is_there_and_of_this_host(site, pages):
    found = [(path, target) for path, page in pages.items() for target in page.loaded if not target.startswith("data:")]
    foreign = {target for path, target in found if local(path, target) is None}
    assert not foreign, f"loaded from other hosts: {foreign}"
    missing = {target for path, target in found if not local(path, target).is_file()}
    assert not missing
    assert any(target.endswith("mnist-samples.png") for _, target in found)


def test_no_style_loads_from_another_host(site):
    styles = [*site.rglob("*.css")]
    for path in styles:
        for target in re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", path.read_text()):
            if not target.startswith(("data:", "#")):
                assert local(path, target) is not None and local(path, target).is_file(), f"{path.name}: {target}"
    assert len(styles) >= 2


def test_material_does_not_load_mermaid(site, pages):
    """Its script fetches mermaid from another host where an element of that class is; ours are drawn already."""
    assert all('class="mermaid"' not in path.read_text() for path in pages)
    assert (site / "architecture.html").read_text().count('<div class="diagram"><svg') == 1


def test_a_page_has_the_parts_that_it_has_on_github(site, pages):
    """Python-Markdown begins a list only after an empty line, and reads some other things otherwise than CommonMark."""
    sources = {path: ROOT / "docs" / path.relative_to(site).with_suffix(".md") for path in pages}
    sources[site / "contributing.html"] = ROOT / "CONTRIBUTING.md"
    parser, differences, compared = MarkdownIt("commonmark").enable("table"), [], 0
    for path, source in sources.items():
        if not source.exists() or path.parent.name == "reference":
            continue
        there = parser.render(re.sub(r"^```mermaid.*?^```", "", source.read_text(), flags=re.DOTALL | re.MULTILINE))
        here = path.read_text().partition("<article")[2].partition("</article>")[0]
        for tag in ("li", "table", "tr", "pre", "h2", "h3", "blockquote"):
            counts = [len(re.findall(rf"<{tag}\b", text)) for text in (here, there)]
            differences += (
                [f"{path.name} has {counts[0]} of <{tag}>, not {counts[1]}"] if counts[0] != counts[1] else []
            )
            compared += counts[1]
    assert not differences
    assert compared > 1000


def test_equations_are_mathml(site, pages):
    assert (site / "math.html").read_text().count("<math ") > 100
    for path in pages:
        text = re.sub(r"<(code|pre|script)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
        assert "arithmatex" not in text and not re.search(r"\\\(|\\\[|\$\$|\\frac", text), path.name


def definition(full: str) -> str:
    """Where the thing of that public name is defined; a constant, which does not know it, is where it is named."""
    owner, _, name = full.rpartition(".")
    if owner not in sys.modules:
        return full
    return f"{getattr(getattr(sys.modules[owner], name, None), '__module__', owner)}.{name}"


def test_names_in_the_text_lead_to_the_reference(site):
    found = re.findall(
        r'<a [^>]*href="reference/ops.html#ddpm_fast.ops.q_sample"[^>]*>', (site / "math.html").read_text()
    )
    assert len(found) == 1


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference_once(pages, module):
    owner = importlib.import_module(f"ddpm_fast{module}")
    ids = [name for path, page in pages.items() if path.parent.name == "reference" for name in page.ids]
    shown = Counter(definition(name) for name in ids if name.startswith("ddpm_fast."))
    names = {f"ddpm_fast{module}.{name}" for name in owner.__all__ if not isinstance(getattr(owner, name), ModuleType)}
    assert not {name: shown[definition(name)] for name in names - INSIDE if shown[definition(name)] != 1}


def test_the_sections_of_docstrings_are_understood(pages):
    """griffe leaves a section as text if it is not written as Google's style has it."""
    for path in pages:
        if path.parent.name == "reference":
            text = path.read_text()
            assert not re.search(r"<p>\s*(Args|Returns|Raises|Attributes|Yields):", text), path.name
    assert sum(path.read_text().count(">Raises:<") for path in pages if path.parent.name == "reference") > 50


@pytest.fixture(scope="module")
def mathematics():
    spec = spec_from_file_location("mathematics", ROOT / "docs" / "site" / "mathematics.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("tex", "letters"),
    [(r"\mathbb E", "𝔼"), (r"\mathbb{R}", "ℝ"), (r"\mathcal L", "ℒ"), (r"\boldsymbol\mu", "𝝁")],
)
def test_letters_of_other_alphabets(mathematics, tex, letters):
    assert f">{letters}<" in html.unescape(mathematics.to_mathml(tex, False))


@pytest.mark.parametrize(
    ("tex", "spaces"), [(r"\tfrac12\log p", 2), (r"2\log(p)", 1), (r"\cos^2 x", 0), (r"\log\frac pq", 1), (r"xy", 0)]
)
def test_functions_stand_apart_from_their_argument(mathematics, tex, spaces):
    """As TeX sets them: no space before an opening bracket."""
    assert mathematics.to_mathml(tex, False).count("<mspace") == spaces


def test_what_is_not_understood_in_an_equation_is_a_warning(mathematics, caplog):
    mathematics.to_mathml(r"\begin{aligned}a&=b\\c&=\big\|d\big\|\end{aligned}", True)
    assert not caplog.records
    mathematics.to_mathml(r"\nosuchcommand x", True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
