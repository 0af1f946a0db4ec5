"""Memory: sizes for people, and malloc's habits."""

import subprocess
import sys

import pytest

from peftk.cli.process_memory import readable

FAULTS = """
import ctypes, resource, sys
from peftk.cli.process_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    raise SystemExit(77)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 8 << 20
for _ in range(9):
    blocks = [libc.malloc(ctypes.c_size_t(size)) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
    before, last = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, locals().get("before", 0)
print(before - last)
"""


def test_sizes_for_people():
    assert [readable(n) for n in (None, 999, 86_400_000, 2_100_000_000)] == ["?", "999 B", "86.4 MB", "2.10 GB"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_kept_memory_is_not_faulted_in_again():
    def faults(what: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True)
        if done.returncode == 77:
            pytest.skip("this C library has no mallopt")
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert faults("keep") < 100 < faults("as it is")
