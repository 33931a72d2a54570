"""A wheel contains the CPU kernels, compiled for the instruction sets of this machine's architecture.

Everything else is in pyproject.toml. Without a C++ compiler the wheel has no compiled kernels and runs on any
architecture; so does an editable installation. The variable REDLINE_PREBUILT_ISAS selects instruction sets
(`avx2,avx512`; empty: none).
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from engine.kernels.cpu import build


def isas_to_prebuild() -> list[str]:
    """The instruction sets that the variable selects, or all of this architecture."""
    selected = os.environ.get("REDLINE_PREBUILT_ISAS")
    isas = build.isas_of_architecture()
    if selected is None:
        return isas
    unknown = set(filter(None, selected.split(","))) - set(isas)
    if unknown:
        raise SystemExit(f"REDLINE_PREBUILT_ISAS: {', '.join(sorted(unknown))}; known here are {', '.join(isas)}")
    return [isa for isa in isas if isa in selected.split(",")]


class BuildWithKernels(build_py):
    """Adds the compiled kernels to the packages of a wheel."""

    @property
    def kernels(self) -> Path:
        return Path(self.build_lib, *build.__name__.split(".")[:-1], build.PREBUILT)

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(self.kernels, ignore_errors=True)  # of an earlier build
        for isa, error in build.prebuild(isas_to_prebuild(), self.kernels).items():
            self.warn(f"the wheel has no kernels for {isa}: {error}")


class Wheel(bdist_wheel):
    """With compiled kernels a wheel is for one platform, and for any version of Python, which they don't use."""

    def run(self) -> None:
        self.run_command("build")
        compiled = any(self.get_finalized_command("build_py").kernels.glob("*.so"))
        self.root_is_pure = not compiled
        # By this, `install` chooses the part of the wheel for one platform.
        self.distribution.has_ext_modules = lambda: compiled
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return self.python_tag, "none", platform


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": Wheel})
