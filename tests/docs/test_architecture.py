"""docs/architecture.md draws the package's parts and their imports: the picture must be what the code does.

The picture is a mermaid flowchart. A node's label is its name, a line break, and the modules or folders (`loops/`) of
ddpm_fast that belong to it; an arrow `a --> b` says that some module of a imports some module of b, and a dotted one,
`a -.-> b`, that it does so against the direction of all others. So the page alone says what belongs where.
"""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ddpm_fast"
PAGE = ROOT / "docs" / "architecture.md"
EXTENSION = "ddpm_fast._C"  # compiled: no module of the text
BASE = "base"  # the part that every other may import: its arrows are not drawn
# Packages that only some functions need, and that need not be installed for the rest of the module.
OPTIONAL = {
    "ddpm_fast.commands.training.weights_and_biases": {"wandb"},
    "ddpm_fast.data.hugging_face": {"datasets", "pyarrow"},
    "ddpm_fast.formats.diffusers.network": {"diffusers"},
    "ddpm_fast.formats.diffusers.export": {"diffusers"},
    "ddpm_fast.formats.hub": {"huggingface_hub"},
    "ddpm_fast.formats.lucidrains": {"denoising_diffusion_pytorch"},
    "ddpm_fast.formats.onnx": {"onnxruntime"},
}
# Modules that are imported by importlib when they are first needed, and why.
LATE = {
    ("ddpm_fast.ops.dispatch", "ddpm_fast.ops.backends.triton"): "importing Triton takes longer than all the rest",
    ("ddpm_fast.commands.demo.command", "ddpm_fast.commands.demo.server"): "Gradio is an extra, and reads its settings "
    "from the environment when it is imported",
    ("ddpm_fast", "ddpm_fast.public"): "it imports torch, which a list of the commands must not",
    ("ddpm_fast", "f'{__name__}.{name}'"): "a module that is asked for as an attribute of the package",
    ("ddpm_fast.__main__", "ddpm_fast.commands.front"): "Ctrl-C while it is imported ends quietly",
    ("ddpm_fast.commands.front", "f'ddpm_fast.commands.{name}'"): "of all commands only the chosen one is imported",
}
MAX_TOP_FILES = 25
MAX_DOOR_LINES = 20


class Picture(NamedTuple):
    """What docs/architecture.md draws."""

    parts: dict[str, str]  # from a module or folder directly below ddpm_fast/ to the name of its node
    arrows: set[tuple[str, str]]
    upward: set[tuple[str, str]]  # the dotted arrows


@cache
def picture() -> Picture:
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    parts = {}
    for node, label in re.findall(r'^\s*(\w+)\["(.*?)"\]', diagram, flags=re.M):
        for member in label.split("<br>")[-1].split(", "):
            member = member.strip().rstrip("/")
            assert member not in parts, f"{member} stands in two nodes: {parts.get(member)} and {node}"
            parts[member] = node
    arrows = set(re.findall(r"^\s*(\w+) --> (\w+)\s*$", diagram, flags=re.M))
    upward = set(re.findall(r"^\s*(\w+) -\.-> (\w+)\s*$", diagram, flags=re.M))
    assert len(re.findall(r"--?>|\.->", diagram)) == len(arrows) + len(upward), "an arrow was not understood"
    return Picture(parts, arrows, upward)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(), filename=str(MODULES[module]))


def imported_late(node: ast.AST) -> str:
    """What a call of importlib.import_module imports, or the empty string for anything else."""
    if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("import_module"):
        return ""
    (name, *_) = node.args
    return name.value if isinstance(name, ast.Constant) else ast.unparse(name)


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of ddpm_fast that a module imports, anywhere in its text, itself excepted."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # `from package import x` imports the module package.x where there is one, else a name of package.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES or name == EXTENSION else node.module for name in names]
        elif late := imported_late(node):
            names = [late]
        else:
            continue
        found.update(name for name in names if name in MODULES)
    return frozenset(found - {module})


