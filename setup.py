# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled extensions; everything else about the package is in pyproject.toml.

``_C_cpu``   the kernels as torch operators (LibTorch stable ABI: one binary for torch >= 2.10)
``_native``  the same kernels on NumPy arrays (pybind11)
``_C_cuda``  the CUDA kernels as torch operators, where there are nvcc and a torch with CUDA

KDKERNELS_BUILD=0 builds none, =1 fails where the default would warn and go on without.
KDKERNELS_CUDA=0 and =1 say the same of _C_cuda alone.
KDKERNELS_DEBUG=1 adds assertions and debug information; KDKERNELS_SANITIZE=address,undefined
builds _native alone, for a sanitizer run.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
# Every kernel source is compiled once per level; csrc/kd/cpu/kernels.cpp chooses at run time.
ISA_LEVELS = {"baseline": (16, [])}
if X86:
    ISA_LEVELS["avx2"] = (32, ["-mavx2", "-mfma"])
    ISA_LEVELS["avx512"] = (
        64, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    )  # fmt: skip
# Said where the extension is not built. pip hides it (without -v); kdkernels info does not.
LOST = {
    "_C_cpu": "The plain-torch reference and the Triton kernels still work; for the CPU kernels, "
    "install torch >= 2.10 and a C++17 compiler and reinstall with --no-build-isolation.",
    "_native": "Only kdkernels.numpy needs it; for that, install pybind11 and a C++17 compiler and "
    "reinstall with --no-build-isolation.",
}
FAMILIES = sorted(path.name for path in (ROOT / "csrc/kd/cpu").iterdir() if path.is_dir())

# Machine code for these, and PTX of the last, of which the driver makes what is newer.
CUDA_TARGETS = ("80", "90")

