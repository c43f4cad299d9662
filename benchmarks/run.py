# SPDX-License-Identifier: Apache-2.0
"""Produces the results kept in this repository: python benchmarks/run.py [--device cuda]

Writes benchmarks/results/<device>/<date>.json, after every row, so that a run cut short keeps what
it has; `python benchmarks/plot.py` then makes the plot and README's tables from it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from kdkernels.bench import Case, Settings, report, run
from kdkernels.testing import LOSSES

MAIN = ("kl_div", "kd_loss")
# Those with a kernel of their own, at the sizes of both image benchmarks.
IMAGE = (
    "kl_div_standardized", "dkd_loss", "nkd_loss", "ats_loss", "wsld_loss", "dist_loss",
    "mlkd_loss", "mlkd_published", "multi_teacher_kl_div", "multi_teacher_mixture",
    "learning_simplifier", "learning_simplifier_batch",
)  # fmt: skip
# The other members of the rowwise family that differ in what they read and reduce.
FAMILY = (
    "reverse_kl_div", "js_div", "tv_distance", "divergence_skew_forward", "kl_div_standardized",
    "dkd_loss", "nkd_loss",
)  # fmt: skip
TOP_K = tuple(name for name in LOSSES if name.startswith("topk_"))
# Over features, at shapes of their own; of a network's three stages alone, the middle one.
FEATURES = tuple(name for name, loss in LOSSES.items() if loss.features)
FEATURE_CASES = tuple(
    Case(name, shape)
    for name in FEATURES
    for shape in LOSSES[name].shapes
    if not shape.endswith(("_stage1", "_stage3"))
)
OTHERS = tuple(
    name for name in LOSSES if name not in (*MAIN, *IMAGE, *TOP_K, *FEATURES, "pld_loss")
)
# Host cost, images, language models; what a CPU has in its caches, and what it has not.
CPU_SHAPES = ("host_8x10", "cifar100_b64", "imagenet_b256", "llama2_vocab", "llama3_vocab")
# The image shapes, then tokens x vocabulary of Llama 2, Llama 3, Qwen and Gemma.
GPU_SHAPES = (
    "host_8x10", "64x100", "256x1000", "4096x32000", "8192x128256", "4096x151936", "2048x262144",
)  # fmt: skip


def cases(device_type: str) -> list[Case]:
    if device_type == "cuda":
        # What README's figures need comes first, should time run out.
        return [
            *(Case(name, shape, dtype) for dtype in ("bf16", "fp32") for shape in GPU_SHAPES
              for name in MAIN),
            *(Case(name, "8192x128256", "bf16") for name in FAMILY),
            *(Case(name, shape) for shape in ("64x100", "256x1000") for name in IMAGE),
            *(Case(name, "4096x32000", "bf16") for name in TOP_K),
            *FEATURE_CASES,
        ]  # fmt: skip
    return [
        *(Case(name, shape) for name in MAIN for shape in CPU_SHAPES),
        *(Case(name, "llama2_vocab", "bf16") for name in MAIN),
        *(Case(name, shape) for name in IMAGE for shape in ("cifar100_b64", "imagenet_b256")),
        *(Case(name, "llama2_vocab") for name in TOP_K),
        *FEATURE_CASES,
        *(Case(name, "imagenet_b256") for name in OTHERS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case and upstream gradient")
    parser.add_argument("--rounds", type=int, default=9, help="at least")
    parser.add_argument("--within", type=float, help="seconds, after which no case is begun")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = Settings(
        device=arguments.device,
        upstreams=(1.0, 0.5),
        seconds=arguments.seconds,
        rounds=arguments.rounds,
    )
    start = time.time()

    def keep(result):
        path = arguments.output / result["environment"]["device"]
        path.mkdir(parents=True, exist_ok=True)
        file = path / f"{result['environment']['date'][:10]}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")

    def progress(result):
        report.show(result["rows"][-1])
        keep(result)

    result = run(
        cases(torch.device(arguments.device).type), settings,
        near_zero=("kl_div",), progress=progress, within=arguments.within,
    )  # fmt: skip
    keep(result)
    report.show_near_zero(result["near_zero"])
    for case in result["not_run"]:
        print(f"{case['loss']} {case['shape']} {case['dtype']}: not run, for want of time")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
