"""The library as source: rooms know only the rooms below them, and no block is written twice."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
import vision_ssm.kernels

import vision_ssm

PACKAGE = Path(vision_ssm.__file__).parent
# from the ground up; a room may import from its own floor's rooms named beside it and from everything below
FLOORS = [{"registry", "version"}, {"kernels"}, {"ops"}, {"layers"}, {"scans"}, {"backbones"}, {"weights"}, {"unets"}, {"factory"}]
BLOCK_FOLDERS = ("layers", "scans", "backbones", "unets")
SMALLEST = 4  # statements; shorter functions may well be alike


def sources(room: str) -> list[Path]:
    """Modules of a room: a folder of the package, one file of it, or the kernels beside it."""
    folder = Path(vision_ssm.kernels.__file__).parent if room == "kernels" else PACKAGE / room
    return sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def imported_rooms(path: Path) -> set[str]:
    """First parts of what a module imports from this package."""
    depth = 1 if path.parent == PACKAGE else 2
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level == depth:
                rooms |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
            elif node.level == 0 and (node.module or "").startswith("vision_ssm."):
                rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vision_ssm.")}
    return rooms


@pytest.mark.parametrize("room", sorted(set().union(*FLOORS)))
def test_arrows_point_down(room):
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    above = set().union(*FLOORS[floor + 1 :]) | {"engine", "analysis", "integrations", "data"}
    wrong = {str(path.relative_to(PACKAGE)): rooms for path in sources(room) if (rooms := imported_rooms(path) & above)}
    assert not wrong


class _Anonymous(ast.NodeTransformer):
    """Names of arguments and local variables by order of appearance, so that renaming does not hide a copy."""

    def __init__(self):
        self.numbers = {}

    def visit_Name(self, node):
        node.id = str(self.numbers.setdefault(node.id, len(self.numbers)))
        return node

    def visit_arg(self, node):
        node.arg, node.annotation = str(self.numbers.setdefault(node.arg, len(self.numbers))), None
        return node


def fingerprints(path: Path) -> dict[str, str]:
    """Every function of a file that is long enough, without its names, comments and documentation."""
    found = {}
    for outer in ast.walk(ast.parse(path.read_text())):
        if not isinstance(outer, (ast.ClassDef, ast.Module)):
            continue
        for node in outer.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if sum(isinstance(inner, ast.stmt) for statement in body for inner in ast.walk(statement)) < SMALLEST:
                continue
            node.body, node.name, node.returns = body, "", None
            owner = f"{outer.name}." if isinstance(outer, ast.ClassDef) else ""
            found[f"{path.relative_to(PACKAGE)}:{owner}{node.lineno}"] = ast.dump(_Anonymous().visit(node))
    return found


def test_no_block_is_defined_twice():
    places = defaultdict(list)
    for folder in BLOCK_FOLDERS:
        for path in sources(folder):
            for place, print_ in fingerprints(path).items():
                places[print_].append(place)
    assert not [copies for copies in places.values() if len(copies) > 1]


def test_class_names_are_unique():
    owners = defaultdict(set)
    for folder in BLOCK_FOLDERS:
        for path in sources(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    owners[node.name].add(str(path.relative_to(PACKAGE)))
    assert not {name: files for name, files in owners.items() if len(files) > 1}
