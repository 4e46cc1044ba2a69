"""What people type: the sample and info commands, and the names they import."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import run, save_small_model

import ddpm_fast as df
from ddpm_fast.loops import prepared, sampling
from ddpm_fast.pictures.images import to_uint8

pytestmark = pytest.mark.usefixtures("wide_terminal")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model") / "small.safetensors", names=["cat", "dog", "hen"])


def test_sample_writes_a_grid_and_says_where_how_long_and_how_fast(small, tmp_path):
    out = tmp_path / "new" / "grid.png"
    result = run("sample", "--model", small, "--n", 9, "--steps", 3, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert str(out) in result.stdout and "9 images of 3x8x8 in" in result.stdout and "images/s" in result.stdout
    picture = Image.open(out)
    assert picture.mode == "RGB" and picture.size[0] == picture.size[1]


def test_npz_holds_what_the_library_draws(small, tmp_path):
    out = tmp_path / "s.npz"
    arguments = ("--model", small, "--n", 5, "--steps", 4, "--seed", 7, "--labels", "dog,2", "--batch-size", 2)
    assert run("sample", *arguments, "--out", out).exit_code == 0
    arrays = np.load(out)
    assert arrays["labels"].tolist() == [1, 2, 1, 2, 1]
    loaded = df.load_model(small)
    x = df.sample(loaded.model, loaded.diffusion, 5, steps=4, seed=7, labels=[1, 2, 1, 2, 1], batch_size=2)
    expected = ((x + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(arrays["images"].astype(int) - expected).max() <= 1


def test_folder_of_pngs_continues_where_an_earlier_one_ended(small, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run("sample", "--model", small, "--n", 4, "--steps", 2, "--labels", "0", "--out", whole).exit_code == 0
    tail = ("--n", 2, "--first-sample-id", 2, "--steps", 2, "--labels", "0", "--out", part)
    assert run("sample", "--model", small, *tail).exit_code == 0
    for name in ("000002_label0_cat.png", "000003_label0_cat.png"):
        a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (whole, part))
        assert np.abs(a - b).max() <= 1
    assert len(list(whole.glob("*.png"))) == 4


def test_gif_shows_the_denoising(small, tmp_path):
    gif = tmp_path / "steps.gif"
    arguments = ("--model", small, "--n", 4, "--steps", 6, "--batch-size", 3, "--out", tmp_path / "s.png")
    assert run("sample", *arguments, "--gif", gif).exit_code == 0
    movie = Image.open(gif)
    assert movie.n_frames == 6
    last = np.asarray(movie.convert("RGB"))
    movie.seek(5)
    assert (np.asarray(movie.convert("RGB")) != last).any()


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--sampler", "dpmpp_2m", "--steps", "5", "--spacing", "quadratic"], ("dpmpp_2m", 5, "quadratic")),
        (["--sampler", "ddim", "--steps", "3,4", "--eta", "0.5"], ("ddim", "3,4", "even")),
    ],
    ids=["quadratic", "sections"],
)
def test_options_of_sampler_and_guidance_reach_the_library(small, tmp_path, arguments, options):
    out = tmp_path / "s.npz"
    guided = ("--guidance", 3, "--guidance-rescale", 0.4, "--dynamic-threshold", 0.9, "--labels", "hen")
    result = run("sample", "--model", small, "--n", 3, *arguments, *guided, "--out", out)
    assert result.exit_code == 0, result.stderr
    loaded, (sampler, steps, spacing) = df.load_model(small), options
    x = df.sample(
        loaded.model,
        loaded.diffusion,
        3,
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        eta=0.5 if sampler == "ddim" else None,
        labels=2,
        guidance=3.0,
        guidance_rescale=0.4,
        dynamic_threshold=0.9,
    )
    assert np.array_equal(np.load(out)["images"], to_uint8(x))


@pytest.fixture
def pictures(tmp_path):
    """Two colour pictures of 8x8, and a mask that keeps the upper half."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    for name, array in (("a", pixels[0]), ("b", pixels[1]), ("mask", mask)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    np.savez(tmp_path / "both.npz", images=pixels)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(mask == 255)


