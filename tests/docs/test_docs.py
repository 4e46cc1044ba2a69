"""What the pages name exists: docs/math.md's functions and tests, and the files and folders on every page."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MATH = (ROOT / "docs" / "math.md").read_text()
CODE = sorted(set(re.findall(r"`(ddpm_fast(?:\.\w+)+)`", MATH)))
TESTS = sorted(set(re.findall(r"`(test_\w+\.py(?:::\w+)?)`", MATH)))
FILES = sorted(set(re.findall(r"`(csrc/[\w/]+\.(?:h|cpp))`", MATH)))


@pytest.mark.parametrize("name", CODE)
def test_the_code_that_math_md_names_exists(name):
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[split:]:
            found = getattr(found, attribute)
        return
    pytest.fail(f"{name} cannot be imported")


@pytest.mark.parametrize("name", TESTS)
def test_the_tests_that_math_md_names_exist(name):
    file, _, function = name.partition("::")
    (path,) = (ROOT / "tests").rglob(file)
    text = path.read_text()
    assert not function or f"\ndef {function}(" in text


@pytest.mark.parametrize("name", [*FILES, *re.findall(r"\]\((?!http)([\w./-]+)\)", MATH)])
def test_the_files_that_math_md_names_exist(name):
    assert (ROOT / name).exists() or (ROOT / "docs" / name).exists()


def test_math_md_names_enough():
    # Fewer would mean that the patterns above no longer find them.
    assert len(CODE) > 30 and len(TESTS) > 50 and len(FILES) >= 5


def test_every_section_with_an_equation_says_where_and_by_what():
    sections = re.split(r"^## ", MATH, flags=re.M)[1:]
    for section in sections:
        if "$$" in section:
            assert "\n- in `" in section and "\n- by `" in section, section.splitlines()[0]


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = "scale_samples"  # the op that docs/guides/add-an-op.md adds
PATHS = re.compile(r"`((?:ddpm_fast|csrc|tests|docs|benchmarks|\.ci)/[\w/.-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_and_folders_that_a_page_names_exist(page):
    named = {path for path in PATHS.findall(page.read_text()) if EXAMPLE not in path}
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing, f"{page.name} names what is not there: {missing}"
