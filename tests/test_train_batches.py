# SPDX-License-Identifier: Apache-2.0
"""Training batches: what they hold, what they are functions of, and what augmentation does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdkernels.train import Config, InputError, run
from kdkernels.train.data import (
    Augmentation,
    Batch,
    Batches,
    Dataset,
    Split,
    load_data,
    mix_up,
    quarter_turns,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scikit-learn's digits."""
    cache_dir = tmp_path_factory.mktemp("cache")
    return load_data(
        "digits", val_fraction=0.25, split_seed=0, image_size=None, cache_dir=cache_dir
    )


def make(data, **changes):
    settings = {"batch_size": 64, "augment": "crop", "seed": 1, "device": "cpu"} | changes
    return Batches(data, **settings)


def test_an_epoch_has_each_image_once(data):
    batches = make(data, batch_size=len(data.train) // 4)
    for epoch in range(2):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        rows = torch.cat([batches(step).rows for step in steps])
        assert len(rows) >= len(data.train) - 3
        assert len(rows.unique()) == len(rows) and rows.max() < len(data.train)


def test_labels_and_images_are_those_of_the_rows(data):
    batch = make(data, augment="none")(3)
    images, labels = data.train.take(batch.rows.numpy())
    assert torch.equal(batch.labels, torch.from_numpy(labels))
    expected = (torch.from_numpy(images).float() - data.mean.item()) / data.std.item()
    torch.testing.assert_close(batch.images, expected.permute(0, 3, 1, 2))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "settings", [{}, {"augment": "crop-flip-cutout"}, {"views": 2}, {"mixup": 0.4}]
)
def test_a_batch_depends_on_seed_and_step_alone(data, settings):
    batches, again, other = make(data, **settings), make(data, **settings), make(data, seed=2)
    for step in (2, batches.per_epoch + 2, 0):
        one, two = batches(step), again(step)
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    assert not torch.equal(batches(2).images, batches(2 + batches.per_epoch).images)
    assert not torch.equal(batches(2).rows[:64], other(2).rows)


def test_a_view_of_an_image_does_not_depend_on_its_batch(data):
    batches, others = make(data, batch_size=64), make(data, batch_size=48)
    epoch = [others(step) for step in range(2 * others.per_epoch)]
    for batch in (batches(1), batches(batches.per_epoch + 1)):
        (view,) = batch.views
        assert torch.equal(batches.view(batch.rows, view), batch.images)
        same = [other for other in epoch if other.views == (view,)]
        rows, images = (torch.cat([getattr(b, name) for b in same]) for name in ("rows", "images"))
        for row, image in zip(batch.rows, batch.images, strict=True):
            if (found := (rows == row).nonzero()).numel():
                assert torch.equal(images[found.item()], image)


def test_views_are_new_in_every_epoch_unless_so_many_are_distinct(data):
    plain, two = make(data), make(data, views=2)
    assert [plain(epoch * plain.per_epoch).views for epoch in range(3)] == [(0,), (1,), (2,)]
    batch = two(two.per_epoch)
    assert batch.views == (2, 3)
    first, second = batch.images.unflatten(0, (2, -1))
    assert not torch.equal(first, second)
    assert torch.equal(*batch.rows.view(2, -1)) and torch.equal(*batch.labels.view(2, -1))
    assert torch.equal(second, plain.view(batch.rows[:64], 3))
    round_again = make(data, views=2, distinct_views=3)
    assert [round_again(epoch * two.per_epoch).views for epoch in range(3)] == [
        (0, 1),
        (2, 0),
        (1, 2),
    ]


def test_one_part_of_augmentation_does_not_change_the_others(data):
    crop, cut = make(data, augment="crop")(0), make(data, augment="crop-cutout")(0)
    kept = cut.images != 0
    assert torch.equal(crop.images[kept], cut.images[kept]) and not kept.all()


def colourful(size, count=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, size, size, 2), generator=generator, dtype=torch.uint8)


def augmented(text, images, seed=0):
    augmentation = Augmentation.parse(text)
    choices = augmentation.draw(np.random.default_rng(seed), len(images), *images.shape[1:3])
    return augmentation(images, torch.from_numpy(choices).long(), lambda x: x.permute(0, 3, 1, 2))


@pytest.mark.parametrize("text", ["crop", "flip", "crop-flip"])
def test_augmented_images_are_shifts_and_mirrors(text):
    images = colourful(16)
    results = augmented(text, images).permute(0, 2, 3, 1)
    pad = 2 if "crop" in text else 0
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    mirrored, offsets = 0, set()
    for image, result in zip(padded, results, strict=True):
        windows = {
            (i, j): image[i : i + 16, j : j + 16]
            for i in range(2 * pad + 1)
            for j in range(2 * pad + 1)
        }
        plain = {at for at, window in windows.items() if torch.equal(window, result)}
        mirror = {at for at, window in windows.items() if torch.equal(window.flip(1), result)}
        assert plain or ("flip" in text and mirror)
        mirrored += bool(mirror)
        offsets |= plain | mirror
    assert 16 < mirrored < 48 if "flip" in text else mirrored == 0
    assert len(offsets) > 15 if "crop" in text else offsets == {(0, 0)}


