"""The README's example runs as it stands there."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["loss"].isfinite() and names["x"].shape == (4, 1, 28, 28)


def test_local_links_exist():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text())
    assert targets
    missing = [target for target in targets if not (README.parent / target).exists()]
    assert not missing, f"README.md links to what is not there: {missing}"
