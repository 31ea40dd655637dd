"""Builds fastattn._native: every CPU kernel once per instruction set, everything else once. No torch at build time."""

import os
import platform
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

KERNELS = sorted(str(p) for p in Path("csrc/cpu").glob("*_kernels.cpp"))
DOORS = sorted(str(p) for p in Path("csrc").rglob("*.cpp") if str(p) not in KERNELS)
HEADERS = [p for p in Path("csrc").rglob("*.h") if p.parts[1] != "cuda"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
V3 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
V4 = [*V3, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISAS = {"baseline": []}
if X86:
    ISAS |= {"avx2": V3, "avx512": V4, "avx512_bf16": [*V4, "-mavx512bf16"]}
# A developer's short cut: build fewer of them (the baseline always).
CHOSEN = os.environ.get("FASTATTN_BUILD_ISAS", " ".join(ISAS)).split()
ISAS = {isa: flags for isa, flags in ISAS.items() if isa in CHOSEN or isa == "baseline"}
SANITIZE = os.environ.get("FASTATTN_SANITIZE", "").split()  # e.g. "-fsanitize=address,undefined -O1 -g1"
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", *SANITIZE]


class BuildNative(build_ext):
    def finalize_options(self):
        super().finalize_options()
        self.force = True  # compile_one decides what is fresh, headers included

    def build_extension(self, ext):
        macros = [(f"FASTATTN_HAS_{isa.upper()}", "1") for isa in ISAS]
        self.include = [pybind11.get_include(), "csrc", sysconfig.get_path("include")]
        self.headers_changed = max(p.stat().st_mtime for p in [*HEADERS, Path(__file__)])
        # Kernels of the widest instruction sets take longest: start them first.
        jobs = [
            (k, [*FLAGS, *flags], [*macros, ("FASTATTN_ISA", isa)], isa) for isa, flags in ISAS.items() for k in KERNELS
        ]
        jobs = [*reversed(jobs), *((d, FLAGS, macros, "doors") for d in DOORS)]
        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
            objects = list(pool.map(self.compile_one, jobs))
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, libraries=["dl"], target_lang="c++", extra_postargs=SANITIZE)

    def compile_one(self, job):
        source, flags, macros, folder = job
        output = Path(self.build_temp) / folder
        built = output / Path(source).with_suffix(".o")
        if built.exists() and built.stat().st_mtime > max(self.headers_changed, Path(source).stat().st_mtime):
            return str(built)
        return self.compiler.compile(
            [source], output_dir=str(output), macros=macros, include_dirs=self.include, extra_postargs=flags
        )[0]


class BuildPython(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # compiled where they run; see fastattn/runtime/sources.py
            self.copy_tree("csrc/cuda", f"{self.build_lib}/fastattn/_csrc/cuda")


setup(
    ext_modules=[Extension("fastattn._native", DOORS + KERNELS, optional="FASTATTN_REQUIRE_NATIVE" not in os.environ)],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
