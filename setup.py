"""Builds peftk._C with CMake and ninja. A build that fails never fails the install: the reason goes to peftk/_native_build.txt,
which peftk.info() shows, and the reference implementation runs."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
REPORT = "_native_build.txt"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        in_source = self.inplace or getattr(self, "editable_mode", False)
        report = (ROOT / "peftk" if in_source else module.parent) / REPORT
        try:
            self.build_native(module.parent)
            report.write_text("built")
        except (OSError, subprocess.CalledProcessError, RuntimeError, ImportError) as error:
            reason = f"the native build failed: {error}"
            report.write_text(reason)
            print(f"peftk: {reason}\npeftk: the install goes on with the reference implementation", file=sys.stderr)

    def build_native(self, destination: Path) -> None:
        if sys.platform in ("win32", "darwin"):
            raise RuntimeError(f"no native kernels for {sys.platform} yet")
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = [
            "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
            *(f"-UPEFTK_{option}" for option in ("CUDA", "GPUS", "TIERS", "SANITIZE")),  # an earlier build's are forgotten
            *os.environ.get("PEFTK_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *options], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


def version() -> str:
    """peftk/version.py's, and behind it what a wheel is for, as torch has it: PEFTK_VERSION_LABEL=cu130 makes 0.1.0+cu130."""
    label = os.environ.get("PEFTK_VERSION_LABEL", "")
    return runpy.run_path(str(ROOT / "peftk" / "version.py"))["VERSION"] + (f"+{label}" if label else "")


setup(
    version=version(),
    # bitsandbytes loads peftk_bitsandbytes: a package of its own, which can be imported where peftk can't
    packages=[*find_packages(include=["peftk", "peftk.*"]), "peftk_bitsandbytes"],
    package_dir={"peftk_bitsandbytes": "peftk/integrations/bitsandbytes/entry"},
    ext_modules=[Extension("peftk._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
