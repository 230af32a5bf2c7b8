"""The command line, through ``main`` as a script would use it: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchsnapshot import Snapshot, StateDict, retain
from torchsnapshot.cli import main
from torchsnapshot.cli.output import print_table, readable_nbytes
from torchsnapshot.store.leases import start_take
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.repository import Repository

NUMEL = 300_000
"""Of the big tensor: 1.2 MB, a chunk of its own."""


def take(root: Path, step: int, **changes: Any) -> None:
    """Take a snapshot in which ``big`` is always the same and ``small`` depends on the step."""
    state = {"big": torch.arange(NUMEL, dtype=torch.float32), "small": torch.full((1000,), float(step)), "step": step}
    Snapshot.take(str(root / f"step_{step}"), {"app": StateDict(**{**state, **changes})}, encoding="raw")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the snapshots step_1, step_2 and step_3."""
    for step in (1, 2, 3):
        take(tmp_path / "root", step)
    return tmp_path / "root"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON that a successful command prints."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def run_failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that fails says on standard error; nothing on standard output, no traceback."""
    capsys.readouterr()
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("torchsnapshot: ")
    return err


def test_ls_lists_the_oldest_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ls names every snapshot in the order of its commits, with sizes of its state and of what was new."""
    assert main(["ls", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["snapshot", "step_1", "step_2", "step_3"]
    snapshots = run_json(capsys, "ls", str(root))["snapshots"]
    assert [snapshot["name"] for snapshot in snapshots] == ["step_1", "step_2", "step_3"]
    assert [snapshot["new_nbytes"] for snapshot in snapshots] == [4 * NUMEL + 4000, 4000, 4000]


def test_show_names_every_leaf(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """show prints path, dtype, shape and value of what a snapshot holds; globs choose paths."""
    assert main(["show", str(root / "step_2")]) == 0
    out = capsys.readouterr().out
    assert "0/app/big" in out
    assert "float32" in out
    assert "300000" in out
    entries = run_json(capsys, "show", str(root / "step_2"))["entries"]
    assert entries["0/app/big"] == {
        "kind": "tensor",
        "nbytes": 4 * NUMEL,
        "dtype": "float32",
        "shape": [NUMEL],
        "requires_grad": False,
    }
    assert entries["0/app/step"]["value"] == "2"
    chosen = run_json(capsys, "show", str(root / "step_2"), "*/small", "--digests")["entries"]
    assert list(chosen) == ["0/app/small"]
    (chunk,) = chosen["0/app/small"]["chunks"]
    assert chunk["nbytes"] == 4000
    assert chunk["blob"] in {file.name for file in root.rglob("blobs/*/*")}


def test_diff_counts_changed_chunks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diff names what changed, came and went, and says by how much; nothing else."""
    take(root, 4, more=torch.ones(500))
    differences = run_json(capsys, "diff", str(root / "step_1"), str(root / "step_4"))["differences"]
    found = {difference["path"]: (difference["change"], difference["new_nbytes"]) for difference in differences}
    assert found.pop("0/app/step")[0] == "changed"
    assert found == {"0/app/small": ("changed", 4000), "0/app/more": ("added", 2000)}
    assert main(["diff", str(root / "step_4"), str(root / "step_1")]) == 0
    assert "removed" in capsys.readouterr().out


