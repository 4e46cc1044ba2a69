"""The page draws what df.sample and the command draw, refuses what it should not be asked, and can be stopped."""

import base64
import io
import re
import shlex
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import run

import ddpm_fast as df
from ddpm_fast.commands.demo import copying, drawing, limits
from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.drawings import edit, sample
from ddpm_fast.commands.demo.models import Models
from ddpm_fast.commands.demo.runs import Runs
from ddpm_fast.commands.demo.turns import Place, Turns
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint

pytestmark = pytest.mark.usefixtures("wide_terminal")


def decoded(html):
    """The first picture in a piece of HTML."""
    data = re.search(r'src="data:image/png;base64,([^"]+)"', html)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)


def tiles(sheet, rows, columns, side=8):
    """The images of a grid that showing.grid made: [N, side, side, C], each pixel once."""
    scale = (sheet.shape[0] - 2) // rows // side
    step = side * scale + 2
    return np.stack(
        [
            sheet[2 + r * step : r * step + step : scale, 2 + c * step : c * step + step : scale][:side, :side]
            for r in range(rows)
            for c in range(columns)
        ]
    )


def levels(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(int)


@pytest.fixture
def picture(tmp_path):
    """A picture of the size of the model's images, and its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return str(tmp_path / "in.png"), torch.from_numpy(pixels).permute(2, 0, 1)


def test_the_last_picture_shows_what_sample_draws(desk, values, small):
    *_, last = sample(desk, "me", values | {"labels": "dog,0"})
    loaded = df.load_model(small)
    x = df.sample(loaded.model, loaded.diffusion, 4, steps=4, seed=3, labels=[1, 0, 1, 0])
    assert np.abs(tiles(decoded(last.picture), 2, 2) - levels(x)).max() <= 1
    assert "4 images in" in last.status and "dog (1), cat (0)" in last.status


@pytest.mark.parametrize("view", ["x0", "x_t"])
def test_frames_on_the_way_show_the_view_that_was_chosen(desk, values, small, view, monkeypatch):
    monkeypatch.setattr("ddpm_fast.commands.demo.drawing.FRAME_SECONDS", 0)
    loaded, steps = df.load_model(small), []
    df.sample(loaded.model, loaded.diffusion, 4, steps=4, seed=3, labels=[0, 1, 2, 0], on_step=steps.append)
    seen = [levels(step.x if view == "x_t" else step.x0) for step in steps]
    for shown in sample(desk, "me", values | {"view": view}):
        number = re.search(r"Step (\d+) of 4, t = (\d+)", shown.status)
        if number:
            assert int(number[2]) == steps[int(number[1]) - 1].t
            assert np.abs(tiles(decoded(shown.picture), 2, 2) - seen[int(number[1]) - 1]).max() <= 1


OTHERS = {"sampler": "ddim", "eta": 0.5, "labels": "hen", "guidance": 2.5}


@pytest.mark.parametrize("changes", [{}, {"labels": "none"}, OTHERS])
def test_the_command_and_the_python_draw_the_same(desk, values, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    *_, last = sample(desk, "me", values | changes)
    images = tiles(decoded(last.picture), 2, 2)
    words = shlex.split(last.command.replace("\\\n", ""))
    assert words[:3] == ["python", "-m", "ddpm_fast.sample"] and words[-2:] == ["--out", "samples.png"]
    assert run("sample", *words[3:-1], "drawn.npz").exit_code == 0
    assert np.abs(np.load("drawn.npz")["images"].astype(int) - images).max() <= 1
    names = {}
    exec(last.python, names)
    assert np.abs(levels(names["x"]) - images).max() <= 1
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("kind", ["image to image", "inpainting", "interpolation"])
def test_an_edit_is_that_of_the_command_and_of_the_python(desk, values, picture, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path, _ = picture
    Image.new("RGB", (8, 8), "teal").save("other.png")
    asked = values | {"strength": 0.4, "resamplings": 2, "jump_length": 1, "part": "the left half"}
    *_, last = edit(desk, "me", kind, asked, {"picture": path, "other": "other.png"})
    images = tiles(decoded(last.picture), 2, 2)
    for data, name in re.findall(r'href="data:image/png;base64,([^"]+)" download="([^"]+)"', last.given):
        (tmp_path / name).write_bytes(base64.b64decode(data))
    words = shlex.split(last.command.replace("\\\n", ""))
    assert run("sample", *words[3:-1], "drawn.npz").exit_code == 0
    assert np.abs(np.load("drawn.npz")["images"].astype(int) - images).max() <= 1
    names = {}
    exec(last.python, names)
    assert np.abs(levels(names["x"]) - images).max() <= 1
    assert words[-1] == copying.OUT[kind] and (tmp_path / words[-1]).exists()


def test_inpainting_keeps_all_but_the_part_that_was_chosen(desk, values, picture):
    path, pixels = picture
    asked = values | {"resamplings": 1, "jump_length": 1, "part": "the upper half"}
    *_, last = edit(desk, "me", "inpainting", asked, {"picture": path})
    images = tiles(decoded(last.picture), 2, 2)
    kept = pixels.permute(1, 2, 0).numpy().astype(int)
    assert (images[:, 4:] == kept[4:]).all() and (images[:, :4] != kept[:4]).any()


WRONG = {
    "an unknown model": {"model": "../../etc/passwd"},
    "no model": {"model": None},
    "an unknown sampler": {"sampler": "heun"},
    "no steps": {"steps": 0},
    "more steps than timesteps": {"steps": 21},
    "more steps than allowed": {"steps": limits.MOST_STEPS + 1},
    "half a step": {"steps": 2.5},
    "a number that is text": {"n": "4; rm -rf /"},
    "too many images": {"n": limits.MOST_IMAGES + 1},
    "NaN": {"guidance": float("nan")},
    "too strong a guidance": {"guidance": 1e9},
    "a negative seed": {"seed": -1},
    "a seed beyond what a browser counts": {"seed": 2**53},
    "an empty seed": {"seed": None},
    "an unknown class": {"labels": "cow"},
    "a long text": {"labels": "0," * limits.LONGEST_TEXT},
    "another view": {"view": "x1"},
    "eta": {"sampler": "ddim", "eta": 2},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=list(WRONG))
def test_what_should_not_be_asked_is_refused_before_anything_is_drawn(desk, values, changes):
    with pytest.raises(InputError):
        next(sample(desk, "me", values | changes))
    assert desk.turns.busy == 0


def test_a_model_without_a_null_class_is_drawn_from_with_labels_alone(values, tmp_path, small):
    state, config = checkpoint.read_model(small)
    checkpoint.save_model(tmp_path / "m.safetensors", state, config | {"training": {"label_drop": 0}})
    desk = Desk(Models([str(tmp_path / "m.safetensors")], torch.device("cpu")), Runs([]), torch.device("cpu"))
    for changes in ({"labels": "none"}, {"guidance": 2}):
        with pytest.raises(InputError, match="null class") as caught:
            next(sample(desk, "me", values | {"model": "m.safetensors"} | changes))
    assert str(tmp_path) not in desk.models.without_paths(str(caught.value))
    assert len(list(sample(desk, "me", values | {"model": "m.safetensors"}))) >= 1


def test_a_drawing_ends_at_the_next_step_when_it_is_stopped(desk, values, monkeypatch):
    asked, put = threading.Event(), drawing.Watched._put

    def held(self, t, **how):
        put(self, t, **how)
        asked.wait(30)  # so that a fast machine does not finish first

    monkeypatch.setattr(drawing.Watched, "_put", held)
    shown = sample(desk, "me", values | {"steps": 20})
    next(shown)
    assert not desk.stop("somebody else") and desk.stop("me")
    asked.set()
    *_, last = shown
    assert "Stopped after step 1 of 20" in last.status
    assert not desk.stop("me") and desk.turns.busy == 0


def test_a_drawing_that_nobody_watches_any_more_ends(desk, values):
    shown = sample(desk, "me", values | {"steps": 20, "n": 16})
    next(shown)
    shown.close()
    assert desk.turns.busy == 0 and not [thread for thread in threading.enumerate() if "(_run)" in thread.name]


def test_a_drawing_takes_no_longer_than_it_may(desk, values, monkeypatch):
    monkeypatch.setattr("ddpm_fast.commands.demo.drawing.LONGEST_SECONDS", -1)
    *_, last = sample(desk, "me", values)
    assert "after step 0 of 4" in last.status and "the most that one drawing may take" in last.status


def test_the_second_waits_for_the_first_and_is_told_so(desk, values):
    with Place(desk.turns, threading.Event()):
        waiting = sample(desk, "me", values)
        assert "in use by another request: one drawing comes before yours" in next(waiting).status
        assert desk.say_device().endswith("1 drawing uses it now, and 1 waits.")
    *_, last = waiting
    assert "4 images in" in last.status
    assert desk.say_device().endswith("Nobody uses it now.")


def test_who_waits_can_stop(desk, values):
    with Place(desk.turns, threading.Event()):
        waiting = sample(desk, "me", values)
        next(waiting)
        assert desk.stop("me")
        (last,) = waiting
        assert "Stopped after step 0 of 4" in last.status and desk.turns.busy == 1


def test_turns_are_taken_in_order_and_no_more_wait_than_may():
    turns, stop = Turns(most_waiting=2), threading.Event()
    with Place(turns, stop) as first, Place(turns, stop) as second:
        third = Place(turns, stop)
        with third:
            assert [turns.ahead(place) for place in (first, second, third)] == [0, 1, 2]
            with pytest.raises(InputError, match="2 others wait"), Place(turns, stop):
                pass
            turns.leave(first)
            assert list(second.wait()) == [] and next(third.wait()) == 1
    assert turns.busy == 0


def test_large_images_are_drawn_in_batches_and_counted_as_one_drawing(desk, values, monkeypatch):
    whole = [shown.picture for shown in sample(desk, "me", values)][-1]
    monkeypatch.setattr("ddpm_fast.commands.demo.asking.BATCH_ELEMENTS", 3 * 8 * 8 * 2)
    *_, last = sample(desk, "me", values)
    assert "(8 steps of ddpm" in last.status
    assert np.abs(decoded(last.picture) - decoded(whole)).max() <= 1


def test_a_drawing_that_fails_says_why(desk, values, monkeypatch):
    def fails(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr("ddpm_fast.loops.prepared.Prepared._run_rows", fails)
    with pytest.raises(MemoryError, match="no room"):
        list(sample(desk, "me", values))
    assert desk.turns.busy == 0


def test_shipped_models_are_offered_by_name_and_given_ones_by_their_last_part(small, tmp_path):
    (tmp_path / "small.safetensors").write_bytes(small.read_bytes())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(small.read_bytes())
    given = [str(small), str(tmp_path / "small.safetensors"), str(tmp_path / "run" / "model.safetensors")]
    models = Models(given, torch.device("cpu"), shows_paths=False)
    expected = ["small.safetensors", "small.safetensors (2)", "run/model.safetensors", "mnist", "emoji"]
    assert models.names == expected
    assert str(tmp_path) not in models.offered("small.safetensors (2)").shown
    with pytest.raises(InputError, match="no model"):
        models.get(given[1])


def test_a_file_that_is_no_model_is_refused_at_once(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(InputError):
        Models([str(tmp_path / "x.safetensors")], torch.device("cpu"))
