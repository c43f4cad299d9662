# SPDX-License-Identifier: Apache-2.0
"""How they are compared: time, memory, and error against the reference in fp64.

Contenders take turns within one process, in an order that rotates, so that whatever else the
machine does reaches all of them; medians over these rounds are reported. A call is forward and
backward with ``.grad`` reset, as in training.

A GPU's kernel time is that of a CUDA graph over several sets of inputs, which together exceed twice
L2 where that takes at most :data:`MOST_SETS`; the host's time per call is measured on its own.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kdkernels.bench.contenders import Call
from kdkernels.testing import Loss, leaves, relative_errors

SAMPLE_SECONDS = 2e-3  # calls are repeated to fill a sample, well above the clock's resolution
MOST_SETS = 64
# Rows beyond this many elements repeat; errors are measured on those before, which keeps the fp64
# reference's temporaries near 1 GB.
RANDOM_ELEMENTS = 2**24

Function = Callable[[], object]


def make_inputs(loss: Loss, shape, dtype: torch.dtype, device: str, seed: int = 0) -> dict:
    """Inputs with a student that requires a gradient; in large ones, rows repeat.

    The registry draws on the CPU in fp64, which at GPU sizes would outlast the measurement.
    """
    rows = shape[0]
    if loss.rows_repeat:
        rows = min(rows, max(RANDOM_ELEMENTS // math.prod(shape[1:]), 1))
    inputs = loss.inputs(rows, *shape[1:], dtype=dtype, device=device, seed=seed)
    if rows < shape[0]:
        index = torch.arange(shape[0], device=device) % rows
        inputs = {name: x.index_select(0, index) for name, x in inputs.items()}
    for name in ("student", *loss.learned):
        inputs[name].requires_grad_()
    return inputs


def make_step(call: Call, inputs: Mapping[str, Tensor], upstream: float) -> Function:
    """Forward and backward under an upstream gradient, made beforehand unless it is 1.

    Gradients are dropped at its end: giving back the pages of a large one, which costs what the
    kernel's own work does, falls to the contender that took them and not to the next one.
    """
    gradient = None if upstream == 1 else torch.full_like(call(inputs).detach(), upstream)

    def step():
        call(inputs).backward(gradient)
        for x in inputs.values():
            x.grad = None

    return step


def minimal_bytes(inputs: Mapping[str, Tensor]) -> int:
    """Every input read once, the student's gradient written once."""
    return sum(x.nbytes for x in inputs.values()) + inputs["student"].nbytes


