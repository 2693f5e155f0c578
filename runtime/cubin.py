"""Reads what a compiled layer's GPU code needs: registers, stack, shared memory, code size.

In: the bytes of a shared library (or a bare cubin). Out: one `KernelResources` a kernel. A cubin is
an ELF file; the compiler stores it raw inside the library, so no CUDA tool is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["KernelResources", "find_cubins", "kernel_resources"]

_EM_CUDA = 190
_SHT_SYMTAB = 2
_SHT_NOBITS = 8
# Attributes of .nv.info that hold (symbol, value) pairs; names as in cuobjdump -elf.
_REGCOUNT, _FRAME_SIZE, _MIN_STACK_SIZE = 0x2F, 0x11, 0x12
# Attributes of .nv.info.<kernel> that hold three dimensions.
_MAX_THREADS, _REQNTID = 0x05, 0x10
_FORM_SIZED = 4  # u16 size and payload follow; other forms hold their value in two bytes


@dataclass(frozen=True, kw_only=True)
class KernelResources:
    """What one kernel needs, from its cubin.

    Attributes:
        name: symbol of the kernel.
        registers: per thread.
        stack_bytes: local memory per thread; 0 means that nothing is spilled.
        static_smem_bytes: shared memory that the cubin declares; dynamic shared memory comes with
            the launch and is not in the cubin.
        code_bytes: size of the instructions.
        threads: threads of a CTA that the kernel was compiled for, 0 where it does not say.
    """

    name: str
    registers: int
    stack_bytes: int
    static_smem_bytes: int
    code_bytes: int
    threads: int


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int


def find_cubins(blob: bytes) -> list[bytes]:
    """Every cubin inside ``blob``, in the order they are stored."""
    found = []
    at = blob.find(b"\x7fELF")
    while at >= 0:
        if len(blob) >= at + 64 and struct.unpack_from("<H", blob, at + 18)[0] == _EM_CUDA:
            size = _elf_size(blob, at)
            found.append(blob[at : at + size])
            at += size - 1
        at = blob.find(b"\x7fELF", at + 1)
    return found


def kernel_resources(blob: bytes) -> list[KernelResources]:
    """The kernels of every cubin inside ``blob``, sorted by name."""
    found = [kernel for cubin in find_cubins(blob) for kernel in _kernels(cubin)]
    return sorted(found, key=lambda kernel: kernel.name)


def _elf_size(blob: bytes, at: int) -> int:
    shoff, shentsize, shnum = _section_table(blob, at)
    phoff = struct.unpack_from("<Q", blob, at + 32)[0]
    phentsize, phnum = struct.unpack_from("<HH", blob, at + 54)
    ends = [shoff + shentsize * shnum, phoff + phentsize * phnum]
    for index in range(shnum):
        header = at + shoff + index * shentsize
        _, kind, _, _, offset, size = struct.unpack_from("<IIQQQQ", blob, header)
        ends.append(offset + (0 if kind == _SHT_NOBITS else size))
    return int(max(ends))


def _section_table(blob: bytes, at: int = 0) -> tuple[int, int, int]:
    shoff = struct.unpack_from("<Q", blob, at + 40)[0]
    shentsize, shnum = struct.unpack_from("<HH", blob, at + 58)
    return shoff, shentsize, shnum


def _sections(cubin: bytes) -> list[_Section]:
    shoff, shentsize, shnum = _section_table(cubin)
    raw = [struct.unpack_from("<IIQQQQI", cubin, shoff + i * shentsize) for i in range(shnum)]
    names_at = raw[struct.unpack_from("<H", cubin, 62)[0]][4]
    return [
        _Section(_text_at(cubin, names_at + name), kind, offset, size, link)
        for name, kind, _flags, _addr, offset, size, link in raw
    ]


def _text_at(cubin: bytes, at: int) -> str:
    return cubin[at : cubin.index(b"\0", at)].decode()


def _kernels(cubin: bytes) -> Iterator[KernelResources]:
    sections = _sections(cubin)
    symbols: list[str] = []
    for section in sections:
        if section.kind == _SHT_SYMTAB:
            names_at = sections[section.link].offset
            for at in range(section.offset, section.offset + section.size, 24):
                symbols.append(_text_at(cubin, names_at + struct.unpack_from("<I", cubin, at)[0]))
    by_name = {section.name: section for section in sections}
    pairs: dict[tuple[int, str], int] = {}
    if ".nv.info" in by_name:
        for attribute, payload in _attributes(cubin, by_name[".nv.info"]):
            if attribute in (_REGCOUNT, _FRAME_SIZE, _MIN_STACK_SIZE) and len(payload) >= 8:
                symbol, value = struct.unpack_from("<II", payload)
                if symbol < len(symbols):
                    pairs[attribute, symbols[symbol]] = value
    for name in sorted(name for attribute, name in pairs if attribute == _REGCOUNT):
        text = by_name.get(f".text.{name}")
        smem = by_name.get(f".nv.shared.{name}")
        threads = 0
        if info := by_name.get(f".nv.info.{name}"):
            for attribute, payload in _attributes(cubin, info):
                if attribute in (_MAX_THREADS, _REQNTID) and len(payload) >= 12:
                    x, y, z = struct.unpack_from("<III", payload)
                    threads = x * y * z
        stack = max(pairs.get((_FRAME_SIZE, name), 0), pairs.get((_MIN_STACK_SIZE, name), 0))
        yield KernelResources(
            name=name,
            registers=pairs[_REGCOUNT, name],
            stack_bytes=stack,
            static_smem_bytes=smem.size if smem else 0,
            code_bytes=text.size if text else 0,
            threads=threads,
        )


def _attributes(cubin: bytes, section: _Section) -> Iterator[tuple[int, bytes]]:
    at, end = section.offset, section.offset + section.size
    while at + 4 <= end:
        form, attribute, value = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form == _FORM_SIZED:
            yield attribute, cubin[at : at + value]
            at += value
