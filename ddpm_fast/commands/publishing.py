"""`python -m ddpm_fast.export --push`: a model's page with its pictures, and sending it all to the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_fast.commands.common import console
from ddpm_fast.commands.quality.published import lines_of
from ddpm_fast.commands.report import read_report
from ddpm_fast.errors import InputError
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats import hub
from ddpm_fast.formats.card import Page
from ddpm_fast.formats.repository import Address
from ddpm_fast.loops.sampling import sample
from ddpm_fast.pictures import images
from ddpm_fast.pictures.canvas import save_figure
from ddpm_fast.pictures.curves import draw_loss

_SAMPLES, _CURVE, _PAGE = "samples.png", "loss.png", "README.md"
_MOST_SAMPLES = 256
_STEPS = 50


@dataclass(frozen=True)
class Publication:
    """What is sent, and where to.

    Attributes:
        address: The repository.
        form: What is in it, as in Page.
        license: The name of the licence.
        private: Whether a repository that is made is private.
        samples: How many images are drawn for the page.

    Raises:
        InputError: For a number of samples that is out of range.
    """

    address: Address
    form: str
    license: str
    private: bool
    samples: int

    def __post_init__(self) -> None:
        if not 0 <= self.samples <= _MOST_SAMPLES:
            raise InputError(f"--samples is {self.samples}; expected 0..{_MOST_SAMPLES}")

    def send(self, loaded: LoadedModel, folder: Path, device: torch.device) -> None:
        """Add the page to a folder that holds the export, and send the folder.

        Args:
            loaded: The model.
            folder: Where the export is.
            device: Where to draw the samples.

        Raises:
            InputError: If it could not be sent.
        """
        pictures = {}
        if self._draw_samples(loaded, folder / _SAMPLES, device):
            pictures[_SAMPLES] = "Samples"
        if _draw_curve(loaded.path.parent / "curves", folder / _CURVE):
            pictures[_CURVE] = "The loss over the training steps"
        metrics = _measured(loaded) if not loaded.files else []
        page = Page(loaded, self.address.repository, self.form, self.license, pictures, metrics)
        (folder / _PAGE).write_text(page.text(), encoding="utf-8")
        sent = hub.upload(folder, self.address, self.private)
        console.print(f"Sent to {escape(sent)}")
        console.print(
            "A new repository is private: change that in its settings, or push with --public."
            if self.private
            else "A new repository is public."
        )

    def _draw_samples(self, loaded: LoadedModel, path: Path, device: torch.device) -> bool:
        """Draw a grid of samples, if there can be one."""
        unet = loaded.unet.config
        if not self.samples or unet.condition_channels or unet.in_channels not in (1, 3):
            return False
        steps = min(_STEPS, loaded.diffusion.num_timesteps)
        console.print(f"Drawing {self.samples} samples of {steps} steps for the page (--samples 0 leaves them out)")
        labels = [i % loaded.classes for i in range(self.samples)] if loaded.classes else None
        x = sample(loaded.unet.to(device), loaded.diffusion, self.samples, steps=steps, seed=0, labels=labels)
        images.save_grid(path, images.shown_channels(x.cpu(), loaded.value_range))
        return True


def _draw_curve(folder: Path, path: Path) -> bool:
    """Draw the loss of the training whose TensorBoard files a folder holds. False if it holds none."""
    if not folder.is_dir():
        return False
    curves = EventAccumulator(str(folder), size_guidance={"scalars": 2000})
    curves.Reload()
    if "loss" not in curves.Tags()["scalars"]:
        return False
    points = curves.Scalars("loss")
    save_figure(draw_loss([point.step for point in points], [point.value for point in points]), path)
    return True


def _measured(loaded: LoadedModel) -> list[str]:
    """What the reports of `evaluate` beside a model say: those of `all` and the like, of `card`, and of `nll`."""
    folder, found = loaded.path.parent, []
    for name in ("quality*.json", "card*.json"):
        for path in sorted(folder.glob(name)):
            found += lines_of(path, loaded.digest)
    for path in sorted(folder.glob("nll*.json")):
        report = read_report(path)
        estimate = ", estimated" if report["estimate"] else ""
        found.append(
            f"{report['total_bits_per_dim']:.4f} bits/dim (standard error {report['total_stderr']:.4f}{estimate}), "
            f"on {report['images']} images"
        )
    return found
