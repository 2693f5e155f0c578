"""Reads what ptxas left in a cubin: registers, stack, shared memory, code size of each kernel.

Pure Python and no CUDA tool, so it works wherever a kernel was compiled. A cubin is an ELF64 file;
the facts lie in its ``.nv.info`` sections as attribute records (format byte, attribute byte, then a
16-bit value or a sized payload) and in the sizes of ``.text.<kernel>`` and ``.nv.shared.<kernel>``.
The attribute numbers are those that ``cuobjdump -elf`` prints as ``EIATTR_*``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["EM_CUDA", "KernelUsage", "cubins_in", "kernel_usage"]

EM_CUDA = 190  # e_machine of a cubin

_FRAME_SIZE = 0x11  # payload: symbol index, bytes of local memory a thread's frame takes
_MIN_STACK_SIZE = 0x12  # payload: symbol index, bytes
_REGCOUNT = 0x2F  # payload: symbol index, registers a thread
_REQNTID = 0x10  # payload: three dimensions of the required block
_SVAL = 0x04  # format: a 16-bit payload size follows; formats 1 to 3 hold their value in 16 bits


@dataclass(frozen=True, kw_only=True)
class KernelUsage:
    """What one kernel takes on the device.

    Attributes:
        name: symbol of the kernel.
        registers: 32-bit registers a thread.
        stack_bytes: local memory a thread's frame takes: spills and indexed arrays; 0 is the aim.
        static_smem_bytes: shared memory fixed at compile time; the launch may ask for more.
        code_bytes: size of the machine code.
        threads: threads of a CTA the kernel was compiled for; 0 where it was not fixed.
    """

    name: str
    registers: int
    stack_bytes: int
    static_smem_bytes: int
    code_bytes: int
    threads: int


def kernel_usage(cubin: bytes) -> tuple[KernelUsage, ...]:
    """The resource usage of every kernel in a cubin, sorted by symbol.

    Raises:
        ValueError: these bytes are not a cubin.
    """
    elf = _Elf(cubin)
    registers: dict[str, int] = {}
    stack: dict[str, int] = {}
    threads: dict[str, int] = {}
    for name, data in elf.sections.items():
        if not name.startswith(".nv.info"):
            continue
        for attribute, payload in _attributes(data):
            if attribute in (_REGCOUNT, _FRAME_SIZE, _MIN_STACK_SIZE):
                symbol, value = struct.unpack_from("<II", payload)
                table = registers if attribute == _REGCOUNT else stack
                kernel = elf.symbols[symbol]
                table[kernel] = max(table.get(kernel, 0), value)
            elif attribute == _REQNTID:
                x, y, z = struct.unpack_from("<III", payload)
                threads[name.removeprefix(".nv.info.")] = x * y * z
    found = []
    for section, data in elf.sections.items():
        if section.startswith(".text."):
            kernel = section.removeprefix(".text.")
            found.append(
                KernelUsage(
                    name=kernel,
                    registers=registers.get(kernel, 0),
                    stack_bytes=stack.get(kernel, 0),
                    static_smem_bytes=elf.sizes.get(f".nv.shared.{kernel}", 0),
                    code_bytes=len(data),
                    threads=threads.get(kernel, 0),
                )
            )
    return tuple(sorted(found, key=lambda usage: usage.name))


def cubins_in(blob: bytes) -> list[bytes]:
    """Every cubin that lies uncompressed in ``blob``, for example in a layer's shared library."""
    found, at = [], blob.find(b"\x7fELF")
    while at >= 0:
        if blob[at + 18 : at + 20] == struct.pack("<H", EM_CUDA):
            end = at + _elf_end(blob[at:])
            found.append(blob[at:end])
        at = blob.find(b"\x7fELF", at + 4)
    return found


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        kind, attribute, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind == _SVAL:
            yield attribute, data[at : at + value]
            at += value
        else:
            yield attribute, data[at - 2 : at]


def _elf_end(blob: bytes) -> int:
    """End of the section and program header tables: the last things in a cubin."""
    phoff, shoff = struct.unpack_from("<QQ", blob, 32)
    phentsize, phnum, shentsize, shnum = struct.unpack_from("<HHHH", blob, 54)
    return int(max(phoff + phentsize * phnum, shoff + shentsize * shnum))


class _Elf:
    """Sections and symbol names of a little-endian ELF64 file."""

    def __init__(self, blob: bytes) -> None:
        if blob[:6] != b"\x7fELF\x02\x01" or len(blob) < 64:
            raise ValueError("not an ELF64 file")
        machine = struct.unpack_from("<H", blob, 18)[0]
        if machine != EM_CUDA:
            raise ValueError(f"an ELF file for machine {machine}, not a cubin ({EM_CUDA})")
        (shoff,) = struct.unpack_from("<Q", blob, 40)
        shentsize, shnum, shstrndx = struct.unpack_from("<HHH", blob, 58)
        try:
            headers = [
                struct.unpack_from("<IIQQQQII", blob, shoff + i * shentsize) for i in range(shnum)
            ]
            names = self._bytes(blob, headers[shstrndx])
        except (struct.error, IndexError):
            raise ValueError("a cubin that was cut short") from None
        self.sections: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.symbols: list[str] = []
        for header in headers:
            name = _text(names, header[0])
            self.sizes[name] = header[5]
            self.sections[name] = self._bytes(blob, header)
            if header[1] == 2:  # SHT_SYMTAB; its link is the string table
                strings = self._bytes(blob, headers[header[6]])
                table = self.sections[name]
                for at in range(0, len(table) - 23, 24):
                    self.symbols.append(_text(strings, struct.unpack_from("<I", table, at)[0]))

    @staticmethod
    def _bytes(blob: bytes, header: tuple[int, ...]) -> bytes:
        if header[1] == 8:  # SHT_NOBITS has a size and no bytes
            return b""
        return blob[header[4] : header[4] + header[5]]


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode("utf-8", "replace")
