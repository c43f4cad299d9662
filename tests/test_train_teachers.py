# SPDX-License-Identifier: Apache-2.0
"""The run's teachers: frozen networks, asked by position, tapped where a method wants it."""

from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from kdkernels.train.data import Batch
from kdkernels.train.frozen import Block, Convolution, folded, packed, supported
from kdkernels.train.models import build_model, usual_taps
from kdkernels.train.models.layers import Network
from kdkernels.train.models.resnet import BasicBlock
from kdkernels.train.taps import Tapped
from kdkernels.train.teachers import Teachers

SHAPE = (8, 8, 1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return [build_model(name, SHAPE, 10) for name in ("convnet4", "mlp8")]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_teachers_answer_in_the_order_asked_for(networks, precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    teachers = Teachers(fabric, networks, [("stages.0",), ()]).train()
    batch = Batch(torch.randn(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64))
    mlp, convnet = teachers(batch, (1, 0))
    for out, network in ((convnet, networks[0]), (mlp, networks[1])):
        expected = network.float()(batch.images)
        torch.testing.assert_close(out.logits.float(), expected, rtol=0.1, atol=0.05)
        assert not out.logits.requires_grad and not network.training
    assert convnet.features["stages.0"].shape == (5, 4, 8, 8) and not mlp.features
    assert not any(parameter.requires_grad for parameter in teachers.parameters())


@pytest.mark.parametrize(
    "name", ["resnet8", "ResNet50", "wrn10-1", "vgg8", "MobileNetV2", "ShuffleV2"]
)
def test_batch_normalisation_is_folded_but_for_what_is_tapped(name):
    torch.manual_seed(0)
    network = build_model(name, (32, 32, 3), 10)
    images = torch.randn(4, 3, 32, 32)
    network(images)  # running statistics of its own
    network.double().eval()
    norms = [path for path, module in network.named_modules() if type(module) is nn.BatchNorm2d]
    with torch.no_grad():
        faster = folded(network, [norms[0]])
        kept = [path for path, module in faster.named_modules() if type(module) is nn.BatchNorm2d]
        assert len(kept) < len(norms)
        assert norms[0] in kept
        torch.testing.assert_close(faster(images.double()), network(images.double()))
    assert len(norms) == sum(type(module) is nn.BatchNorm2d for module in network.modules())


def test_folding_rounds_at_the_runs_precision():
    torch.manual_seed(0)
    network = build_model("resnet8", SHAPE, 10)
    images = torch.randn(4, 1, 8, 8)
    network(images)
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    teacher = Teachers(fabric, [network], [()])[0].network
    assert not any(type(module) is nn.BatchNorm2d for module in teacher.modules())
    with torch.no_grad():
        expected, found = (model(images.double()) for model in (network, teacher.network))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_has_no_batch_normalisation_is_not_copied():
    network = build_model("mlp8", SHAPE, 10)
    assert folded(network) is network


def test_only_neighbours_are_folded():
    act = nn.ReLU()
    apart = nn.Sequential(nn.Conv2d(1, 2, 3), act, nn.Conv2d(2, 2, 3), act, nn.BatchNorm2d(2))
    network = Network(apart, [], 2, 10)
    assert folded(network.eval()) is network


def test_a_users_network_is_not_folded():
    class Between(nn.Sequential):
        def forward(self, images):
            inner = self[0][0](images)
            return self[0][1](inner).mean((2, 3)) + inner.mean((2, 3))

    network = Between(nn.Sequential(nn.Conv2d(1, 10, 3), nn.BatchNorm2d(10)))
    assert folded(network.eval()) is network


MODELS = ["resnet8", "ResNet50", "wrn10-1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"]


@pytest.mark.skipif(not supported(torch.float32), reason="needs oneDNN on x86")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_convolutions_give_the_same(name, precision):
    if precision != "32-true" and not supported(torch.bfloat16):
        pytest.skip("needs AVX-512")
    torch.manual_seed(0)
    network = build_model(name, (16, 16, 3), 10)
    places = usual_taps(network)
    taps = [*places.stages, *places.preactivations, places.pooled]
    images = torch.randn(16, 3, 16, 16)
    network(images)  # running statistics of its own
    plain = Tapped(folded(network.eval(), taps), taps)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    with torch.no_grad():
        expected = plain(images)
        with torch.autocast("cpu", enabled=precision != "32-true"):
            rounded = plain(images)
    for paths in ([], taps):
        teacher = Teachers(fabric, [network], [paths])[0]
        assert any(type(module) is Convolution for module in teacher.modules())
        found = teacher(images)
        for at in [None, *paths]:
            one, other, least = (
                (out.features[at] if at else out.logits).float()
                for out in (found, expected, rounded)
            )
            room = 1.2 * (least - other).norm() + 1e-5 * other.norm()
            assert (one - other).norm() <= room


@pytest.mark.skipif(not supported(torch.float32), reason="needs oneDNN on x86")
def test_hooks_see_what_they_saw_before_packing():
    network = folded(build_model("resnet8", SHAPE, 10).eval())
    block, unit = network.stages[0][0], network.stages[1][0].body[0]
    seen = []
    for module in (block.relu, unit[0]):
        module.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    faster = packed(network, [], "32-true")
    assert type(faster.stages[0][0]) is BasicBlock and type(faster.stages[2][0]) is Block
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(faster(images), network(images))
    assert len(seen) == 4 and seen[:2] == seen[2:]


def test_precisions_without_a_packed_form_and_users_networks_stay():
    network = build_model("resnet8", SHAPE, 10)
    assert packed(network, [], "64-true") is network
    users = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    assert packed(users, [], "32-true") is users
