"""The hash of a file, at the speed of its disk."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path

import xxhash

READ_BYTES = 1 << 22
MADV_POPULATE_READ = 22  # of Linux 5.14 and later, in its mman.h


def file_hash(path: Path, *, again: bool = True) -> str:
    """XXH3, 128 bits, hexadecimal: it notices damage as a cryptographic hash would, and is faster than any disk. A file
    that nobody reads ``again`` soon is read past the kernel's cache, where it can be: it pushes nothing out, and takes
    a third of the processor's time. Raises OSError."""
    if not again and (hashed := _hash_past_cache(path)) is not None:
        return hashed
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if not size or not _hash_mapped(digest, file.fileno(), size):
            block = bytearray(READ_BYTES)
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def _hash_past_cache(path: Path) -> str | None:
    """None on a system or a disk that reads through its cache only, or cannot give a whole block at once."""
    if not hasattr(os, "O_DIRECT"):
        return None
    digest = xxhash.xxh3_128()
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            size = os.fstat(file).st_size
            with mmap.mmap(-1, READ_BYTES) as block:  # such reads go to whole pages
                for start in range(0, size, READ_BYTES):
                    count = os.preadv(file, [block], start)
                    if count != min(READ_BYTES, size - start):
                        return None
                    with memoryview(block)[:count] as read:
                        digest.update(read)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    return digest.hexdigest()


def _hash_mapped(digest: xxhash.xxh3_128, file: int, size: int) -> bool:
    """Adds the whole file to ``digest`` where it lies in the kernel's cache: copying it from there, as reading does,
    takes longer than hashing it. False, with nothing added, where the kernel cannot say beforehand that a page
    cannot be read: to find that out by touching it would kill the process."""
    if sys.platform != "linux":
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    # Private and writable, since ctypes gives the address of nothing else; it is only read.
    with mmap.mmap(file, size, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.addressof(first)
        del first  # a mapping that is pointed to cannot be closed
        for start in range(0, size, READ_BYTES):
            count = min(READ_BYTES, size - start)
            # Through ctypes, which lets other threads run while the disk is waited for; mmap's own madvise does not.
            place = ctypes.c_void_p(address + start), ctypes.c_size_t(count)
            if madvise(*place, MADV_POPULATE_READ):
                if start == 0 and ctypes.get_errno() == errno.EINVAL:
                    return False
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            with memoryview(mapped)[start : start + count] as block:
                digest.update(block)
            madvise(*place, mmap.MADV_DONTNEED)
    return True
