# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of a kernel, without a GPU: registers, local memory, occupancy."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from compiling import cached, run, tool

FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xptxas", "-v", "-Werror", "all-warnings"]

# Of a multiprocessor, alike on all targets. Registers are handed to warps in units of 256.
REGISTERS, REGISTER_UNIT, WARPS, BLOCKS = 65536, 256, 64, 32
STATIC_SHARED_LIMIT = 48 * 1024


@dataclass(frozen=True)
class Kernel:
    name: str
    threads: int  # of a block, at most
    registers: int
    stack: int  # bytes of local memory: arrays and spills
    spills: int
    shared: int  # static bytes; what a launch asks for, the simulator holds against the device

    @property
    def blocks(self) -> int:
        """Resident on a multiprocessor, as far as registers and threads go."""
        warps = -(-self.threads // 32)
        of_a_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        return min(REGISTERS // (of_a_warp * warps), WARPS // warps, BLOCKS)

    @property
    def occupancy(self) -> float:
        return self.blocks * -(-self.threads // 32) / WARPS


def compiled(source: Path, target: str) -> list[Kernel]:
    command = [tool("nvcc"), *FLAGS, f"-arch={target}", "-cubin"]

    def write(path):
        path.write_text(json.dumps([asdict(kernel) for kernel in _compile(command, source)]))

    kept = cached(command, [source], ".json", write)
    return [Kernel(**fields) for fields in json.loads(kept.read_text())]


def _compile(command: list[str], source: Path) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.cubin"
        result = run([*command, "--keep", "--keep-dir", folder, source.resolve(), "-o", out])
        ptx = "\n".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    kernels = []
    for part in re.split(r"Compiling entry function '", result.stdout + result.stderr)[1:]:
        name = part.partition("'")[0]
        threads = re.search(rf"\.entry {re.escape(name)}\b[^{{]*?\.maxntid (\d+)", ptx)
        assert threads, f"{name} has no launch bounds"

        def number(pattern, part=part):
            found = re.search(pattern, part)
            return int(found[1]) if found else 0

        kernels.append(
            Kernel(
                _readable(name),
                int(threads[1]),
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                number(r"(\d+) bytes smem"),
            )
        )
    return kernels


def _readable(name: str) -> str:
    filters = shutil.which("cu++filt") or shutil.which("c++filt")
    if not filters:
        return name
    text = run([filters, name]).stdout.strip()
    text = re.sub(r"\(\w+::\w+\)|kd::cuda::", "", text.removeprefix("void "))
    return text.rpartition("(")[0] or text
