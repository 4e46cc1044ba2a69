"""The notebooks of docs/notebooks run on small settings, and read well as they are kept. The derivation is complete:
its equations are numbered through, a notebook checks each of them, and the numbers that it quotes are right.
"""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
DERIVATION = (ROOT / "docs" / "derivation.md").read_text()
MACHINE_PATHS = re.compile(r"(?<![\w:/.])/(?:home|root|tmp|work|usr|opt|var|mnt|Users|content)/|\bC:\\|site-packages")
MATH = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$", flags=re.DOTALL)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def executed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the notebook prints on small settings. Raises CellExecutionError where a cell does."""
    nbclient = pytest.importorskip("nbclient", reason="notebooks are executed by nbclient: install the 'docs' extra")
    pytest.importorskip("ipykernel", reason="notebooks run in ipykernel: install the 'docs' extra")
    nbformat = pytest.importorskip("nbformat")  # comes with nbclient
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(folder / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DDPM_FAST_QUICK", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
@each
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    printed = executed(path, tmp_path, monkeypatch)
    assert printed
    if path.stem == "derivation":
        # "(11, 14) largest difference ..." is a check of the equations (11) and (14).
        labels = re.findall(r"^\((\d+(?:, \d+)*)", printed, flags=re.M)
        checked = {int(number) for label in labels for number in label.split(", ")}
        assert checked == set(numbers_of_equations())


def numbers_of_equations() -> list[int]:
    return [int(number) for number in re.findall(r"\\qquad \((\d+)\)\$\$", DERIVATION)]


def test_the_equations_are_numbered_through_and_named_where_the_package_has_them():
    numbers = numbers_of_equations()
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 30
    last = DERIVATION.split("## Where the steps are in the package")[1]
    ranges = re.findall(r"\((\d+)\)(?: (?:to|and) \((\d+)\))?", last)
    named = {n for first, end in ranges for n in range(int(first), int(end or first) + 1)}
    steps_on_the_way = {2, 26, 33}  # a product, another form of a weight, and what no code has to know
    assert named | steps_on_the_way >= set(numbers)


@pytest.mark.parametrize("path", [ROOT / "docs" / "derivation.md", *NOTEBOOKS], ids=lambda path: path.name)
def test_equations_have_nothing_that_markdown_takes_for_its_own(path):
    """GitHub, Jupyter and MkDocs read Markdown before or after mathematics. What neither touches is the same in all."""
    text = path.read_text() if path.suffix == ".md" else "\n".join(map(source, cells(path, "markdown")))
    text = re.sub(r"`[^`\n]*`", "", text)
    broken = [line for line in text.splitlines() if line.replace("$$", "").count("$") % 2]
    assert not broken, "an equation within the text must be on one line"
    equations = MATH.findall(text)
    assert equations or path.stem in ("first-steps", "own-images")
    for equation in equations:
        wrong = re.findall(r"\\[^A-Za-z \n]|[})\]]_|[*<>&]|\n\n", equation)
        assert not wrong, f"{equation} has {wrong}: use \\Vert, \\lt, \\quad, or one equation for each line"


@each
def test_a_notebook_is_small_and_names_no_machine(path):
    assert path.stat().st_size < 300_000
    text = path.read_text()
    assert not MACHINE_PATHS.search(text) and str(ROOT) not in text
    code = cells(path, "code")
    assert any(cell["outputs"] for cell in code), "run it: python docs/run_notebooks.py"
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    assert sum(source(cell).count("assert") for cell in code) >= 4


def repository() -> str:
    """The project's address: mkdocs.yml's, or the placeholder."""
    stated = None
    if (ROOT / "mkdocs.yml").exists():
        stated = re.search(r"^repo_url: *(\S+)", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    stated = stated or re.search(
        r'^PLACEHOLDER = "(.+?)"', (ROOT / "docs" / "run_notebooks.py").read_text(), flags=re.M
    )
    return stated[1].rstrip("/")


@each
def test_a_notebook_opens_in_colab_and_installs_there(path):
    advice = "write the address anew: python docs/run_notebooks.py --heads"
    first, install = source(cells(path, "markdown")[0]), source(cells(path, "code")[0])
    place = repository().removeprefix("https://github.com/")
    address = f"https://colab.research.google.com/github/{place}/blob/main/docs/notebooks/{path.name}"
    assert first.startswith("[![Open in Colab](") and f"]({address})" in first.splitlines()[0], advice
    assert f"%pip install -q git+{repository()}\n" in install, advice
    assert install == source(cells(NOTEBOOKS[0], "code")[0]), advice


def figures():
    spec = importlib.util.spec_from_file_location("derivation_figures", ROOT / "docs" / "derivation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and named tuples look their module up
    spec.loader.exec_module(module)
    return module


def test_the_numbers_that_the_derivation_quotes():
    made = figures()
    chain, x0 = made.chain(), made.EXAMPLE
    # log p(x_0) from the whole path's density: p(x_0..x_T) / p(x_1..x_T | x_0), at any path.
    path = torch.linspace(-1, 1, made.T, dtype=torch.float64)
    whole = torch.cat([torch.tensor([x0], dtype=torch.float64), path])
    normal = torch.distributions.MultivariateNormal
    exact = normal(chain.mean, chain.covariance).log_prob(whole) - normal(*chain.given(x0)).log_prob(path)
    bound = -made.bound_terms(chain, x0).sum()
    assert f"the bound is {bound:.3f} where" in DERIVATION and f"the log-likelihood is {exact:.3f}." in DERIVATION
    assert math.isclose(exact - bound, made.divergence(chain.forward(x0), chain.given(x0)), abs_tol=1e-10)
    ratios = []
    for variance in ("fixed_small", "fixed_large"):
        weight = made.dropped_weight(made.Schedule.linear(1000), variance)
        ratios.append(round(float(weight[0] / weight.min())))
    assert f"{ratios[0]} times its smallest value" in DERIVATION and f"{ratios[1]} times with" in DERIVATION
