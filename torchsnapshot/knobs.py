"""Settings, read from the environment each time they are asked for.

What lives here: one getter per setting, and the context managers that override the old torchsnapshot's settings. What
doesn't: arguments of calls, the readings of the machine that defaults derive from (``machine``), and any decision about
how a setting is used.

Invariants: a value that cannot be used is a ``ValueError`` that names the variable, its value and what is allowed; an
empty variable counts as unset; an override puts back exactly what it found, also when its block raises.

=====================================================  =============  ===============================================
variable                                               default        meaning
=====================================================  =============  ===============================================
TORCHSNAPSHOT_MAX_CHUNK_SIZE_BYTES_OVERRIDE            the store's    size of a chunk, at most 32 MiB
TORCHSNAPSHOT_SLAB_SIZE_THRESHOLD_BYTES_OVERRIDE       64 MiB         size of a pack of small chunks, at most 64 MiB
TORCHSNAPSHOT_DISABLE_BATCHING                         false          every small chunk becomes a blob of its own
TORCHSNAPSHOT_MAX_PER_RANK_IO_CONCURRENCY_OVERRIDE     16             most requests in flight
TORCHSNAPSHOT_PER_RANK_MEMORY_BUDGET_BYTES             256 MiB        memory for buffers
TORCHSNAPSHOT_BASE_MEMORY_BYTES                        see below      copies of bases for deltas; 0 keeps none
TORCHSNAPSHOT_NUM_THREADS                              cores          worker threads
TORCHSNAPSHOT_ALLOW_PICKLE                             false          restoring may run pickles
TORCHSNAPSHOT_DURABLE                                  true           local stores wait for the disk
TORCHSNAPSHOT_WATCH_MEMORY                             see below      the kernel is asked what was written
TORCHSNAPSHOT_STORE                                    none           the store of the paths below it
TORCHSNAPSHOT_MAX_SHARD_SIZE_BYTES_OVERRIDE            512 MiB        none: shards are cut on the grid of chunks
TORCHSNAPSHOT_ENABLE_SHARDED_TENSOR_ELASTICITY_...     false          none: sharded tensors may move anywhere
=====================================================  =============  ===============================================

Copies of bases take at most a rank's share of an eighth of the memory that is free (``get_base_memory_bytes``). Memory
is watched unless devices might write to it (``watches_memory``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

from torchsnapshot import machine

MEBIBYTE = 1 << 20

DEFAULT_CHUNK_NBYTES = 4 * MEBIBYTE
MAX_CHUNK_NBYTES = 32 * MEBIBYTE
"""A chunk may grow to twice its nominal size, and a blob holds at most 64 MiB."""
MAX_PACK_NBYTES = 64 * MEBIBYTE
DEFAULT_MEMORY_BUDGET_NBYTES = 256 * MEBIBYTE
MIN_STAGING_NBYTES = 64 * MEBIBYTE
"""An asynchronous take is given this much even where memory is short: with less it could hardly move."""
BASE_MEMORY_SHARE = 8
"""One part in so many of the free memory may hold copies of chunks that deltas are made against."""
DEFAULT_IO_CONCURRENCY = 16

CHUNK_SIZE = "TORCHSNAPSHOT_MAX_CHUNK_SIZE_BYTES_OVERRIDE"
SHARD_SIZE = "TORCHSNAPSHOT_MAX_SHARD_SIZE_BYTES_OVERRIDE"
SLAB_SIZE = "TORCHSNAPSHOT_SLAB_SIZE_THRESHOLD_BYTES_OVERRIDE"
IO_CONCURRENCY = "TORCHSNAPSHOT_MAX_PER_RANK_IO_CONCURRENCY_OVERRIDE"
DISABLE_BATCHING = "TORCHSNAPSHOT_DISABLE_BATCHING"
ELASTICITY_AT_ROOT_ONLY = "TORCHSNAPSHOT_ENABLE_SHARDED_TENSOR_ELASTICITY_ROOT_ONLY"
MEMORY_BUDGET = "TORCHSNAPSHOT_PER_RANK_MEMORY_BUDGET_BYTES"
BASE_MEMORY = "TORCHSNAPSHOT_BASE_MEMORY_BYTES"
NUM_THREADS = "TORCHSNAPSHOT_NUM_THREADS"
ALLOW_PICKLE = "TORCHSNAPSHOT_ALLOW_PICKLE"
DURABLE = "TORCHSNAPSHOT_DURABLE"
STORE = "TORCHSNAPSHOT_STORE"
WATCH_MEMORY = "TORCHSNAPSHOT_WATCH_MEMORY"
LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"

_YES = ("1", "true", "yes", "on")
_NO = ("0", "false", "no", "off")


# ------------------------------------------------------------------ reading variables


def _text(variable: str) -> str | None:
    """The variable's value without surrounding blanks; None where it is unset or empty."""
    return os.environ.get(variable, "").strip() or None