EDITS = {
    "image to image": (
        ("--init-image", "both.npz", "--strength", 0.3, "--n", 3, "--labels", "dog"),
        lambda m, d, x, mask, o: df.image_to_image(m, d, x[[0, 1, 0]], 0.3, labels=1, **o),
    ),
    "inpainting": (
        ("--init-image", "a.png", "--mask", "mask.png", "--resamplings", 2, "--jump-length", 2, "--n", 2),
        lambda m, d, x, mask, o: df.inpaint(m, d, x[[0, 0]], mask, resamplings=2, jump_length=2, **o),
    ),
    "interpolation": (
        ("--init-image", "a.png", "--interpolate-with", "b.png", "--n", 4, "--sampler", "ddim"),
        lambda m, d, x, mask, o: df.interpolate(m, d, x[0], x[1], 4, sampler="ddim", **o),
    ),
    "round trip": (
        ("--init-image", "both.npz", "--round-trip"),
        lambda m, d, x, mask, o: df.decode(m, d, df.encode(m, d, x, o["steps"]), o["steps"]),
    ),
}


def test_a_set_of_images_is_prepared_once_and_drawn_once(small, tmp_path, monkeypatch):
    calls = []
    for module, name in ((sampling, "make_table"), (prepared, "predictor")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=function, _n=name, **k: (calls.append(_n), _f(*a, **k))[1])
    run("sample", "--model", small, "--n", 4, "--steps", 3, "--batch-size", 2, "--out", tmp_path / "s.npz")
    assert calls == ["make_table", "predictor", "predictor"]


