# SPDX-License-Identifier: Apache-2.0
"""Two processes train what one does: DDP and FSDP over gloo, resumed, and stopped by errors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kdkernels import functional as KF
from kdkernels.train import Config, DivergedError, checkpoint, loop, methods, run
from kdkernels.train.methods.ce import CE

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
    pytest.mark.usefixtures("one_thread"),
]
COMMON = {"student": "mlp8", "accelerator": "cpu", "precision": "64-true", "epochs": 2}
# By name: method, its options, settings.
RUNS = {
    "kd": ("kd", {}, {"mixup": 0.5, "clip_norm": 0.1, "accumulate": 2, "ema": 0.9}),
    "skd": ("skd+dkd", {"dim": 4}, {"optimizer": "adamw", "lr": 0.01}),
    "skd-batch": ("skd", {"dim": 4, "tokens": "batch"}, {}),
    "relations": ("relations", {}, {}),
    "fsdp": ("skd", {"dim": 4}, {"strategy": "fsdp", "precision": "32-true", "clip_norm": 0.1}),
}

# Stopped inside an epoch and taken up again; with normalisation, whose buffers differ.
STOPPED = {"student": "convnet2", "precision": "bf16-mixed", "checkpoint_every": 5}
RESUMED = {
    "resumed": ("crd", {"negatives": 16}, STOPPED | {"ema": 0.9}),
    "resumed-fsdp": ("skd", {"dim": 4}, STOPPED | {"strategy": "fsdp"}),
}


class Relations(CE):
    """A loss that relates all samples of a batch, whichever process has them."""

    needs_teacher = True

    def losses(self, batch, student_out, teacher_out):
        loss = KF.dist_loss(student_out.logits, teacher_out[0].logits, group=self.run.group)
        return super().losses(batch, student_out, teacher_out) | {"dist": loss}


class BrokenOnOne(CE):
    """No number in one process's third step."""

    calls = 0

    def losses(self, batch, student_out, teacher_out):
        self.calls += 1
        terms = super().losses(batch, student_out, teacher_out)
        broken = self.calls == 3 and dist.get_rank() == 1
        return {"ce": terms["ce"] * float("nan")} if broken else terms


class Stop(Exception):
    pass


def train(name, out, teacher, **more):
    method, options, settings = (RUNS | RESUMED)[name]
    settings = COMMON | settings | more
    config = Config(method=method, teacher_checkpoint=teacher, out=str(out / name), **settings)
    return run(config, options)


def stop_after(saves, save):
    def stopping(*arguments):
        nonlocal saves
        save(*arguments)
        saves -= 1
        if not saves:
            raise Stop

    return stopping


def two_processes(rank, port, out, teacher):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    methods.METHODS |= {"relations": Relations, "broken": BrokenOnOne}
    for name in RUNS:
        train(name, out, teacher)

    save = loop.save
    for name in RESUMED:
        whole = train(name, out / "whole", teacher)
        loop.save = stop_after(2, save)
        with pytest.raises(Stop):
            train(name, out / "again", teacher)
        loop.save = save
        again = train(name, out / "again", teacher, resume=True)
        assert whole["runs"][0]["val"] == again["runs"][0]["val"]

    with pytest.raises(DivergedError, match="ce, loss not finite in step 3;"):
        run(Config(method="broken", **COMMON, out=str(out / "broken")))

    def disk_full(*arguments):
        raise OSError(28, "No space left on device")

    checkpoint.save_state = disk_full
    with pytest.raises(OSError, match="No space left"):
        run(Config(method="ce", **COMMON, out=str(out / "full")))
    dist.barrier()
    # Gloo's threads do not always survive the end of an interpreter on a busy machine: torch then
    # aborts. The programs that the test below starts end as any other.
    os._exit(0)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def weights(folder):
    path = folder / "seed-0" / "model.safetensors"
    return checkpoint.load_model(path, (8, 8, 1), 10)[1].state_dict()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    run(Config(**COMMON | {"student": "mlp16"}, method="ce", out=str(out)))
    return str(out / "seed-0" / "model.safetensors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, teacher):
    """The folder of what two processes trained."""
    out = tmp_path_factory.mktemp("pair")
    mp.spawn(two_processes, (free_port(), out, teacher), nprocs=2)
    return out


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(pair, teacher, tmp_path, monkeypatch, name):
    monkeypatch.setitem(methods.METHODS, "relations", Relations)
    train(name, tmp_path, teacher)
    precise = RUNS[name][2].get("precision", "64-true") == "64-true"
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if precise else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(weights(pair / name), weights(tmp_path / name), **tolerance)
    one, two = (
        checkpoint.read_lines(out / name / "seed-0" / "log.jsonl")[-1] for out in (tmp_path, pair)
    )
    assert two["val"] == pytest.approx(one["val"], rel=1e-3)
    assert two["train"] == pytest.approx(one["train"], rel=1e-4)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_pair_is_bit_equal(pair, name):
    whole, again = (
        checkpoint.load_state(pair / folder / name / "seed-0" / "checkpoint.pt")
        for folder in ("whole", "again")
    )
    for part in whole.keys() - {"state"}:
        torch.testing.assert_close(again[part], whole[part], rtol=0, atol=0)
    assert len(whole["rng"]) == 2 and not torch.equal(*(rng["cpu"] for rng in whole["rng"]))


def test_one_process_goes_on_from_the_shards_of_two(pair, teacher):
    state = checkpoint.load_state(pair / "fsdp" / "seed-0" / "checkpoint.pt")
    torch.testing.assert_close(state["state"]["best"]["weights"], weights(pair / "fsdp"))
    (pair / "fsdp" / "results.json").unlink()
    (pair / "fsdp" / "seed-0" / "results.json").unlink()
    again = train("fsdp", pair, teacher, resume=True, strategy="ddp")
    assert again["runs"][0]["steps"] == state["state"]["step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        [],
    ],
    ids=["torchrun", "--devices"],
)
def test_the_command_line_starts_two(tmp_path, start):
    program = tmp_path / "program.py"
    program.write_text("import sys; from kdkernels.cli import main; sys.exit(main())")
    arguments = ["train", "--method", "ce", "--student", "mlp8", "--epochs", "1"]
    arguments += ["--accelerator", "cpu", "--out", str(tmp_path / "out")]
    arguments += [] if start else ["--devices", "2"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *start, str(program), *arguments],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 2 x cpu") == 1
    assert len(checkpoint.load_state(tmp_path / "out" / "seed-0" / "checkpoint.pt")["rng"]) == 2
