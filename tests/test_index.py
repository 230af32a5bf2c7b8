"""The index: digest → chunk, and how chunks leave it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tiny_takes import chunk_of

from torchsnapshot.store.envelope import ChunkRef, ChunkTable, ChunkTableBuilder, Envelope, Form, TableReference
from torchsnapshot.store.index import Index

TAKES = ["a" * 24, "b" * 24, "c" * 24]


def table_of(*refs: ChunkRef) -> ChunkTable:
    """A table of these chunks."""
    builder = ChunkTableBuilder()
    builder.add(refs)
    return builder.build()


def delta_of(content: bytes, take_id: str, base: ChunkRef) -> ChunkRef:
    """A chunk that is stored as a difference."""
    plain = chunk_of(content, take_id)
    key = plain.key + ".d"
    return plain._replace(key=key, form=Form.DELTA, base=base)


def test_a_chunk_is_found_by_digest_and_size() -> None:
    """Another size under the same digest is another content."""
    index = Index()
    ref = chunk_of(b"content", TAKES[0])
    index.add_table(table_of(ref))
    assert index.lookup(ref.digest, ref.nbytes) == ref
    assert index.lookup(ref.digest, ref.nbytes + 1) is None
    assert index.lookup(bytes(16), ref.nbytes) is None
    assert len(index) == 1


def test_what_a_take_has_just_written_replaces_what_was_known() -> None:
    """The taker has just seen its own chunk work."""
    index = Index()
    old, new = chunk_of(b"content", TAKES[0]), chunk_of(b"content", TAKES[1])
    index.add_table(table_of(old))
    index.add(new)
    assert index.lookup(old.digest, old.nbytes) == new
    assert len(index) == 1


def test_dropped_keys_take_their_deltas_with_them() -> None:
    """A chunk whose base is condemned is as good as condemned, whether it came before or after the drop."""
    base = chunk_of(b"base...", TAKES[0])
    delta = delta_of(b"delta..", TAKES[1], base)
    other = chunk_of(b"other", TAKES[0])
    before, after = Index(), Index()
    before.add_table(table_of(delta, other))
    before.drop([base.key])
    after.drop([base.key])
    after.add_table(table_of(delta, other))
    single = Index()
    single.add(delta)
    single.drop([base.key])
    for index in (before, after, single):
        assert index.lookup(base.digest, base.nbytes) is None
        assert index.lookup(delta.digest, delta.nbytes) is None
    assert before.lookup(other.digest, other.nbytes) == other
    assert after.lookup(other.digest, other.nbytes) == other


def test_a_dropped_content_may_come_back_under_another_key() -> None:
    """Only the key is condemned, not the content."""
    index = Index()
    old, new = chunk_of(b"content", TAKES[0]), chunk_of(b"content", TAKES[1])
    index.add_table(table_of(old))
    index.drop([old.key])
    index.add_table(table_of(new))
    assert index.lookup(old.digest, old.nbytes) == new


def test_tables_that_stand_in_blobs_are_fetched() -> None:
    """An envelope's references are followed through the function that it is given."""
    inline, apart = chunk_of(b"inline", TAKES[0]), chunk_of(b"apart", TAKES[0])
    data = table_of(apart).pack()
    blob = chunk_of(data, TAKES[0])
    envelope = Envelope(1, (table_of(inline), TableReference(blob.key + ".t", len(data), blob.digest)))
    index = Index()
    index.add_envelope(envelope, {blob.key + ".t": data}.__getitem__)
    assert index.lookup(inline.digest, inline.nbytes) == inline
    assert index.lookup(apart.digest, apart.nbytes) == apart


@given(st.lists(st.tuples(st.sampled_from(["add", "table", "drop"]), st.integers(0, 5), st.integers(0, 2))))
def test_a_lookup_never_gives_a_dropped_key(steps: list[tuple[str, int, int]]) -> None:
    """Whatever the order of adding and dropping: a hit is of the right content and was never dropped."""
    index = Index()
    dropped: set[str] = set()
    for step, content, number in steps:
        ref = chunk_of(bytes([content]) * 8, TAKES[number])
        if step == "add":
            index.add(ref)
        elif step == "table":
            index.add_table(table_of(ref))
        else:
            index.drop([ref.key])
            dropped.add(ref.key)
        for probe in range(6):
            wanted = chunk_of(bytes([probe]) * 8, TAKES[0])
            found = index.lookup(wanted.digest, wanted.nbytes)
            if found is not None:
                assert found.digest == wanted.digest
                assert found.key not in dropped
