"""The modules: subclasses of stock's, with stock's parameters, keys, constructor and repr."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from reference import assert_equal, integers
from torch import nn

from lenet_ext.nn import ConvReLUMaxPool2d, Linear, LinearReLU, ReLUAvgPool2d


def stock_of(module: nn.Module) -> nn.Module:
    """The stock layers with the same parameters."""
    if isinstance(module, ConvReLUMaxPool2d):
        conv = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
        )
        conv.load_state_dict(module.state_dict(), strict=True)
        pool = nn.MaxPool2d(
            module.pool_kernel_size,
            module.pool_stride,
            module.pool_padding,
            module.pool_dilation,
            ceil_mode=module.ceil_mode,
        )
        return nn.Sequential(conv, nn.ReLU(), pool)
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    linear.load_state_dict(module.state_dict(), strict=True)
    return nn.Sequential(linear, nn.ReLU()) if isinstance(module, LinearReLU) else linear


def _integer_parameters(module):
    for p in module.parameters():
        p.data.copy_(integers(*p.shape, low=-1, high=1))
    return module


CONVS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 3, "pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1},
    {"kernel_size": 3, "pool_kernel_size": (2, 3), "pool_stride": (1, 2), "pool_dilation": (2, 1), "ceil_mode": True},
    {"kernel_size": 3, "pool_kernel_size": 2, "pool_stride": None},
]


@pytest.mark.parametrize("arguments", CONVS, ids=str)
def test_conv_is_the_stock_sequence(device, arguments):
    module = _integer_parameters(ConvReLUMaxPool2d(4, 6, **arguments))
    stock = stock_of(module)
    x = integers(2, 4, 13, 12)
    a, b = (x.to(place, copy=True).requires_grad_() for place in (device, "cpu"))
    module.to(device)
    ours, expected = module(a), stock(b)
    assert_equal(ours, expected, "output")
    ours.sum().backward()
    expected.sum().backward()
    assert_equal(a.grad, b.grad, "grad of input")
    for p, q in zip(module.parameters(), stock.parameters(), strict=True):
        assert_equal(p.grad, q.grad, "grad")
    assert_equal(module(x[0].to(device)), expected[0], "unbatched")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [Linear, LinearReLU])
def test_linear_is_the_stock_layer(device, cls, bias):
    module = _integer_parameters(cls(7, 5, bias=bias))
    stock = stock_of(module)
    for shape in [(7,), (3, 7), (2, 3, 7), (0, 7)]:
        x = integers(*shape)
        assert_equal(module.to(device)(x.to(device)), stock(x), "output")


def test_linear_is_sequential_of_relu():
    assert issubclass(ConvReLUMaxPool2d, nn.Conv2d)
    assert issubclass(Linear, nn.Linear)
    assert issubclass(LinearReLU, nn.Linear)
    assert not issubclass(LinearReLU, Linear), "isinstance(m, Linear) must not take a ReLU for granted or overlook it"


@pytest.mark.parametrize(
    ("make", "stock"),
    [
        (lambda: ConvReLUMaxPool2d(4, 6, 3, groups=2), lambda: nn.Conv2d(4, 6, 3, groups=2)),
        (lambda: ConvReLUMaxPool2d(4, 6, (3, 5), bias=False), lambda: nn.Conv2d(4, 6, (3, 5), bias=False)),
        (lambda: Linear(7, 5), lambda: nn.Linear(7, 5)),
        (lambda: LinearReLU(7, 5, bias=False), lambda: nn.Linear(7, 5, bias=False)),
    ],
    ids=["conv", "conv without bias", "linear", "linear_relu"],
)
def test_same_seed_same_parameters(make, stock):
    torch.manual_seed(4)
    ours = make()
    torch.manual_seed(4)
    expected = stock()
    assert list(ours.state_dict()) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert_equal(ours.state_dict()[key], value, key)
    ours.load_state_dict(expected.state_dict(), strict=True)
    expected.load_state_dict(ours.state_dict(), strict=True)


def test_factory_arguments(device):
    for make in (
        lambda **k: ConvReLUMaxPool2d(1, 2, 3, **k),
        lambda **k: Linear(3, 2, **k),
        lambda **k: LinearReLU(3, 2, **k),
    ):
        for dtype in (torch.float64, torch.bfloat16):
            module = make(device=device, dtype=dtype)
            assert {(p.dtype, p.device.type) for p in module.parameters()} == {(dtype, torch.device(device).type)}
        assert make(device="meta").weight.device.type == "meta"
        with torch.device("meta"):
            assert make().weight.device.type == "meta"


def test_meta_forward_has_the_right_shape():
    module = ConvReLUMaxPool2d(
        3, 4, 3, padding="same", pool_kernel_size=3, pool_stride=2, ceil_mode=True, device="meta"
    )
    x = torch.empty(5, 3, 17, 16, device="meta")
    expected = stock_of(module.to_empty(device="cpu"))(torch.zeros(5, 3, 17, 16))
    assert module.to("meta")(x).shape == expected.shape
    assert LinearReLU(7, 5, device="meta")(torch.empty(2, 3, 7, device="meta")).shape == (2, 3, 5)


@pytest.mark.parametrize("size", [7, 8, 9, 10])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 3, 0), (2, 3, 1), (1, 3, 0), (3, 2, 1)])
def test_meta_knows_that_no_window_begins_beyond_the_end(size, kernel, stride, padding):
    """With ceil_mode the last window may be cut short, but has to begin on the map or in front of it."""
    options = {"pool_kernel_size": kernel, "pool_stride": stride, "pool_padding": padding, "ceil_mode": True}
    layer = ConvReLUMaxPool2d(3, 4, 3, **options)
    image = torch.ones(2, 3, size, size + 1)
    expected = stock_of(layer)(image).shape
    assert layer.to("meta")(image.to("meta")).shape == expected


def test_meta_gradients_have_the_right_shapes():
    module = ConvReLUMaxPool2d(3, 4, 3, device="meta")
    module(torch.empty(5, 3, 17, 16, device="meta")).sum().backward()
    assert module.weight.grad.shape == module.weight.shape
    assert module.weight.grad.device.type == "meta"


MODULES = [
    lambda: ConvReLUMaxPool2d(
        2, 3, 3, padding="same", pool_kernel_size=(2, 3), pool_stride=1, pool_dilation=2, ceil_mode=True
    ),
    lambda: Linear(9, 4),
    lambda: LinearReLU(9, 4, bias=False),
]


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("make", MODULES, ids=["conv", "linear", "linear_relu"])
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy], ids=["deepcopy", "pickle", "copy"]
)
def test_copies(make, copier, used):
    module = make()
    x = torch.randn(2, 2, 9, 9)
    if used:
        module(x)
    other = copier(module)
    assert_equal(other(x), module(x), "output")
    assert repr(other) == repr(module)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert_equal(a, b, "parameter")


def test_repr_shows_what_is_fused():
    text = repr(
        ConvReLUMaxPool2d(1, 6, 5, padding=2, pool_kernel_size=3, pool_stride=2, pool_padding=1, ceil_mode=True)
    )
    for part in ("ConvReLUMaxPool2d", "1, 6", "kernel_size=(5, 5)", "padding=(2, 2)", "pool_kernel_size=3",
                 "pool_stride=2", "pool_padding=1", "ceil_mode=True"):  # fmt: skip
        assert part in text, f"{part} is not in {text}"
    assert "pool_kernel_size=2" in repr(ConvReLUMaxPool2d(1, 6, 5))
    assert "LinearReLU(in_features=3, out_features=2, bias=True)" in repr(LinearReLU(3, 2))
    assert "Linear(in_features=3, out_features=2, bias=False)" in repr(Linear(3, 2, bias=False))


def test_signatures_are_the_contract():
    stock = list(inspect.signature(nn.Conv2d).parameters)[:8]
    parameters = inspect.signature(ConvReLUMaxPool2d).parameters
    assert list(parameters)[:8] == stock
    assert list(parameters)[8:] == [
        "pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode", "device", "dtype",
    ]  # fmt: skip
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(parameters)[8:])
    for cls in (Linear, LinearReLU):
        assert list(inspect.signature(cls).parameters) == list(inspect.signature(nn.Linear).parameters)


def test_changed_attributes_take_effect():
    """Everything a module computes in advance has to notice."""
    module = ConvReLUMaxPool2d(2, 3, 3, padding=1)
    x = torch.randn(2, 2, 13, 12)
    module(x)
    for name, value in [
        ("stride", (2, 1)),
        ("padding", (0, 2)),
        ("dilation", (1, 2)),
        ("pool_kernel_size", 3),
        ("pool_stride", 1),
        ("pool_padding", 1),
        ("pool_dilation", 2),
        ("ceil_mode", True),
        ("padding", "valid"),
    ]:
        setattr(module, name, value)
        with torch.no_grad():
            torch.testing.assert_close(module(x), stock_of(module)(x), rtol=1e-5, atol=1e-6)
    module.stride = (0, 0)
    with pytest.raises(RuntimeError, match="stride"):
        module(x)


def test_changed_kernel_takes_effect():
    """padding="same" depends on the size of the weight, which may be replaced."""
    module = ConvReLUMaxPool2d(2, 3, 3, padding="same")
    x = torch.randn(2, 2, 8, 8)
    module(x)
    module.weight = nn.Parameter(torch.randn(3, 2, 5, 5))
    expected = nn.functional.conv2d(x, module.weight, module.bias, padding="same").relu()
    torch.testing.assert_close(module(x), nn.functional.max_pool2d(expected, 2), rtol=1e-5, atol=1e-6)


def test_changed_list_takes_effect():
    module = ConvReLUMaxPool2d(2, 3, 3, pool_kernel_size=[2, 2], pool_stride=[2, 2])
    x = torch.randn(2, 2, 10, 10)
    assert module(x).shape[-2:] == (4, 4)
    module.pool_stride[0] = 1
    assert module(x).shape[-2:] == (7, 4)


def test_padding_mode_of_conv2d_is_not_accepted():
    """Only zeros have a kernel: another padding_mode must not be taken and ignored."""
    with pytest.raises(TypeError):
        ConvReLUMaxPool2d(1, 2, 3, padding=1, padding_mode="reflect")


@pytest.mark.parametrize("make", MODULES, ids=["conv", "linear", "linear_relu"])
def test_hooks_and_train_mode(make):
    module, seen = make(), []
    module.register_forward_hook(lambda *a: seen.append("forward"))
    module.register_full_backward_hook(lambda *a: seen.append("backward"))
    module.train()(torch.randn(2, 2, 9, 9, requires_grad=True)).sum().backward()
    assert seen == ["forward", "backward"]
    x = torch.randn(2, 2, 9, 9)
    assert_equal(module.eval()(x), module.train()(x), "output")


def test_parametrizations():
    module = nn.utils.parametrizations.weight_norm(LinearReLU(9, 4))
    x = torch.randn(3, 9)
    expected = torch.relu(nn.functional.linear(x, module.weight, module.bias))
    torch.testing.assert_close(module(x), expected)
    module(x).sum().backward()
    assert module.parametrizations.weight.original0.grad is not None


class Counted(nn.Module):
    """A parametrization that says how often it is evaluated."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, weight):
        self.count += 1
        return weight * 2


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    ("make", "image"),
    [
        (lambda: ConvReLUMaxPool2d(2, 3, 3), (2, 2, 9, 9)),
        (lambda: ConvReLUMaxPool2d(2, 3, 3, padding="same"), (2, 2, 9, 9)),
        (lambda: Linear(9, 4), (3, 9)),
        (lambda: LinearReLU(9, 4), (3, 9)),
    ],
    ids=["conv", "conv same", "linear", "linear_relu"],
)
def test_a_parametrization_is_evaluated_once(make, image, name):
    """As in nn.Conv2d and nn.Linear. It may be expensive, or change when it is evaluated."""
    module, counted = make(), Counted()
    nn.utils.parametrize.register_parametrization(module, name, counted)
    counted.count = 0
    module(torch.randn(image))
    assert counted.count == 1