DEBUG = os.environ.get("KDKERNELS_DEBUG") == "1"
SANITIZE = os.environ.get("KDKERNELS_SANITIZE", "")
COMPILE_ARGS = [
    "-std=c++17", "-O1" if SANITIZE else "-O3", "-ffp-contract=fast", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
    f"-ffile-prefix-map={ROOT}=.",
    *(["-g"] if DEBUG or SANITIZE else ["-g0", "-DNDEBUG"]),
    *([f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []),
]  # fmt: skip
LINK_ARGS = [f"-fsanitize={SANITIZE}"] if SANITIZE else ["-s"] if not DEBUG else []


def torch_extension() -> Extension:
    import torch
    from torch.utils import cpp_extension

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise RuntimeError(f"torch >= 2.10 is needed to build _C_cpu, found {torch.__version__}")
    return Extension(
        "kdkernels._C_cpu",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/torch").glob("*.cpp")),
        extra_compile_args=[f"-isystem{path}" for path in cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch", "torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
    )


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise RuntimeError("no nvcc in PATH or CUDA_HOME")
    return nvcc


def cuda_libraries(nvcc: str) -> list[str]:
    """Where nvcc itself looks for them: its own folder may be a script's, or a wheel's."""
    steps = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True,
                           text=True)  # fmt: skip
    return re.findall(r'"-L([^"]+)"', steps.stderr)


def cuda_extension() -> Extension:
    import torch

    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is built without CUDA")
    ext = torch_extension()
    ext.name = "kdkernels._C_cuda"
    ext.sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/torch/cuda").glob("*.cpp"))
    ext.define_macros.append(("USE_CUDA", None))  # declares the current stream
    # cudart is linked in: the binary then suits torch of any CUDA version that the driver knows.
    ext.library_dirs += cuda_libraries(find_nvcc())
    ext.libraries += ["torch_cuda", "cudart_static", "rt", "dl", "pthread"]
    return ext


def numpy_extension() -> Extension:
    import pybind11

    return Extension(
        "kdkernels._native",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/python").glob("*.cpp")),
        include_dirs=[pybind11.get_include()],
    )


class BuildKernels(build_ext):
    """Compiles the kernels once and links them into each extension; records what was built."""

    def run(self):
        # Extensions are resolved here, so that metadata needs neither torch nor pybind11.
        self.record = {"isa_levels": list(ISA_LEVELS), "extensions": {}, "platform": sys.platform}
        self.kernel_objects = None
        wanted = os.environ.get("KDKERNELS_BUILD", "auto")
        if wanted == "0":
            self.record["extensions"] = dict.fromkeys(
                ("_C_cpu", "_native", "_C_cuda"), "KDKERNELS_BUILD=0"
            )
            self.extensions = []
        if SANITIZE:
            self.extensions = [ext for ext in self.extensions if ext.name.endswith("_native")]
        super().run()
        in_tree = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "kdkernels" if in_tree else Path(self.build_lib, "kdkernels")
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(self.record, indent=1) + "\n")

    def build_extension(self, placeholder):
        name = placeholder.name.rpartition(".")[2]
        if name == "_C_cuda" and os.environ.get("KDKERNELS_CUDA") == "0":
            self.record["extensions"][name] = "KDKERNELS_CUDA=0"
            return
        try:
            ext = {
                "_C_cpu": torch_extension, "_native": numpy_extension, "_C_cuda": cuda_extension,
            }[name]()  # fmt: skip
            if name == "_C_cuda":
                ext.extra_objects = self.compile_cuda()
            else:
                if self.kernel_objects is None:
                    self.kernel_objects = self.compile_kernels()
                ext.extra_objects = self.kernel_objects
            ext.extra_compile_args += COMPILE_ARGS
            ext.extra_link_args = LINK_ARGS
            ext.depends = [str(p) for p in (ROOT / "csrc").rglob("*.*")]
            ext._needs_stub = False
            super().build_extension(ext)
        except Exception as error:
            demanded = "KDKERNELS_CUDA" if name == "_C_cuda" else "KDKERNELS_BUILD"
            if os.environ.get(demanded) == "1":
                raise
            self.record["extensions"][name] = f"not built: {error}"
            if name == "_C_cuda":  # few machines have what it takes, and Triton does the same
                return
            print(f"kdkernels: {name} was NOT built ({error}). {LOST[name]}", file=sys.stderr)
            return
        self.record["extensions"][name] = "built"
        if name == "_C_cpu":
            import torch

            self.record["torch"] = torch.__version__

    def compile_cuda(self) -> list[str]:
        nvcc = find_nvcc()
        targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in CUDA_TARGETS]
        targets.append("-gencode=arch=compute_{0},code=compute_{0}".format(CUDA_TARGETS[-1]))
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            out = folder / f"{source.stem}.o"
            options = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            options.append(f"--threads={len(targets)}")  # each takes up to a minute
            command = [nvcc, *options, *targets, "-c", str(source), "-o", str(out)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"nvcc failed on {source.name}: {result.stderr[-2000:]}")
            return str(out)

        sources = sorted((ROOT / "csrc/kd/cuda").rglob("*.cu"))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            return list(pool.map(compile_one, sources))

    def compile_kernels(self) -> list[str]:
        compiler = self.compiler.compiler_so[0]
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True)
        self.record["compiler"] = version.stdout.splitlines()[0] if version.stdout else compiler
        self.record["flags"] = [arg for arg in COMPILE_ARGS if "prefix-map" not in arg]
        jobs = [(["csrc/kd/cpu/kernels.cpp"], "dispatch", [("KD_X86", "1")] if X86 else [], [])]
        for isa, (width, flags) in ISA_LEVELS.items():
            for family in FAMILIES:
                source = f"csrc/kd/cpu/{family}/{family}.cpp"
                jobs.append(([source], isa, [("KD_ISA", isa), ("KD_BYTES", str(width))], flags))

        def compile_one(job):
            sources, folder, macros, flags = job
            return self.compiler.compile(
                sources, output_dir=os.path.join(self.build_temp, folder), macros=macros,
                extra_postargs=[*COMPILE_ARGS, "-fPIC", *flags],
            )  # fmt: skip

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            return [obj for objects in pool.map(compile_one, jobs) for obj in objects]

    def get_ext_filename(self, name):
        if "_C_" in name:  # holds no Python symbol: loaded by torch, for any Python
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)


setup(
    ext_modules=[
        Extension("kdkernels._C_cpu", [], optional=True),
        Extension("kdkernels._native", [], optional=True),
        Extension("kdkernels._C_cuda", [], optional=True),
    ],
    cmdclass={"build_ext": BuildKernels},
)
