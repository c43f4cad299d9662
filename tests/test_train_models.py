# SPDX-License-Identifier: Apache-2.0
"""The model zoo against its published sizes, and features by name in any model."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdkernels.train import InputError
from kdkernels.train.models import Taps, build_model, usual_taps
from kdkernels.train.taps import Tapped

# As measured in the distillation suites: millions of parameters and of multiplications an image, at
# 100 classes and 32x32 pixels, with as many digits as are known.
SIZES = {
    "resnet8": ("0.084", "12.5"),
    "resnet14": ("0.181", "26.7"),
    "resnet20": ("0.278", "40.8"),
    "resnet32": ("0.473", "69.1"),
    "resnet44": ("0.667", "97.4"),
    "resnet56": ("0.862", "125.8"),
    "resnet110": ("1.737", "253"),
    "resnet8x4": ("1.234", "177"),
    "resnet32x4": ("7.434", "1083"),
    "ResNet18": ("11.22", None),  # 556 there, 555.5 here
    "ResNet50": ("23.71", "1298"),
    "wrn16-1": ("0.181", "26.7"),
    "wrn16-2": ("0.703", "101"),
    "wrn40-1": ("0.570", "83"),
    "wrn40-2": ("2.255", "328"),
    "vgg8": ("3.965", "96"),
    "vgg11": ("9.277", "209"),
    "vgg13": ("9.462", "285"),
    "vgg16": ("14.774", None),
    "vgg19": ("20.087", None),
    "MobileNetV2": ("0.813", "6.5"),
    "ShuffleV1": ("0.949", "38.7"),
    "ShuffleV2": ("1.356", "44.5"),
}
# One of each architecture, the smaller ones.
KINDS = (
    "convnet4",
    "resnet8",
    "resnet8x4",
    "ResNet18",
    "wrn10-1",
    "vgg8",
    "MobileNetV2",
    "ShuffleV1",
    "ShuffleV2",
)


def count_multiplications(model, inputs):
    counts = []

    def count(module, arguments, output):
        pixels = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        counts.append(pixels * module.weight.numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(inputs)
    return sum(counts)


def rounded(number, like):
    return f"{number:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", SIZES)
def test_models_have_the_published_sizes(name):
    parameters, multiplications = SIZES[name]
    with torch.device("meta"):
        model = build_model(name, (32, 32, 3), 100)
        count = count_multiplications(model, torch.empty(1, 3, 32, 32))
    assert rounded(sum(map(torch.numel, model.parameters())) / 1e6, parameters) == parameters
    if multiplications:
        assert rounded(count / 1e6, multiplications) == multiplications


@pytest.mark.parametrize("name", ["mlp4", *KINDS])
@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 13, 3)])
def test_models_take_any_size_and_channels_and_learn_in_every_part(name, shape):
    height, width, channels = shape
    model = build_model(name, shape, 7)
    logits = model(torch.randn(2, channels, height, width))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_vgg_pools_larger_images_once_more():
    model = build_model("vgg8", (64, 64, 3), 10)
    found, _ = features(model, ["stages.3", "stages.4"], size=64)
    assert [tuple(feature.shape[2:]) for feature in found.values()] == [(8, 8), (4, 4)]


@pytest.mark.parametrize(
    "name",
    ["resnet9", "resnet2", "mlp", "mlp0", "mlp8x4", "vgg9", "wrn16", "wrn15-2", "ResNet20", "x"],
)
def test_unknown_models_are_refused(name):
    with pytest.raises(InputError, match=f"{name}.*expected one of"):
        build_model(name, (8, 8, 1), 10)


def test_small_images_are_refused():
    with pytest.raises(InputError, match="expected images of 8x8 or more pixels, got 9x7"):
        build_model("resnet8", (7, 9, 3), 10)


def features(model, taps, size=32, channels=3):
    with torch.no_grad():
        out = Tapped(model.eval(), tuple(taps))(torch.randn(2, channels, size, size))
    return out.features, out.logits


@pytest.mark.parametrize(
    ("name", "stem", "stages", "pooled"),
    [
        ("resnet32x4", (32, 32), [(64, 32), (128, 16), (256, 8)], 256),
        ("resnet20", (16, 32), [(16, 32), (32, 16), (64, 8)], 64),
        ("ResNet50", (64, 32), [(256, 32), (512, 16), (1024, 8), (2048, 4)], 2048),
        ("wrn16-2", (16, 32), [(32, 32), (64, 16), (128, 8)], 128),
        ("vgg8", None, [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], 512),
        ("MobileNetV2", (16, 16), [(12, 16), (16, 8), (48, 4), (160, 2)], 1280),
        ("ShuffleV1", (24, 32), [(240, 16), (480, 8), (960, 4)], 960),
        ("ShuffleV2", (24, 32), [(116, 16), (232, 8), (464, 4)], 1024),
        ("convnet4", (4, 32), [(4, 32), (8, 16)], 8),
    ],
)
def test_features_have_the_published_shapes(name, stem, stages, pooled):
    model = build_model(name, (32, 32, 3), 10)
    taps = usual_taps(model)
    found, logits = features(
        model,
        filter(None, [taps.stem, *taps.stages, *taps.preactivations, taps.pooled, taps.classifier]),
    )
    assert (taps.stem is None) == (stem is None)
    if stem:
        assert found[taps.stem].shape == (2, stem[0], stem[1], stem[1])
    for (channels, size), after, before in zip(
        stages, taps.stages, taps.preactivations, strict=True
    ):
        assert found[after].shape == found[before].shape == (2, channels, size, size)
    assert found[taps.pooled].shape == (2, pooled)
    assert torch.equal(found[taps.classifier], logits)
    assert torch.equal(model.classifier(found[taps.pooled]), logits)


@pytest.mark.parametrize("name", ["mlp4", *KINDS])
def test_preactivations_become_features_through_a_relu(name):
    model = build_model(name, (32, 32, 3), 10)
    taps = usual_taps(model)
    found, _ = features(model, [*taps.stages, *taps.preactivations])
    for after, before in zip(taps.stages, taps.preactivations, strict=True):
        after, before = found[after], found[before]
        if name == "MobileNetV2":  # linear: no activation follows
            assert torch.equal(after, before) and before.min() < 0
        elif name == "wrn10-1":  # the sum, which is normalised before it is activated
            assert before.min() < 0 and not torch.equal(after, before)
        else:
            assert before.min() < 0 and torch.equal(before.relu(), after)


def test_channels_are_shuffled_between_groups():
    from kdkernels.train.models.layers import shuffle

    channels = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle(channels, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(shuffle(shuffle(channels, 3), 2), channels)


class InPlace(nn.Module):
    """A user's network, which works in place wherever it can."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.late = nn.Conv2d(4, 4, 1)
        self.unused = nn.Linear(4, 2)
        self.pair = nn.LSTM(4, 4)

    def forward(self, images):
        late = self.late(self.block(images))
        late += 1
        return self.pair(late.mean((2, 3)))[0]


