"""Codes of a few bits, one a byte, to packed bytes and back, compiled by numba.

Codes that lie side by side in a wide number are drawn together by twos, or apart by halves; numbers are little-endian.
"""

from numpy import uint8 as u8
from numpy import uint16 as u16
from numpy import uint32 as u32
from numpy import uint64 as u64

from lowbit_optim.kernels.cpu import Array, inline


@inline
def pack(codes: Array, bits: int, packed: Array) -> None:
    """Codes, and zeros behind the last, to as many bytes as there are in ``packed``."""
    size = len(packed)
    if bits == 8:
        for i in range(size):
            packed[i] = codes[i]
    elif bits == 4:
        pairs = codes.view(u16)
        for i in range(size):
            x = u32(pairs[i])
            packed[i] = u8(u32(x | u32(x >> u32(4))))
    elif bits == 2:
        fours = codes.view(u32)
        for i in range(size):
            x = u32(fours[i])
            x = u32(x | u32(x >> u32(6)))
            packed[i] = u8(u32(x | u32(x >> u32(12))))
    else:  # to words of 3 bytes
        words = size // 3
        for word in range(words):
            x = _drawn_together(codes, bits, word)
            for j in range(3):
                packed[3 * word + j] = u8(x >> u32(8 * j))
        if 3 * words < size:
            x = _drawn_together(codes, bits, words)
            for j in range(size - 3 * words):
                packed[3 * words + j] = u8(x >> u32(8 * j))


@inline
def _drawn_together(codes: Array, bits: int, word: int) -> u32:
    """Eight codes of 3 bits or four of 6, in the lowest 24 bits."""
    if bits == 3:
        y = codes.view(u64)[word]
        y = (y | y >> u64(5)) & u64(0x003F003F003F003F)
        y = (y | y >> u64(10)) & u64(0x00000FFF00000FFF)
        return u32(y | y >> u64(20))
    x = u32(codes.view(u32)[word])
    x = u32(u32(x & u32(0x003F003F)) | u32(u32(x >> u32(2)) & u32(0x0FC00FC0)))
    return u32(u32(x & u32(0x0FFF)) | u32(u32(x >> u32(4)) & u32(0xFFF000)))


@inline
def unpack(packed: Array, bits: int, codes: Array) -> None:
    """Packed codes of 2, 3 or 6 bits to codes; whole words are written."""
    size = len(packed)
    if bits == 2:
        fours = codes.view(u32)
        for i in range(size):
            x = u32(packed[i])
            x = u32(u32(x | u32(x << u32(12))) & u32(0x000F000F))
            fours[i] = u32(u32(x | u32(x << u32(6))) & u32(0x03030303))
    else:  # from words of 3 bytes
        words = size // 3
        for word in range(words):
            x = u32(0)
            for j in range(3):
                x = u32(x | u32(u32(packed[3 * word + j]) << u32(8 * j)))
            _draw_apart(x, bits, codes, word)
        if 3 * words < size:
            x = u32(0)
            for j in range(size - 3 * words):
                x = u32(x | u32(u32(packed[3 * words + j]) << u32(8 * j)))
            _draw_apart(x, bits, codes, words)


@inline
def _draw_apart(x: u32, bits: int, codes: Array, word: int) -> None:
    """The lowest 24 bits to eight codes of 3 bits or four of 6."""
    if bits == 3:
        y = u64(x)
        y = (y | y << u64(20)) & u64(0x00000FFF00000FFF)
        y = (y | y << u64(10)) & u64(0x003F003F003F003F)
        codes.view(u64)[word] = (y | y << u64(5)) & u64(0x0707070707070707)
    else:
        x = u32(u32(x & u32(0x0FFF)) | u32(u32(x & u32(0xFFF000)) << u32(4)))
        codes.view(u32)[word] = u32(u32(x & u32(0x003F003F)) | u32(u32(x & u32(0x0FC00FC0)) << u32(2)))