def test_diff_exit_code_tells_sameness(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --exit-code, diff exits 1 for snapshots that differ and 0 for those that don't."""
    same, other = str(root / "step_1"), str(root / "step_2")
    assert main(["diff", same, same, "--exit-code"]) == 0
    assert main(["diff", same, other, "--exit-code"]) == 1
    assert main(["diff", same, other]) == 0


def test_diff_tells_another_dtype_and_shape(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor that was replaced by one of another dtype or shape is shown with both."""
    take(root, 4, big=torch.zeros(3, 4), small=torch.zeros(1000, dtype=torch.int64))
    differences = run_json(capsys, "diff", str(root / "step_1"), str(root / "step_4"))["differences"]
    details = {difference["path"]: difference["detail"] for difference in differences}
    assert details["0/app/big"] == "float32 [300000] -> float32 [3, 4]"
    assert details["0/app/small"] == "float32 [1000] -> int64 [1000]"


def test_du_separates_own_from_shared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """du counts what only one snapshot refers to as its own, and everything on disk exactly once."""
    usage = run_json(capsys, "du", str(root))
    own = {snapshot["name"]: snapshot["own_nbytes"] for snapshot in usage["snapshots"]}
    assert own["step_2"] == own["step_3"]
    assert 4000 <= own["step_2"] < 4 * NUMEL
    assert usage["nbytes"] == sum(file.stat().st_size for file in root.rglob("blobs/*/*"))
    assert usage["unreferenced_nbytes"] == 0
    shutil.rmtree(root / "step_3")
    assert run_json(capsys, "du", str(root))["unreferenced_nbytes"] == own["step_3"]


@pytest.mark.parametrize("depth", ["manifests", "blobs", "bytes"])
def test_verify_finds_nothing_in_a_sound_root(root: Path, depth: str, capsys: pytest.CaptureFixture[str]) -> None:
    """verify exits 0 for a sound root and for a sound snapshot, at every depth."""
    assert main(["verify", str(root), "--depth", depth]) == 0
    assert "3 snapshots" in capsys.readouterr().out
    assert main(["verify", str(root / "step_1"), "--depth", depth]) == 0
    assert "1 snapshot " in capsys.readouterr().out


def test_verify_finds_a_flipped_bit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit in a blob is found by reading the bytes; verify names the snapshots that it hurts and exits 1."""
    blob = max(root.rglob("blobs/*/*"), key=lambda file: file.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[1000] ^= 1
    blob.write_bytes(data)
    assert main(["verify", str(root), "--depth", "blobs"]) == 0
    capsys.readouterr()
    assert main(["verify", str(root), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert {problem["name"] for problem in problems} == {"step_1", "step_2", "step_3"}
    assert blob.name in str(problems)


def test_verify_finds_a_missing_blob(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A blob that is gone is found by looking at names and sizes."""
    max(root.rglob("blobs/*/*"), key=lambda file: file.stat().st_size).unlink()
    assert main(["verify", str(root), "--depth", "manifests"]) == 0
    assert main(["verify", str(root), "--depth", "blobs"]) == 1


def test_gc_frees_what_rm_left(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """rm deletes the snapshot, gc its blobs; a dry run says the same numbers and changes nothing."""
    assert main(["rm", str(root / "step_1"), str(root / "step_2")]) == 0
    before = sorted(root.rglob("blobs/*/*"))
    planned = run_json(capsys, "gc", str(root), "--dry-run")
    assert sorted(root.rglob("blobs/*/*")) == before
    done = run_json(capsys, "gc", str(root))
    assert (planned["freed_blobs"], planned["freed_nbytes"]) == (done["freed_blobs"], done["freed_nbytes"])
    assert done["freed_blobs"] > 0
    left = sorted(root.rglob("blobs/*/*"))
    assert done["kept_blobs"] == len(left) == len(before) - done["freed_blobs"]
    assert main(["verify", str(root / "step_3")]) == 0


def test_gc_script_is_the_command(root: Path) -> None:
    """``python tools/gc.py ROOT`` works from a checkout, from any folder, and prints what it kept and freed."""
    script = Path(__file__).parent.parent / "tools" / "gc.py"
    shutil.rmtree(root / "step_1")
    done = subprocess.run([sys.executable, str(script), str(root)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "kept" in done.stdout
    assert "freed" in done.stdout


def test_gc_stops_at_an_unreadable_manifest(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """gc refuses to go on where it cannot read a manifest, names it, exits 1 and deletes nothing."""
    shutil.rmtree(root / "step_1")
    before = sorted(root.rglob("blobs/*/*"))
    (manifest,) = (file for file in (root / "step_2" / ".manifests").iterdir() if file.suffix != ".ok")
    manifest.write_bytes(b"\x89broken")
    assert "step_2" in run_failing(capsys, "gc", str(root))
    assert sorted(root.rglob("blobs/*/*")) == before


def test_retain_keeps_by_policy(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """retain keeps what any rule keeps and says why; a dry run only says."""
    plan = run_json(capsys, "retain", str(root), "--last", "1", "--keep", "*_1", "--dry-run")
    assert plan["drop"] == ["step_2"]
    assert {kept["name"] for kept in plan["keep"]} == {"step_1", "step_3"}
    assert len(run_json(capsys, "ls", str(root))["snapshots"]) == 3
    run_json(capsys, "retain", str(root), "--last", "1", "--keep", "*_1")
    assert [snapshot["name"] for snapshot in run_json(capsys, "ls", str(root))["snapshots"]] == ["step_1", "step_3"]


def test_retain_without_a_rule_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that would keep nothing at all is no policy: nothing is deleted."""
    with pytest.raises(SystemExit) as error:
        main(["retain", str(root)])
    assert error.value.code == 2
    assert "--last, --every or --keep" in capsys.readouterr().err
    assert len(run_json(capsys, "ls", str(root))["snapshots"]) == 3


def test_one_run_of_a_store_of_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """retain and du for one run's folder see its snapshots only: those of the other runs stay, whatever their age."""
    for run in ("one", "two"):
        for step in (1, 2):
            Snapshot.take(str(tmp_path / run / f"step_{step}"), {"app": {"step": step}}, store=str(tmp_path))
    assert [each["name"] for each in run_json(capsys, "du", str(tmp_path / "one"))["snapshots"]] == [
        "one/step_1",
        "one/step_2",
    ]
    assert run_json(capsys, "retain", str(tmp_path / "one"), "--last", "1")["drop"] == ["one/step_1"]
    left = [each["name"] for each in run_json(capsys, "ls", str(tmp_path))["snapshots"]]
    assert left == ["one/step_2", "two/step_1", "two/step_2"]
    assert [info.name for info in retain(str(tmp_path / "two"), last=1).drop] == ["two/step_1"]


def test_rm_goes_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path that cannot be deleted is named, the others go, and the exit code says so."""
    paths = [str(root / name) for name in ("step_1", "nowhere", "step_2")]
    assert main(["rm", *paths]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"deleted {paths[0]}", f"deleted {paths[2]}"]
    assert f"{paths[1]}: no snapshot is here; what is there: torchsnapshot ls {root}" in err
    assert main(["rm", paths[0], "--json"]) == 1
    assert list(json.loads(capsys.readouterr().out)["failed"]) == [paths[0]]


def test_rm_leaves_what_a_link_leads_to(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link is no snapshot: whoever removes "latest" does not mean the newest one."""
    (root / "latest").symlink_to("step_3")
    assert f"is a link to {root.resolve() / 'step_3'}" in run_failing(capsys, "rm", f"{root / 'latest'}/")
    assert len(run_json(capsys, "ls", str(root))["snapshots"]) == 3


def test_gc_says_whom_it_waits_for(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no terminal shows a bar, a line tells why gc does not go on, before it gives up."""
    assert main(["rm", str(root / "step_1")]) == 0
    with start_take(Repository.open(LocalBackend(str(root))), "running"):
        message = run_failing(capsys, "gc", str(root), "--wait", "0")
    assert message.startswith("torchsnapshot: waiting up to 0 s for take")
    assert "gave up" in message.splitlines()[1]


@pytest.mark.parametrize("big", [False, True])
def test_show_prints_user_metadata(tmp_path: Path, big: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """User metadata is shown whole, also where it is too large for the head; it is no part of the state."""
    path, text = str(tmp_path / "root" / "step_1"), "x" * (5000 if big else 5)
    Snapshot.take(path, {"app": {"step": 1}}, user_metadata={"note": text, "lr": 0.5})
    assert main(["show", path]) == 0
    out = capsys.readouterr().out
    assert f"note: {text}\nlr: 0.5\n" in out
    assert "%user_metadata" not in out
    shown = run_json(capsys, "show", path)
    assert shown["head"]["user_metadata"] == {"note": text, "lr": 0.5}
    assert list(shown["entries"]) == ["0/app"]


def test_large_user_metadata_is_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diff compares states: what was noted about them does not count."""
    for step in (1, 2):
        Snapshot.take(str(tmp_path / f"step_{step}"), {"app": {}}, store=str(tmp_path), user_metadata={"n": "x" * 4000})
        Snapshot.take(str(tmp_path / "bare"), {"app": {}}, store=str(tmp_path))
    for before, after in (("step_1", "step_2"), ("step_1", "bare"), ("bare", "step_2")):
        assert main(["diff", str(tmp_path / before), str(tmp_path / after), "--exit-code"]) == 0


def test_show_refuses_a_pattern_without_a_match(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pattern that matches nothing is most likely a typing error, and said to be one."""
    assert "no path matches 'app/*'" in run_failing(capsys, "show", str(root / "step_1"), "app/*")


def test_nothing_to_list(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty store is no error, a folder that holds no snapshot of a store that has some is one."""
    assert "no snapshot is at or below this folder" in run_failing(capsys, "ls", str(root / "stpe_1"))
    assert "no snapshot is at or below this folder" in run_failing(capsys, "ls", str(root / "stpe_1"), "--json")
    shutil.rmtree(root / "step_1")
    shutil.rmtree(root / "step_2")
    shutil.rmtree(root / "step_3")
    assert main(["ls", str(root)]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"torchsnapshot: no snapshots in {root}\n")


def test_json_of_any_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What JSON or Python's own text has no form for is shown all the same, and as JSON that every parser takes."""
    path = str(tmp_path / "root" / "step")
    metadata = {"loss": float("nan"), "best": [float("-inf"), 2**5000], "keys": {(1, 2): {3, 10**5000}, None: b"\xff"}}
    Snapshot.take(path, {"s": {"digits": 10**5000, "list": [10**5000]}}, user_metadata=metadata)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for command in ("show", "ls"):
        capsys.readouterr()
        assert main([command, path, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert main(["show", path, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert shown["head"]["user_metadata"] == {
        "loss": "nan",
        "best": ["-inf", hex(2**5000)],
        "keys": {"(1, 2)": [hex(10**5000), 3], "null": "ff"},
    }
    assert main(["show", path]) == 0
    assert "dict with an int of thousands of digits" in capsys.readouterr().out


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters and broken encodings in names and metadata are printed escaped."""
    path = str(tmp_path / "root" / "a\x1b[31m\udcffb\n")
    Snapshot.take(path, {"app": {"x": 1}}, user_metadata={"k\x1b": "\x1b[31m\nv\udcff"})
    for command in (["ls", str(tmp_path / "root")], ["show", path], ["du", str(tmp_path / "root")], ["rm", path]):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "\udcff" not in out


def test_closed_streams(root: Path) -> None:
    """A command without standard output and error still does its work."""
    command = f"{sys.executable} -m torchsnapshot rm {root / 'step_1'} >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert not (root / "step_1").exists()


def test_a_terminal_without_utf_8(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the terminal's encoding lacks is printed escaped."""
    Snapshot.take(str(root / "é"), {"app": {"x": 1}})
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["ls", str(root)]) == 0
    assert b"\n\\xe9 " in terminal.buffer.getvalue()  # type: ignore[attr-defined]


def test_copy_brings_everything(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy restores where its source is gone, and a second copy writes only what the first did not bring."""
    first = run_json(capsys, "copy", str(root / "step_2"), str(tmp_path / "archive" / "two"))["stats"]
    second = run_json(capsys, "copy", str(root / "step_3"), str(tmp_path / "archive" / "three"))["stats"]
    assert first["new_nbytes"] == 4 * NUMEL + 4000
    assert second["new_nbytes"] == 4000
    shutil.rmtree(root)
    target = StateDict(big=torch.zeros(NUMEL), small=torch.zeros(1000), step=0)
    Snapshot(str(tmp_path / "archive" / "two")).restore({"app": target})
    assert target["step"] == 2
    assert torch.equal(target["big"], torch.arange(NUMEL, dtype=torch.float32))


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "{}/nowhere"],
        ["show", "{}/nowhere"],
        ["verify", "{}/nowhere"],
        ["du", "{}/nowhere"],
        ["gc", "{}/nowhere"],
        ["retain", "{}/nowhere", "--last", "1"],
        ["rm", "{}/nowhere"],
        ["diff", "{}/nowhere", "{}/nowhere"],
        ["copy", "{}/nowhere", "{}/elsewhere"],
        ["ls", "nosuchprotocol://bucket"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_not_there_is_one_clear_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path without a snapshot, or of an unknown protocol, is one clear error that names the path; exit code 1."""
    filled = [argument.format(tmp_path) for argument in arguments]
    message = run_failing(capsys, *filled)
    assert filled[1] in message
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["gc"],
        ["verify", "x", "--depth", "deep"],
        ["ls", "x", "--storage-options", "{no json"],
        ["ls", "x", "--storage-options", "[1]"],
        ["gc", "x", "--wait", "nan"],
        ["gc", "x", "--wait", "-1"],
        ["retain", "x"],
        ["retain", "x", "--last", "0"],
        ["retain", "x", "--every", "1.5"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A command line that makes no sense exits with 2 and says what it expects."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """With --debug an error comes with its traceback."""
    command = [sys.executable, "-m", "torchsnapshot", "show", str(tmp_path), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(root: Path) -> None:
    """``torchsnapshot show … | head -0`` ends without a word."""
    command = f"{sys.executable} -m torchsnapshot show {root / 'step_1'} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (5_000_000_000, "5.00 GB"),
        (10**18, "1.00 EB"),
        (10**22, "10000 EB"),
    ],
)
def test_sizes_have_three_digits(nbytes: int, text: str) -> None:
    """A size is printed with three digits and the unit that makes them readable."""
    assert readable_nbytes(nbytes) == text


def test_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns line up, numbers to the right, no trailing blanks."""
    print_table(("name", ">size"), [("a", "10"), ("long", "5")])
    assert capsys.readouterr().out == "name  size\na       10\nlong     5\n"
