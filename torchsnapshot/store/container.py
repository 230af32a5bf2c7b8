"""The manifest's outer form: a fixed header, a directory of sections, and the sections one behind the other.

What lives here: the header's bytes, the directory, digests and codecs of whole sections. What doesn't: what a section
holds (``envelope``, ``format.entries``). Documented byte by byte in docs/format.md.

Invariants:

- The first 32 bytes and the digest that ends the header keep their meaning in every version, so that damage is told
  apart from a newer version.
- The sections follow the header and one another without a gap, in the order of the directory, up to the file's end:
  there is nothing to overlap and nothing that no digest covers.
- Everything is checked before it is used: sizes before slicing, digests before parsing, the size that a compressed
  frame declares before decompressing.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from torchsnapshot.errors import FormatError, NewerFormatError
from torchsnapshot.store import bounded

MAGIC = b"\x89TSNAP\r\n"
"""The first byte is no text in any encoding; CR LF shows a transfer that "repaired" line ends."""

ENVELOPE_VERSION = 1
"""The version of all that gc needs: this header, head, envelope, chunk tables. A collector stops at any other one."""

DIGEST_NBYTES = 16
MAX_SECTIONS = 64

_HEADER = struct.Struct("<8sHHIIIQ")
_SECTION = struct.Struct("<HBBIQQQ16s")
_BIG_ENDIAN = sys.byteorder != "little"


class SectionType(IntEnum):
    """What a section holds. Readers pass over types that they do not know."""

    HEAD = 1
    ENVELOPE = 2
    ENTRIES = 3


class SectionCodec(IntEnum):
    """How a section is stored."""

    RAW = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class Section:
    """One line of the directory. ``type`` and ``codec`` are plain numbers: those of a newer version are passed over."""

    type: int
    codec: int
    offset: int
    stored_nbytes: int
    raw_nbytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header: flags for readers, the file's size, and the directory."""

    incompatible: int
    compatible: int
    nbytes: int
    sections: tuple[Section, ...]

    def section(self, section_type: SectionType, where: str) -> Section:
        """The section of that type.

        Raises:
            FormatError: there is none.
        """
        for section in self.sections:
            if section.type == section_type:
                return section
        raise FormatError(f"{where}: the manifest has no {section_type.name.lower()} section")


def digest_of(data: bytes | memoryview) -> bytes:
    """The canonical (big-endian) xxh3_128 of ``data``."""
    digest: bytes = xxhash.xxh3_128_digest(data)
    return digest


def check_host() -> None:
    """Refuse a host that would read our little-endian columns the wrong way round.

    Raises:
        FormatError: the host is big-endian.
    """
    if _BIG_ENDIAN:
        raise FormatError("torchsnapshot stores little-endian bytes and does not run on big-endian hosts")


@dataclass(frozen=True, slots=True)
class PackedSection:
    """A section as it stands in a file, wherever that is: compressed where that pays, and hashed."""

    type: SectionType
    codec: SectionCodec
    raw_nbytes: int
    stored: bytes
    digest: bytes


def pack_section(section_type: SectionType, raw: bytes) -> PackedSection:
    """Compress and hash a section. The head is never compressed.

    Raises:
        ValueError: it is larger than a section may be.
    """
    if len(raw) > bounded.MAX_SECTION_NBYTES:
        raise ValueError(f"the {_name(section_type)} section has {len(raw)} bytes, more than a manifest may")
    compressed = None if section_type is SectionType.HEAD else bounded.compress(raw)
    stored = raw if compressed is None else compressed
    codec = SectionCodec.RAW if compressed is None else SectionCodec.ZSTD
    return PackedSection(section_type, codec, len(raw), stored, digest_of(stored))


def pack_container(sections: Sequence[tuple[SectionType, bytes]], incompatible: int, compatible: int) -> bytes:
    """Build the file of raw sections. See ``join_sections``."""
    return join_sections([pack_section(*section) for section in sections], incompatible, compatible)


def join_sections(sections: Sequence[PackedSection], incompatible: int, compatible: int) -> bytes:
    """Build the file.

    Args:
        sections: in the order of the file; the head comes first.
        incompatible: flags of which a reader of entries must know every one.
        compatible: flags that a reader may ignore.
    """
    check_host()
    header_nbytes = _HEADER.size + len(sections) * _SECTION.size + DIGEST_NBYTES
    directory: list[bytes] = []
    offset = header_nbytes
    for section in sections:
        nbytes = len(section.stored)
        directory.append(
            _SECTION.pack(section.type, section.codec, 0, 0, offset, nbytes, section.raw_nbytes, section.digest)
        )
        offset += nbytes
    header = _HEADER.pack(MAGIC, ENVELOPE_VERSION, len(sections), incompatible, compatible, header_nbytes, offset)
    header += b"".join(directory)
    return b"".join((header, digest_of(header), *[section.stored for section in sections]))


