"""A page shows its texts, numbers and pictures to a browser, and obeys nothing that is in them."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.errors import InputError
from ddpm_fast.pictures.page import HtmlPage
from ddpm_fast.pictures.sweeps import Point, Quantity, draw_sweep

HOSTILE = "<script>alert(1)</script> \"'><img src=http://example.org/x onerror=alert(2)> &amp; \x1b[31m \u202eevil"
IMAGES = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)


class Parsed(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(page.html())
        self.close()
        assert not self.open, "each element is closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def tags(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]

    def texts(self):
        return [word for word in self.words if word.strip()]


def picture(attributes):
    """The pixels of an image element."""
    kind, data = attributes["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def filled(text):
    """A page with the text in every place that takes one."""
    page = HtmlPage(text)
    page.section(text)
    page.text(text)
    page.text(text, note=True)
    page.facts({text: text})
    page.table([text, text], [[text, text], [text, text]], marked=1)
    page.grid(IMAGES, 2, text)
    page.rows_of_images([(text, IMAGES[0], IMAGES[1:], text)], (text, text))
    page.figure(draw_sweep([Point("one", 1, 1.0, 1.0, {"q": 1.0})], [Quantity("q", True)]), text)
    return page


def test_hostile_texts_are_shown_and_not_obeyed():
    plain, hostile = Parsed(filled("plain")), Parsed(filled(HOSTILE))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(found) for _, found in hostile.elements] == [sorted(found) for _, found in plain.elements]
    shown = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert [text.replace("plain", shown) for text in plain.texts()] == hostile.texts()
    assert all(one["alt"] in (shown, "plain") for one in hostile.tags("img"))


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs():
    page = filled("plain")
    parsed = Parsed(page)
    (policy,) = (one["content"] for one in parsed.tags("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert {tag for tag, _ in parsed.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "tr", "th", "td", "img")
    }
    assert all(one["src"].startswith("data:image/png;base64,") for one in parsed.tags("img"))
    assert not re.search(r"https?:|url\(", page.html())


def test_a_grid_has_each_image_and_squares_for_pixels():
    page = HtmlPage("x")
    page.grid(IMAGES, 2, "three")
    (shown,) = Parsed(page).tags("img")
    sheet = picture(shown)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        top, left = 2 + row * 6, 2 + column * 7
        np.testing.assert_array_equal(sheet[top : top + 4, left : left + 5], IMAGES[i])
    assert int(shown["width"]) * sheet.shape[0] == int(shown["height"]) * sheet.shape[1]
    assert int(shown["width"]) % sheet.shape[1] == 0 and shown["class"] == "pixels"


def test_grey_images_and_their_neighbours_stand_in_one_row():
    page, grey = HtmlPage("x"), IMAGES[..., :1]
    page.rows_of_images([("first", grey[0], grey[1:], "1, 2")], ("sample", "nearest"))
    first, others = (picture(one) for one in Parsed(page).tags("img"))
    np.testing.assert_array_equal(first[2:6, 2:7], grey[0, ..., 0])
    np.testing.assert_array_equal(others[2:6, 9:14], grey[2, ..., 0])
    assert Parsed(page).texts()[2:] == ["sample", "nearest", "first", "1, 2"]


def test_columns_of_numbers_stand_to_the_right_and_a_row_is_marked():
    page = HtmlPage("x")
    page.table(["name", "value"], [["a", "1.5 ± 0.2"], ["b", "-"]], marked=1)
    parsed = Parsed(page)
    assert [one.get("class") for one in parsed.tags("td")] == [None, "number"] * 2
    assert [one.get("class") for one in parsed.tags("tr")] == [None, None, "marked"]


def test_wide_images_fit_the_page():
    page = HtmlPage("x")
    page.grid(np.zeros((12, 8, 100, 1), np.uint8), 12, "wide")
    page.grid(np.zeros((1, 8, 100, 1), np.uint8), 12, "one")
    wide, one = Parsed(page).tags("img")
    assert int(wide["width"]) == 12 * 102 + 2 and int(one["width"]) == 4 * 104


def test_it_is_written_whole(tmp_path):
    page = filled("plain")
    page.save(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page.html()
    with pytest.raises(InputError, match="is a folder"):
        page.save(tmp_path)
