# SPDX-License-Identifier: Apache-2.0
"""The simulator that CUDA kernels are tested under: what is right passes, mistakes are found.

``tests/simt/right.cu`` uses every primitive as it should be used; on a GPU it runs there as well,
so that the simulator and the hardware are known to mean the same. ``tests/simt/wrong.cu`` makes one
mistake in each case, and the simulator has to say which, in any order of the threads.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from compiling import FLAGS, SANITIZED, build_for_gpu, build_simulated

FOLDER = Path(__file__).parent / "simt"
SEEDS = range(5)

RIGHT = [
    "indices", "warps", "block", "cluster", "bulk", "fenced", "last", "memory", "formats",
    "extremes", "powers",
]  # fmt: skip
UNWRITTEN = "reads element .* which nothing has written"
UNSYNCHRONISED = "which thread .* without having synchronised with it"
UNWAITED = "which an asynchronous copy has written, without having synchronised with it"
STUCK = "no thread can go on"
MISTAKES = {
    "missing_barrier": f"{UNWRITTEN}|{UNSYNCHRONISED}",
    "missing_second_barrier": UNSYNCHRONISED,
    "missing_warp_barrier": f"{UNWRITTEN}|{UNSYNCHRONISED}",
    "warp_barrier_for_block": f"{UNWRITTEN}|{UNSYNCHRONISED}",
    "missing_wait": f"thread 0 .* reads element 0 .* {UNWAITED}",
    "wrong_parity": f"{UNWRITTEN}|{UNWAITED}",
    "wrong_barrier": f"thread (3[2-9]|[4-6].) .* {UNWAITED}",
    "copy_while_read": "thread 0 .* writes element .* which thread .* has read",
    "too_many_bytes_expected": rf"{STUCK}\. 64 are in wait at .* lacks 0 arrivals and 16 bytes",
    "too_few_bytes_expected": "expects too few bytes|128 bytes more than it was told to expect",
    "too_many_bytes_land": "128 bytes more than it was told to expect",
    "too_many_arrivals": "which has had all arrivals of its phase",
    "too_few_arrivals": f"{STUCK}.* lacks 1 arrivals",
    "unaligned_copy": "thread 0 .* address aligned to 16 bytes",
    "broken_copy": "whole and aligned 16 bytes",
    "unfenced_copy": "where thread 0 .* has written, without fence_async",
    "copy_nobody_waits_for": "nobody waited for the last copy",
    "unfenced_barrier": "thread 1 .* was initialised without fence_barriers",
    "barrier_without_init": "has not been initialised",
    "barrier_before_init": "has not been initialised|has not synchronised with the init",
    "out_of_bounds": "thread 63 .* uses elements 64 to 64 of a shared array of 64",
    "out_of_slice": "of a shared array of 16",
    "unaligned_pack": "needs 4 elements of shared memory aligned",
    "unaligned_load": "needs an address aligned to 16 bytes",
    "never_written": "thread 0 .* reads element 63 .* which nothing has written",
    "too_much_memory": "takes shared memory up to byte 512, and was launched with 272",
    "other_layout": "takes other shared memory at byte 0 than another thread",
    "divergent_barrier": r"is in sync_block at \S+:\d+, where thread \d+ .* is in sync_block",
    "barrier_after_exit": f"{STUCK}. 1 are at their end, first thread 7 .* 63 are in sync_block",
    "missing_lane": f"{STUCK}. 2 are at their end, first thread 3 .* 62 are in shuffle",
    "other_exchange": "is in (shuffle_xor|vote)",
    "half_of_cluster": f"{STUCK}. 64 are at their end, .* 64 are in sync_cluster",
    "block_barrier_for_cluster": f"{UNWRITTEN}|{UNSYNCHRONISED}",
    "block_not_started": "uses the memory of block 0, which may not have started",
    "block_ended": "which has ended|which may have ended by then",
    "no_such_block": "asks for block 2 of the cluster",
    "unordered": "number is 0",
    "launch_threads": "a multiple of 32",
    "launch_cluster": "a multiple of the cluster's",
    "launch_memory": "more shared memory than a block can have",
}


def run(program, name, seed=0):
    return subprocess.run([program, name, str(seed)], capture_output=True, text=True)


def listed(program):
    return subprocess.run([program], capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def right():
    return build_simulated(FOLDER / "right.cu")


@pytest.fixture(scope="module")
def wrong():
    return build_simulated(FOLDER / "wrong.cu")


def test_every_case_is_run(right, wrong):
    assert listed(right) == RIGHT
    assert listed(wrong) == list(MISTAKES)


@pytest.mark.parametrize("name", RIGHT)
def test_right(name, right):
    for seed in SEEDS:
        result = run(right, name, seed)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found(name, wrong):
    found = 0
    for seed in SEEDS:
        result = run(wrong, name, seed)
        found += result.returncode == 1
        assert re.search(MISTAKES[name], result.stdout) or not result.stdout, result.stdout
    assert found == len(SEEDS) or (name == "unordered" and found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RIGHT, *MISTAKES])
def test_simulator_is_clean(name):
    """Its own memory, under AddressSanitizer and UBSan."""
    source = "right.cu" if name in RIGHT else "wrong.cu"
    program = build_simulated(FOLDER / source, flags=[*FLAGS, *SANITIZED])
    result = run(program, name)
    assert "runtime error" not in result.stderr and "AddressSanitizer:" not in result.stderr
    assert result.returncode == (name in MISTAKES), result.stdout + result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", RIGHT)
def test_right_on_gpu(name):
    result = run(build_for_gpu(FOLDER / "right.cu"), name)
    assert result.returncode == 0, result.stdout + result.stderr