def _count(variable: str) -> int | None:
    """The variable as a positive integer, None where it is unset."""
    text = _text(variable)
    if text is None:
        return None
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{variable}={text!r}: allowed is a whole number of at least 1")
    return value


def _count_or_none_at_all(variable: str) -> int | None:
    """The variable as an integer that may be 0, None where it is unset."""
    if _text(variable) == "0":
        return 0
    try:
        return _count(variable)
    except ValueError as error:
        raise ValueError(str(error).replace("at least 1", "at least 0")) from None


def _switch(variable: str, default: bool) -> bool:
    """The variable as a yes or no."""
    text = _text(variable)
    if text is None:
        return default
    if text.lower() not in _YES + _NO:
        raise ValueError(f"{variable}={text!r}: allowed is one of {', '.join(_YES + _NO)}")
    return text.lower() in _YES


# ------------------------------------------------------------------ sizes


def get_chunk_size_bytes(default: int = DEFAULT_CHUNK_NBYTES) -> int:
    """The nominal size of a chunk in bytes: the override where it is set, else ``default`` (the store's config).

    An override above 32 MiB (the old torchsnapshot's default was 512 MiB) counts as 32 MiB.
    """
    return min(_count(CHUNK_SIZE) or default, MAX_CHUNK_NBYTES)


def get_max_chunk_size_bytes() -> int:
    """The old torchsnapshot's name for ``get_chunk_size_bytes()``."""
    return get_chunk_size_bytes()


def get_max_shard_size_bytes() -> int:
    """The old torchsnapshot's limit for one piece of a shard, in bytes. Without meaning here: a chunk is the piece."""
    return _count(SHARD_SIZE) or 512 * MEBIBYTE


def get_slab_size_threshold_bytes() -> int:
    """The size in bytes up to which small chunks are packed into one blob; never above 64 MiB."""
    return min(_count(SLAB_SIZE) or MAX_PACK_NBYTES, MAX_PACK_NBYTES)


def get_memory_budget_bytes() -> int:
    """Bytes of buffers that a synchronous take or a restore may hold at a time.

    Returns:
        TORCHSNAPSHOT_PER_RANK_MEMORY_BUDGET_BYTES where it is set. Else 256 MiB, or where that is less this process's
        share of a quarter of the free memory (at least 64 MiB).
    """
    explicit = _count(MEMORY_BUDGET)
    if explicit is not None:
        return explicit
    share = machine.free_memory_nbytes() // 4 // get_local_world_size()
    return max(MIN_STAGING_NBYTES, min(DEFAULT_MEMORY_BUDGET_NBYTES, share))


