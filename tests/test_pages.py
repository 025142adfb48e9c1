"""The method stays on five short pages, SimCLR one idea long: what people are told they read in twenty minutes."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "simclr"
PAGES = ("augment", "losses", "heads", "encoders", "module")


def test_the_method_is_five_pages_of_950_lines():
    lines = {page: len((PACKAGE / f"{page}.py").read_text().splitlines()) for page in PAGES}
    assert sum(lines.values()) <= 950, lines


def test_simclr_is_at_most_200_lines_of_code():
    text = (PACKAGE / "module.py").read_text()
    [kind] = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    told = set()  # lines of docstrings
    for node in ast.walk(kind):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = text.splitlines()
    code = [n for n in range(kind.lineno, kind.end_lineno + 1) if lines[n - 1].strip() and n not in told]
    assert len(code) <= 200


def test_each_page_opens_with_its_idea():
    """The first function or method of a page is the one that its reader came for."""
    first = {}
    for page in PAGES:
        nodes = ast.parse((PACKAGE / f"{page}.py").read_text()).body
        node = next(node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef))
        if isinstance(node, ast.ClassDef) and page in ("augment", "module"):
            node = next(inner for inner in node.body if isinstance(inner, ast.FunctionDef))
        first[page] = node.name
    assert first == {
        "augment": "draw",
        "losses": "dense_nt_xent",
        "heads": "ProjectionHead",
        "encoders": "build_encoder",
        "module": "training_step",
    }
