"""The figures of the theory show the formulas' values, are written as picture files, and bad input is refused."""

import importlib
import itertools
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import ddpm_fast as df
from ddpm_fast.commands import plot
from ddpm_fast.files import checkpoint
from ddpm_fast.nn import UNet, UNetConfig
from ddpm_fast.noise import normals
from ddpm_fast.pictures import canvas, figures

pytestmark = pytest.mark.usefixtures("wide_terminal")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of 8x8 images in colour, with a learned variance, and weights that are random throughout."""
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    torch.manual_seed(0)
    config = UNetConfig(
        image_size=8, in_channels=3, model_channels=8, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), num_classes=3, norm_groups=4, learned_variance=True,
    )  # fmt: skip
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(20), "v", "learned_range", "hybrid")
    state = {name: 0.1 * torch.randn_like(weight) for name, weight in UNet(config).state_dict().items()}
    described = {"unet": config.to_dict(), "diffusion": diffusion.to_dict(), "label_names": None, "training": {}}
    checkpoint.save_model(path, state, described)
    return path


REPORT = {
    "model": "small.safetensors",
    "data": "a $ set_of_2",
    "images": 12,
    "estimate": False,
    "total_bits_per_dim": 3.5,
    "total_stderr": 0.25,
    "prior_bits_per_dim": 1e-3,
    "timesteps": [0.0, 1.0, 2.0, 3.0],
    "counts": [1.0, 1.0, 1.0, 1.0],
    "terms_bits_per_dim": [2.0, 1.0, 0.4, 0.099],
    "terms_stderr": [0.1, 0.05, 0.02, 0.01],
    "mse_x0": [0.01, 0.02, 0.04, 0.08],
    "mse_eps": [0.8, 0.4, 0.2, 0.1],
}


def test_an_image_of_a_folder_of_several_sizes_is_cut_to_a_square(tmp_path):
    for i, size in enumerate([(8, 8), (20, 9)]):
        Image.new("RGB", size, (i, 0, 0)).save(tmp_path / f"{i}.png")
    assert plot.read_image(str(tmp_path), 1, None).shape == (3, plot.LARGEST_SIDE, plot.LARGEST_SIDE)


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "nll.json"
    path.write_text(json.dumps(REPORT))
    return path


def run(*arguments):
    return CliRunner().invoke(plot.app, [str(a) for a in arguments], catch_exceptions=False)


def line(axes, label):
    """The values of a line by its name."""
    (found,) = (one for one in axes.lines if one.get_label() == label)
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


def alphas_cumprod(kind, T):
    """alpha_bar of the linear and the cosine schedule, in plain Python."""
    if kind == "linear":
        betas = [(1e-4 + (0.02 - 1e-4) * i / (T - 1)) * 1000 / T for i in range(T)]
    else:
        f = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
        betas = [min(1 - b / a, 0.999) for a, b in itertools.pairwise(f)]
    products = [1.0]
    for beta in betas:
        products.append(products[-1] * (1 - beta))
    return np.array(betas), np.array(products[1:]), np.array(products[:-1])


def test_schedules_show_alpha_bar_and_beta():
    figure = figures.draw_schedules([df.Schedule.linear(100), df.Schedule.cosine(100)])
    signal, betas = figure.axes
    for kind in ("linear", "cosine"):
        beta, ab, _ = alphas_cumprod(kind, 100)
        for axes, expected in ((signal, ab), (betas, beta)):
            t, drawn = line(axes, kind)
            np.testing.assert_array_equal(t, range(100))
            np.testing.assert_allclose(drawn, expected, rtol=1e-10)
    assert betas.get_yscale() == "log" and signal.get_yscale() == "linear"


def test_zero_terminal_schedules_are_dashed_beside_the_solid_ones():
    schedule = df.Schedule.linear(50)
    figure = figures.draw_schedules([schedule, schedule.zero_terminal_snr()])
    solid, dashed = figure.axes[0].lines
    assert solid.get_linestyle() == "-" and dashed.get_linestyle() == "--"
    assert solid.get_color() == dashed.get_color()
    _, ab, _ = alphas_cumprod("linear", 50)
    root = np.sqrt(ab)
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    np.testing.assert_allclose(dashed.get_ydata(), expected, rtol=1e-9, atol=1e-15)


def test_variances_show_the_ratio_and_the_band_of_learned_range():
    figure = figures.draw_variances([df.Schedule.cosine(T) for T in (20, 100)])
    ratio, both = figure.axes
    for T in (20, 100):
        beta, ab, previous = alphas_cumprod("cosine", T)
        small = beta * (1 - previous) / (1 - ab)
        u, drawn = line(ratio, f"T = {T}")
        np.testing.assert_allclose(u, np.arange(1, T + 1) / T)
        np.testing.assert_allclose(drawn, small / beta, rtol=1e-9, atol=1e-15)
        small[0] = small[1]  # of log 0 at t = 0
        high, low = both.lines[:2] if T == 20 else both.lines[2:]
        np.testing.assert_allclose(high.get_ydata(), beta, rtol=1e-9)
        np.testing.assert_allclose(low.get_ydata(), small, rtol=1e-9)
        edges = both.collections[0 if T == 20 else 1].get_paths()[0].vertices
        for i, at in enumerate(u):
            heights = edges[np.isclose(edges[:, 0], at), 1]
            np.testing.assert_allclose([heights.min(), heights.max()], [small[i], beta[i]], rtol=1e-9)


WEIGHTS = {
    "none": lambda snr: np.ones_like(snr),
    "snr": lambda snr: snr,
    "truncated_snr": lambda snr: np.maximum(snr, 1),
    r"min_snr, $\gamma$ = 3": lambda snr: np.minimum(snr, 3),
}
# An error of x_0 in terms of the error of what is predicted.
OF_THE_OUTPUT = {"eps": lambda snr: 1 / snr, "x0": lambda snr: 1.0, "v": lambda snr: 1 / (snr + 1)}


def test_snr_and_the_weights_that_follow_from_it():
    figure = figures.draw_snr([df.Schedule.linear(100), df.Schedule.cosine(100)], gamma=3.0)
    top, *panels = figure.axes
    for kind in ("linear", "cosine"):
        _, ab, _ = alphas_cumprod(kind, 100)
        np.testing.assert_allclose(line(top, kind)[1], ab / (1 - ab), rtol=1e-9)
    for axes, (prediction, factor) in zip(panels, OF_THE_OUTPUT.items(), strict=True):
        for name, weight in WEIGHTS.items():
            snr, drawn = line(axes, name)
            expected = np.ones_like(snr) if name == "none" else weight(snr) * factor(snr)
            np.testing.assert_allclose(drawn, expected, rtol=1e-9, err_msg=f"{prediction} {name}")
        assert snr.min() < 1e-4  # cosine reaches farther than linear


def test_bound_shows_the_terms_the_ends_and_the_errors():
    figure = figures.draw_bound(REPORT)
    bound, errors = figure.axes
    t, terms = line(bound, r"$L_t$ $\pm$ standard error")
    np.testing.assert_array_equal(t, [1, 2, 3, 4])
    np.testing.assert_array_equal(terms, REPORT["terms_bits_per_dim"])
    assert line(bound, "$L_0$ = 2") == ([1], [2.0])
    assert line(bound, "$L_T$ = 1e-3") == ([5], [1e-3])
    np.testing.assert_array_equal(line(errors, r"$|\hat x_0 - x_0|^2$")[1], REPORT["mse_x0"])
    np.testing.assert_array_equal(line(errors, r"$|\hat\epsilon - \epsilon|^2$")[1], REPORT["mse_eps"])
    title = figure.get_suptitle()
    assert "small: 3.500" in title and "0.250 bits/dim on 12 images" in title
    assert "2.000 ($L_0$) + 1.499 (all timesteps between) + 1e-3 ($L_T$)" in title


def test_bound_of_an_estimate_says_so_and_a_prior_of_zero_is_left_out():
    sparse = {
        **REPORT,
        "estimate": True,
        "counts": [1, 3, 6, 10],
        "timesteps": [0, 2.4, 7, 16.5],
        "prior_bits_per_dim": 0,
    }
    figure = figures.draw_bound(sparse)
    assert "estimated from 4 of 20 terms" in figure.get_suptitle()
    assert len(figure.axes[0].lines) == 2 and figure.axes[0].lines[0].get_marker() == "o"


def sheet(axes):
    """The images of a strip, row after row: what canvas.strip laid out with a pixel between them."""
    return np.asarray(axes.images[0].get_array())


def test_noising_shows_q_sample_with_one_noise_for_all(tmp_path):
    x0 = torch.randint(0, 256, (3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    figure = figures.draw_noising([df.Schedule.linear(100), df.Schedule.cosine(100)], x0, columns=4, seed=7)
    eps = normals(df.NoiseKey.of(7, 1), 60).double().numpy().reshape(3, 5, 4)
    image = x0.double().numpy() / 127.5 - 1
    strips = [axes for axes in figure.axes if axes.images]
    for axes, kind in zip(strips, ("linear", "cosine"), strict=True):
        _, ab, _ = alphas_cumprod(kind, 100)
        for column, t in enumerate((0, 33, 66, 99)):
            x_t = math.sqrt(ab[t]) * image + math.sqrt(1 - ab[t]) * eps
            expected = ((x_t + 1) * 127.5).clip(0, 255).transpose(1, 2, 0)
            drawn = sheet(axes)[1:6, 1 + 5 * column : 5 + 5 * column]
            assert np.abs(drawn - expected).max() <= 0.51
        assert [label.get_text() for label in axes.get_yticklabels()] == [kind]
    assert strips[0].get_xticklabels()[1].get_text() == rf"$\bar\alpha$ = {alphas_cumprod('linear', 100)[1][33]:.2f}"


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_chain_shows_the_states_of_sample_and_what_the_model_predicts_from_them(small, sampler):
    loaded = df.load_model(small)
    options = {"sampler": sampler, "steps": 7, "labels": [0, 2], "seed": 3}
    timesteps, x_t, x0 = plot.reverse_states(loaded, 2, 4, **options)
    states = []
    df.sample(loaded.model, loaded.diffusion, 2, on_step=lambda step: states.append(step.x), **options)
    assert timesteps == [19, 13, 6, 0]
    torch.testing.assert_close(x_t[1:], torch.stack([states[i] for i in (1, 3, 5)]), rtol=0, atol=0)
    for t, state, predicted in zip(timesteps, x_t, x0, strict=True):
        told = torch.full((2,), t)
        output = loaded.model(state, told, torch.tensor([0, 2])).detach()
        pred_x0 = loaded.diffusion.p_mean_variance(output.double(), state.double(), told).pred_x0
        torch.testing.assert_close(predicted.double(), pred_x0, rtol=0, atol=1e-5)
    assert not loaded.model._forward_hooks

    strips = [axes for axes in figures.draw_chain(timesteps, x_t, x0).axes if axes.images]
    assert len(strips) == 2
    pixels = ((x0[2, 1].double() + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(sheet(strips[1])[10:18, 19:27] - pixels).max() <= 0.51


def arguments_of(command, small, report):
    return {
        "schedules": ("--timesteps", 30, "--zero-terminal-snr"),
        "noising": ("--data", "mnist5k", "--timesteps", 30, "--columns", 3),
        "augmentation": ("--augment", "small:1", "--augment", "xflip:1", "--columns", 4),
        "variances": ("--schedule", "linear", "--timesteps", "30,60"),
        "snr": ("--timesteps", 30),
        "bound": (report,),
        "chain": ("--model", small, "--n", 1, "--steps", 3, "--columns", 3),
    }[command]


@pytest.mark.parametrize("command", ["schedules", "noising", "augmentation", "variances", "snr", "bound", "chain"])
def test_commands_write_png_and_svg(small, report, tmp_path, command):
    png, svg = tmp_path / "new" / f"{command}.png", tmp_path / f"{command}.SVG"
    for out in (png, svg):
        result = run(command, *arguments_of(command, small, report), "--out", out)
        assert result.exit_code == 0, result.stderr
        assert f"Wrote {out}" in result.stdout
    with Image.open(png) as picture:
        picture.load()
        width, height = picture.size
        assert picture.format == "PNG" and width == round(canvas.WIDTH * canvas.DPI)
        assert not picture.info.keys() & {"Software", "Creation Time"}
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    root = ElementTree.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    points = [float(root.get(side).removesuffix("pt")) for side in ("width", "height")]
    np.testing.assert_allclose(np.array(points) / 72 * canvas.DPI, (width, height), atol=1.5)
    assert "<dc:date>" not in svg.read_text()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_picture_has_the_same_bytes_whatever_the_users_settings(tmp_path, suffix):
    matplotlib = importlib.import_module("matplotlib")
    schedules = [df.Schedule.cosine(30)]
    paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    canvas.save_figure(figures.draw_schedules(schedules), paths[0])
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "axes.facecolor": "pink", "savefig.dpi": 30, "svg.hashsalt": "x"}
    ):
        before = dict(matplotlib.rcParams)
        canvas.save_figure(figures.draw_schedules(schedules), paths[1])
        assert dict(matplotlib.rcParams) == before
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_names_stand_by_their_lines_inside_their_axes_and_apart():
    figure = Figure((5, 3))
    axes = figure.subplots()
    x = np.linspace(0, 1, 50)
    for i in range(5):
        axes.plot(x, x + 0.02 * i, label=f"line {i}")
    (far,) = axes.plot(x, x**8 - 1, label="far away")
    canvas.name_lines(figure)
    boxes = [text.get_window_extent() for text in axes.texts]
    frame = axes.get_window_extent()
    assert [text.get_text() for text in axes.texts] == [f"line {i}" for i in range(5)] + ["far away"]
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not axes.lines[5].get_path().transformed(far.get_transform()).intersects_bbox(box, filled=False)
    assert axes.transData.inverted().transform((boxes[5].x0, boxes[5].y0))[1] < 0


def test_a_picture_of_any_size_is_noised(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    Image.new("L", (6, 4), 200).save(tmp_path / "grey.png")
    assert plot.read_image("mnist5k", 0, tmp_path / "red.png").shape == (3, 128, 128)
    assert plot.read_image("mnist5k", 0, tmp_path / "grey.png").shape == (1, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("schedules", "--schedules", "linear,quadratic"), "quadratic is not a schedule;", id="name"),
        pytest.param(("schedules", "--schedules", ","), "nothing is not a schedule", id="no name"),
        pytest.param(("schedules", "--timesteps", "20"), "use T >= 21", id="T"),
        pytest.param(("schedules", "--out", "x.jpg"), "expected a name ending in .png or .svg", id="suffix"),
        pytest.param(("schedules", "--out", "TEXT/x.png"), "cannot write", id="unwritable"),
        pytest.param(("noising", "--columns", "0"), "--columns is 0; expected 1..1000", id="columns"),
        pytest.param(("noising", "--index", "5000", "--data", "mnist5k"), "has the images 0..4999", id="index"),
        pytest.param(("noising", "--image", "nowhere.png"), "there is no file nowhere.png", id="no image"),
        pytest.param(("noising", "--image", "TEXT"), "cannot read the image", id="not an image"),
        pytest.param(("noising", "--data", "TWO"), "a picture has 1 (grey), 3 (RGB) or 4 (RGBA)", id="channels"),
        pytest.param(("augmentation", "--augment", "turn"), "augment has 'turn'", id="augmentation"),
        pytest.param(("augmentation", "--columns", "101"), "expected 1..100, the number of images", id="images"),
        pytest.param(("variances", "--schedule", "linear,cosine"), "only one schedule: choose one", id="two schedules"),
        pytest.param(("variances", "--timesteps", "100,many"), "one to six lengths T such as", id="no number"),
        pytest.param(("variances", "--schedule", "best"), "--schedule: best is not a schedule", id="option's name"),
        pytest.param(("snr", "--gamma", "0"), "min_snr_gamma is 0", id="gamma"),
        pytest.param(("bound", "nowhere.json"), "cannot read nowhere.json", id="no report"),
        pytest.param(("bound", "TEXT"), "evaluate nll --out FILE.json` writes", id="not JSON"),
        pytest.param(("bound", "LIST"), "holds a list", id="no object"),
        pytest.param(("bound", "OTHER"), "terms_bits_per_dim, ", id="another JSON file"),
        pytest.param(("bound", "SHORT"), "one number for each of its 4 timesteps", id="lists of two lengths"),
        pytest.param(("bound", "WORDS"), "one number for each of its 4 timesteps", id="words for numbers"),
        pytest.param(("chain", "--model", "nosuch"), "no model is called 'nosuch'", id="model"),
        pytest.param(("chain", "--model", "SMALL", "--n", "0"), "--n is 0; expected 1..50", id="n"),
        pytest.param(("chain", "--model", "SMALL", "--steps", "21"), "ask for 1..20", id="steps"),
        pytest.param(("chain", "--model", "SMALL", "--steps", "5"), "--columns is 10; expected 1..5", id="few steps"),
        pytest.param(("chain", "--model", "SMALL", "--labels", "7"), "7 is no class of this model", id="label"),
        pytest.param(("chain", "--model", "SMALL", "--sampler", "euler"), "'euler' is unknown", id="sampler"),
        pytest.param(
            ("chain", "--model", "SMALL", "--device", "nonsense"), "expected auto, cpu, cuda, mps or xpu", id="device"
        ),
    ],
)
def test_bad_input_ends_with_what_to_do_and_status_2_and_no_picture(small, tmp_path, arguments, message):
    files = {
        "TEXT": "hello",
        "LIST": "[1, 2]",
        "OTHER": '{"model": "small"}',
        "SHORT": json.dumps({**REPORT, "mse_x0": [0.1]}),
        "WORDS": json.dumps({**REPORT, "mse_x0": ["a", "b", "c", "d"]}),
    }
    places = {"SMALL": small, "TEXT/x.png": tmp_path / "TEXT.txt" / "x.png", "TWO": tmp_path / "two.npz"}
    for name, text in files.items():
        places[name] = tmp_path / f"{name}.txt"
        places[name].write_text(text)
    np.savez(places["TWO"], images=np.zeros((1, 4, 4, 2), np.uint8))
    arguments = [str(places.get(a, a)) for a in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "unwritten.png")]
    result = run(*arguments)
    assert result.exit_code == 2, result.stdout + result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "unwritten.png").exists()
