"""Imports point one way, and the rooms that must not know a library do not import it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_muon"

# Each room may import from the rooms at a lower level, and from its own.
LEVELS = {
    "coefficients": 0,
    "matrices": 1,
    "config": 1,
    "orthogonalize": 1,
    "update": 2,
    "telemetry": 3,
    "roles": 2,
    "fused": 3,
    "layouts": 4,
    "routes": 4,
    "checks": 2,
    "exchange": 3,
    "engines": 4,
    "moonlight": 1,
    "analysis": 1,
    "logical": 5,
    "units": 5,
    "clip": 6,
    "canonical": 6,
    "state": 6,
    "routing": 6,
    "groups": 7,
    "plan": 8,
    "report": 5,
    "optimizer": 7,
    "checkpoint": 7,
    "convert": 8,
    "integrations": 9,
    "__init__": 10,
    "run": 11,
    "__main__": 11,
}
PEERS = {"transformers", "accelerate", "deepspeed", "trl", "peft", "datasets"}
FILES = sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _imports(path: Path):
    """(absolute first name or None, room of the package or None) of every import in a file."""
    inside = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1]
            tails = [node.module] if node.module else [alias.name for alias in node.names]
            names = [".".join((*base, tail)) for tail in tails]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield (parts[0], (parts[1] if len(parts) > 1 else "__init__") if parts[0] == "hf_muon" else None)


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_imports_point_one_way(path):
    room = _room(path)
    assert room in LEVELS, f"{room} is a new room: give it a level here"
    for top, other in _imports(path):
        if room not in ("integrations", "run", "__main__"):
            assert top not in PEERS, f"{path.name} imports {top}: only integrations may"
        if other is not None and other != room:
            assert LEVELS[other] < LEVELS[room], f"{path.name} imports hf_muon.{other}, which lies above or beside it"


@pytest.mark.parametrize("file", ["matrices", "layouts", "fused", "exchange/layout", "exchange/ownership"])
def test_shapes_and_layouts_know_no_communication(file):
    assert "torch.distributed" not in (PACKAGE / f"{file}.py").read_text()


def test_engines_are_recognised_by_their_tensors_and_never_imported():
    for path in (PACKAGE / "engines").glob("*.py"):
        assert not any(top in PEERS for top, _ in _imports(path)), path.name


def test_files_and_functions_stay_small():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 320, f"{path.name} is long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.end_lineno - node.lineno - len((ast.get_docstring(node) or "").splitlines())
                assert body <= 55, f"{path.name}:{node.name} is long"


def test_nothing_sets_the_tag_that_deepspeed_acts_on():
    for path in FILES:
        assert "use_muon =" not in path.read_text() and '"use_muon"' not in path.read_text()
