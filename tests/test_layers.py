"""The house: imports go downward only, modules stay small, pure modules stay pure.

The table is the layers, low to high. A module imports from lower layers and from its own, never from a higher one, and
nowhere do imports go in a circle. All of them are read: those inside functions and under ``TYPE_CHECKING`` too.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import torchsnapshot

PACKAGE = Path(torchsnapshot.__file__).parent
MAX_LINES = 400
MAX_FUNCTION_LINES = 60

LAYERS = [
    # names, rules and values that everything may use; boxes and placements
    """errors event knobs machine pauses progress recent rss_profiler stateful stats version geometry""",
    # what carries work and messages, and the store's objects: they know no tensors and no snapshots
    """event_handlers engine coordination store.backend store.bounded store.clock store.keys store.mounts
    store.parallel store.processes store.turns""",
    """store.blob_folders store.container store.durable_names store.envelope store.filesystems store.gcs_files
    store.local store.local_errors store.locate store.memory store.other_files store.posix store.records store.remote
    store.remote_errors store.remote_files store.s3_files store.table_references store.tables
    store.temporary_names store.transfers store.walk store.whole_filesystem""",
    # the store's protocol
    """store""",
    # what stands in it: stored chunks, manifests
    """chunks format""",
    # what a state is
    """state""",
    # a snapshot and its bytes, as they are and as upstream showed them
    """reading diff manifest manifest_utils manifest_view""",
    # the jobs
    """taking verify""",
    """restoring ranks copy""",
    # the front door from Python
    """adapters in_flight maintenance snapshot test_utils tricks""",
    # the names of the package; the command line
    """__init__ __main__ cli""",
]
"""Of packages and modules; a module that isn't named stands where its package does."""

STORE_MAY_IMPORT = {"errors", "knobs", "progress", "recent"}
"""Beside the store itself: it knows nothing of tensors."""

PURE = [
    "diff",
    "chunks.encoded",
    "format.entries",
    "format.entry_builder",
    "format.entry_bytes",
    "format.entry_kinds",
    "format.entry_section",
    "format.entry_shardings",
    "geometry.grid",
    "geometry.mesh_cells",
    "ranks.agreement",
    "ranks.ownership",
    "ranks.sharing",
    "geometry.placements",
    "taking.plan",
    "state.resharding",
    "store.gcplan",
    "state.values",
]
CLIENTS_OF_EVENT_LOOPS = {"store.gcs_files", "store.s3_files", "store.transfers"}
"""Modules that speak to a library on its own event loop, where an answer can be had piece by piece only there."""

IMPURE = {"asyncio", "io", "os", "pathlib", "random", "shutil", "socket", "subprocess", "tempfile", "threading", "time"}
"""Modules of I/O, clocks, chance and threads, which pure modules do without."""


@dataclass(frozen=True)
class Import:
    """One import: where it stands, the full name of what it imports, whether it stands in a function."""

    line: int
    name: str
    in_function: bool

    @property
    def top(self) -> str:
        """The top-level package."""
        return self.name.partition(".")[0]


def module_name(file: Path) -> str:
    """``store.gc`` for ``torchsnapshot/store/gc.py``; a package's ``__init__`` has the package's name."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def layer_of(module: str) -> int:
    """Where a module, or else its package, stands in the table."""
    for layer, names in enumerate(LAYERS):
        if module in names.split():
            return layer
    package, dot, _ = module.rpartition(".")
    assert dot, f"{module} is not in the table of layers"
    return layer_of(package)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(file.read_text()) for module, file in FILES.items()}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, at any depth."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Every import of a module."""
    return tuple(_imports(module))


def _imports(module: str) -> Iterator[Import]:
    inside = {id(node) for function in functions(TREES[module]) for node in ast.walk(function)}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, id(node) in inside)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                yield Import(node.lineno, f"{node.module}.{alias.name}", id(node) in inside)


def ours(found: Import) -> str | None:
    """The module of this package that an import brings, or None for other packages."""
    if found.top != "torchsnapshot":
        return None
    name = found.name.partition(".")[2] or "__init__"
    while name not in FILES and "." in name:
        name = name.rpartition(".")[0]
    # what isn't a module is a name of the package itself
    return name if name in FILES else "__init__"


def test_table_names_what_is_there() -> None:
    """The table of layers names nothing twice and nothing that doesn't exist, and every module has its place."""
    named = [name for names in LAYERS for name in names.split()]
    assert len(named) == len(set(named))
    assert set(named) <= set(FILES)
    assert all(layer_of(module) >= 0 for module in FILES)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_downward(module: str) -> None:
    """A module imports nothing from a higher layer."""
    for found in imports(module):
        imported = ours(found)
        if imported is not None:
            assert layer_of(imported) <= layer_of(module), f"{module}:{found.line} imports {imported} from above"


def test_imports_make_no_circle() -> None:
    """Following imports never leads back to where it began."""
    graph = {module: {ours(found) for found in imports(module)} - {None, module} for module in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", [module for module in FILES if module.split(".")[0] == "store"])
def test_store_knows_no_tensors(module: str) -> None:
    """The store imports no torch, and of this package only itself, errors, knobs and progress."""
    for found in imports(module):
        assert found.top != "torch", f"{module}:{found.line}"
        imported = ours(found)
        if imported is not None:
            assert imported.split(".")[0] == "store" or imported in STORE_MAY_IMPORT, f"{module}:{found.line}"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_do_nothing_but_compute(module: str) -> None:
    """A pure module imports nothing that does I/O, reads a clock, draws lots or starts threads."""
    for found in imports(module):
        assert found.top not in IMPURE, f"{module}:{found.line} imports {found.name}"


@pytest.mark.parametrize("module", FILES)
def test_imports_stand_at_the_top(module: str) -> None:
    """Inside a function only other people's packages are imported, those that not everybody needs; numpy nowhere."""
    for found in imports(module):
        where = f"{module}:{found.line} imports {found.name}"
        assert found.top != "numpy", where
        if found.in_function:
            assert found.top != "torchsnapshot", where
            assert found.top not in sys.stdlib_module_names, where


@pytest.mark.parametrize("module", FILES)
def test_modules_and_functions_are_small(module: str) -> None:
    """No module has more than 400 lines, no function more than 60 (its docstring aside); work is done by threads."""
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= MAX_LINES
    for function in functions(TREES[module]):
        is_client = module in CLIENTS_OF_EVENT_LOOPS
        assert is_client or isinstance(function, ast.FunctionDef), f"{module}:{function.lineno}: threads, no async def"
        first = (
            function.body[1] if ast.get_docstring(function) is not None and len(function.body) > 1 else function.body[0]
        )
        assert (function.end_lineno or 0) - first.lineno < MAX_FUNCTION_LINES, (
            f"{module}:{function.lineno} {function.name}"
        )