def parse_header(data: bytes | memoryview, where: str, *, whole: bool) -> Header:
    """Check the header and the directory.

    Args:
        data: the manifest, or its beginning.
        where: which manifest this is, for messages.
        whole: ``data`` is all of it, so its length must be what the header says.

    Raises:
        NewerFormatError: the envelope's version is not ours.
        FormatError: anything else is wrong.
    """
    check_host()
    view = memoryview(data)
    if len(view) < _HEADER.size or view[: len(MAGIC)] != MAGIC:
        raise FormatError(f"{where}: not a manifest of torchsnapshot, or its beginning is lost ({len(view)} bytes)")
    _, version, num_sections, incompatible, compatible, header_nbytes, nbytes = _HEADER.unpack_from(view)
    if not _HEADER.size + DIGEST_NBYTES <= header_nbytes <= min(len(view), 1 << 16):
        raise FormatError(f"{where}: the header claims {header_nbytes} bytes of the {len(view)} that are there")
    end = header_nbytes - DIGEST_NBYTES
    if digest_of(view[:end]) != view[end:header_nbytes]:
        raise FormatError(f"{where}: the header is damaged (its digest does not match)")
    if version != ENVELOPE_VERSION:
        raise NewerFormatError(
            f"{where}: envelope version {version}, this library knows {ENVELOPE_VERSION}; upgrade torchsnapshot"
        )
    if num_sections > MAX_SECTIONS or header_nbytes != _HEADER.size + num_sections * _SECTION.size + DIGEST_NBYTES:
        raise FormatError(f"{where}: {num_sections} sections do not fit a header of {header_nbytes} bytes")
    if whole and len(view) != nbytes:
        raise FormatError(f"{where}: {len(view)} bytes, but the header says {nbytes}: truncated, or mixed up")
    sections = tuple(_parse_section(view, index, where) for index in range(num_sections))
    _check_places(sections, header_nbytes, nbytes, where)
    return Header(incompatible, compatible, nbytes, sections)


def _parse_section(view: memoryview, index: int, where: str) -> Section:
    fields = _SECTION.unpack_from(view, _HEADER.size + index * _SECTION.size)
    section_type, codec, zero, another_zero, offset, stored_nbytes, raw_nbytes, digest = fields
    if zero or another_zero:
        raise FormatError(f"{where}: section {index} has reserved bytes that are not zero")
    return Section(section_type, codec, offset, stored_nbytes, raw_nbytes, digest)


def _check_places(sections: tuple[Section, ...], header_nbytes: int, nbytes: int, where: str) -> None:
    if len({section.type for section in sections}) != len(sections):
        raise FormatError(f"{where}: two sections of one type")
    end = header_nbytes
    for section in sections:
        if section.offset != end:
            raise FormatError(f"{where}: the section at {section.offset} overlaps or leaves a gap, {end} was expected")
        end += section.stored_nbytes
    if end != nbytes:
        raise FormatError(f"{where}: the sections end at {end}, the file at {nbytes}")


def read_section(data: bytes | memoryview, section: Section, where: str) -> bytes:
    """A section's bytes, checked and decompressed.

    Args:
        data: the manifest, or a beginning of it that holds the section.
        section: its line of the directory.
        where: which manifest this is, for messages.

    Raises:
        FormatError: the section is damaged, cut short, or not what the directory says.
    """
    name = _name(section.type)
    stored = check_section(data, section, where)
    if section.codec == SectionCodec.ZSTD:
        return bounded.decompress(stored, section.raw_nbytes, f"{where}: {name} section")
    if section.codec != SectionCodec.RAW:
        raise NewerFormatError(f"{where}: the {name} section has codec {section.codec}; upgrade torchsnapshot")
    if section.raw_nbytes != section.stored_nbytes:
        raise FormatError(f"{where}: the uncompressed {name} section declares another raw size than its own")
    return bytes(stored)


def check_section(data: bytes | memoryview, section: Section, where: str) -> memoryview:
    """A section's bytes as they are stored, after a look at their digest. See ``read_section``."""
    name = _name(section.type)
    stored = memoryview(data)[section.offset : section.offset + section.stored_nbytes]
    if len(stored) != section.stored_nbytes:
        raise FormatError(f"{where}: the {name} section is cut short ({len(stored)} of {section.stored_nbytes} bytes)")
    if digest_of(stored) != section.digest:
        raise FormatError(f"{where}: the {name} section is damaged (its digest does not match)")
    return stored


def _name(section_type: int) -> str:
    try:
        return SectionType(section_type).name.lower()
    except ValueError:
        return f"type {section_type}"
