"""Which file may import which."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEVELS = [  # low to high: a file imports from lower levels and its own
    {"losses", "plumbing.errors", "toy"}, {"plumbing.machine", "plumbing.ranks"}, {"plumbing.files"},
    {"plumbing.vocab", "plumbing.pretrained", "plumbing.pairs"}, {"model", "data"}, {"plumbing"}, {"train"},
    {"sample"}, {"tools", "ports", "experiments", "golden", "docs"}, {"tests"}]

def level(name):
    """The level of a module, or of its package."""
    for key in (name, name.split(".")[0]):
        for i, names in enumerate(LEVELS):
            if key in names:
                return i
    raise AssertionError(f"{name}: not in LEVELS")

def imports_of(path, name, modules):
    """The modules of ours that a file imports, also inside functions; neighbours by their name alone too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    package = name.rpartition(".")[0]
    return (found | {f"{package}.{x}" for x in found}) & modules - {name}

def test_imports_form_no_circle_and_point_down():
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p
             for pattern in ("*.py", "[a-z]*/[a-z]*.py") for p in ROOT.glob(pattern)}
    files = {name: path for name, path in files.items() if name.split(".")[0] not in ("out", "env", "venv")}
    graph = {name: imports_of(path, name, set(files)) for name, path in files.items()}
    up = [f"{a} -> {b}" for a, some in graph.items() for b in some if level(a) < level(b)]
    assert not up, up
    while leaves := {name for name, some in graph.items() if not some}:
        graph = {name: some - leaves for name, some in graph.items() if name not in leaves}
    assert not graph, f"a circle among {sorted(graph)}"