@pytest.mark.parametrize("padding", [0, "same"])
def test_spectral_norm_in_training(padding):
    """Every evaluation is a step of its power iteration."""
    module = ConvReLUMaxPool2d(2, 3, 3, padding=padding).double()
    stock = stock_of(module).double()
    for layer in (module, stock[0]):
        torch.manual_seed(3)
        nn.utils.parametrizations.spectral_norm(layer)
    x = torch.randn(2, 2, 9, 9, dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(module.train()(x), stock.train()(x))
    for name, value in stock[0].state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)
    assert "parametrizations.weight.0._u" in module.state_dict()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [lambda: ConvReLUMaxPool2d(2, 3, 3), lambda: LinearReLU(9, 4)], ids=["conv", "linear"])
def test_to_mkldnn_is_refused(make):
    """It goes by isinstance(), and would leave ReLU and pooling out without a word."""
    import torch.utils.mkldnn

    with pytest.raises(RuntimeError, match=r"to_mkldnn cannot convert .* lenet_ext\.unfuse\(model\)"):
        torch.utils.mkldnn.to_mkldnn(nn.Sequential(make()))
    assert list(nn.Sequential(make()).modules())
    assert list(make().children()) == []


def test_average_pooling_is_an_avg_pool2d_that_does_its_relu():
    """No parameters; options as in nn.AvgPool2d, read at every call; copied and pickled as it is."""
    layer = ReLUAvgPool2d((3, 2), 2, 1, count_include_pad=False)
    assert isinstance(layer, nn.AvgPool2d)
    assert repr(layer) == "ReLUAvgPool2d(kernel_size=(3, 2), stride=2, padding=1)"
    assert list(layer.state_dict()) == []
    images = torch.randn(2, 3, 8, 7)
    for options in ({}, {"stride": (1, 2)}, {"kernel_size": 2, "ceil_mode": True}, {"divisor_override": 5}):
        for name, value in options.items():
            setattr(layer, name, value)
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        stock = nn.AvgPool2d(*(getattr(layer, name) for name in names))
        for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(one(images), stock(images.relu()))
        assert torch.equal(layer(images[0]), stock(images.relu())[0])
