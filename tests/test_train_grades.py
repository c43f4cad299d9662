# SPDX-License-Identifier: Apache-2.0
"""Education's course: whose batch and which teacher a step has, and the student that grows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from kdkernels.train.average import Average
from kdkernels.train.data import Batches, load_data
from kdkernels.train.methods import METHODS, Run
from kdkernels.train.methods.growing import grow
from kdkernels.train.models import build_model

SHAPE = (8, 8, 1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return load_data("digits", val_fraction=0.1, split_seed=0, image_size=None, cache_dir=cache)


def begun(digits, steps=60, steps_per_epoch=10, **options):
    course = METHODS["education"](**options).course
    course.begin(Run(digits, steps, steps_per_epoch))
    return course


def test_a_student_grows_and_keeps_what_its_kept_parts_compute():
    torch.manual_seed(0)
    network = build_model("resnet14", SHAPE, 10)
    student = grow(network, SHAPE, [3, 6, 10])
    assert student.ends == ("stages.0", "stages.1")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(2, *SHAPE[::-1])
    front = network.eval().stages[0](network.stem(images))
    assert student.eval()(images).shape == (2, 3)
    for grade, classes in ((1, 6), (2, 10)):
        student.grade = grade
        assert student(images).shape == (2, classes)
        assert torch.equal(network.stages[0](network.stem(images)), front)
    assert torch.equal(student(images), network(images))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_grade_computes_and_learns_nothing_behind_its_end():
    student = grow(build_model("resnet14", SHAPE, 10), SHAPE, [3, 6, 10]).train()
    behind = student.network.stages[1:].state_dict()  # running statistics too
    before = {name: value.clone() for name, value in behind.items()}
    student(torch.randn(4, *SHAPE[::-1])).sum().backward()
    assert all(p.grad is not None for p in student.network.stages[0].parameters())
    assert all(p.grad is not None for p in student.heads[0].parameters())
    unborn = (student.network.stages[1:], student.network.classifier, student.heads[1])
    assert all(p.grad is None for module in unborn for p in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in behind.items())


def test_averaged_weights_grow_with_the_student():
    student = grow(build_model("resnet14", SHAPE, 10), SHAPE, [3, 6, 10])
    average = Average(Fabric(accelerator="cpu", devices=1), student, 0.9)
    images = torch.randn(2, *SHAPE[::-1])
    for grade, classes in ((0, 3), (1, 6), (2, 10)):
        student.grade = grade
        average.update(student, 0)
        assert average.network(images).logits.shape == (2, classes)


@pytest.mark.parametrize("order", ["interleaved", "sequential"])
@pytest.mark.parametrize("replay", [True, False])
def test_the_timetable_is_that_of_the_grades(digits, order, replay):
    course = begun(digits, steps=60, steps_per_epoch=12, order=order, replay=replay,
                   boundaries=[0.4, 0.6])  # fmt: skip
    assert [list(group) for group in course.groups] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    epochs = course.timetable[:, 0].reshape(5, 12)
    assert (epochs[:2] == 0).all()
    for epoch in epochs[3:]:
        found, counts = np.unique(epoch, return_counts=True)
        assert found.tolist() == ([0, 1, 2] if replay else [2])
        assert not replay or sorted(counts.tolist()) == [4, 4, 4] or counts.tolist() == [4, 3, 5]
        ups = sum(a != b for a, b in pairwise(epoch.tolist()))
        assert not replay or (ups > 6 if order == "interleaved" else ups == 2)


def test_batches_are_of_a_group_and_go_over_all_its_images(digits):
    course = begun(digits, steps=60, steps_per_epoch=12)
    batches = Batches(digits, batch_size=64, augment="none", seed=3, device="cpu")
    seen = []
    for step in range(4):
        batch = course.batch(batches, step)
        assert batch.classes == (0, 3) and batch.labels.max() < 3
        assert torch.equal(
            batch.labels, torch.from_numpy(digits.train.labels[digits.train.rows])[batch.rows]
        )
        again = begun(digits, steps=60, steps_per_epoch=12).batch(batches, step)
        assert torch.equal(again.images, batch.images)
        seen.append(batch.rows)
    assert len(torch.cat(seen[:3]).unique()) == 3 * 64
    late = course.batch(batches, 59)
    assert course.teachers(59) == (course.groups.index(range(*late.classes)),)


def test_by_default_grades_pass_equally_often_over_what_they_see(digits):
    assert begun(digits, steps=120).starts == [0, 2, 6]
    assert begun(digits, steps=120, replay=False).starts == [0, 4, 8]
    assert begun(digits, steps=30).starts == [0, 1, 2]


def test_the_learning_rate_may_begin_anew_with_each_grade(digits):
    restarts = begun(digits, grades=2, steps=40, boundaries=[0.5])
    assert [restarts.progress(step) for step in (0, 10, 20, 30)] == [0, 0.5, 0, 0.5]
    runs_through = begun(digits, grades=2, steps=40, boundaries=[0.5], restart=False)
    assert [runs_through.progress(step) for step in (0, 20)] == [0, 0.5]
