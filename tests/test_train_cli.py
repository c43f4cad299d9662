# SPDX-License-Identifier: Apache-2.0
"""``kdkernels train``: options and their help, config files, and what is said of bad ones."""

from __future__ import annotations

import json
import re

import pytest

from kdkernels.train import Config, run
from kdkernels.train.cli import main
from kdkernels.train.methods import METHODS
from kdkernels.train.options import parameters

pytestmark = pytest.mark.usefixtures("one_thread")


def test_config_file_is_overruled_by_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "method: ce\nstudent: mlp8\nepochs: 7\nmax-steps: 3\nseed: [5]\naccelerator: cpu\n"
    )
    out = tmp_path / "out"
    assert main(["--epochs", "1", "--config", str(path), "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["epochs"] == 1
    assert [(run["seed"], run["steps"]) for run in results["runs"]] == [(5, 3)]


def test_the_end_says_how_good_the_teacher_was_and_where_all_is(tmp_path, capsys):
    out = tmp_path / "out"
    common = "--student mlp8 --teacher mlp8 --epochs 1 --batch-size 400 --accelerator cpu"
    assert main([*common.split(), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "2 steps of 400 images an epoch (the 9 images that are left come in" in shown
    assert "warning: 2 steps an epoch: few; a --batch-size of 64 makes 12" in shown
    assert "digits, seed 0" in shown
    assert re.search(r"teacher *│ test accuracy, % *│ *\d+ *│", shown)
    assert shown.endswith(f"next: kdkernels report {out}\n")


def test_what_needs_no_images_is_checked_before_they_are_read(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    common = ["--method", "ce", "--data", "nowhere", "--accelerator", "cpu"]
    assert main([*common, "--out", str(tmp_path / "full")]) == 1
    assert "not empty" in capsys.readouterr().err
    run(Config(method="ce", student="mlp8", epochs=1, accelerator="cpu", out=str(tmp_path / "run")))
    assert main([*common, "--resume", "--out", str(tmp_path / "run")]) == 1
    assert "data was digits, is nowhere" in capsys.readouterr().err


def test_unknown_config_keys_are_refused(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("method: ce\nlearning_rate: 0.1\n")
    with pytest.raises(SystemExit):
        main(["--config", str(path), "--out", str(tmp_path / "out")])
    assert "learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("method: [ce\n", "run.yaml: "),
        ("method: ce\nlearning_rate: 0.1\n", "run.yaml: "),
        ("epochs: two\n", "run.yaml: --epochs: expected int, got two"),
    ],
)
def test_what_is_wrong_in_a_file_names_it(tmp_path, capsys, content, message):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "run.yaml")])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_option_of_one_of_several_methods(tmp_path):
    path, out = tmp_path / "run.yaml", tmp_path / "out"
    path.write_text("method: kd+dkd\nteacher: mlp8\nstudent: mlp8\nkd.alpha: 0.5\n")
    common = "--temperature 3 --dkd.temperature 2 --epochs 1 --accelerator cpu --warmup 1"
    assert main([*common.split(), "--config", str(path), "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    found = {key: config[key] for key in config if key.endswith((".alpha", ".temperature"))}
    assert found == {
        "kd.alpha": 0.5, "dkd.alpha": 1.0, "kd.temperature": 3.0, "dkd.temperature": 2.0,
    }  # fmt: skip
    assert main(["--resume", "--out", str(out)]) == 0


def test_the_help_of_an_option_says_what_it_means_to_each_method(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "dkd: weight of the target class's part. Default for dkd: 1.0." in text
    assert "education, kd: weight of the teacher's part; the labels get the rest." in text
    assert "Of one of several methods: --dkd.alpha, --education.alpha, --kd.alpha." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methd ce", "unrecognized arguments: --methd ce; the nearest are --method,"),
        ("--alpha x", "--alpha: expected float, got x"),
        ("--tokens clas", "--tokens: expected one of 'class', 'batch', got clas"),
        ("--epochs two", "--epochs: expected int, got two"),
    ],
)
def test_a_mistyped_option_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments.split())
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_lone_resume_asks_for_the_run(capsys):
    assert main(["--resume"]) == 1
    assert "--resume: expected --out" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdkernels.train.experiment.run", interrupted)
    assert main(["--method", "ce"]) == 130
    assert capsys.readouterr().err.endswith("--resume go on\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method ce --alpha .5", "--alpha: not an option of --method ce"),
        ("--method ce --kd.alpha .5", "--kd.alpha: not an option of --method ce, which has none"),
        ("--method kd+dkd --alpha .5", "--alpha: means different things; say whose. --kd.alpha:"),
        ("--method kd", "--method kd: expected --teacher or --teacher-checkpoint"),
        (
            "--method none",
            "--method: expected one of at, ce, crd, dkd, education,",
        ),
        ("--method ce --epochs 0", "--epochs: expected a number above 0, got 0"),
        ("--method ce --val-fraction 1", "--val-fraction: expected a number between 0 and 1, got"),
        ("--method ce --seed 1 1", "--seed: expected different numbers"),
        ("--method ce --accumulate 7", "--batch-size 64: expected a multiple of 7"),
        (
            "--method kd --teacher-checkpoint .",
            "expected the model.safetensors in",
        ),
        ("--method ce --student resnet9", "--student: model 'resnet9': expected one of"),
        ("--method ce --student resnet9", "; the nearest are resnet8,"),
        ("--method kd --teacher vgg12", "--teacher: model 'vgg12': expected one of"),
        ("--method kd --teacher-checkpoint no --data no", "--teacher-checkpoint: no: no such"),
        ("--method ce --data nowhere", "--data nowhere: expected 'digits', a folder"),
        ("--method kd --teacher-checkpoint nowhere", "checkpoint: nowhere: no such model file"),
        ("--method ce --data pyproject.toml", "--data: pyproject.toml: not a readable archive"),
        ("--method at --at-weight -1", "--at-weight: expected 0 or more, got -1"),
    ],
)
def test_bad_options_are_named_and_write_nothing(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*arguments.split(), "--accelerator", "cpu", "--out", str(out)]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_help_of_method_names_each():
    (text,) = (parameter.help for parameter in parameters(Config) if parameter.name == "method")
    assert set(METHODS) <= set(re.findall(r"\w+", text))


def test_every_option_has_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(own.help for kind in (Config, *METHODS.values()) for own in parameters(kind))
    options = [*Config.__dataclass_fields__, "temperature", "alpha"]
    assert all("--" + name.replace("_", "-") in text for name in options)
