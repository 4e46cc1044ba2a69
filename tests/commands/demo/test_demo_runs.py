"""The live view of a run: its log.csv or its TensorBoard files, and its newest grid, while they are written."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ddpm_fast.commands.demo.runs import MOST_POINTS, Runs, newest_grid, read_curves
from ddpm_fast.errors import InputError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@pytest.fixture
def runs(folder):
    return Runs([folder])


def test_a_csv_is_read_up_to_its_last_whole_line(folder):
    (folder / "log.csv").write_text("step,loss,images a second\n1,0.5,10\n2,0.25,\n3,nan,30\n4,0.1")
    assert read_curves(folder) == {"loss": ([1, 2], [0.5, 0.25]), "images a second": ([1, 3], [10.0, 30.0])}


def test_a_step_that_was_taken_twice_counts_with_its_last_row(folder):
    (folder / "log.csv").write_text("step,loss\n1,0.5\n2,0.4\n3,0.3\n2,0.6\n")
    assert read_curves(folder)["loss"] == ([1, 2, 3], [0.5, 0.6, 0.3])


@pytest.mark.parametrize("text", ["", "\n", "loss\n1\n", "step,loss\nx,1\n", "step\n1\n", "\x00\xff,x\n\n1,2,3\n"])
def test_a_csv_that_says_nothing_has_no_curves(folder, text):
    (folder / "log.csv").write_bytes(text.encode("latin-1"))
    assert read_curves(folder) == {}


def test_a_long_curve_is_thinned_and_keeps_its_last_point(folder):
    rows = "".join(f"{step},{math.sin(step)}\n" for step in range(1, 10 * MOST_POINTS + 4))
    (folder / "log.csv").write_text("step,loss\n" + rows)
    steps, values = read_curves(folder)["loss"]
    assert len(steps) <= MOST_POINTS and steps[-1] == 10 * MOST_POINTS + 3 and values[-1] == math.sin(steps[-1])


def test_without_a_csv_the_curves_are_tensorboards(folder):
    with SummaryWriter(folder / "curves") as writer:
        for step in range(3):
            writer.add_scalar("loss", 1 / (step + 1), step)
    steps, values = read_curves(folder)["loss"]
    assert steps == [0, 1, 2] and np.allclose(values, [1, 1 / 2, 1 / 3])


def test_the_newest_grid_is_that_of_the_latest_step(folder, runs):
    for step, colour in ((9, "red"), (100, "lime")):
        Image.new("RGB", (20, 10), colour).save(folder / f"samples-{step:08d}.png")
    (folder / "samples-00000200.png.tmp").write_bytes(b"half")
    (folder / "samples-x.png").write_bytes(b"none")
    assert newest_grid(folder) == (folder / "samples-00000100.png", 100)
    view = runs.look("mine")
    shown = Image.open(io.BytesIO(view.grid))
    assert view.grid_step == 100 and shown.size == (640, 320) and shown.getpixel((5, 5)) == (0, 255, 0)


def test_a_large_grid_is_made_small_enough_for_a_browser(folder, runs):
    Image.new("L", (3000, 1500), 7).save(folder / "samples-00000001.png")
    assert Image.open(io.BytesIO(runs.look("mine").grid)).size == (1024, 512)


def test_a_grid_that_is_no_picture_is_reported_in_words(folder, runs):
    (folder / "samples-00000001.png").write_bytes(b"%!PS not a picture")
    with pytest.raises(InputError, match=r"samples-00000001\.png cannot be read") as caught:
        runs.look("mine")
    assert str(folder) not in str(caught.value)


def test_the_version_changes_when_something_was_written(folder, runs):
    seen = [runs.version("mine")]
    (folder / "log.csv").write_text("step,loss\n1,0.5\n")
    seen.append(runs.version("mine"))
    (folder / "log.csv").write_text("step,loss\n1,0.5\n2,0.4\n")
    seen.append(runs.version("mine"))
    Image.new("L", (8, 8)).save(folder / "samples-00000001.png")
    seen.append(runs.version("mine"))
    assert len(set(seen)) == 4 and runs.version("mine") == seen[-1]


def test_a_run_that_has_just_begun_says_so(runs):
    view = runs.look("mine")
    assert view.curves == {} and view.grid is None and "no curves yet" in view.text


def test_a_run_says_where_it_is(folder, runs):
    (folder / "log.csv").write_text("step,loss\n1000,0.5\n2000,0.25\n")
    assert runs.look("mine").text.startswith("Training step 2,000, loss 0.2500; last written 0 s ago")


def test_runs_are_chosen_by_name_and_never_by_path(folder, tmp_path):
    (tmp_path / "b" / "mine").mkdir(parents=True)
    runs = Runs([folder, tmp_path / "b" / "mine"])
    assert runs.names == ["mine", "mine (2)"] and runs.folder("mine (2)") == tmp_path / "b" / "mine"
    for name in (str(folder), "../mine", None, 3):
        with pytest.raises(InputError, match="no run"):
            runs.look(name)


def test_a_folder_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="--run: there is no folder"):
        Runs([tmp_path / "nothing"])