@pytest.mark.parametrize("edit", list(EDITS))
def test_edits_are_the_librarys(small, tmp_path, pictures, edit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = EDITS[edit]
    result = run("sample", "--model", small, *arguments, "--steps", 6, "--seed", 3, "--out", "s.npz")
    assert result.exit_code == 0, result.stderr
    loaded = df.load_model(small)
    x = expected(loaded.model, loaded.diffusion, *pictures, {"steps": 6, "seed": 3})
    assert np.array_equal(np.load("s.npz")["images"], to_uint8(x))
    if edit == "round trip":
        mse = (x - (pictures[0].float() / 127.5 - 1)).square().mean().item()
        assert f"mean squared error {mse:.3g}" in result.stdout and "dB" in result.stdout


def test_a_grey_model_takes_grey_saved_as_colour_and_refuses_colour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey = save_small_model(tmp_path / "grey.safetensors", channels=1)
    Image.new("RGB", (8, 8), (99, 99, 99)).save("grey.png")
    Image.new("RGB", (8, 8), (99, 99, 98)).save("colour.png")
    arguments = ("--model", grey, "--steps", 2, "--n", 1, "--init-image")
    assert run("sample", *arguments, "grey.png").exit_code == 0
    result = run("sample", *arguments, "colour.png")
    assert result.exit_code == 2 and "colour.png is RGB; expected grey: convert it first" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nosuch"], "no model is called 'nosuch'"),
        (["--model", "MISSING"], "missing.safetensors"),
        (["--model", "TEXT"], "text.safetensors"),
        (["--model", "CUT"], "cut.safetensors"),
        (["--model", "SMALL", "--labels", "7"], "7 is no class of this model; it has 0..2 or cat, dog, hen"),
        (["--model", "PLAIN", "--labels", "1"], "unconditional"),
        (["--model", "SMALL", "--steps", "21"], "ask for 1..20"),
        (["--model", "SMALL", "--steps", "many"], "cannot read the respacing 'many'"),
        (["--model", "SMALL", "--spacing", "log"], "spacing 'log' is unknown; there are even, quadratic"),
        (["--model", "SMALL", "--eta", "0.5"], "eta belongs to ddim"),
        (["--model", "SMALL", "--guidance", "-1"], "guidance is -1.0; expected a finite number"),
        (["--model", "SMALL", "--guidance", "2", "--labels", "none"], "guidance needs labels"),
        (["--model", "SMALL", "--guidance-rescale", "0.5"], "guidance_rescale is 0.5 without guidance"),
        (["--model", "SMALL", "--dynamic-threshold", "2"], "expected a quantile in (0, 1]"),
        (["--model", "UNDROPPED", "--guidance", "2"], "trained with --label-drop 0"),
        (
            ["--model", "SMALL", "--strength", "0.5"],
            "--strength is for editing a picture: give the picture with --init",
        ),
        (["--model", "SMALL", "--round-trip"], "--round-trip is for editing a picture"),
        (["--model", "SMALL", "--init-image", "nosuch.png"], "--init-image: there is no file nosuch.png"),
        (["--model", "SMALL", "--init-image", "TEXT"], "text.safetensors"),
        (["--model", "SMALL", "--init-image", "WIDE"], "a width of 9 pixels, but this UNet halves"),
        (["--model", "SMALL", "--init-image", "TWO.npz"], "is 2 channels; expected RGB"),
        (["--model", "SMALL", "--init-image", "PICTURE", "--strength", "0"], "strength is 0.0; expected a number in"),
        (["--model", "SMALL", "--init-image", "PICTURE", "--gif", "x.gif"], "leave it out with --init-image"),
        (["--model", "SMALL", "--init-image", "PICTURE", "--resamplings", "3"], "--resamplings is for inpainting"),
        (
            ["--model", "SMALL", "--init-image", "PICTURE", "--mask", "SMOOTH"],
            "3 of the 64 pixels of",
        ),
        (
            ["--model", "SMALL", "--init-image", "PICTURE", "--mask", "MASK", "--strength", "0.5"],
            "not for inpainting: leave --strength out",
        ),
        (
            ["--model", "SMALL", "--init-image", "PICTURE", "--mask", "MASK", "--steps", "4"],
            "jump_length is 5, but there are 4 steps",
        ),
        (
            ["--model", "SMALL", "--init-image", "PICTURE", "--mask", "MASK", "--round-trip"],
            "--mask and --round-trip are different edits: choose one",
        ),
        (
            ["--model", "SMALL", "--init-image", "PICTURE", "--round-trip", "--sampler", "ddpm"],
            "--round-trip works with the sampler ddim alone, not with ddpm",
        ),
        (["--model", "SMALL", "--init-image", "PICTURE", "--round-trip", "--n", "2"], "leave --n out"),
        (
            ["--model", "SMALL", "--init-image", "PICTURE", "--round-trip", "--labels", "1", "--guidance", "2"],
            "leave --guidance out",
        ),
        (
            ["--model", "SMALL", "--init-image", "PICTURE", "--interpolate-with", "PICTURE", "--labels", "0,1"],
            "an interpolation has one class for all images",
        ),
        (
            ["--model", "SMALL", "--init-image", "PICTURE", "--interpolate-with", "PAIR.npz"],
            "--init-image holds 1 and --interpolate-with 2: give files of one picture each",
        ),
        (["--model", "UNDROPPED", "--labels", "none"], "its null class was never trained"),
        (["--model", "UNDROPPED", "--init-image", "PICTURE"], "without labels the null class is used"),
        (["--model", "SMALL", "--init-image", "TEXT"], "--init-image: cannot read the image"),
        (["--model", "SMALL", "--n", "0"], "--n is 0"),
        (["--model", "SMALL", "--sampler", "euler"], "there are ddpm"),
        (["--model", "SMALL", "--out", "x.jpg"], ".png (a grid)"),
        (["--model", "SMALL", "--out", "TEXT/x.png"], "cannot write"),
        (["--model", "SMALL", "--gif", "x.mp4"], "ending in .gif"),
        (["--model", "SMALL", "--device", "nonsense"], "expected auto, cpu, cuda, mps or xpu"),
        (["--model", "SMALL", "--device", "cpu", "--cuda-graph"], "on cpu, and CUDA graphs are for CUDA devices"),
        (["--model", "SMALL", "--precision", "int4"], "expected auto, fp32, bf16"),
        (["--model", "SMALL", "--seed", str(2**64)], "2^64-1"),
    ],
)
def test_bad_input_ends_with_a_message_and_status_2_before_any_sampling(small, tmp_path, arguments, message):
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(small.read_bytes()[:-100])
    places = {
        "MISSING": tmp_path / "missing.safetensors",
        "TEXT": tmp_path / "text.safetensors",
        "TEXT/x.png": tmp_path / "text.safetensors" / "x.png",
        "CUT": tmp_path / "cut.safetensors",
        "SMALL": small,
        "PLAIN": tmp_path / "plain.safetensors",
        "UNDROPPED": tmp_path / "undropped.safetensors",
        "PICTURE": tmp_path / "picture.png",
        "WIDE": tmp_path / "wide.png",
        "MASK": tmp_path / "mask.png",
        "SMOOTH": tmp_path / "smooth.png",
        "TWO.npz": tmp_path / "two.npz",
        "PAIR.npz": tmp_path / "pair.npz",
    }
    if "PLAIN" in arguments:
        save_small_model(places["PLAIN"], classes=0)
    if "UNDROPPED" in arguments:
        save_small_model(places["UNDROPPED"], training={"label_drop": 0.0})
    Image.new("RGB", (8, 8), (9, 99, 200)).save(places["PICTURE"])
    Image.new("RGB", (9, 8)).save(places["WIDE"])
    mask = Image.new("L", (8, 8), 255)
    mask.save(places["MASK"])
    mask.paste(128, (0, 0, 3, 1))
    mask.save(places["SMOOTH"])
    np.savez(places["TWO.npz"], images=np.zeros((1, 8, 8, 2), np.uint8))
    np.savez(places["PAIR.npz"], images=np.zeros((2, 8, 8, 3), np.uint8))
    # The default output goes where the command runs.
    arguments = [str(places.get(a, a)) for a in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "unwritten.png")]
    result = run("sample", *arguments)
    assert result.exit_code == 2, result.stdout + result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "unwritten.png").exists()


