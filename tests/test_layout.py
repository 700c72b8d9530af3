"""The shape of the code: imports go one way, only one module starts Jittor, every folder is packaged."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "moss_jt": "moss_jt",
    "convert": "moss_jt.convert",
    "kernels": "moss_jt.kernels",
    "demos": "moss_jt.demos",
}


def module_files() -> dict[str, Path]:
    """Installed module name of every source file of the four folders."""
    collected = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "moss-tiny-training" in path.parts:
                continue
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            collected[".".join((package, *parts)).removesuffix(".__init__")] = path
    return collected


MODULES = module_files()


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports, inside functions too, with whether the import stands at the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names
            ]
        else:
            continue
        for name in names:
            yield name, id(node) in top


# From the bottom up. A package imports only from floors below its own, inside functions too. docs/design.md says why.
FLOORS = (
    {"errors"},
    {"user_folders"},
    {"store", "backend", "plugins"},
    {"kernels", "plan"},
    {"weights"},
    {"engine"},
    {"chat", "measure"},
    {"terminal", "convert", "train"},
    {"loading"},
    {"moss"},
    {"serve"},
    {"commands", "demos"},
)
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
# The names that users import and run: they show what a floor below has.
FRONT_DOORS = {
    "moss_jt": {
        "moss_jt.moss",
        "moss_jt.errors",
        "moss_jt.chat.chat",
        "moss_jt.chat.events",
        "moss_jt.plugins.interface",
        "moss_jt.plugins.registry",
    },
    "moss_jt.__main__": {"moss_jt.commands.cli"},
}


def package_of(module: str) -> str:
    return module.removeprefix("moss_jt.").split(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_backend_imports_jittor(module: str) -> None:
    names = {name.split(".")[0] for name, _ in imports_of(MODULES[module])}
    if module != "moss_jt.backend.jittor":
        assert "jittor" not in names
    assert not names & {"torch", "transformers"}, "they are oracles of the tests, not dependencies"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - FRONT_DOORS.keys()))
def test_a_package_imports_only_from_floors_below(module: str) -> None:
    own = package_of(module)
    for name, _ in imports_of(MODULES[module]):
        if not name.startswith("moss_jt"):
            continue
        if name == "moss_jt":
            assert FLOOR_OF["moss"] < FLOOR_OF[own], f"{module} imports Moss"
        elif package_of(name) != own:
            assert FLOOR_OF[package_of(name)] < FLOOR_OF[own], f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(FRONT_DOORS))
def test_the_front_doors_only_show_what_a_package_has(module: str) -> None:
    shown = {name for name, _ in imports_of(MODULES[module]) if name.startswith("moss_jt")}
    assert shown == FRONT_DOORS[module]


def test_no_import_cycle_even_inside_functions() -> None:
    graph = {
        module: {name for name, _ in imports_of(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, "import cycle: " + " -> ".join((*way[way.index(module) :], module))
        if module in done:
            return
        for name in sorted(graph[module]):
            visit(name, (*way, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_every_folder_is_declared_so_that_the_wheel_has_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = set(settings["tool"]["setuptools"]["packages"])
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert packages == declared


@pytest.mark.parametrize("module", sorted(MODULES))
def test_foreign_text_is_never_executed(module: str) -> None:
    """No eval, exec, compile or pickle: checkpoints, model output and files are hostile."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"line {node.lineno}"
    assert not {name for name, _ in imports_of(MODULES[module])} & {"pickle", "marshal", "shelve"}


# Words of docs/design.md that are names only where they have their meaning. What comes out of something is named after what it is.
WORDS = {
    "found": set[str](),
    "piece": {"engine", "chat", "terminal", "commands", "moss", "demos", "serve"},
    "place": {"kernels", "engine"},
    "room": {"engine", "chat", "terminal"},
    "whole": {"kernels", "engine", "measure"},
}


def names_given(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names of functions, classes, parameters and variables; not the public field ``found`` of a result, which is a flag."""
    fields = {
        id(statement.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            if id(node) not in fields or node.id != "found":
                yield node.lineno, node.id


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_word_means_one_thing(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for line, name in names_given(tree):
        for word in re.findall(r"[a-z]+|[A-Z][a-z]*", name.replace("in_place", "")):
            packages = WORDS.get(word.lower().removesuffix("s"))
            assert packages is None or package_of(module) in packages, (
                f"line {line}: {name} (docs/design.md, Words)"
            )


def test_the_files_that_the_design_names_are_there() -> None:
    names = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./-]+\.(?:py|h|cu|md))`", text)
    assert named
    for name in named:
        assert (ROOT / name).is_file() if "/" in name else name in names, name


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_there_is(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            tree = ast.parse(MODULES[node.module].read_text(encoding="utf-8"))
            names = {name for _, name in names_given(tree)} | {
                alias.asname or alias.name
                for inner in ast.walk(tree)
                if isinstance(inner, ast.ImportFrom | ast.Import)
                for alias in inner.names
            }
            missing = {
                alias.name for alias in node.names if f"{node.module}.{alias.name}" not in MODULES
            } - names
            assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "kernels").rglob("*") if p.suffix in (".h", ".cu", ".cuh")),
    ids=lambda path: path.name,
)
def test_a_word_means_one_thing_in_native_code_too(path: Path) -> None:
    code = re.sub(r"//[^\n]*|\"[^\"\n]*\"", "", path.read_text(encoding="utf-8"))
    names = {word.lower() for word in re.findall(r"[a-z]+|[A-Z][a-z]*", code)}
    assert not names & {"found", "piece", "pieces", "room"}, "docs/design.md, Words"