def host_clock(function: Function, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        function()
    return (time.perf_counter() - start) / number


def device_clock(function: Function, number: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(number):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / number


def enqueue_clock(function: Function, number: int) -> float:
    """Host time of calls whose work a GPU does; few, so that its queue never fills up."""
    torch.cuda.synchronize()
    return host_clock(function, min(number, 10))


def interleave(
    functions: Mapping[str, Function], clock, seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Seconds per call of each function, one sample per round: at least ``rounds`` of them."""
    numbers = {}
    for name, function in functions.items():
        clock(function, 2)
        numbers[name] = math.ceil(SAMPLE_SECONDS / max(clock(function, 1), 1e-6))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        while len(samples[order[0]]) < rounds or time.perf_counter() < deadline:
            for name in order:
                functions[name]()  # the first call pays for the state others left memory in
                samples[name].append(clock(functions[name], numbers[name]))
            order.append(order.pop(0))
    finally:
        if collecting:
            gc.enable()
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {
        "seconds": statistics.median(samples),
        "p20": fifths[0],
        "p80": fifths[3],
        "samples": len(samples),
    }


def copies(size: int, sets: int, device: str) -> Function:
    """Move ``size`` bytes, half read and half written, ``sets`` times on buffers of their own."""
    source, target = (torch.ones(sets, size // 2, dtype=torch.uint8, device=device) for _ in "st")

    def run():
        for i in range(sets):
            target[i].copy_(source[i])

    return run


def cpu_times(
    calls: Mapping[str, Call], make: Callable[[int], dict], upstream: float, seconds, rounds
) -> dict[str, dict]:
    """Time of each call and of a copy that moves the minimal bytes; ``make(seed)`` makes inputs."""
    inputs = make(0)
    steps = {name: make_step(call, inputs, upstream) for name, call in calls.items()}
    steps["copy"] = copies(minimal_bytes(inputs), 1, "cpu")
    samples = interleave(steps, host_clock, seconds, rounds)
    return {name: summary(x) for name, x in samples.items()}


def gpu_times(
    calls: Mapping[str, Call], make: Callable[[int], dict], upstream: float, seconds, rounds
) -> dict[str, dict]:
    """Likewise: kernel time from CUDA graphs, and ``host_seconds`` per call."""
    size = minimal_bytes(make(0))
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    sets = [make(seed) for seed in range(min(MOST_SETS, 1 + 2 * cache // size))]
    # The graphs may share their memory: none reads what another has left there.
    pool = torch.cuda.graph_pool_handle()
    first, functions, notes = {}, {}, {}
    for name, call in calls.items():
        steps = [make_step(call, inputs, upstream) for inputs in sets]
        first[name] = steps[0]
        functions[name] = lambda steps=steps: [step() for step in steps]
    functions["copy"] = copies(size, len(sets), "cuda")
    for name, function in functions.items():
        try:
            functions[name] = _graph(function, pool).replay
        except RuntimeError as error:  # it synchronises, as some packages do
            notes[name] = {"not_captured": one_line(error)}
    samples = interleave(functions, device_clock, seconds, rounds)
    host = interleave(first, enqueue_clock, seconds / 2, rounds)
    return {
        name: summary([x / len(sets) for x in values])
        | ({"host_seconds": statistics.median(host[name])} if name in host else {})
        | notes.get(name, {})
        for name, values in samples.items()
    }


def _graph(function: Function, pool) -> torch.cuda.CUDAGraph:
    """``function`` captured, after a warm-up on the stream it is captured on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # which a capture could not do for itself when short of memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()
    return graph


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def launches(function: Function) -> int | None:
    """How often one call has the GPU do something; None where profiling is not permitted."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profile.events()) or None


def extra_bytes(function: Function, device: str) -> int:
    """Peak of the tensors allocated during one call, above what was there before."""
    if torch.device(device).type == "cpu":
        return _allocated(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _allocated(function: Function) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would log every start and stop
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def resident_bytes(function: Function) -> int | None:
    """The same of the whole process, where Linux tells: sees a kernel's own buffers, in pages."""

    def status(key):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # glibc's free lists would hide what is allocated from them
        trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # resets the peak
    except OSError:  # some containers forbid it
        return None
    before = status("VmRSS")
    function()
    return max(status("VmHWM") - before, 0)


def oracle(loss: Loss, shape, dtype, device: str) -> tuple[dict, Tensor, Tensor]:
    """Inputs, and their loss and gradient by the reference in fp64."""
    rows = max(RANDOM_ELEMENTS // math.prod(shape[1:]) // (shape[-1] ** loss.pairwise), 1)
    inputs = make_inputs(loss, (min(shape[0], rows), *shape[1:]), dtype, device)
    exact = leaves(inputs, torch.float64)
    value = loss(exact, backend="reference")
    value.backward()
    return inputs, value.detach(), exact["student"].grad


def errors(call: Call, inputs: Mapping[str, Tensor], value: Tensor, grad: Tensor) -> dict:
    """Relative error of loss and gradient: largest over the largest element, and L2."""
    inputs["student"].grad = None
    computed = call(inputs)
    computed.backward()
    largest, l2 = relative_errors(inputs["student"].grad, grad)
    return {
        "loss_error": relative_errors(computed, value)[0],
        "grad_error": largest,
        "grad_error_l2": l2,
    }


def near_zero_errors(
    calls: Mapping[str, Call], loss: Loss, target: float, device: str, rows=64, classes=4096
) -> dict:
    """Errors in fp32 where the student is so close to the teacher that the loss is ``target``.

    ``loss`` is a divergence, which is a square near zero. Rows are compared one by one, since
    their errors would average out in a mean.
    """
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in "tn"]
    teacher, noise = 3 * logits[0], logits[1]

    def inputs(size, dtype):
        student = teacher + size * noise
        return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)}

    def reference(given):
        return loss(leaves(given, torch.float64), backend="reference", reduction="none").cpu()

    size = 1e-3 * (target / reference(inputs(1e-3, torch.float64)).mean().item()) ** 0.5
    given = inputs(size, torch.float32)
    oracle = reference(given)
    result = {"true": oracle.mean().item(), "rows": rows, "classes": classes, "contenders": {}}
    for name, call in calls.items():
        values = torch.tensor(
            [
                call({key: x[row : row + 1] for key, x in given.items()}).item()
                for row in range(rows)
            ],
            dtype=torch.float64,
        )
        result["contenders"][name] = {
            "worst_error": ((values - oracle).abs() / oracle).max().item(),
            "negative_rows": int((values < 0).sum()),
        }
    return result