def test_cutout_blanks_one_square_in_any_place():
    images = colourful(16, 512)
    results = augmented("cutout", images)
    blank = (results == 0).all(1)
    assert torch.equal(results, images.permute(0, 3, 1, 2) * ~blank[:, None])
    for cut in blank:
        rows, columns = cut.any(1).nonzero(), cut.any(0).nonzero()
        assert cut.sum() == len(rows) * len(columns) <= 16
        assert rows.max() - rows.min() < 4 and columns.max() - columns.min() < 4
    assert blank.any(0).all()


@pytest.mark.parametrize("text", ["", "crop-crop", "rotate", "flip,crop", "none-crop"])
def test_unknown_augmentation_is_refused(text):
    with pytest.raises(InputError, match="--augment: expected auto, none, or some of crop, flip"):
        Config(augment=text)


def test_rectangular_and_colour_images_are_augmented():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 10, 14, 3), dtype=np.uint8)
    whole = Split(images, np.zeros(40, dtype=np.int64), np.arange(40))
    data = Dataset.build("x", ("a",), "", "crop-flip-cutout", whole, whole, whole)
    batch = make(data, augment="auto", batch_size=8)(0)
    assert batch.images.shape == (8, 3, 10, 14)
    inputs = Batches(data, batch_size=40, augment="none", seed=0, device="cpu")(0).images
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3))


def test_mixup_mixes_images_and_labels_of_all_views_alike():
    # Each image is its own class, and the second view is twice the first.
    first = torch.eye(64).view(64, 1, 8, 8)
    rows = torch.arange(64).repeat(2)
    batch = Batch(torch.cat([first, 2 * first]), rows, rows, views=(0, 1))
    mixed = mix_up(batch, 1.0, 64, np.random.default_rng(0))
    one, two = mixed.labels.view(2, 64, 64)
    images = mixed.images.view(2, 64, 64)
    assert torch.equal(one, two) and torch.equal(images[0], one)
    torch.testing.assert_close(images[1], 2 * one)
    torch.testing.assert_close(one.sum(1), torch.ones(64))
    torch.testing.assert_close(one.sum(0), torch.ones(64))
    share = one.diagonal().min()
    assert 0 < share < 1
    for row, label in zip(one, range(64), strict=True):
        row[label] -= share
        assert row.count_nonzero() == 1
        torch.testing.assert_close(row.max(), 1 - share)


def test_mixup_of_mixed_labels_keeps_probabilities(data):
    rng = np.random.default_rng(0)
    batch = mix_up(make(data, mixup=1.0)(0), 1.0, 10, rng)
    torch.testing.assert_close(batch.labels.sum(1), torch.ones(64))


def test_quarter_turns_come_with_their_numbers(data):
    batch = make(data)(0)
    turned = quarter_turns(batch)
    assert turned.images.shape == (256, 1, 8, 8)
    assert torch.equal(turned.turns, torch.arange(4).repeat_interleave(64))
    for name in ("labels", "rows"):
        assert torch.equal(getattr(turned, name), getattr(batch, name).repeat(4))
    for count, images in enumerate(turned.images.unflatten(0, (4, -1))):
        undone = images
        for _ in range(-count % 4):
            undone = undone.transpose(2, 3).flip(2)  # a quarter turn, written out
        assert torch.equal(undone, batch.images)


def test_quarter_turns_need_square_images():
    with pytest.raises(InputError, match="expected square images, got 10x8"):
        quarter_turns(Batch(torch.zeros(2, 3, 8, 10), torch.zeros(2), torch.arange(2)))


@pytest.mark.parametrize("method", ["ce", "kd"])
def test_methods_learn_from_mixed_images(tmp_path, method):
    config = Config(
        method=method,
        teacher="mlp8" if method == "kd" else None,
        student="mlp8",
        epochs=2,
        mixup=0.2,
        augment="crop-cutout",
        accelerator="cpu",
        out=str(tmp_path / "run"),
    )
    (result,) = run(config)["runs"]
    assert result["epochs"] == 2


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_a_cpu(data):
    settings = {"augment": "crop-flip-cutout", "views": 2, "mixup": 0.4}
    one, other = (
        quarter_turns(make(data, device=device, **settings)(3)) for device in ("cpu", "cuda")
    )
    assert other.images.is_cuda
    torch.testing.assert_close(one.images, other.images.cpu())
    torch.testing.assert_close(one.labels, other.labels.cpu())
    assert torch.equal(one.rows, other.rows.cpu()) and torch.equal(one.turns, other.turns.cpu())


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_shares_make_up_the_batch(data, mixup):
    settings = {"batch_size": 6, "augment": "crop-flip", "seed": 1, "device": "cpu", "views": 2}
    whole = Batches(data, **settings, mixup=mixup)(3)
    shared = Batches(data, **settings, mixup=mixup, shares=3)
    shares = [shared(3, share) for share in range(3)]
    for field in ("images", "labels", "rows"):
        views = [getattr(share, field).unflatten(0, (2, 2)) for share in shares]
        assert torch.equal(torch.cat(views, 1).flatten(0, 1), getattr(whole, field))
    assert all(share.views == whole.views for share in shares)