def packages(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The packages that a statement imports."""
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}


def part(module: str) -> str:
    """The node of the picture that a module belongs to."""
    _, _, below = module.partition(".")
    top = below.partition(".")[0] or "__init__"
    parts = picture().parts
    assert top in parts, (
        f"{module} belongs to no part: add {top!r} (a folder as '{top}/') to a node's label in docs/architecture.md"
    )
    return parts[top]


def drawn(arrows: set[tuple[str, str]]) -> str:
    """Lines of the diagram, in the order in which it has its nodes."""
    order = list(dict.fromkeys(picture().parts.values()))
    lines = sorted(arrows, key=lambda arrow: (order.index(arrow[0]), order.index(arrow[1])))
    return "\n".join(f"    {a} {'-.->' if (a, b) in picture().upward else '-->'} {b}" for a, b in lines) or "    (none)"


def test_the_picture_is_what_the_code_imports():
    real = {(part(module), part(other)) for module in MODULES for other in imports(module)}
    real = {(a, b) for a, b in real if a != b and b != BASE}
    shown = picture().arrows | picture().upward
    if shown != real:
        pytest.fail(
            "docs/architecture.md does not draw the real imports.\n"
            f"Missing there:\n{drawn(real - shown)}\nThere, but not in the code:\n{drawn(shown - real)}\n"
            f"All arrows, to paste:\n{drawn(real)}",
            pytrace=False,
        )


def test_the_picture_names_only_what_exists():
    existing = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    missing = sorted(set(picture().parts) - existing)
    assert not missing, f"docs/architecture.md shows what is not in ddpm_fast/: {missing}"
    nodes = set(picture().parts.values())
    assert {end for arrow in picture().arrows | picture().upward for end in arrow} <= nodes


def test_the_solid_arrows_go_one_way():
    graph: dict[str, set[str]] = {}
    for a, b in picture().arrows:
        graph.setdefault(a, set()).add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"parts import each other in a circle: {' <- '.join(error.args[1])}", pytrace=False)


def test_the_one_arrow_upwards_is_the_declared_one():
    """GaussianDiffusion.bits_per_dim is a method by contract, and its loop over the timesteps is a loop's business."""
    assert picture().upward == {("diffusion", "loops")}
    reached = {other for other in imports("ddpm_fast.diffusion") if part(other) == "loops"}
    assert reached == {"ddpm_fast.loops.likelihood"}


def test_the_base_imports_nothing_of_the_package_but_itself():
    outside = {(m, other) for m in MODULES if part(m) == BASE for other in imports(m) if part(other) != BASE}
    assert not outside, f"every part imports these modules, so they must import none: {sorted(outside)}"


def test_no_module_imports_itself_in_a_circle():
    try:
        TopologicalSorter({module: imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' <- '.join(error.args[1])}", pytrace=False)


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top_and_are_absolute(module):
    """An import inside a function hides a dependency, and usually dodges a circle."""
    inside = [
        f"line {node.lineno}, in {function.name}()"
        for function in ast.walk(tree(module))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and not packages(node) <= OPTIONAL.get(module, set())
    ]
    assert not inside, f"{module} imports inside a function: {', '.join(inside)}"
    late = {imported_late(node) for node in ast.walk(tree(module))} - {""}
    hidden = sorted(name for name in late if (module, name) not in LATE)
    assert not hidden, f"{module} imports {hidden} by importlib: write an import statement, or say why not in LATE"
    relative = [f"line {n.lineno}" for n in ast.walk(tree(module)) if isinstance(n, ast.ImportFrom) and n.level]
    assert not relative, f"{module} has relative imports ({', '.join(relative)}): write `from ddpm_fast.x import y`"


def test_the_top_of_the_package_is_the_theory_the_doors_and_the_base():
    top = {path.stem: path for path in PACKAGE.glob("*.py")}
    assert len(top) <= MAX_TOP_FILES, f"{len(top)} files at the top of ddpm_fast/: {sorted(top)}"
    allowed = {"theory", "samplers", "diffusion", "doors", "names", BASE}
    wrong = {name: picture().parts.get(name) for name in top if picture().parts.get(name) not in allowed}
    assert not wrong, f"these belong into a folder of ddpm_fast/: {wrong}"


def test_a_door_is_a_few_lines_in_front_of_its_command():
    # __main__ opens them all.
    doors = [name for name, node in picture().parts.items() if node == "doors" and name != "__main__"]
    for door in doors:
        path = PACKAGE / f"{door}.py"
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) <= MAX_DOOR_LINES, f"{path.name} has {len(lines)} lines: move them into ddpm_fast/commands/"
        assert f"ddpm_fast.commands.{door}" in imports(f"ddpm_fast.{door}"), f"{path.name} opens no command"
