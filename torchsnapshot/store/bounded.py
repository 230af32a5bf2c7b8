"""Reading msgpack and zstd that may be hostile: nothing is allocated that the input's own size does not justify.

What lives here: ``FieldReader``, which takes msgpack apart one field at a time and knows what it expects, and the
compression of whole sections. What doesn't: any layout of ours (``container``, ``envelope``, ``format.entries``).

Invariants:

- msgpack's own unpacker allocates an array when it sees its header, so nested headers multiply; here arrays are only
  ever opened by someone who expects one, their elements are read one by one, and a length above the bytes that are
  left is refused.
- Maps and extension types are refused, except that ``FieldReader.plain`` reads maps with text keys, each key once.
- python-zstandard believes the size that a frame declares, whatever ``max_output_size`` says; the declared size is
  compared with what the directory says before anything is decompressed, and that is bounded by the stored size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import msgpack
import zstandard

from torchsnapshot.errors import FormatError

MAX_SECTION_NBYTES = 1 << 30
"""The most bytes that a section may have after decompression."""

FREE_NBYTES = 64 << 10
MAX_RATIO = 128
"""A section may decompress to ``FREE_NBYTES``, or to ``MAX_RATIO`` times its stored size. Writers keep to it by storing
what compresses better than that as it is."""

MAX_PLAIN_DEPTH = 16

SMALL_NBYTES = 1 << 10
"""Up to this size msgpack may unpack at its own discretion: what it allocates is bounded, and soon free again."""

_LEVEL = 3
_SMALLEST_COMPRESSED_NBYTES = 512
_MAX_WINDOW_NBYTES = 8 << 20
_INT_LIMIT = 1 << 63

Plain = Any
"""None, bool, int, float, str, bytes, and lists and text-keyed dicts of these."""


def compress(raw: bytes) -> bytes | None:
    """The zstd frame of ``raw``, or None where it is to be stored as it is."""
    if len(raw) < _SMALLEST_COMPRESSED_NBYTES:
        return None
    stored = zstandard.ZstdCompressor(level=_LEVEL).compress(raw)
    if len(stored) >= len(raw) or not is_plausible(len(stored), len(raw)):
        return None
    return stored


def is_plausible(stored_nbytes: int, raw_nbytes: int) -> bool:
    """Whether a section of ``stored_nbytes`` may decompress to ``raw_nbytes``."""
    return raw_nbytes <= MAX_SECTION_NBYTES and raw_nbytes <= max(FREE_NBYTES, MAX_RATIO * stored_nbytes)


def decompress(stored: memoryview, raw_nbytes: int, what: str) -> bytes:
    """Decompress one frame that must give exactly ``raw_nbytes``.

    Args:
        stored: the frame, and nothing else.
        raw_nbytes: the size that the directory declares.
        what: where the frame is, for messages.

    Raises:
        FormatError: the frame is damaged, or it is not what the directory says.
    """
    if not is_plausible(len(stored), raw_nbytes):
        raise FormatError(f"{what}: {len(stored)} compressed bytes claim to hold {raw_nbytes}")
    try:
        # decompressing a skippable frame gives nothing and is no error, but its declared size is 0
        declared = zstandard.frame_content_size(stored)
        if declared != raw_nbytes or raw_nbytes == 0:
            raise FormatError(f"{what}: the compressed frame declares {declared} bytes, the directory {raw_nbytes}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_NBYTES)
        raw = decompressor.decompress(stored, max_output_size=raw_nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"{what}: damaged compressed data ({error})") from error
    if len(raw) != raw_nbytes:
        raise FormatError(f"{what}: {len(raw)} bytes after decompression, the directory declares {raw_nbytes}")
    return raw


def pack(value: Plain) -> bytes:
    """The one msgpack form that we write: canonical sizes, text as UTF-8 where lone surrogates are let through.

    Raises:
        ValueError: an int that does not fit into 64 bits.
    """
    try:
        packed: bytes = msgpack.packb(value, use_bin_type=True, unicode_errors="surrogatepass")
    except OverflowError as error:
        raise ValueError(str(error)) from error
    return packed


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what msgpack raises while it reads ``what`` into ``FormatError``."""
    try:
        yield
    except FormatError:
        raise
    except (ValueError, TypeError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise FormatError(f"{what}: broken msgpack ({type(error).__name__}: {error})") from error


def unpack_small(data: bytes) -> Plain:
    """Unpack at most ``SMALL_NBYTES`` bytes without maps. To be used inside ``reading(what)``."""
    if len(data) > SMALL_NBYTES:
        raise ValueError(f"{len(data)} bytes are not unpacked unseen")
    return msgpack.unpackb(data, raw=False, unicode_errors="surrogatepass", max_map_len=0, max_ext_len=0)


def check_lengths(data: bytes | memoryview, what: str) -> None:
    """Refuse msgpack whose headers claim more elements than there are bytes.

    For who must leave the unpacking to msgpack: after this, ``msgpack.unpackb`` allocates in proportion to ``data``.
    One quick pass that builds nothing. The payloads of extensions are bytes here; each needs a check of its own.

    Args:
        data: one object, and nothing behind it.
        what: where it is, for messages.

    Raises:
        FormatError: it is not one sound object.
    """
    with reading(what):
        unpacker: Any = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
        unpacker.feed(data)
        unpacker.skip()
        if unpacker.tell() != len(data):
            raise FormatError(f"{what}: {len(data) - unpacker.tell()} bytes behind its end")


class FieldReader:
    """Reads one field after another; each method says which kind it expects, and refuses any other.

    To be used inside ``reading(what)``, which translates what msgpack itself raises.

    Args:
        data: all of the msgpack bytes.
        what: where they are, for messages.
        start: where they begin there, for messages.
    """

    __slots__ = ("_data", "_start", "_unpacker", "what")

    def __init__(self, data: bytes, what: str, start: int = 0) -> None:
        self.what = what
        self._data = data
        self._start = start
        self._unpacker: Any = msgpack.Unpacker(
            raw=False,
            unicode_errors="surrogatepass",
            max_buffer_size=max(1, len(data)),
            max_array_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
        self._unpacker.feed(data)

    @property
    def left(self) -> int:
        """Bytes that have not been read."""
        return len(self._data) - int(self._unpacker.tell())

    def fail(self, problem: str) -> NoReturn:
        """Raise ``FormatError`` that names the place."""
        raise FormatError(f"{self.what}: {problem} (at byte {self._start + self._unpacker.tell()})")

    def finish(self) -> None:
        """Refuse bytes behind the last field."""
        if self.left:
            self.fail(f"{self.left} bytes too many")

    def starts_with(self, head: bytes) -> bool:
        """Whether the next bytes are these."""
        return self._data.startswith(head, self._unpacker.tell())

    def item(self) -> bytes:
        """The bytes of the next field, whatever it is, with all that is in it."""
        start = self._unpacker.tell()
        self._unpacker.skip()
        return self._data[start : self._unpacker.tell()]

    def part(self, item: bytes) -> FieldReader:
        """What reads the field that ``item`` has just given."""
        return FieldReader(item, self.what, self._start + self._unpacker.tell() - len(item))

    def array(self, name: str, limit: int | None = None) -> int:
        """Open an array; its elements are read one by one. Returns their number."""
        length: int = self._unpacker.read_array_header()
        # an element has at least one byte
        if length > (self.left if limit is None else limit):
            self.fail(f"{name} claims {length} elements")
        return length

    def integer(self, name: str, limit: int = _INT_LIMIT) -> int:
        """An int from 0 up to, but not including, ``limit``."""
        value = self._unpacker.unpack()
        if type(value) is not int or not 0 <= value < limit:
            self.fail(f"{name} is {value!r:.80}, not an int from 0 to {limit - 1}")
        return value

    def integers(self, name: str, max_count: int, limit: int = _INT_LIMIT) -> tuple[int, ...]:
        """An array of ints from 0 up to, but not including, ``limit``."""
        unpack = self._unpacker.unpack
        values = tuple([unpack() for _ in range(self.array(name, max_count))])
        for value in values:
            if type(value) is not int or not 0 <= value < limit:
                self.fail(f"{name} holds {value!r:.80}, not an int from 0 to {limit - 1}")
        return values

    def text(self, name: str, max_nchars: int) -> str:
        """A str of at most ``max_nchars`` characters."""
        value = self._unpacker.unpack()
        if type(value) is not str or len(value) > max_nchars:
            self.fail(f"{name} is {value!r:.80}, not a text of at most {max_nchars} characters")
        return value

    def binary(self, name: str) -> bytes:
        """Bytes."""
        value = self._unpacker.unpack()
        if type(value) is not bytes:
            self.fail(f"{name} is {value!r:.80}, not bytes")
        return value

    def binary_or_none(self, name: str) -> bytes | None:
        """Bytes or nil."""
        value = self._unpacker.unpack()
        if value is not None and type(value) is not bytes:
            self.fail(f"{name} is {value!r:.80}, neither bytes nor nil")
        return value

    def text_or_none(self, name: str, max_nchars: int) -> str | None:
        """A str of at most ``max_nchars`` characters, or nil."""
        value = self._unpacker.unpack()
        if value is not None and (type(value) is not str or len(value) > max_nchars):
            self.fail(f"{name} is {value!r:.80}, neither nil nor a text of at most {max_nchars} characters")
        return value

    def boolean(self, name: str) -> bool:
        """A bool."""
        value = self._unpacker.unpack()
        if type(value) is not bool:
            self.fail(f"{name} is {value!r:.80}, not a bool")
        return value

    def scalar(self, name: str, kinds: tuple[type, ...]) -> Any:
        """A value of exactly one of ``kinds``."""
        value = self._unpacker.unpack()
        if type(value) not in kinds:
            self.fail(f"{name} is {value!r:.80}, which is not allowed there")
        return value

    def next_byte(self) -> int:
        """The first byte of the next field, which tells its kind; -1 at the end."""
        position = self._unpacker.tell()
        return self._data[position] if position < len(self._data) else -1

    def plain(self, name: str, depth: int = MAX_PLAIN_DEPTH) -> Plain:
        """Any plain value: nil, bool, int, float, str, bytes, arrays, and maps with text keys."""
        first = self.next_byte()
        if depth < 0:
            self.fail(f"{name} is nested too deeply")
        if 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
            return [self.plain(name, depth - 1) for _ in range(self.array(name))]
        if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            length: int = self._unpacker.read_map_header()
            if 2 * length > self.left:
                self.fail(f"{name} claims {length} pairs")
            pairs = {}
            for _ in range(length):
                key = self.text(f"a key of {name}", 4096)
                if key in pairs:
                    self.fail(f"{name} has the key {key!r:.80} twice")
                pairs[key] = self.plain(name, depth - 1)
            return pairs
        return self.scalar(name, (type(None), bool, int, float, str, bytes))
