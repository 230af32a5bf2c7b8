"""The walk below ROOT: every manifest is found, whatever people do with folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_takes import new_store, take

from torchsnapshot.errors import StoreError
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.repository import Repository
from torchsnapshot.store.walk import check_name


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A store in a folder."""
    return Repository.create_or_open(LocalBackend(str(tmp_path / "root"), durable=False))


def names(repository: Repository) -> list[str]:
    """What the walk finds as snapshots of this ROOT."""
    return sorted(ref.name for ref in repository.walk().refs)


def test_snapshots_below_snapshots_are_found(repository: Repository) -> None:
    """``mv a b`` puts a inside b, and a stays a root."""
    root = Path(repository.url)
    for name in ("a", "b", "deep/er/c"):
        take(repository, name, name.encode())
    os.rename(root / "a", root / "b" / "a")
    assert names(repository) == ["b", "b/a", "deep/er/c"]


def test_root_itself_may_be_a_snapshot(repository: Repository) -> None:
    """Its name is empty."""
    take(repository, "", b"x")
    assert names(repository) == [""]


def test_another_stores_snapshots_below_root_are_found(repository: Repository) -> None:
    """Whatever its store id, a manifest below ROOT is a root; a store's own folder is not entered."""
    inner = Repository.create_or_open(LocalBackend(f"{repository.url}/inner", durable=False))
    take(inner, "c", b"c")
    assert names(repository) == ["inner/c"]


def test_linked_folders_are_roots_but_no_snapshots(repository: Repository, tmp_path: Path) -> None:
    """A link out of ROOT is followed once; a link back into ROOT, or in a circle, adds nothing."""
    root = Path(repository.url)
    take(repository, "a", b"a")
    outside = Repository.create_or_open(LocalBackend(str(tmp_path / "outside"), durable=False))
    take(outside, "x", b"x")
    take(outside, "deep/y", b"y")
    os.symlink(tmp_path / "outside", root / "link")
    os.symlink(tmp_path / "outside" / "deep", root / "second")
    os.symlink(root, root / "circle")
    os.symlink(root / "a", root / "alias")
    os.symlink(tmp_path / "nowhere", root / "dangling")
    walk = repository.walk()
    assert [ref.name for ref in walk.refs] == ["a"]
    assert sorted(ref.name for ref in walk.linked) == ["link/x", "second/y"]
    assert len(walk.roots) == 3
    for ref in walk.linked:
        assert repository.backend.read(ref.object)


def test_folders_of_the_filesystem_are_passed_over(repository: Repository) -> None:
    """Snapshots that the filesystem keeps of itself are no roots, and no take may use these names."""
    root = Path(repository.url)
    take(repository, "a", b"a")
    for name in (".snapshot", ".snapshots", ".snap", ".zfs"):
        os.makedirs(root / name)
        os.rename(root / "a", root / name / "a")
        assert names(repository) == []
        os.rename(root / name / "a", root / "a")
        with pytest.raises(ValueError, match="passed over"):
            check_name(f"run/{name}/step")
    for name in ("lost+found", ".torchsnapshot", ".manifests"):
        with pytest.raises(ValueError, match="passed over"):
            check_name(name)


def test_lost_and_found_is_passed_over_only_where_it_is_the_filesystems(repository: Repository) -> None:
    """Only root's own is passed over."""
    take(repository, "a", b"a")
    root = Path(repository.url)
    os.makedirs(root / "lost+found")
    os.rename(root / "a", root / "lost+found" / "a")
    is_roots = os.stat(root / "lost+found").st_uid == 0
    assert names(repository) == ([] if is_roots else ["lost+found/a"])
    if is_roots:
        os.chown(root / "lost+found", 12345, -1)
        assert names(repository) == ["lost+found/a"]


def test_in_a_bucket_every_name_is_a_users_own() -> None:
    """Object stores have no folders of a filesystem."""
    repository = new_store()
    ref = take(repository, "a", b"a")
    for name in (".zfs/a", "lost+found/a"):
        repository.backend.put(f"{name}/.manifests/{ref.manifest}", repository.backend.read(ref.object))
    assert names(repository) == [".zfs/a", "a", "lost+found/a"]


def test_a_folder_that_cannot_be_listed_is_an_error(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not seen is not nothing."""
    take(repository, "a/b", b"a")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/a/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match="a/b"):
        repository.walk()


def test_foreign_files_and_old_snapshots_are_reported(repository: Repository) -> None:
    """A metadata file of the old torchsnapshot marks a snapshot of its own; a lone signpost marks nothing."""
    take(repository, "a", b"a")
    repository.backend.put("a/.manifests/000001-nonsense", b"")
    repository.backend.put("old/.snapshot_metadata", b"version: 0.1.0\nmanifest: {}\n")
    repository.backend.put("half/.snapshot_metadata", b"\x89torchsnapshot\n")
    walk = repository.walk()
    assert walk.foreign == ("a/.manifests/000001-nonsense",)
    assert walk.upstream == ("old",)
    assert {"", "a", "old", "half"} <= walk.folders
