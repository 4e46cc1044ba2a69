"""What a drawing of the page is on the command line and in Python, to be copied."""

from __future__ import annotations

import shlex

from ddpm_fast.commands.demo.asking import Ask
from ddpm_fast.commands.demo.editing import Edit
from ddpm_fast.commands.labels import Turns

OUT = {None: "samples.png", "image to image": "edited.png", "inpainting": "inpainted.png", "interpolation": "path.png"}
# What the page's own pictures are saved as.
PICTURE, MASK, OTHER = "picture.png", "mask.png", "second.png"


def command(ask: Ask, source: str, device: str = "auto", edit: Edit | None = None) -> str:
    """The command that draws the same images.

    Args:
        ask: What was asked for.
        source: The model, as the command is to name it.
        device: The option --device of the page itself.
        edit: The edit, or None. Its pictures are named as the page saves them.
    """
    options = {
        "--model": source,
        "--n": ask.n,
        "--steps": ask.steps,
        "--sampler": ask.sampler,
        "--seed": ask.seed,
        "--labels": ask.labels or None,
        "--eta": ask.eta,
        "--guidance": ask.guidance,
        "--device": None if device == "auto" else device,
    }
    if edit is not None:
        options["--init-image"] = PICTURE
        if edit.kind == "inpainting":
            options |= {"--mask": MASK, "--resamplings": edit.resamplings, "--jump-length": edit.jump_length}
        else:
            options["--strength"] = edit.strength
            options["--interpolate-with"] = OTHER if edit.kind == "interpolation" else None
    options["--out"] = OUT[None if edit is None else edit.kind]
    given = (f"{name} {_argument(value)}" for name, value in options.items() if value is not None)
    return _broken("python -m ddpm_fast.sample", list(given))


def _argument(value: object) -> str:
    return shlex.quote(f"{value:g}" if isinstance(value, float) else str(value))


def _broken(start: str, parts: list[str]) -> str:
    """The parts behind the start, on lines of at most 100 characters, each but the last ending in a backslash."""
    lines = [start]
    for part in parts:
        if len(lines[-1]) + len(part) > 96:
            lines.append("   ")
        lines[-1] += f" {part}"
    return " \\\n".join(lines)


def python(ask: Ask, source: str, classes: Turns | None, device: str = "cpu", edit: Edit | None = None) -> str:
    """The Python that draws the same images.

    Args:
        ask: What was asked for.
        source: The model, as load_model is to be given it.
        classes: The class of each image, or None.
        device: Where the model is put.
        edit: The edit, or None. Its pictures are named as the page saves them.
    """
    options = [f"sampler={ask.sampler!r}", f"steps={ask.steps}", f"seed={ask.seed}"]
    if ask.eta is not None:
        options.append(f"eta={ask.eta:g}")
    if classes is not None:
        options.append(f"labels={_labels(classes)}")
    if ask.guidance is not None:
        options.append(f"guidance={ask.guidance:g}")
    load = f"df.load_model({source!r})" if device == "cpu" else f"df.load_model({source!r}, {device!r})"
    lines = ["from pathlib import Path", ""] if edit is not None else []
    lines += ["import ddpm_fast as df"]
    if edit is not None:
        lines.append("from ddpm_fast.data import read_picture")
    lines += ["from ddpm_fast.pictures.images import save_grid", "", f"loaded = {load}"]
    if edit is None:
        call, first = f"df.sample(loaded.model, loaded.diffusion, {ask.n}", list[str]()
    else:
        lines += _read_pictures(edit, ask.n)
        call, first = _edit_call(edit, ask.n)
    lines.append(f"x = {call}, {', '.join([*first, *options])})")
    lines.append(f'save_grid("{OUT[None if edit is None else edit.kind]}", x)')
    return "\n".join(lines)


def _labels(classes: Turns) -> str:
    """The classes of n images, as Python."""
    distinct, n = classes.chosen, len(classes)
    if len(set(classes)) == 1:
        return str(classes[0])
    if distinct == list(range(len(distinct))):
        return f"[i % {len(distinct)} for i in range({n})]"
    return f"[{distinct}[i % {len(distinct)}] for i in range({n})]"


def _read_pictures(edit: Edit, n: int) -> list[str]:
    lines = [f'picture = read_picture(Path("{PICTURE}"), "the picture")']
    if edit.kind == "inpainting":
        lines.append(f'mask = read_picture(Path("{MASK}"), "the mask")[0] == 255  # white is kept')
    if edit.kind == "interpolation":
        lines.append(f'other = read_picture(Path("{OTHER}"), "the second picture")')
    else:
        lines.append(f"pictures = picture.expand({n}, -1, -1, -1)")
    return lines


def _edit_call(edit: Edit, n: int) -> tuple[str, list[str]]:
    model = "loaded.model, loaded.diffusion"
    if edit.kind == "inpainting":
        numbers = [f"resamplings={edit.resamplings}", f"jump_length={edit.jump_length}"]
        return f"df.inpaint({model}, pictures, mask", numbers
    if edit.kind == "interpolation":
        return f"df.interpolate({model}, picture, other, {n}", [f"strength={edit.strength:g}"]
    return f"df.image_to_image({model}, pictures", [f"strength={edit.strength:g}"]