def test_what_an_in_place_relu_takes_is_kept():
    found, _ = features(InPlace(), ["block.1", "block.2:input", "block.2", "block"])
    assert found["block.1"].min() < 0
    assert torch.equal(found["block.1"], found["block.2:input"])
    assert torch.equal(found["block.1"].relu(), found["block.2"])


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("late", "'late': its output is overwritten in place"),
        ("unused", "'unused'.*did not call"),
        ("pair", "'pair': expected a tensor, got .*tuple"),
        ("blok:input", "no module 'blok'; the nearest are block"),
        ("block:output", "'block:output': expected a module's path or <path>:input"),
    ],
)
def test_taps_that_cannot_be_read_are_named(tap, message):
    with pytest.raises(InputError, match=message):
        features(InPlace(), [tap])


def test_preactivations_carry_gradients():
    model = build_model("resnet8", (8, 8, 3), 10)
    tap = usual_taps(model).preactivations[0]
    Tapped(model, [tap])(torch.randn(2, 3, 8, 8)).features[tap].sum().backward()
    assert model.stem[0].weight.grad.any() and model.stages[1][0].body[0][0].weight.grad is None


def test_a_users_model_tells_its_own_taps():
    model = InPlace()
    with pytest.raises(InputError, match="InPlace: has neither taps nor timm's feature_info"):
        usual_taps(model)
    model.taps = Taps(None, ("block",), ("block.2:input",), "pair:input", "pair")
    assert usual_taps(model) is model.taps


class TimmLike(InPlace):
    """What this package relies on of timm's models."""

    feature_info = (
        {"num_chs": 4, "reduction": 1, "module": "block"},
        {"num_chs": 4, "reduction": 1, "module": "late"},
    )

    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.default_cfg = {"classifier": "unused"}
        self.made = (num_classes, in_chans)

    def set_input_size(self, size):
        self.size = size


def test_timm_models_by_name(monkeypatch):
    fake = SimpleNamespace(
        is_model=lambda name: name == "like",
        list_models=lambda: ["like"],
        create_model=lambda name, **settings: TimmLike(**settings),
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    model = build_model("timm:like", (8, 12, 1), 5)
    assert model.made == (5, 1) and model.size == (8, 12)
    assert usual_taps(model) == (None, ("block", "late"), (), "unused:input", "unused")
    with pytest.raises(InputError, match="timm:lik: not one of timm's; nearest: like"):
        build_model("timm:lik", (8, 8, 1), 5)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="timm:like: needs timm, which cannot be imported"):
        build_model("timm:like", (8, 8, 1), 5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_timms_own_models(name):
    try:
        import timm  # noqa: F401
    except ImportError as error:
        pytest.skip(f"timm cannot be imported: {error}")
    model = build_model(f"timm:{name}", (32, 32, 3), 7)
    taps = usual_taps(model)
    found, logits = features(model, [*taps.stages, taps.pooled, taps.classifier])
    assert logits.shape == (2, 7) and torch.equal(found[taps.classifier], logits)
    assert len(taps.stages) > 3 and found[taps.pooled].ndim == 2
