"""What runs on this machine, what doesn't, and why not."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

import torch

from peftk import replaced
from peftk.native import native, why_not_native
from peftk.ops import gpu
from peftk.version import VERSION


@dataclass(frozen=True)
class Info:
    """``print(peftk.info())`` shows it; the fields are for programs."""

    versions: dict[str, str]
    native: bool
    why_not_native: str
    cpu_tiers: list[str]  # instruction sets that this processor runs, slowest first
    cpu_tier: str | None  # the one in use
    why_not_tiers: dict[str, str]  # those that don't run here
    threads: str  # where CPU kernels take their threads from
    cuda: bool  # whether CUDA kernels run: they are in this build, and it sees a device
    why_not_cuda: str
    triton: bool  # whether Triton kernels run
    why_not_triton: str
    devices: list[str] = field(default_factory=list)
    hooks: dict[str, str] = field(default_factory=dict)  # what happens to packages of which nothing is replaced, and its switch
    replaced: dict[str, tuple[str, ...]] = field(default_factory=dict)  # functions and kernels of other packages, by package
    left: dict[str, dict[str, str]] = field(default_factory=dict)  # those that were asked for and stay as they were: why

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {number}" for name, number in self.versions.items())]
        lines.append("reference  runs everywhere, slow")
        if self.native:
            others = [tier for tier in self.cpu_tiers if tier != self.cpu_tier]
            also = f" (also: {', '.join(others)})" if others else ""
            count = torch.get_num_threads()
            missing = "".join(f"; {tier} does not run: {reason}" for tier, reason in list(self.why_not_tiers.items())[:1])
            lines.append(f"cpu        {self.cpu_tier}{also}; threads: {self.threads}, {count} of them{missing}")
        else:
            lines.append(f"cpu        does not run: {self.why_not_native}")
        lines.append(f"cuda       {', '.join(self.devices) if self.cuda else 'does not run: ' + self.why_not_cuda}")
        lines.append(f"triton     {'runs where CUDA kernels do not' if self.triton else 'does not run: ' + self.why_not_triton}")
        lines += [f"{package:<10} {text}" for package, text in self.hooks.items()]
        for package, names in self.replaced.items():
            lines += [f"in {package} peftk stands in for:", *(f"  {name}" for name in names)]
        for package, reasons in self.left.items():
            lines += [f"in {package} stays as it was:", *(f"  {name}: {reason}" for name, reason in reasons.items())]
        return "\n".join(lines)


def info() -> Info:
    """Facts about this installation; loads the native module, changes nothing."""
    module = native()
    devices = module.cuda_devices() if module and hasattr(module, "cuda_devices") else []
    why_not_cuda, why_not_triton = gpu.CudaDoor().why_not(), gpu.TritonDoor().why_not()
    return Info(
        versions={"peftk": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        native=module is not None,
        why_not_native=why_not_native(),
        cpu_tiers=list(module.available_tiers()) if module else [],
        cpu_tier=module.tier() if module else None,
        why_not_tiers=dict(module.why_not_tiers()) if module else {},
        threads=module.thread_runtime if module else "torch's own",
        cuda=not why_not_cuda,
        why_not_cuda=why_not_cuda,
        triton=not why_not_triton,
        why_not_triton=why_not_triton,
        devices=devices,
        hooks=replaced.hooks(),
        replaced=replaced.listed(),
        left=replaced.left(),
    )