def get_staging_budget_bytes(state_nbytes: int, held_nbytes: int = 0) -> int:
    """Bytes of buffers that an asynchronous take may hold: the whole state where that fits, so that it returns at once.

    Args:
        state_nbytes: size of the state in bytes.
        held_nbytes: what this process has taken for buffers already.

    Returns:
        The least of the state and this process's share of a quarter of the memory that would be free without its
        buffers (of the machine and of the control group; at least 64 MiB).
        TORCHSNAPSHOT_PER_RANK_MEMORY_BUDGET_BYTES takes that share's place.
    """
    free_nbytes = machine.free_memory_nbytes() + held_nbytes
    share = _count(MEMORY_BUDGET) or max(free_nbytes // 4 // get_local_world_size(), MIN_STAGING_NBYTES)
    return max(1, min(state_nbytes, share))


def get_base_memory_bytes(held_nbytes: int = 0) -> int:
    """Bytes of memory that a process may spend on copies of chunks that deltas are made against.

    It is memory beside the buffers of a take, held between takes: a copy costs the raw size of its chunk, and where
    nothing is copied because nothing would be gained (``encoding="raw"``, stores that are faster than the codec),
    none is taken. Without a copy a base is read from the store, which costs a take time instead.

    Args:
        held_nbytes: what the copies take already.

    Returns:
        This process's share of an eighth of the memory that would be free without copies.
        TORCHSNAPSHOT_BASE_MEMORY_BYTES takes that share's place.
    """
    explicit = _count_or_none_at_all(BASE_MEMORY)
    if explicit is not None:
        return explicit
    return (machine.free_memory_nbytes() + held_nbytes) // BASE_MEMORY_SHARE // get_local_world_size()


# ------------------------------------------------------------------ parallelism


def get_local_world_size() -> int:
    """How many ranks share this machine: LOCAL_WORLD_SIZE, which torchrun sets, else 1."""
    return _count(LOCAL_WORLD_SIZE) or 1


def get_num_threads() -> int:
    """How many worker threads this process may run, at least 1.

    TORCHSNAPSHOT_NUM_THREADS where it is set. Else this rank's share of the cores that the process may use (affinity
    and the control group's limit), and not more than TORCHSNAPSHOT_MAX_PER_RANK_IO_CONCURRENCY_OVERRIDE, if it is set.
    """
    explicit = _count(NUM_THREADS)
    if explicit is not None:
        return explicit
    share = get_num_cores()
    return min(share, _count(IO_CONCURRENCY) or share)


def get_num_cores() -> int:
    """This rank's share of the cores that the process may use, at least 1."""
    return max(1, machine.available_cores() // get_local_world_size())


def get_num_workers(concurrency: int) -> int:
    """How many worker threads a run has that waits for a store as well as it computes.

    Args:
        concurrency: how many requests the store wants in flight from one machine.

    Returns:
        This rank's share of these requests, or the requests that TORCHSNAPSHOT_MAX_PER_RANK_IO_CONCURRENCY_OVERRIDE
        allows; not less than ``get_num_threads()``.
    """
    requests = _count(IO_CONCURRENCY) or concurrency // get_local_world_size()
    return max(get_num_threads(), requests)


def get_max_per_rank_io_concurrency() -> int:
    """How many requests to the store one rank may have in flight."""
    return _count(IO_CONCURRENCY) or DEFAULT_IO_CONCURRENCY


# ------------------------------------------------------------------ switches


def is_batching_disabled() -> bool:
    """Whether every small chunk becomes a blob of its own instead of part of a pack."""
    return _switch(DISABLE_BATCHING, False)


def is_sharded_tensor_elasticity_enabled_at_root_only() -> bool:
    """The old torchsnapshot's restriction of resharding. Without meaning here: a sharded tensor may be anywhere."""
    return _switch(ELASTICITY_AT_ROOT_ONLY, False)


def is_pickle_allowed() -> bool:
    """Whether a restore may run pickles although its caller did not say so: they can execute any code."""
    return _switch(ALLOW_PICKLE, False)


def is_durable() -> bool:
    """Whether a local store waits until bytes are on the disk (default), or leaves that to the system."""
    return _switch(DURABLE, True)


def watches_memory() -> bool | None:
    """Whether the kernel is asked which memory was written, instead of hashing all of it (``state.live_digests``).

    None where TORCHSNAPSHOT_WATCH_MEMORY is unset: that is up to whether a device might write to memory unseen.
    """
    return None if _text(WATCH_MEMORY) is None else _switch(WATCH_MEMORY, False)


def get_store_url() -> str | None:
    """The store of all paths below it, None where TORCHSNAPSHOT_STORE is unset."""
    return _text(STORE)


# ------------------------------------------------------------------ overrides


def _override(variable: str) -> Callable[[int], AbstractContextManager[None]]:
    """A context manager that sets ``variable`` to the number or switch that it is called with."""

    @contextmanager
    def override(value: int) -> Generator[None, None, None]:
        found = os.environ.get(variable)
        os.environ[variable] = str(value)
        try:
            yield
        finally:
            if found is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = found

    override.__doc__ = f"Set ``{variable}`` for the length of a ``with`` block."
    return override


override_max_chunk_size_bytes = _override(CHUNK_SIZE)
override_max_shard_size_bytes = _override(SHARD_SIZE)
override_slab_size_threshold_bytes = _override(SLAB_SIZE)
override_max_per_rank_io_concurrency = _override(IO_CONCURRENCY)
override_is_batching_disabled = _override(DISABLE_BATCHING)
