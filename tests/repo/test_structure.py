"""The rules of the code base that no single test of behaviour can hold: imports, safety."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "fasttrain": ROOT / "fasttrain",
    "fasttrain_kernels": ROOT / "kernels/fasttrain_kernels",
}
NOT_OURS = {"build", "dist", "runs", "__pycache__", "node_modules"}

# The floors of fasttrain: a package or module imports from floors below its own alone.
FLOORS = [
    {"config", "printing", "redact"},
    {"command", "device"},
    {"storage"},
    {"data"},
    {"model", "log"},
    {"distributed"},
    {"checkpoint", "resolve"},
    {"engine"},
    {"run"},
    # Tools: each is a command or an API of its own.
    {"mirror", "prepare", "report", "generate"},
    {"evaluate", "hf", "library"},
    {"preflight", "verify_resume"},
    # Entry points
    {"train", "__main__"},
]
HEIGHTS = {package: height for height, floor in enumerate(FLOORS) for package in floor}
TOOLS = set().union(*FLOORS[9:12])
# Where the core reaches up to a tool: within a function, so that a run without it never loads it.
SEAMS = {
    ("run.setup", "prepare.corpus"): "a config that names no data trains on the default text",
    ("run.setup", "preflight.memory"): 'train.micro_batch = "auto"',
    ("run.setup", "evaluate.harness"): "eval.tasks",
    ("run.folder", "mirror"): "checkpoint.mirror",
    ("train", "mirror"): "--resume ADDRESS",
    ("train", "preflight.plan"): "--dry-run",
    ("train", "verify_resume"): "--verify-resume",
}
# What of outside the packages may import: config before torch is loaded.
LIGHT = {"config", "command", "printing", "redact"}
KERNELS_MAY_IMPORT = {"torch", "triton"}
# The distributions whose import name is not their own.
IMPORT_NAMES = {"liger-kernel": "liger_kernel"}


def python_files(folder: Path) -> Iterator[Path]:
    """Yield our own Python files under ``folder``: no virtual environments, caches or outputs."""
    if (folder / "pyvenv.cfg").exists():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and path.name not in NOT_OURS:
            yield from python_files(path)
        elif path.suffix == ".py":
            yield path


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = list(python_files(ROOT))
MODULES = {
    ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for package, folder in PACKAGES.items()
    for path in python_files(folder)
}


def is_for_types(node: ast.AST) -> bool:
    """Return whether a node is ``if TYPE_CHECKING:``, whose imports no program runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and those below it, but for what only a type checker reads."""
    if not is_for_types(node):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)


def imports_of(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Return the full names that a module imports, wherever in it: ``a.b`` for a submodule b."""
    return _imports_in(walk(ast.parse(source)), module, is_package=is_package)


def _imports_in(nodes: Iterable[ast.AST], module: str, *, is_package: bool = False) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return found


IMPORTS = {
    name: imports_of(path.read_text("utf-8"), name, is_package=path.name == "__init__.py")
    for name, path in MODULES.items()
}


def package_of(module: str) -> str:
    """Return a name of `FLOORS`: ``data`` for ``fasttrain.data.loader``; "" for the package."""
    return module.partition(".")[2].partition(".")[0]


OURS = [name for name in MODULES if name.startswith("fasttrain.") and package_of(name)]


@pytest.mark.parametrize("module", OURS)
def test_imports_lead_down(module):
    own = package_of(module)
    for name in IMPORTS[module]:
        other = package_of(name)
        if (module.partition(".")[2], name.partition(".")[2]) in SEAMS:
            continue
        if name.split(".")[0] == "fasttrain" and other != own:
            # The package itself is the version and lazy names; it loads nothing.
            assert name == "fasttrain" or HEIGHTS[other] < HEIGHTS[own], (module, name)
        elif own in LIGHT and name.split(".")[0] != "fasttrain":
            assert name.split(".")[0] in sys.stdlib_module_names, (module, name)