def test_info_says_what_is_active_and_why_the_rest_is_not():
    result = run("info")
    assert result.exit_code == 0, result.stderr
    assert "C++ extension: built" in result.stdout
    assert "TRITON_INTERPRET=1" in result.stdout or "pip install triton" in result.stdout
    assert "normal: cpu" in result.stdout and "mnist5k" in result.stdout
    if not torch.cuda.is_available():
        assert "CUDA: none" in result.stdout


@pytest.mark.parametrize(
    ("versions", "has_bf16", "capability", "line"),
    [
        ({"hip": "7.0.1", "cuda": None}, True, (9, 4), "ROCm 7.0.1: cuda:0, a GPU; trains in bf16 by default"),
        ({"hip": None, "cuda": "13.0"}, False, (7, 5), "CUDA: cuda:0, a GPU; trains in fp16 by default"),
    ],
    ids=["ROCm", "Turing"],
)
def test_info_names_the_gpus_and_what_they_train_in(monkeypatch, versions, has_bf16, capability, line):
    for name, value in versions.items():
        monkeypatch.setattr(torch.version, name, value)
    gpu = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda index: "a GPU",
        "get_device_capability": lambda index: capability,
        "is_bf16_supported": lambda including_emulation: has_bf16,
    }
    for name, value in gpu.items():
        monkeypatch.setattr(torch.cuda, name, value)
    result = run("info")
    assert result.exit_code == 0, result.stderr
    assert line in result.stdout and "Active for cuda tensors: " in result.stdout


DOORS = ("sample", "train", "prepare", "info", "evaluate", "plot", "convert", "export")
# What `python -m ddpm_fast.X --help` does, one X after the other: a process each would import torch each time.
EVERY_HELP = f"""
import runpy, sys
for door in {DOORS}:
    sys.argv = [door, "--help"]
    try:
        runpy.run_module(f"ddpm_fast.{{door}}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(f"{{door}} ended with status {{end.code}}")
"""


def test_every_command_explains_itself():
    result = subprocess.run([sys.executable, "-c", EVERY_HELP], capture_output=True, text=True)
    parts = result.stdout.split(" ended with status 0\n")
    assert result.returncode == 0 and len(parts) == len(DOORS) + 1, result.stdout + result.stderr
    for door, text in zip(DOORS, parts, strict=False):
        assert "Usage" in text and text.endswith(door), text


def test_importing_the_sample_command_leaves_the_sample_function(small):
    importlib.import_module("ddpm_fast.commands.sample")
    loaded = df.load_model(small)
    assert df.sample(loaded.model, loaded.diffusion, 1, steps=1, labels=0).shape == (1, 3, 8, 8)


def test_public_names_are_stable():
    expected = {
        "GaussianDiffusion",
        "NoiseKey",
        "SamplingOptions",
        "Schedule",
        "Step",
        "TrainConfig",
        "Trainer",
        "UNet",
        "UNetConfig",
        "load_dataset",
        "load_model",
        "ops",
        "sample",
        "use_backend",
    }
    assert expected <= set(df.__all__)
    assert all(hasattr(df, name) for name in df.__all__)
    assert {"normal", "q_sample", "diffusion_loss", "reverse_step"} <= set(df.ops.__all__)
    methods = ("q_sample", "q_posterior", "p_mean_variance", "training_losses")
    assert all(hasattr(df.GaussianDiffusion, name) for name in methods)
