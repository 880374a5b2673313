"""The product's modules and what each imports, read from its source: what test_architecture.py compares with the plan.

`python -m tests.architecture [FOLDER]` prints the figures of a checkout, by default this one.
"""

import ast
import re
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
NO_PRODUCT = {"tests", "docs"}
"""Top-level folders that are not installed."""
MODULE_NAME = re.compile(r"shvit(\.\w+)+(:\w+)?")

Imports = Mapping[str, Set[str]]
"""Each module with the modules that it imports."""


def folders(root: Path = ROOT) -> list[Path]:
    """Return the top-level folders that are installed."""
    return sorted(path.parent for path in root.glob("*/__init__.py") if path.parent.name not in NO_PRODUCT)


def product_files(root: Path = ROOT) -> list[Path]:
    """Return every file of Python that is installed, MMDetection's configs too, which are no modules."""
    return sorted(path for folder in folders(root) for path in folder.rglob("*.py"))


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the modules by the names under which they are installed."""
    return {_name(root, path): path for path in product_files(root) if (path.parent / "__init__.py").exists()}


def _name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(part for part in ("shvit", *parts[parts[0] == "shvit" :]) if part != "__init__")


def imported(name: str, source: str, known: Set[str], *, is_package: bool = False) -> set[str]:
    """Return the modules that the module `name` imports: anywhere in its source, by a statement or as a string.

    Args:
        name: as it is installed.
        known: the names of all modules; of what is imported, the longest beginning that is one of them counts.
        is_package: the source is that of an `__init__.py`.
    """
    package = name if is_package else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {_longest(alias.name, known) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            found |= {_longest(f"{base}.{alias.name}", known) for alias in node.names}
        elif isinstance(node, ast.Call) and (relative := _relative_import(node)):
            found.add(_longest(_absolute(relative, package), known))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(_named(node.value, known))
    return found - {"", name}


def _absolute(name: str, package: str) -> str:
    """Return the full name of what a module of `package` calls `name`, which may begin with dots."""
    rest = name.lstrip(".")
    level = len(name) - len(rest)
    above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
    return ".".join([*above, *([rest] if rest else [])])


def _longest(name: str, known: Set[str]) -> str:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def _named(text: str, known: Set[str]) -> str:
    """Return the module that a string names, as `shvit.train.data` or `shvit.train.data:elpv`; else nothing."""
    module = _longest(text.partition(":")[0], known) if MODULE_NAME.fullmatch(text) else ""
    return "" if module == "shvit" else module


def _relative_import(call: ast.Call) -> str:
    """Return `.name` of `import_module(".name", …)`; a string with a dot is else a suffix."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = call.args[0] if call.args and called == "import_module" else None
    text = given.value if isinstance(given, ast.Constant) else ""
    return text if isinstance(text, str) and text.startswith(".") else ""


def read_imports(root: Path = ROOT) -> dict[str, set[str]]:
    """Return every module with what it imports of ours."""
    known = modules(root)
    return {
        name: imported(name, path.read_text(), known.keys(), is_package=path.name == "__init__.py")
        for name, path in known.items()
    }


def without(imports: Imports, pairs: Set[tuple[str, str]]) -> dict[str, set[str]]:
    """Return `imports` but for some, given as (importing, imported)."""
    return {name: {other for other in targets if (name, other) not in pairs} for name, targets in imports.items()}


def circles(imports: Imports) -> list[list[str]]:
    """Return circles such that nothing goes round once their last imports are gone; the first name ends each again."""
    graph, found = {name: set(targets) for name, targets in imports.items()}, []
    while circle := _circle(graph):
        found.append(circle)
        graph[circle[-2]].discard(circle[-1])
    return found


def _circle(imports: Imports) -> list[str]:
    try:
        TopologicalSorter({name: sorted(imports[name]) for name in sorted(imports)}).prepare()
    except CycleError as error:
        return error.args[1][::-1]  # graphlib tells it from what is imported to what imports
    return []


def room(module: str) -> str:
    """Return where a module lives: a top-level folder, or what stands directly in `export`."""
    _, *parts = module.split(".")
    if len(parts) > 1 and parts[0] == "export":
        return ".".join(parts[:2])
    return parts[0] if len(parts) > 1 or (parts and parts[0] in {path.name for path in folders()}) else "shvit"


def arrows(imports: Imports) -> set[tuple[str, str]]:
    """Return what rooms import from each other."""
    pairs = {(room(name), room(target)) for name, targets in imports.items() for target in targets}
    return {(a, b) for a, b in pairs if a != b}


def function_lengths(root: Path = ROOT) -> list[int]:
    """Return the lines of each function and method, docstring included, decorators not."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for path in product_files(root) for node in ast.walk(ast.parse(path.read_text())))
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes if isinstance(node, kinds)]


def line_counts(root: Path = ROOT) -> dict[str, int]:
    """Return the lines of each file of Python, by its path below `root`."""
    return {path.relative_to(root).as_posix(): len(path.read_text().splitlines()) for path in product_files(root)}


def files_of_rooms(root: Path = ROOT) -> Counter[str]:
    """Return how many files of Python, `__init__.py` not counted, each folder with an `__init__.py` has."""
    paths = modules(root).values()
    return Counter(
        {
            path.parent.relative_to(root).as_posix(): len([*path.parent.glob("*.py")]) - 1
            for path in paths
            if path.name == "__init__.py"
        }
    )


def figures(root: Path = ROOT) -> dict[str, object]:
    """Return what is counted of a checkout."""
    imports, lines, lengths = read_imports(root), line_counts(root), function_lengths(root)
    export = {name: targets for name, targets in imports.items() if room(name).partition(".")[0] == "export"}
    inside = sum(room(target).partition(".")[0] == "export" for targets in export.values() for target in targets)
    largest, rooms = max(lines, key=lambda name: lines[name]), files_of_rooms(root)
    (fullest, most), *_ = rooms.most_common()
    return {
        "rooms": len(rooms),
        "fullest room": f"{most} files ({fullest})",
        "modules": len(imports),
        "imports between them": sum(map(len, imports.values())),
        "imports inside export": inside,
        "arrows between rooms": len(arrows(imports)),
        "circles": len(circles(imports)),
        "functions": len(lengths),
        "median function": f"{statistics.median(lengths):g} lines",
        "largest file": f"{lines[largest]} lines ({largest})",
        "product lines": sum(lines.values()),
    }


if __name__ == "__main__":
    checkout = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for key, value in figures(checkout.resolve()).items():
        print(f"{key:<24}{value}")
    for circle in circles(read_imports(checkout.resolve())):
        print(f"{'':<24}{' → '.join(circle)}")
