"""Builds dampr._C, the C++ kernels, with ninja and without torch. Everything else about the package is in
pyproject.toml.

The extension is optional: without a working C++ compiler the result is a pure Python package, and the build says so.
The kernels are compiled once per instruction set, each with flags of its own; which one runs is decided when it is
loaded, so a wheel fits every processor.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS, BINDINGS, ISA = "csrc/kernels.cpp", "csrc/bindings.cpp", "csrc/isa.cpp"
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h"))

COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Every product and sum is rounded on its own, or zero patterns would differ from the reference;
# the other two let loops become vector code.
KERNEL_FLAGS = ["-O3", "-fno-exceptions", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# What only old processors run of a build for several is compiled in three quarters of the time.
BASELINE_OF_SEVERAL = ["-O2"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": AVX2_FLAGS,
    "avx512": [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
OPENMP_PROBE = "#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"


class CompilerMissingError(Exception):
    """There is no C++ compiler that can build an extension; the text says why."""


def first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line.lower()), lines[0])


class Toolchain:
    """The C++ compiler and the flags it was seen to accept.

    Raises CompilerMissingError unless it builds a small extension module.
    """

    def __init__(self) -> None:
        import pybind11

        self.compiler = self.find_compiler()
        self.includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        self.link_flags = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        reason = self.failure("#include <Python.h>\n#include <cstdint>\nint probe() { return 0; }\n", self.includes)
        if reason:
            raise CompilerMissingError(f"{' '.join(self.compiler)} cannot build an extension module: {reason}")
        self.openmp = ["-fopenmp"] if not self.failure(OPENMP_PROBE, ["-fopenmp"]) else []
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        names = ISA_FLAGS if x86 else ["baseline"]
        self.isas = [isa for isa in names if not self.failure("int probe() { return 0; }\n", ISA_FLAGS[isa])]

    @staticmethod
    def find_compiler() -> list[str]:
        if os.name == "nt":
            raise CompilerMissingError(
                "the C++ kernels are written for gcc and clang, which are not looked for on Windows"
            )
        if os.environ.get("CXX"):
            return shlex.split(os.environ["CXX"])
        for command in (sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"):
            words = shlex.split(command)
            if words and shutil.which(words[0]):
                return words
        raise CompilerMissingError("no C++ compiler (c++, g++, clang++) on PATH")

    def failure(self, source: str, flags: list[str]) -> str:
        """Why the compiler does not make a shared object of this source, or an empty string if it does."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.cpp")
            path.write_text(source)
            command = [
                *self.compiler,
                "-std=c++17",
                "-fPIC",
                *flags,
                *self.link_flags,
                str(path),
                "-o",
                str(path.with_suffix(".so")),
            ]
            try:
                run = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                return str(error)
        return first_error(run.stderr) + f" (exit status {run.returncode})" if run.returncode else ""

    def compile_steps(self, folder: Path) -> list[tuple[Path, Path, list[str]]]:
        """(object, source, flags) of every file to compile."""
        common = [*shlex.split(os.environ.get("CXXFLAGS", "")), *COMMON_FLAGS, *(self.openmp or ["-fopenmp-simd"])]
        have = [f"-DDAMPR_HAVE_{isa.upper()}" for isa in self.isas if isa != "baseline"]
        steps = [
            (folder / "bindings.o", ROOT / BINDINGS, [*common, "-O2", *self.includes]),
            (folder / "isa.o", ROOT / ISA, [*common, "-O2", *have]),
        ]
        for isa in self.isas:
            define = [f"-DDAMPR_ISA={isa}", f"-DDAMPR_{isa.upper()}"]
            level = BASELINE_OF_SEVERAL if isa == "baseline" and len(self.isas) > 1 else []
            flags = [*common, *KERNEL_FLAGS, *level, *define, *ISA_FLAGS[isa]]
            steps.append((folder / f"kernels_{isa}.o", ROOT / KERNELS, flags))
        return steps

    def link_command(self, objects: list[Path], target: Path) -> list[str]:
        flags = [*self.link_flags, *self.openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]
        return [*self.compiler, *flags, *map(str, objects), "-o", str(target)]

    def build(self, folder: Path, target: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        steps = self.compile_steps(folder)
        ninja = find_ninja()
        if ninja:
            (folder / "build.ninja").write_text(self.ninja_file(steps, target))
            subprocess.run([ninja, "-C", str(folder)], check=True)
            return
        for output, source, flags in steps:
            subprocess.run([*self.compiler, *flags, "-c", str(source), "-o", str(output)], check=True)
        subprocess.run(self.link_command([output for output, _, _ in steps], target), check=True)

    def ninja_file(self, steps: list[tuple[Path, Path, list[str]]], target: Path) -> str:
        def quoted(path: Path) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        def command(words: list[str]) -> str:
            return shlex.join(words).replace("$", "$$")

        # In and out are spelled out in each command: ninja would not quote their names the way a shell needs it. Which
        # headers a file includes the compiler tells ninja, in the depfile.
        lines = ["ninja_required_version = 1.5"]
        for output, source, flags in steps:
            depfile = output.with_suffix(".d")
            words = [*self.compiler, "-MMD", "-MF", str(depfile), *flags, "-c", str(source), "-o", str(output)]
            lines += [
                f"rule compile_{output.stem}",
                f"  command = {command(words)}",
                f"  depfile = {quoted(depfile)}",
                "  deps = gcc",
            ]
            lines += [f"build {quoted(output)}: compile_{output.stem} {quoted(source)}"]
        objects = [output for output, _, _ in steps]
        lines += ["rule link", f"  command = {command(self.link_command(objects, target))}"]
        lines += [f"build {quoted(target)}: link {' '.join(map(quoted, objects))}", f"default {quoted(target)}", ""]
        return "\n".join(lines)


def find_ninja() -> str | None:
    """The ninja of the build environment's package, else one on PATH, else None."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    packaged = Path(ninja.BIN_DIR, "ninja")
    return str(packaged) if packaged.exists() else shutil.which("ninja")


def warn_pure(reason: str) -> None:
    line = "*" * 100
    print(
        f"{line}\nWARNING: dampr is built WITHOUT its C++ kernels: {reason}.\n"
        "The package works; on the CPU it uses plain PyTorch, which is slower. dampr.backend_info() says so too.\n"
        + line,
        file=sys.stderr,
    )


class NinjaBuildExt(build_ext):
    """Builds the one extension module there is with :class:`Toolchain`."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            Toolchain().build(Path(self.build_temp, "csrc").resolve(), target)
        except (CompilerMissingError, OSError, subprocess.CalledProcessError) as error:
            warn_pure(f"compiling csrc/ failed ({error})")


def extensions() -> list[Extension]:
    """The extension module, or none if it cannot be built; only commands that build look for a compiler."""
    building = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"} & set(sys.argv[1:])
    if building:
        try:
            Toolchain()
        except (CompilerMissingError, ImportError) as error:
            warn_pure(str(error))
            return []
    return [Extension("dampr._C", sources=[BINDINGS, ISA, KERNELS], depends=HEADERS, language="c++", optional=True)]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt})
