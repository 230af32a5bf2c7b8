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
from pathlib import Path

import pytest

import torchsnapshot

PACKAGE = Path(torchsnapshot.__file__).parent
MAX_LINES = 400
MAX_FUNCTION_LINES = 60

LAYERS = [
    # 0: names, rules and values that everything may use; no store, no tensor
    """errors event pauses grid knobs progress rss_profiler stats version store store.backend store.bounded store.clock
    store.keys store.mounts store.parallel store.processes store.turns""",
    # 1: what holds bytes, and what turns bytes into bytes
    """event_handlers buffers encoded planes codecs engine meter staging background messages links store.durable_names
    store.filesystems store.gcs_files store.local store.local_errors store.locate store.memory store.other_files
    store.posix store.remote store.remote_errors store.remote_files store.s3_files store.container store.tables
    store.envelope store.records store.walk""",
    # 2: what a store holds and its protocol; what an entry is; plain values
    """atoms dtypes entries entry_builder entry_bytes entry_kinds entry_section entry_shardings kinds layout mesh_cells
    ownership placements stages elastic replicas wrappers values stateful collectives coordinator distributed
    members sessions store.check store.commit store.config store.evidence store.gc store.gcplan store.housekeeping
    store.index store.known store.leases store.liveness store.repository store.retention store.roots store.usage""",
    # 3: tensors and states, cut and put together; chunks as stored bytes
    """bases chunk_coder chunk_reader chunks composites diff flatten host_views live_state manifest manifest_utils
    manifest_view resharding sharded tensors""",
    # 4: the jobs: plan, take, restore, verify, copy
    """agreement app_state assembly group_decisions group_jobs group_take verdict copy history loading opening parts
    plan read_jobs read_object reading repack restore selection take structure take_jobs targets verify""",
    # 5: the front door from Python
    """snapshot in_flight maintenance adapters adapters.ddp adapters.fsdp adapters.model_state tricks tricks.ddp
    tricks.fsdp test_utils""",
    # 6: the names of the package; the command line
    """__init__ __main__ cli cli.care cli.look cli.options cli.output""",
]
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules.split()}

STORE_MAY_IMPORT = {"errors", "knobs", "progress"}
"""Beside the store itself: it knows nothing of tensors."""

PURE = [
    "diff",
    "encoded",
    "entries",
    "entry_builder",
    "entry_bytes",
    "entry_kinds",
    "entry_section",
    "entry_shardings",
    "grid",
    "mesh_cells",
    "ownership",
    "placements",
    "plan",
    "resharding",
    "store.gcplan",
    "values",
]
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


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(file.read_text()) for module, file in FILES.items()}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, at any depth."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imports(module: str) -> Iterator[Import]:
    """Every import of a module."""
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


def test_table_names_every_module_once() -> None:
    """The table of layers has every module of the package, once, and no other."""
    named = [module for modules in LAYERS for module in modules.split()]
    assert sorted(named) == sorted(FILES)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_downward(module: str) -> None:
    """A module imports nothing from a higher layer."""
    for found in imports(module):
        imported = ours(found)
        if imported is not None:
            assert LAYER_OF[imported] <= LAYER_OF[module], f"{module}:{found.line} imports {imported} from above"


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
    """No module has more than 400 lines, no function more than 60 (its docstring aside), no function is async."""
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= MAX_LINES
    for function in functions(TREES[module]):
        assert isinstance(function, ast.FunctionDef), f"{module}:{function.lineno}: threads, no async def"
        first = (
            function.body[1] if ast.get_docstring(function) is not None and len(function.body) > 1 else function.body[0]
        )
        assert (function.end_lineno or 0) - first.lineno < MAX_FUNCTION_LINES, (
            f"{module}:{function.lineno} {function.name}"
        )
