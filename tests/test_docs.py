"""What the documentation shows is true: every code block runs, every command and option is documented.

In each page all blocks run in order, in one empty folder: ``python`` blocks in one namespace, ``console`` blocks line
by line. What a ``console`` command prints is compared, and what a ``python`` block prints where ``<!-- prints -->``
stands before the ``text`` block after it. Times, durations, random ids and what compression saves may differ; ``...``
stands for anything.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from warm import run_script

from torchsnapshot.cli import build_parser

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PRINTS = "<!-- prints -->"

PROGRAMS = {
    "torchsnapshot": [str(REPOSITORY / "torchsnapshot" / "__main__.py")],
    "python": [],
}
"""What stands in place of a program's name: all of them run scripts of Python."""

# What may differ from run to run, in the order in which it is replaced.
VOLATILE = [
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(\+00:00)?"), "<time>"),
    (re.compile(r"\b[0-9a-f]{32}-[0-9a-f]{24}-\d+(\.[zdpt])?\b"), "<key>"),
    (re.compile(r"\b[0-9a-f]{24}\b"), "<id>"),
    (re.compile(r"\b\d+(\.\d+)? m?s\b"), "<seconds>"),
    (re.compile(r'"created_ms": \d+'), "<time>"),
    # what "auto" compresses depends on how fast the disk is just then
    (re.compile(r"\b[\d.]+ [kM]?B( +\d+/\d+)$", re.MULTILINE), r"<stored>\1"),
    (re.compile(r"^(kept \d+ blobs), [\d.]+ [kM]?B$", re.MULTILINE), r"\1, <stored>"),
    (re.compile(r"[ \t]+"), " "),
]


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, its first line in the page, and whether it shows printed output."""

    language: str
    text: str
    line: int
    is_output: bool


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    blocks: list[Block] = []
    language: str | None = None
    body: list[str] = []
    before = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                language, body, start = line[3:].strip(), [], number + 1
            else:
                blocks.append(Block(language, "".join(text + "\n" for text in body), start, before == PRINTS))
                language, before = None, ""
        elif language is not None:
            body.append(line)
        elif line.strip():
            before = line.strip()
    assert language is None, f"{page.name}: a block is not closed"
    return blocks


def settle(text: str) -> str:
    """The text with everything replaced that may differ from run to run."""
    for pattern, replacement in VOLATILE:
        text = pattern.sub(replacement, text)
    return "".join(line.strip() + "\n" for line in text.strip().splitlines())


def assert_printed(expected: str, got: str, where: str) -> None:
    """Hold what was printed against what the page shows."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(settle(expected), settle(got), flags)
    assert same, f"{where}: the page shows\n{expected}\nbut this is printed:\n{got}"


def run_python(block: Block, namespace: dict[str, object], where: str) -> str:
    """Run a block in the page's namespace; what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * (block.line - 1) + block.text, where, "exec"), namespace)
    return out.getvalue()


def console_commands(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a block, each with the output that the page shows."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        yield command, expected


def run_console(block: Block, folder: Path, where: str) -> None:
    """Run a block's commands and compare what they print."""
    assert block.text.startswith("$ "), f"{where}: a console block begins with a command"
    for command, expected in console_commands(block):
        words = shlex.split(command, comments=True)
        assert words[0] in PROGRAMS, f"{where}: {words[0]} is no program that pages may run"
        words = [str(REPOSITORY / word) if word.startswith(("tools/", "examples/")) else word for word in words]
        done = run_script(*PROGRAMS[words[0]], *words[1:], folder=folder)
        assert_printed(expected, done.stdout, f"{where}: {command}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block of the page runs in order and prints what the page says."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in read_blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            printed = run_python(block, namespace, where)
        elif block.language == "console":
            run_console(block, tmp_path, where)
        elif block.language == "json":
            json.loads(block.text)
        else:
            assert block.language == "text", f"{where}: no rule for a block of {block.language or 'no language'!r}"
            if block.is_output:
                assert_printed(block.text, printed, where)


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command of the command line with its parser."""
    actions = build_parser()._subparsers
    assert actions is not None
    (choices,) = [action.choices for action in actions._group_actions]
    assert isinstance(choices, dict)
    return choices


@pytest.mark.parametrize("command", sorted(commands()))
def test_command_is_documented(command: str) -> None:
    """The page of the command line has a section on each command, which names each of its options."""
    text = (REPOSITORY / "docs" / "cli.md").read_text()
    sections = {
        match[1]: match[2] for match in re.finditer(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    }
    assert command in sections, f"docs/cli.md has no section '## {command}'"
    shared = {"-h", "--help", "--json", "--storage-options", "--debug"}
    for action in commands()[command]._actions:
        for option in action.option_strings:
            assert option in shared or f"`{option}" in sections[command], f"docs/cli.md, {command}: {option} is missing"


def test_every_run_time_dependency_has_its_reason() -> None:
    """Each package that an installation brings is in docs/dependencies.md with the reason for it."""
    project = (REPOSITORY / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert listed is not None
    reasons = (REPOSITORY / "docs" / "dependencies.md").read_text()
    for name in re.findall(r'"([\w-]+)', listed[1]):
        assert f"| `{name}` |" in reasons, f"docs/dependencies.md says nothing of {name}"


def test_pages_link_to_what_exists() -> None:
    """A relative link in a page leads to a file of this repository."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
