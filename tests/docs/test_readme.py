"""The README's examples run as they stand there, and no page links to or shows a file that does not exist."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import ddpm_fast as df

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run_example(number: int, smaller: dict[str, str] | None = None) -> dict:
    """The names that a python example of the README leaves behind. smaller: texts that occur once in it, and what
    replaces them."""
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 3
    text, names = examples[number], {"df": df}
    for before, after in (smaller or {}).items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    exec(compile(text, "README.md", "exec"), names)
    return names


def test_the_first_example_draws_eight_digits():
    images = run_example(0)["sevens"]
    assert images.shape == (8, 1, 28, 28)
    assert -1.1 < images.min() < -0.9 and 0.9 < images.max() < 1.1


def test_the_second_example_trains_on_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 30), (60 * i, 0, 200)).save(tmp_path / "images" / f"{i}.png")
    names = run_example(
        1, {"path/to/images": "images", "size=64)\n": "size=8)\n", "10_000": "2", "batch_size=64": "batch_size=2"}
    )
    loaded = df.load_model("runs/mine")
    assert names["trainer"].step == 2 and loaded.model.config.image_size == 8


def test_the_third_example_trains_on_new_noise_in_each_iteration(monkeypatch):
    losses, keys = df.GaussianDiffusion.training_losses, []

    def recorded(self, output, x0, t, noise) -> torch.Tensor:
        keys.append(noise)
        return losses(self, output, x0, t, noise)

    monkeypatch.setattr(df.GaussianDiffusion, "training_losses", recorded)
    names = run_example(2)
    assert names["loss"].isfinite() and names["x"].shape == (4, 1, 28, 28)
    first, second, third = (df.ops.normal(key, (4,)) for key in keys)
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_and_pictures_exist(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)  # code has brackets of its own
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text) + re.findall(r'<img src="([^"]+)"', text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to what is not there: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_headings_that_are_linked_to_exist(page):
    """`file.md#some-heading`: GitHub's anchors are the heading in lower case, without punctuation, with hyphens."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        other = (page.parent / target) if target else page
        headings = re.findall(r"^#+ (.+)$", other.read_text(), flags=re.M)
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in anchors, f"{page.name} links to {target}#{anchor}, which has {anchors}"
