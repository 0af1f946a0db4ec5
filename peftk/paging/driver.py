"""The part of CUDA's driver API that paging uses, by ctypes from the library that the driver installs: nothing to link.

Every call raises DriverError with its name. Handles (context, stream, event) are integers.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import weakref
from collections.abc import Iterator
from functools import cache

OUT_OF_MEMORY = 2
REFUSALS = (1, OUT_OF_MEMORY, 101, 801)  # invalid value, out of memory, invalid device, not supported: the call alone failed
_CONCURRENT_MANAGED_ACCESS = 89  # CUdevice_attribute
_ATTACH_GLOBAL, _NON_BLOCKING, _DISABLE_TIMING, _PORTABLE_AND_MAPPED = 1, 1, 2, 1 | 2
PREFERRED_LOCATION, ACCESSED_BY = 3, 5  # CUmem_advise
HOST = -1  # CU_DEVICE_CPU

_pointer, _size, _int, _uint, _handle = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", _int), ("id", _int))

    @classmethod
    def of(cls, device: int) -> _Location:
        return cls(2, 0) if device == HOST else cls(1, device)


_SIGNATURES = {
    "cuGetErrorString": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuCtxGetCurrent": (ctypes.POINTER(_handle),),
    "cuCtxPushCurrent_v2": (_handle,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(_handle),),
    "cuCtxSynchronize": (),
    "cuDeviceGetAttribute": (ctypes.POINTER(_int), _int, _int),
    "cuMemAllocManaged": (ctypes.POINTER(_pointer), _size, _uint),
    "cuMemAlloc_v2": (ctypes.POINTER(_pointer), _size),
    "cuMemFree_v2": (_pointer,),
    "cuMemHostAlloc": (ctypes.POINTER(_handle), _size, _uint),
    "cuMemHostGetDevicePointer_v2": (ctypes.POINTER(_pointer), _handle, _uint),
    "cuMemFreeHost": (_handle,),
    "cuMemcpyAsync": (_pointer, _pointer, _size, _handle),
    "cuMemsetD8Async": (_pointer, ctypes.c_ubyte, _size, _handle),
    "cuMemAdvise": (_pointer, _size, _int, _int),
    "cuMemAdvise_v2": (_pointer, _size, _int, _Location),
    "cuMemPrefetchAsync": (_pointer, _size, _int, _handle),
    "cuMemPrefetchAsync_v2": (_pointer, _size, _Location, _uint, _handle),
    "cuStreamCreate": (ctypes.POINTER(_handle), _uint),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamWaitEvent": (_handle, _handle, _uint),
    "cuEventCreate": (ctypes.POINTER(_handle), _uint),
    "cuEventRecord": (_handle, _handle),
    "cuEventDestroy_v2": (_handle,),
}


class DriverError(RuntimeError):
    """A call of the driver failed; ``code`` is its CUresult."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call}: {text} (CUDA error {code})")
        self.code = code


class Event:
    """A point in a stream; destroyed with the object, which the driver allows while it is pending."""

    def __init__(self, driver: Driver) -> None:
        self.handle = driver.made("cuEventCreate", _handle, _DISABLE_TIMING)
        weakref.finalize(self, driver.call, "cuEventDestroy_v2", self.handle).atexit = False


class Driver:
    """The library at ``path``, used in the context that is current when this is made."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        # Drivers from 12.2 on have both; CUDA 13's headers name the second one without its suffix.
        self._takes_locations = hasattr(self._library, "cuMemPrefetchAsync_v2")
        self._context = self.made("cuCtxGetCurrent", _handle)

    def call(self, name: str, *arguments: object) -> None:
        function = getattr(self._library, name)
        function.argtypes, function.restype = _SIGNATURES[name], _int
        if code := function(*arguments):
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise DriverError(name, code, (text.value or b"unknown").decode())

    def made(self, name: str, kind: type, *arguments: object) -> int:
        """What the call writes to its first argument."""
        result = kind()
        self.call(name, ctypes.byref(result), *arguments)
        return result.value or 0

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The calls inside, from any thread, are made in this driver's context."""
        self.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.made("cuCtxPopCurrent_v2", _handle)

    def has_concurrent_access(self, device: int) -> bool:
        """Whether host and GPU may use managed memory at the same time: not so on Windows and WSL."""
        return bool(self.made("cuDeviceGetAttribute", _int, _CONCURRENT_MANAGED_ACCESS, device))

    def managed(self, nbytes: int) -> int:
        return self.made("cuMemAllocManaged", _pointer, nbytes, _ATTACH_GLOBAL)

    def on_device(self, nbytes: int) -> int:
        return self.made("cuMemAlloc_v2", _pointer, nbytes)

    def pinned(self, nbytes: int) -> tuple[int, int]:
        """Host memory that the GPU can reach: its address on the host, and for the GPU."""
        host = self.made("cuMemHostAlloc", _handle, nbytes, _PORTABLE_AND_MAPPED)
        return host, self.made("cuMemHostGetDevicePointer_v2", _pointer, host, 0)

    def free(self, address: int, call: str = "cuMemFree_v2") -> None:
        """After all work in the context, since work that uses it may be under way; from any thread."""
        with self.context():
            self.call("cuCtxSynchronize")
            self.call(call, address)

    def advise(self, address: int, nbytes: int, advice: int, device: int) -> None:
        if self._takes_locations:
            self.call("cuMemAdvise_v2", address, nbytes, advice, _Location.of(device))
        else:
            self.call("cuMemAdvise", address, nbytes, advice, device)

    def prefetch(self, address: int, nbytes: int, device: int, stream: int) -> None:
        if self._takes_locations:
            self.call("cuMemPrefetchAsync_v2", address, nbytes, _Location.of(device), 0, stream)
        else:
            self.call("cuMemPrefetchAsync", address, nbytes, device, stream)

    def stream(self) -> int:
        """One that does not wait for the default stream."""
        return self.made("cuStreamCreate", _handle, _NON_BLOCKING)

    def record(self, stream: int) -> Event:
        event = Event(self)
        self.call("cuEventRecord", event.handle, stream)
        return event

    def stream_waits(self, stream: int, event: Event) -> None:
        self.call("cuStreamWaitEvent", stream, event.handle, 0)


class Block:
    """Keeps a piece of the driver's memory; frees it by ``call`` when the last tensor over it is gone."""

    def __init__(self, driver: Driver, address: int, call: str = "cuMemFree_v2") -> None:
        self.address = address
        weakref.finalize(self, driver.free, address, call).atexit = False


@cache
def installed_driver(device: int) -> Driver:
    """The system's, in torch's context of that device. RuntimeError where there is none."""
    import torch

    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    with torch.cuda.device(device):
        torch.zeros(1, device=f"cuda:{device}")  # makes torch's context the current one
        try:
            return Driver(name)
        except OSError as error:
            raise RuntimeError(f"paging on cuda:{device} needs NVIDIA's driver library: {error}") from error
