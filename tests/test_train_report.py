# SPDX-License-Identifier: Apache-2.0
"""``kdkernels report``: the page about runs, whole, unfinished or damaged."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from kdkernels.cli import main
from kdkernels.train import Config, InputError, predictions, report, run
from kdkernels.train.data import from_arrays
from kdkernels.train.predictions import Predictions
from kdkernels.train.report import sections
from kdkernels.train.report.charts import Chart, mean_and_range
from kdkernels.train.report.runs import read_runs

pytestmark = pytest.mark.usefixtures("one_thread")

VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of ce over one seed and of kd over two."""
    root = tmp_path_factory.mktemp("runs")
    common = {"student": "mlp8", "epochs": 3, "accelerator": "cpu"}
    teacher = {"teacher": "mlp32", "teacher_epochs": 3}
    run(Config(method="ce", **common, out=str(root / "ce")))
    run(Config(method="kd", **common, **teacher, seed=(0, 1), out=str(root / "kd")))
    return root


def written(*paths):
    """The page about runs, checked to be whole and to need nothing but itself."""
    out = paths[0].parent / "page.html"
    assert main(["report", *map(str, paths), "--out", str(out)]) == 0
    text = out.read_text()
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    return text


class Checker(HTMLParser):
    """Elements closed in order, and no address of anything outside of the page."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert name not in ("src", "href") or value.startswith(("data:", "#"))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def plain(html):
    """The text of a page; not that shown on hovering."""
    html = re.sub(r"<(title|style)>.*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def test_the_summary_is_mean_and_deviation_over_seeds(folder):
    text = plain(written(folder))
    accuracies = [
        100 * seed["test"]["accuracy"]
        for seed in json.loads((folder / "kd/results.json").read_text())["runs"]
    ]
    expected = f"{statistics.fmean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
    assert " kd 2 " in text and expected in text
    (alone,) = json.loads((folder / "ce/results.json").read_text())["runs"]
    row = text[text.index(" ce 1 ") :][:400]
    assert f"{100 * alone['test']['accuracy']:.2f}" in row
    assert "±" not in row[: row.index(" kd 2 ")]


def test_the_page_tells_options_teacher_and_predictions(folder):
    text = plain(written(folder))
    own = r"the method's own temperature 4\.0, alpha 0\.9 "
    assert re.search(rf"Options that differ .* method ce kd .* seed 0 0 1 {own}", text)
    assert re.search(r"Teacher: mlp32 \(\d\d?\.\d\d % on test\)\.", text)
    assert re.search(r"teacher mlp32 \d\d?\.\d\d ", text)
    assert "Guessing is right for 10 % of images of 10 classes." in text
    assert re.search(r"best first: \d, \d, ", text)
    assert re.search(r"teacher [✓✗] \d \d+ %", text)
    assert text.count("Drawn at random") == 2
    assert text.count("Gradient norms of the terms") == 2


def test_runs_on_different_data_are_told_apart(folder, tmp_path):
    other = shutil.copytree(folder / "ce", tmp_path / "ce")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"data": "sets/photos"}))
    text = plain(written(other, folder / "kd"))
    assert "on different data (digits, photos): their figures are not to be compared" in text
    assert re.search(r"Summary, photos .* ce 1 .* Summary, digits .* kd 2 ", text)
    assert "different data" not in plain(written(folder))


def test_a_single_run_has_no_comparison_of_options(folder):
    assert "Options that differ" not in written(folder / "kd")


def damage(path, content):
    path.unlink() if content is None else path.write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "problem", "seeds"),
    [
        ("seed-1/results.json", None, "seed 1: unfinished after 3 of 3 epochs", "1 of 2"),
        ("seed-1/results.json", "{}", "seed 1: results.json is damaged", "1 of 2"),
        ("seed-1/log.jsonl", '{"epoch": 1', "seed 1: log.jsonl is damaged", "2"),
        ("seed-1/test.npz", "PK", "seed 1: test.npz is damaged", "2"),
        ("results.json", "[", "results.json is damaged", "2"),
        ("config.json", None, "not a folder of kdkernels train (config.json is missing)", "2"),
        ("config.json", "", "config.json is damaged", "2"),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    folder, tmp_path, capsys, name, content, problem, seeds
):
    broken = tmp_path / "kd"
    shutil.copytree(folder / "kd", broken)
    damage(broken / name, content)
    text = plain(written(broken, folder / "ce"))
    assert problem in text and f"{broken}: {problem}" in capsys.readouterr().err
    assert re.search(rf" kd {seeds} \d", text)


def test_a_run_that_has_not_begun_is_shown_as_such(folder, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(folder / "kd/config.json", begun)
    text = plain(written(begun, folder / "ce"))
    assert "seed 0: not begun" in text and " kd 0 of 2 - - " in text


def test_nothing_to_show_is_an_error(tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "none"), str(tmp_path), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'none'}: no such folder; {tmp_path}: not a folder of kdkernels" in error
    assert not out.exists()


def test_runs_of_one_method_are_told_apart(folder, tmp_path):
    for name, temperature in (("a", 2.0), ("b", 8.0), ("c", 8.0)):
        shutil.copytree(folder / "kd", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        damage(tmp_path / name / "config.json", json.dumps(config | {"temperature": temperature}))
    labels = [run.label for run in read_runs([tmp_path, folder / "ce"])]
    assert labels == [
        "kd (temperature 2.0)", "kd (temperature 8.0), b", "kd (temperature 8.0), c", "ce",
    ]  # fmt: skip


def test_names_cannot_break_the_page(folder, tmp_path):
    odd = tmp_path / "<script>&"
    shutil.copytree(folder / "ce", odd)
    (odd / "seed-0/test.npz").write_bytes(b"")
    assert "<script>" not in written(odd)


def test_predictions_are_those_of_the_results(folder):
    kept = predictions.load(folder / "kd/seed-1/test.npz")
    test = json.loads((folder / "kd/seed-1/results.json").read_text())["test"]
    assert (kept.student == kept.labels).mean() == pytest.approx(test["accuracy"])
    assert (kept.student == kept.teacher).mean() == pytest.approx(test["agreement"])
    assert kept.images.shape == (12, 8, 8, 1) and kept.images.max() > 0
    other = predictions.load(folder / "ce/seed-0/test.npz")
    assert np.array_equal(other.examples, kept.examples) and not len(other.teacher)
    (folder / "kd/seed-1/damaged.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"damaged\.npz: damaged"):
        predictions.load(folder / "kd/seed-1/damaged.npz")


def test_long_strips_are_shown(tmp_path):
    strips = np.zeros((12, 8, 2000, 3), np.uint8), np.arange(12) % 2
    data = from_arrays(*strips, val_fraction=0.2, split_seed=0)
    predictions.save(tmp_path / "x.npz", data, torch.zeros(2, 2), torch.zeros(2), None)
    assert predictions.load(tmp_path / "x.npz").images.shape == (2, 1, 96, 3)


def test_many_classes_are_shown_by_what_is_confused():
    labels = np.repeat(np.arange(30), 4)
    student = np.where(labels == 7, 21, labels)
    none, half = np.zeros(0, dtype=int), np.full(120, 0.5)
    one = Predictions(
        np.array([f"class {k}" for k in range(30)]), labels, student, half, none, none,
        np.arange(2), np.zeros((2, 8, 8, 3), np.uint8),
    )  # fmt: skip
    text = plain("".join(sections.classes([one, one])))
    assert "class 7 class 21 100.0" in text and text.count(" class 7 ") == 1


@pytest.mark.filterwarnings("error")
def test_a_class_without_test_images_is_shown():
    labels = np.array([0, 0, 2, 2])
    none, half = np.zeros(0, dtype=int), np.full(4, 0.5)
    one = Predictions(
        np.array(["a", "b", "c"]), labels, labels, half, none, none, np.arange(2),
        np.zeros((2, 8, 8, 3), np.uint8),
    )  # fmt: skip
    assert "nan" not in "".join(sections.classes([one])).lower()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("target_entropy", "entropy"),
        ("skd.teacher_entropy", "entropy"),
        ("kl_to_target", "KL, nats"),
        ("accuracy_of_group_12", "accuracy of group"),
    ],
)
def test_measures_of_a_kind_share_a_chart(name, kind):
    assert sections._kind(name) == kind


def test_charts_leave_out_what_has_no_place():
    points = [(1, 0.0), (2, 3.0), (3, float("nan")), (4, float("inf")), (5, 3.0)]
    for log in (False, True):
        chart = Chart(points, x="epoch", y="loss", log=log)
        chart.line(points, "s0", "loss")
        assert not re.search(r"nan|inf", chart.svg())
        assert chart.svg().count("<circle") == (2 if log else 3)
    Chart([], x="epoch", y="loss", log=True).line([], "s0", "nothing")


def test_ticks_have_the_digits_that_tell_them_apart():
    chart = Chart([(1, 4.3605), (2, 4.3635)], x="epoch", y="entropy")
    ticks = re.findall(r'class="tick end"[^>]*>([^<]*)<', chart.svg())
    assert len(ticks) > 2 and len(set(ticks)) == len(ticks)


def test_lines_of_different_lengths_have_a_mean_where_there_are_values():
    mean, between = mean_and_range([[(1, 2.0), (2, 4.0)], [(1, 4.0)]])
    assert mean == [(1, 3.0), (2, 4.0)] and between == [(1, 2.0, 4.0), (2, 4.0, 4.0)]


def test_the_terminals_table_has_no_deviation_of_one_seed():
    summary = {
        "test.accuracy": {"mean": 0.5, "std": None},
        "val.best": {"mean": 0.25, "std": 0.0625},
    }
    with report.console.capture() as captured:
        report.console.print(report.table("title", {"kd": summary}))
    assert re.search(r"best epoch *│ *50\.00 *│", captured.get())
    assert re.search(r"best *│ *25 ± 6 *│", captured.get())
    assert "KL" not in captured.get()  # of no teacher


@pytest.mark.parametrize(
    ("accuracy", "images", "shown"), [(0.94722, 360, "95"), (0.7, 10_000, "70.0"), (1.0, 40, "100")]
)
def test_the_terminals_digits_end_where_noise_begins(accuracy, images, shown):
    summary = {"test.accuracy": {"mean": accuracy, "std": None}}
    with report.console.capture() as captured:
        report.console.print(report.table("title", {"kd": summary}, {"test": images}))
    assert re.search(rf"best epoch *│ *{re.escape(shown)} *│", captured.get())