def test_the_core_loads_a_tool_only_within_a_function_at_a_named_place():
    used = set()
    for module in OURS:
        if package_of(module) in TOOLS:
            continue
        tree = ast.parse(MODULES[module].read_text("utf-8"))
        at_import = _imports_in(run_at_import(tree), module)
        for name in IMPORTS[module]:
            if package_of(name) in TOOLS:
                place = (module.partition(".")[2], name.partition(".")[2])
                assert place in SEAMS, f"{module} imports the tool {name}"
                assert name not in at_import, f"{module} loads {name} when it is imported"
                used.add(place)
    assert used == set(SEAMS)


def test_packages_have_no_circles():
    """Nor have the modules within a package."""
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join([*above[above.index(module) :], module])
        if module not in done:
            for name in IMPORTS[module] & MODULES.keys():
                if not MODULES[name].name.startswith("__init__"):
                    visit(name, (*above, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())
    assert {package_of(name) for name in OURS} == set(HEIGHTS)


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("fasttrain_kernels")])
def test_kernels_can_be_vendored_under_any_name(module):
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    for node in ast.walk(tree):
        absolute = []
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            absolute = [node.module or ""]
        for name in absolute:
            root = name.split(".")[0]
            assert root in KERNELS_MAY_IMPORT | sys.stdlib_module_names, f"{module}: {name}"


# Operators are public, also where their names begin with an underscore.
PRIVATE_TORCH = re.compile(
    r"\b(?:torch|dist)(?:\.\w+)*\._(?!_|foreach_|fused_adamw_|amp_update_scale_)\w+"
)


@pytest.mark.parametrize("module", MODULES)
def test_what_is_known_of_torchs_private_names_lives_in_one_file(module):
    if module != "fasttrain_kernels._torch":
        source = ast.unparse(ast.parse(MODULES[module].read_text("utf-8")))
        names = [*re.finditer(PRIVATE_TORCH, source)]
        assert [n[0] for n in names if not n[0].endswith("._dynamo")] == []


def test_every_package_imported_is_a_declared_dependency():
    ours, kernels = (
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))["project"]
        for folder in (".", "kernels")
    )
    extras = ours["optional-dependencies"]
    declared = [*ours["dependencies"], *(r for n in extras if n != "test" for r in extras[n])]
    declared += kernels["dependencies"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in declared}
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names} | set(PACKAGES)
    for module, imported in IMPORTS.items():
        foreign = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
        assert foreign <= known, f"{module} imports {foreign - known}: declare it in pyproject.toml"


def run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes that run when a module is imported: all but the bodies of functions."""
    open_ends: list[ast.AST] = [tree]
    while open_ends:
        node = open_ends.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        if is_for_types(node):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args
            open_ends += [*arguments.defaults, *(d for d in arguments.kw_defaults if d)]
            if not isinstance(node, ast.Lambda):
                open_ends += node.decorator_list
        else:
            open_ends += ast.iter_child_nodes(node)


SIDE_EFFECTS = re.compile(
    r"os\.(environ|getenv|putenv)\b"
    r"|torch\.(cuda|accelerator|distributed)\.\w+\("
    r"|torch\.(set_|use_deterministic|manual_seed|compile\b)"
    r"|triton\.runtime\.driver"
    r"|logging\.(basicConfig|getLogger\(\)|disable)"
    r"|warnings\.(filterwarnings|simplefilter)"
    r"|signal\.signal\("
)


def import_time_faults(source: str) -> list[str]:
    """Return what a module does on import beyond defining things."""
    tree = ast.parse(source)
    modules = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    faults = []
    for node in run_at_import(tree):
        if isinstance(node, ast.Call | ast.Attribute) and SIDE_EFFECTS.match(ast.unparse(node)):
            faults.append(ast.unparse(node))
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            # An assignment to an attribute of an imported module is a monkey-patch.
            base = ast.unparse(target).split(".")[0].split("[")[0]
            if isinstance(target, ast.Attribute | ast.Subscript) and base in modules:
                faults.append(ast.unparse(node))
    return faults


@pytest.mark.parametrize("module", MODULES)
def test_importing_has_no_side_effects(module):
    assert import_time_faults(MODULES[module].read_text("utf-8")) == []


UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
UNSAFE_CALLS = {"eval", "exec", "os.system"}
PICKLING_CALLS = {"torch.load", "torch.save", "torch.jit.load"}
UNSAFE_OPTIONS = {"weights_only": "False", "allow_pickle": "True", "shell": "True"}


def unsafe_uses(source: str, *, shipped: bool = True) -> list[str]:
    """Return what could execute code that is held in a file that is read.

    Code that is not ``shipped`` in a package may pickle its own objects, to compare with it or to
    see that others can, and load tensors with ``weights_only=True``.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        unsafe = False
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = getattr(node, "module", None) or ""
            names = {alias.name for alias in node.names}
            roots = {name.split(".")[0] for name in {*names, base}}
            unsafe = shipped and bool(roots & UNSAFE_IMPORTS)
            unsafe |= bool({f"{base}.{name}" for name in names} & (UNSAFE_CALLS | PICKLING_CALLS))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            unsafe = name in UNSAFE_CALLS or (shipped and name in PICKLING_CALLS)
            unsafe |= name == "torch.load" and options.get("weights_only") != "True"
            unsafe |= any(options.get(k) == value for k, value in UNSAFE_OPTIONS.items())
        if unsafe:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_read_is_ever_executed(path):
    shipped = path in MODULES.values()
    assert unsafe_uses(path.read_text("utf-8"), shipped=shipped) == []


DEFINITIONS = """
import os, torch
LIMIT = 3
kinds = {torch.float32: 4}
class A:
    width = 3
    def f(self):
        self.x = os.environ["X"]
        return torch.cuda.is_available()
handler = lambda: torch.cuda.synchronize()
if __name__ == "__main__":
    os.environ["X"] = "1"
"""


@pytest.mark.parametrize(
    ("source", "is_fault"),
    [
        ("import os\nDEBUG = os.environ.get('DEBUG')", True),
        ("import os\nclass A:\n    debug = os.getenv('DEBUG')", True),
        ("import torch\nHAS_GPU = torch.cuda.is_available()", True),
        ("import torch\ndef f(device=torch.cuda.current_device()): ...", True),
        ("import torch\ntorch.set_float32_matmul_precision('high')", True),
        ("import torch\nif True:\n    torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("import torch\n@torch.compile\ndef f(): ...", True),
        ("import logging\nlogging.basicConfig()", True),
        (DEFINITIONS, False),
    ],
)
def test_the_checker_sees_import_time_faults(source, is_fault):
    assert bool(import_time_faults(source)) == is_fault


@pytest.mark.parametrize(
    ("source", "n_shipped", "n_others"),
    [
        ("import pickle\npickle.loads(pickle.dumps(x))", 1, 0),
        ("from pickle import load", 1, 0),
        ("import torch\ntorch.save(x, b)\ntorch.load(b, weights_only=True)", 2, 0),
        ("import torch\ntorch.load(b)", 1, 1),
        ("import torch\ntorch.load(b, weights_only=False)", 1, 1),
        ("from torch import load", 1, 1),
        ("f(weights_only=False)", 1, 1),
        ("np.load(b, allow_pickle=True)\nexec(text)", 2, 2),
        ("import subprocess\nsubprocess.run('ls', shell=True)", 1, 1),
        ("model.eval()\ntorch.compile(f)\nsafetensors.torch.load(b)\nre.compile('x')", 0, 0),
    ],
)
def test_the_checker_sees_unsafe_uses(source, n_shipped, n_others):
    assert len(unsafe_uses(source)) == n_shipped
    assert len(unsafe_uses(source, shipped=False)) == n_others


def test_imports_are_resolved():
    source = "from . import step\nfrom ..data.loader import Loader\nimport torch.nn.functional as F"
    found = imports_of(source, "fasttrain.engine.loop")
    assert found == {"fasttrain.engine.step", "fasttrain.data.loader", "torch.nn.functional"}
    assert imports_of("from . import device", "fasttrain", is_package=True) == {"fasttrain.device"}
    assert imports_of("from fasttrain import __version__", "fasttrain.x") == {"fasttrain"}
    for_types = "if TYPE_CHECKING:\n    from fasttrain.mirror import Mirror"
    assert imports_of(for_types, "fasttrain.x") == set()
