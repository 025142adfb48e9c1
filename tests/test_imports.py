"""Imports go down only (architecture.md), read from the source; the core needs neither dashboards nor a network."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "simclr"

# From the ground up. A file may import from its own layer and from those below.
LAYERS = [
    ["checks", "seeding", "distributed", "precision", "paths", "files", "heartbeat", "torch_internals"],
    ["allocator", "container"],
    ["contrast"],
    ["views"],
    ["augment", "losses", "heads", "resnet", "efficientnet", "image_sizes", "model_zoo", "encoders", "optim"],
    ["run_length", "pyramid"],
    ["data"],
    ["inputs", "intact"],
    ["module", "byol", "supervised", "checkpoint", "starting_weights", "continuation", "training", "export"],
    ["memory"],
    ["eval"],
    ["online_quality", "use"],
    ["nonfinite", "online_accuracy"],
    ["callbacks", "diagnosis", "step_figures", "loggers", "wandb_run", "provenance", "run_folder", "profile"],
    ["report", "pace", "progress"],
    ["compare", "dashboard", "evaluation_figures"],
    ["ablate"],
    ["cli"],
]
HEAVY = {
    "pillow_heif",
    "faiss",
    "tifffile",
    "wandb",
    "matplotlib",
    "sklearn",
    "timm",
    "onnx",
    "onnxruntime",
    "litdata",
    "pyarrow",
    "scipy",
}  # imported where they are used


def name_of(path: Path) -> str:
    """The part of the package a file belongs to: a folder counts as one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(tree: ast.AST) -> set[str]:
    """Full names of everything imported anywhere in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(tree: ast.AST) -> set[str]:
    ours = {name for name in imports(tree) if name.startswith("simclr.")}
    return {name.split(".")[1] for name in ours} - {"__version__"}


def layer(part: str) -> int:
    for height, parts in enumerate(LAYERS):
        if part in parts:
            return height
    raise AssertionError(f"simclr/{part} has no layer: give it one in {Path(__file__).name}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down_only(path):
    here = layer(name_of(path))
    upwards = {part for part in parts_imported(tree_of(path)) if layer(part) > here}
    assert not upwards, f"{path.name} imports {sorted(upwards)} from above"


@pytest.mark.parametrize("argument", ["--help", "--version", "trian"])
def test_the_command_line_answers_without_torch(argument):
    program = f"""
import sys
from simclr.cli import main
try: main([{argument!r}])
except SystemExit: pass
print(sorted({{"torch", "pytorch_lightning", "jsonargparse", "rich", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split("\n")[-2] == "[]", done


def test_python_m_simclr_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "simclr", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("simclr "), done


def test_only_distributed_imports_torch_distributed():
    def imports_it(path: Path) -> bool:
        return any(name.startswith("torch.distributed") for name in imports(tree_of(path)))

    assert [name_of(path) for path in FILES if imports_it(path)] == ["distributed"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_heavy_packages_are_imported_where_they_are_used(path):
    at_import = set()
    for statement in tree_of(path).body:
        for_types_only = isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef) and not for_types_only:
            at_import |= {name.split(".")[0] for name in imports(statement)}
    assert not at_import & HEAVY
    if layer(name_of(path)) < layer("callbacks"):
        assert not {name.split(".")[0] for name in imports(tree_of(path))} & {"wandb", "matplotlib"}


def test_every_public_name_is_there_and_importing_says_nothing_and_opens_no_connection_and_no_dashboard():
    program = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import simclr, simclr.eval, simclr.data, pytorch_lightning
for name in simclr.__all__: getattr(simclr, name)
for name in ("extract_features", "knn_accuracy", "linear_probe"): getattr(simclr.eval, name)
# Not matplotlib: torchmetrics, which Lightning imports, imports it itself.
print(" ".join({"wandb", "timm", "tensorboard"} & set(sys.modules)))
print("simclr.cli" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("\nFalse\n", "")
    from simclr import __all__

    public = {"SimCLR", "build_encoder", "ProjectionHead", "nt_xent", "SimCLRAugmentation", "LARS", "load_encoder"}
    assert public <= set(__all__)
