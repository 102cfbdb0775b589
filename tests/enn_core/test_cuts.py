"""Cutting networks: the blocks are the model, as even as they can be."""

from __future__ import annotations

import doctest
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from enn_core import CutError, LocalBlock, LocalTrainer, cut, cuts, local_blocks, to_enn
from enn_core.cuts import _join, _price, balance, measure, units

timm = pytest.importorskip("timm", reason="cuts networks of timm")


def resnet() -> nn.Module:
    layers = {"layers": (1, 2, 1, 1), "channels": (16, 24, 32, 48), "num_classes": 7}
    return timm.models.resnet.ResNet(block=timm.models.resnet.BasicBlock, **layers)


def vit() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(**sizes, num_classes=7)


def volumes() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((1, 8, 12, 16, 16)):
        layers.append(nn.Sequential(nn.Conv3d(a, b, 3, 2, 1), nn.BatchNorm3d(b), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 7))


NETWORKS = {
    "resnet": (resnet, (4, 3, 32, 32)),
    "vit": (vit, (4, 3, 32, 32)),
    "volumes": (volumes, (2, 1, 24, 24, 24)),
}


@pytest.fixture(params=NETWORKS)
def model_and_example(request):
    torch.manual_seed(0)
    make, shape = NETWORKS[request.param]
    return make(), torch.randn(shape)


def test_examples():
    assert doctest.testmod(cuts).failed == 0


@pytest.mark.parametrize("by", ["memory", "time"])
def test_blocks_are_the_model(model_and_example, by):
    model, x = model_and_example
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    blocks = cut(model, x, 4, by)
    assert len(blocks) == 4
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    # The names are the model's, the parameters are the model's own.
    named = {name: p for block in blocks for name, p in block.named_parameters()}
    own = dict(model.named_parameters())
    assert named.keys() == own.keys()
    assert all(named[name] is own[name] for name in own)
    model.eval()
    h = x
    for block in blocks:
        h = block.eval()(h)
    assert torch.equal(h, model(x))


def test_blocks_take_other_sizes_and_travel(model_and_example):
    model, x = model_and_example
    blocks = cut(model.eval(), x)
    other = torch.randn(3, *x.shape[1:])
    if x.ndim == 5 or hasattr(model, "layer1"):
        other = torch.randn(3, *x.shape[1:-1], 40)
    h = other
    for block in pickle.loads(pickle.dumps(blocks)):
        h = block(h)
    assert torch.equal(h, model(other))


def test_largest_block_is_as_small_as_can_be():
    torch.manual_seed(0)
    model, x = resnet(), torch.randn(4, 3, 32, 32)
    parts = units(model, x)
    assert len(parts) == 6  # stem and five basic blocks
    costs = measure(parts, x)
    largest = max(_price(cost, "memory") for cost in measure(cut(model, x, 3), x))
    options = []
    for i, j in itertools.combinations(range(1, len(parts)), 2):
        groups = (costs[:i], costs[i:j], costs[j:])
        options.append(max(_price(_join(group), "memory") for group in groups))
    assert largest == min(options)


def test_measured_bytes_add_up_to_those_of_the_whole():
    torch.manual_seed(0)
    model, x = resnet(), torch.randn(4, 3, 32, 32)
    (whole,) = measure([model], x)
    joined = _join(measure(units(model, x), x))
    assert joined.saved == whole.saved
    assert joined.saved_input == whole.saved_input == x.nbytes
    assert whole.seconds > 0


def test_modules_are_opened_only_where_it_helps():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = resnet()

        def forward(self, x, scale=None):
            return self.inner(x) if scale is None else scale * self.inner(x)

    model, x = Wrapped(), torch.randn(2, 3, 32, 32)
    blocks = cut(model, x)
    leaves = {
        type(block.get_submodule(str(node.target)))
        for block in blocks
        for node in block.graph.nodes
        if node.op == "call_module"
    }
    assert timm.models.resnet.BasicBlock in leaves
    assert nn.Conv2d in leaves  # the stem's
    assert Wrapped not in leaves


def test_what_differs_in_training_is_not_opened():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x):
            return self.b(F.dropout(self.a(x), 0.5, self.training))

    x = torch.randn(4, 8)
    model = nn.Sequential(Noisy(), Noisy())
    assert len(cut(model, x, 2)) == 2
    with pytest.raises(CutError, match="can be cut into 2 blocks at most, 3 were asked"):
        cut(model, x, 3)
    with pytest.raises(CutError, match="differs between training and evaluation"):
        cut(Noisy(), x, 2)


def test_shared_weights_stay_in_one_block():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.c(self.a(self.b(self.a(x))))

    x = torch.randn(4, 8)
    blocks = cut(Tied(), x, 2)
    assert [sorted(block.state_dict()) for block in blocks] == [
        ["a.bias", "a.weight", "b.bias", "b.weight"],
        ["c.bias", "c.weight"],
    ]


def test_errors_say_what_to_do():
    x = torch.randn(4, 8)

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(CutError, match=r"forward of Branches cannot be traced .*; give its blocks"):
        cut(Branches(), x)
    with pytest.raises(ValueError, match="by='size' is unknown"):
        cut(resnet(), x, by="size")
    with pytest.raises(ValueError, match="blocks=0"):
        cut(resnet(), x, 0)
    with pytest.raises(CutError, match="does not answer with a row of numbers"):
        local_blocks(nn.Conv1d(3, 4, 1), torch.randn(2, 3, 9), 1)


@settings(max_examples=60)
@given(data=st.data(), costs=st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_balance_is_the_best_there_is(data, costs):
    groups = data.draw(st.integers(1, len(costs)))
    sizes = balance(costs, groups)
    assert sum(sizes) == len(costs)
    assert min(sizes) >= 1

    def largest(ends: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *ends, len(costs))))

    places = itertools.combinations(range(1, len(costs)), groups - 1)
    assert largest(tuple(itertools.accumulate(sizes))[:-1]) == min(map(largest, places))


def test_balance_refuses_the_impossible():
    with pytest.raises(ValueError, match="2 costs cannot form 3 groups"):
        balance([1, 2], 3)


@pytest.mark.parametrize(
    ("network", "head"), [("resnet", "conv"), ("vit", "mlp"), ("volumes", "linear")]
)
def test_cut_networks_learn_locally(network, head):
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    model, x = make(), torch.randn(shape)
    blocks = local_blocks(to_enn(model), x, 3, head=head)
    assert isinstance(blocks[-1].head, nn.Identity)  # the model's own end
    trainer = LocalTrainer(blocks, F.cross_entropy)
    target = torch.arange(len(x))
    for _ in range(12):
        trainer.step(x, target)
    assert (trainer.losses[-1] < trainer.losses[0]).all()
    assert trainer.answer(x).shape == (len(x), 7)


def test_features_get_a_head_at_the_end_too():
    model = nn.Sequential(*list(volumes().children())[:4])
    blocks = local_blocks(model.double(), torch.randn(2, 1, 24, 24, 24).double(), 2, outputs=1)
    assert all(isinstance(block, LocalBlock) for block in blocks)
    assert blocks[-1](blocks[0](torch.randn(2, 1, 24, 24, 24).double())[0])[1].shape == (2, 1)


def test_an_mlp_on_images_is_cut_between_its_vectors() -> None:
    layers = [nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    x = torch.randn(5, 3, 2, 2)
    blocks = cut(model, x, 3)
    assert [sorted(block.state_dict())[-1] for block in blocks] == [
        "1.weight",
        "3.weight",
        "5.weight",
    ]
    assert torch.equal(nn.Sequential(*blocks)(x), model(x))
