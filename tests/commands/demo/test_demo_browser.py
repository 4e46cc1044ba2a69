"""The page in a real browser, headless: it loads, samples, edits, shows an error, and stops."""

import asyncio
import contextlib
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'ddpm-fast[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")

from ddpm_fast.commands.demo import command, server  # noqa: E402
from ddpm_fast.commands.demo.desk import Desk  # noqa: E402
from ddpm_fast.commands.demo.runs import Runs  # noqa: E402
from ddpm_fast.commands.demo.turns import Place  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MILLISECONDS = 60_000  # how long a slow machine may take
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    (folder / "log.csv").write_text("step,loss\n1,0.5\n2,0.4\n")
    Image.new("RGB", (32, 32), "teal").save(folder / "samples-00000002.png")
    return folder


@pytest.fixture(scope="module")
def desk(models, folder):
    return Desk(models, Runs([folder]), torch.device("cpu"))


@pytest.fixture(scope="module")
def address(desk, tmp_path_factory):
    """The page, served by a thread."""
    over = threading.Event()
    with pytest.MonkeyPatch.context() as patch, server.listen("127.0.0.1", 0) as listening:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        app = server.application(desk)
        thread = threading.Thread(target=server.serve, args=(app, listening, over.is_set))
        thread.start()
        yield command.address(listening)
        over.set()
        thread.join(30)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()
    with contextlib.suppress(RuntimeError):
        asyncio.set_event_loop(None)


@pytest.fixture(scope="module")
def page(browser, address):
    """The page, opened once. What it asks of others than its server fails the test, and so do errors of its scripts."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(MILLISECONDS)
    elsewhere, failures = [], []
    own = (address, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else elsewhere.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(address)
    page.locator("#sample-draw").wait_for()
    yield page
    assert not elsewhere and not failures


def set_number(page, field, number):
    box = page.locator(f"#{field} input[type=number]")
    box.fill(str(number))
    box.press("Tab")


def status(page, tab):
    return page.get_by_role("tabpanel", name=tab).locator(".df-status").first


def test_the_page_loads_and_says_which_device_it_uses(page):
    assert page.title() == "ddpm_fast"
    assert re.search(r"Device: cpu, \d+ threads?\. Nobody uses it now\.", page.locator("#device").inner_text())
    for tab in ("Sample", "Edit", "Training", "Schedules"):
        assert page.get_by_role("tab", name=tab, exact=True).is_visible()


def test_it_samples_and_gives_the_command(page, desk):
    set_number(page, "sample-n", 4)
    set_number(page, "sample-steps", 3)
    page.locator("#sample-labels textarea, #sample-labels input").first.fill("dog")
    page.locator("#sample-draw").click()
    page.get_by_role("link", name="Save samples.png").wait_for()
    assert "4 images in" in page.locator("#sample-status").inner_text()
    width = page.locator("#sample-picture img").evaluate("image => image.naturalWidth")
    assert width > 100
    page.get_by_role("button", name=re.compile("The same on the command line")).first.click()
    shown = page.locator("#sample-command").inner_text()
    assert "--labels dog" in shown and "--n 4" in shown and desk.turns.busy == 0


def test_an_error_is_shown_in_words(page):
    labels = page.locator("#sample-labels textarea, #sample-labels input").first
    labels.fill("<b>cow</b>")
    page.locator("#sample-draw").click()
    toast = page.get_by_test_id("toast-body").filter(has_text="<b>cow</b> is no class of this model")
    toast.wait_for()
    assert "Traceback" not in toast.inner_text() and "File " not in toast.inner_text()
    page.get_by_test_id("toast-close").first.click()
    labels.fill("dog")


def test_who_waits_is_told_so_and_can_stop(page, desk):
    with Place(desk.turns, threading.Event()):
        page.locator("#sample-draw").click()
        page.get_by_text("The CPU is in use by another request: one drawing comes before yours").wait_for()
        page.locator("#sample-stop").click()
        page.get_by_text("Stopped after step 0 of 3").wait_for()
    assert desk.turns.busy == 0


def test_it_edits_an_uploaded_picture(page, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    page.get_by_role("tab", name="Edit", exact=True).click()
    set_number(page, "edit-n", 2)
    set_number(page, "edit-steps", 4)
    page.locator("#image-picture input[type=file]").set_input_files(tmp_path / "mine.png")
    page.locator("#image-picture img").wait_for()
    page.locator("#image-start").click()
    page.get_by_role("link", name="Save edited.png").wait_for()
    page.get_by_role("link", name="Save picture.png").wait_for()


def test_it_fills_in_what_is_painted(page):
    page.get_by_role("tab", name="Inpainting").click()
    page.locator("#inpaint-example").click()
    canvas = page.locator("#inpaint-picture canvas").first
    canvas.wait_for()
    page.wait_for_timeout(2000)  # the editor draws the picture some frames after it has it
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=8)
    page.mouse.up()
    set_number(page, "inpaint-jump", 1)
    page.locator("#inpaint-start").click()
    page.get_by_role("link", name="Save inpainted.png").wait_for()
    mask = page.get_by_role("img", name="the mask: white is kept")
    mask.wait_for()


def test_a_file_that_is_no_picture_is_refused_in_words(page, tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    page.get_by_role("tab", name="Image to image").click()
    page.locator("#image-picture").get_by_role("button", name=re.compile("Clear|Remove")).first.click()
    page.locator("#image-picture input[type=file]").set_input_files(tmp_path / "a.png")
    page.locator("#image-picture img").wait_for(state="attached")
    page.locator("#image-start").click()
    toast = page.get_by_test_id("toast-body").filter(has_text="The picture cannot be read")
    toast.wait_for()
    assert str(tmp_path) not in toast.inner_text()
    page.get_by_test_id("toast-close").first.click()


def test_a_training_is_followed_while_it_writes(page, folder):
    page.get_by_role("tab", name="Training", exact=True).click()
    page.get_by_text("Training step 2, loss 0.4000").wait_for()
    page.get_by_role("img", name="samples of the run after training step 2").wait_for()
    with open(folder / "log.csv", "a") as file:
        file.write("3,0.25\n4,0.")
    page.get_by_text("Training step 3, loss 0.2500").wait_for()


def test_schedules_are_redrawn_as_a_slider_moves(page):
    page.get_by_role("tab", name="Schedules", exact=True).click()
    page.get_by_text("t = 200 of 0 to 999").wait_for()
    slider = page.locator("#schedule-t input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    page.get_by_text("t = 210 of 0 to 999").wait_for()


def test_it_is_used_with_the_keyboard_alone(page):
    page.get_by_role("tab", name="Sample", exact=True).focus()
    page.keyboard.press("Enter")
    set_number(page, "sample-steps", 3)
    page.locator("#sample-n input[type=number]").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("2")
    page.locator("#sample-draw").focus()
    page.keyboard.press("Enter")
    page.locator("#sample-status").get_by_text("2 images in").wait_for()


def test_nothing_is_wider_than_a_telephone(page):
    for tab in ("Sample", "Edit", "Training", "Schedules"):
        page.set_viewport_size({"width": 1280, "height": 900})
        page.get_by_role("tab", name=tab, exact=True).click()
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab
