# SPDX-License-Identifier: Apache-2.0
"""A killed run goes on to the very weights of one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from lightning_fabric import Fabric

from kdkernels.train import InputError, checkpoint
from kdkernels.train.cli import main
from kdkernels.train.state import State, restore, save

OPTIONS = (
    "--method ce --student convnet2 --epochs 4 --batch-size 32 --checkpoint-every 1 "
    "--accelerator cpu --seed 7"
)
ARGUMENTS = OPTIONS.split()
# Everything that carries something from step to step.
EVERYTHING = (
    "--method skd --teacher mlp8 --teacher-epochs 1 --ema .9 --accumulate 2 --clip-norm 1 "
    "--schedule onecycle --mixup .2"
)
LIMIT_SECONDS = 60


pytestmark = pytest.mark.usefixtures("one_thread")


def train_until_killed(out, *, after_step):
    """Train in a process of its own and kill it, mid-epoch, once ``after_step`` is on disk."""
    command = "import sys; from kdkernels.train.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", command, *ARGUMENTS, *EVERYTHING.split(), "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    path = out / "seed-7" / "checkpoint.pt"
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and checkpoint.load_state(path)["state"]["step"] >= after_step:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    state = checkpoint.load_state(path)["state"]
    assert after_step <= state["step"] and not (out / "seed-7" / "results.json").exists()
    return state


def test_a_killed_run_resumes_bit_equal(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    arguments = [*ARGUMENTS, *EVERYTHING.split()]
    assert main([*arguments, "--out", str(alone)]) == 0
    state = train_until_killed(killed, after_step=20)
    # The folder knows with which options it was started.
    assert main(["--out", str(killed), "--resume"]) == 0

    ends = [checkpoint.load_state(out / "seed-7" / "checkpoint.pt") for out in (alone, killed)]
    assert ends[0]["state"]["step"] == ends[1]["state"]["step"] > state["step"]
    for part in ("student", "average", "method", "optimizer", "rng"):
        torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0)
    logs = [(out / "seed-7" / "log.jsonl").read_text().splitlines() for out in (alone, killed)]
    for before, after in zip(*logs, strict=True):
        for part in ("epoch", "step", "lr", "train", "val"):
            assert json.loads(before)[part] == json.loads(after)[part]
    one, other = (out / "seed-7" / "model.safetensors" for out in (alone, killed))
    assert one.read_bytes() == other.read_bytes()


def test_random_numbers_go_on_where_they_were(tmp_path):
    path, fabric = tmp_path / "checkpoint.pt", Fabric(accelerator="cpu", devices=1)
    save(path, State(step=3), {}, fabric)
    expected = torch.rand(3)
    torch.rand(5)
    assert restore(path, {}, fabric).step == 3
    assert torch.equal(torch.rand(3), expected)


def test_the_best_epoch_is_exported_and_tested(tmp_path):
    out = tmp_path / "run"
    assert main([*ARGUMENTS, "--max-steps", "3", "--out", str(out)]) == 0
    path = out / "seed-7" / "checkpoint.pt"
    state = checkpoint.load_state(path)
    for value in state["state"]["best"]["weights"].values():
        value.zero_()
    checkpoint.save_state(path, state)
    (out / "seed-7" / "results.json").unlink()
    assert main([*ARGUMENTS, "--max-steps", "3", "--out", str(out), "--resume"]) == 0
    _, model = checkpoint.load_model(out / "seed-7" / "model.safetensors", (8, 8, 1), 10)
    assert not any(value.any() for value in model.state_dict().values())
    # Every logit 0 is class 0 with a confidence of a tenth, and a tenth of the digits are zeros.
    test = checkpoint.read_json(out / "seed-7" / "results.json")["test"]
    assert test["accuracy"] == pytest.approx(0.1, abs=0.01)
    assert test["ece"] < 0.01


def test_resuming_needs_a_run(tmp_path, capsys):
    assert main([*ARGUMENTS, "--out", str(tmp_path / "none"), "--resume"]) == 1
    assert "no run to go on with" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_options_that_contradict_the_run_are_refused(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--method", "skd", "--teacher", "mlp8", "--temperature", "2"]
    assert main([*ARGUMENTS, *options, "--max-steps", "2", "--out", str(out)]) == 0
    (out / "results.json").unlink()
    assert main(["--out", str(out), "--resume", "--temperature", "3"]) == 1
    assert "other options: temperature was 2.0, is 3.0" in capsys.readouterr().err
    assert main(["--out", str(out), "--resume", "--epochs", "9"]) == 1
    assert "other options: epochs was 4, is 9" in capsys.readouterr().err
    assert main(["--out", str(out), "--resume", "--temperature", "2"]) == 0


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*ARGUMENTS, "--max-steps", "3", "--out", str(out)]) == 0
    (out / "seed-7" / "results.json").unlink()
    path = out / "seed-7" / "checkpoint.pt"
    damaged = path.read_bytes()[:1000]
    path.write_bytes(damaged)
    assert main([*ARGUMENTS, "--max-steps", "3", "--out", str(out), "--resume"]) == 1
    assert f"{path}: damaged checkpoint" in capsys.readouterr().err
    assert path.read_bytes() == damaged


def test_a_damaged_log_is_named(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*ARGUMENTS, "--max-steps", "3", "--out", str(out)]) == 0
    log = out / "seed-7" / "log.jsonl"
    log.write_text(log.read_text()[:10])
    assert main([*ARGUMENTS, "--max-steps", "3", "--out", str(out), "--resume"]) == 1
    assert f"{log}: not readable as JSON Lines" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save_state(path, {"step": 1})

    def disk_full(file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path, disk_full)
    assert checkpoint.load_state(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_foreign_file_is_not_loaded(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"step": pytest.raises}, path)
    with pytest.raises(InputError, match="damaged checkpoint"):
        checkpoint.load_state(path)


def test_a_checkpoint_without_a_part_is_named(tmp_path):
    fabric, network = Fabric(accelerator="cpu", devices=1), torch.nn.Linear(2, 2)
    path = tmp_path / "checkpoint.pt"
    save(path, State(), {"student": network}, fabric)
    with pytest.raises(InputError, match=r"checkpoint\.pt: a checkpoint without 'loader'"):
        restore(path, {"student": network, "loader": network}, fabric)
