"""The GPU as the benches see it: a clock on the current stream, an L2 to empty, graphs, and the facts that figures depend on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

HOLD_CYCLES = 4_000_000  # some 2 ms: longer than Python needs to queue a training step of a layer
UNKNOWN = "unknown"
FACTS = {
    "driver": "driver_version",
    "power_cap_w": "power.limit",
    "max_sm_clock_mhz": "clocks.max.sm",
}  # column: nvidia-smi's name
LEAST_FLUSH = 2**26  # bytes, should a driver tell no L2
READINGS = 3  # of the SM clock, while a case's work runs


class Event(Protocol):
    """A mark on a stream, as torch.cuda.Event."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...  # ms


class Device(Protocol):
    """What timing needs of a GPU."""

    place: torch.device
    implementations: tuple[str, ...]  # of peftk, as in peftk.use, that are timed
    name: str  # of the results' file
    isa: str
    l2: int  # bytes

    def event(self) -> Event: ...
    def flush(self) -> None: ...
    def hold(self) -> None: ...
    def synchronise(self) -> None: ...
    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]: ...
    def facts(self) -> dict[str, str]: ...
    def clock_under(self, run: Callable[[], Any]) -> str: ...


class NoGpu(Exception):
    """There is no GPU to time on; the message is one line and says why."""


class Gpu:
    """The current CUDA device. NoGpu where there is none."""

    implementations = ("cuda", "triton")

    def __init__(self) -> None:
        if why := why_no_gpu():
            raise NoGpu(why)
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.place = torch.device("cuda", torch.cuda.current_device())
        self.name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
        self.isa = f"sm_{properties.major}{properties.minor}"
        self.l2 = properties.L2_cache_size
        self._smi = NvidiaSmi(f"GPU-{properties.uuid}")
        count = max(2 * self.l2, LEAST_FLUSH) // 4
        self._written, self._read = (torch.zeros(count, device=self.place) for _ in range(2))

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def flush(self) -> None:
        """Leave nothing of earlier work in L2, and no dirty line whose write-back the next call would pay for: write more than
        L2 holds, then read as much of something else."""
        self._written.zero_()
        self._read.sum()

    def hold(self) -> None:
        """Keep the stream busy until the call to time is queued: its events then enclose GPU work without gaps for Python."""
        torch.cuda._sleep(HOLD_CYCLES)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.place)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return capture(run)

    def facts(self) -> dict[str, str]:
        return {"cuda": torch.version.cuda or UNKNOWN} | {column: self._smi.ask(query) for column, query in FACTS.items()}

    def clock_under(self, run: Callable[[], Any]) -> str:
        """The SM clock in MHz while ``run`` is repeated: "1410", or "1200-1410" where it moved."""

        def once() -> None:
            run()
            self.synchronise()

        return span([self._smi.ask_while("clocks.sm", once) for _ in range(READINGS)])


def capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as a CUDA graph: a call replays it and returns what run returned, written anew. RuntimeError for whatever can't be
    captured: a wait for the GPU, an allocation past torch's allocator, another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # what is made at a first call is made outside of the graph
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


class NvidiaSmi:
    """nvidia-smi for one GPU; "unknown" for whatever it doesn't tell, and where it isn't installed."""

    def __init__(self, gpu: str, program: str | None = None) -> None:
        self.gpu, self.program = gpu, program or shutil.which("nvidia-smi")

    def ask(self, query: str) -> str:
        return self.ask_while(query, lambda: time.sleep(0.005))

    def ask_while(self, query: str, work: Callable[[], Any]) -> str:
        """The answer, with ``work`` repeated until it is there."""
        if self.program is None:
            return UNKNOWN
        command = [self.program, "-i", self.gpu, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asked:
            work()
            while asked.poll() is None:
                work()
            answer = asked.stdout.read().strip()
        return answer if asked.returncode == 0 and answer and not answer.startswith("[") else UNKNOWN  # "[N/A]"


def span(readings: Sequence[str]) -> str:
    """Several readings as one cell: "1410", "1200-1410", "unknown" where there is none."""
    numbers = sorted({int(reading) for reading in readings if reading != UNKNOWN})
    return "-".join(str(number) for number in numbers[:1] + numbers[1:][-1:]) or UNKNOWN


def why_no_gpu() -> str:
    """Why torch can use no GPU in this process; empty where it can."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return f"torch {torch.__version__}: {str(error).splitlines()[0]}"
    if torch.cuda.device_count() == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"torch {torch.__version__} sees no device" + (f" (CUDA_VISIBLE_DEVICES={hidden!r})" if hidden is not None else "")
    return ""
