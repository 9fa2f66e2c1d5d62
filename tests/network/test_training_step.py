"""TrainingStep: step by step what the plain loop does, and the plain loop itself wherever anything is not as usual."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from lenet_ext import Net, ReferenceNet, TrainingStep, training_step
from lenet_ext.training_step import ONE_OPERATOR

SGD_OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.01, 0.1]),
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
    },
    optional={"dampening": st.sampled_from([0.0, 0.3]), "foreach": st.booleans()},
)
ADAM_OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.001, 0.01]),
        "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    },
    optional={"fused": st.booleans()},
)
OPTIMIZERS = st.one_of(
    st.tuples(st.just(SGD), SGD_OPTIONS),
    st.tuples(st.just(SGD), st.just({"lr": 0.05, "momentum": 0.9, "nesterov": True})),
    st.tuples(st.just(Adam), ADAM_OPTIONS),
    st.tuples(st.just(AdamW), ADAM_OPTIONS),
)
CROSS_ENTROPY = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "weight": st.sampled_from([None, "weights"]),
        "ignore_index": st.sampled_from([-100, 3]),
    }
)
LOSSES = st.one_of(CROSS_ENTROPY, st.just({"loss": "mse"}))


def batch(size=6, *, dtype=torch.float64, loss="cross_entropy", channels=1, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, channels, 32, 32, dtype=dtype, generator=generator)
    if loss == "mse":
        return images, torch.randn(size, classes, dtype=dtype, generator=generator)
    return images, torch.randint(classes, (size,), generator=generator)


def twins(dtype=torch.float64, **kwargs):
    torch.manual_seed(1)
    ours, stock = Net(dtype=dtype, **kwargs), ReferenceNet(dtype=dtype, **kwargs)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def loss_options(options, dtype=torch.float64):
    options = dict(options)
    if options.get("weight") == "weights":
        options["weight"] = torch.linspace(0.1, 2.0, 10, dtype=dtype)
    return options


def plain_step(net, optimizer, images, targets, loss="cross_entropy", **options):
    optimizer.zero_grad()
    value = F.mse_loss(net(images), targets) if loss == "mse" else F.cross_entropy(net(images), targets, **options)
    value.backward()
    optimizer.step()
    return value.detach()


def assert_same_state(ours, stock, ours_optimizer, stock_optimizer, tolerance=1e-9):
    """Parameters and everything that the optimizers' state_dicts hold, names and kinds included."""
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023
    mine, theirs = ours_optimizer.state_dict(), stock_optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for index, expected in theirs["state"].items():
        found = mine["state"][index]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert (found[key].dtype, found[key].device) == (value.dtype, value.device)
                torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance)
            else:
                assert found[key] == value


@given(optimizer=OPTIMIZERS, loss=LOSSES, seed=st.integers(0, 99))
def test_three_steps_are_those_of_the_loop(optimizer, loss, seed):
    kind, options = optimizer
    ours, stock = twins()
    mine, theirs = kind(ours.parameters(), **options), kind(stock.parameters(), **options)
    loss = loss_options(loss)
    step = TrainingStep(ours, mine, **loss)
    for number in range(3):
        images, targets = batch(loss=loss.get("loss", "cross_entropy"), seed=100 * seed + number)
        torch.testing.assert_close(step(images, targets), plain_step(stock, theirs, images, targets, **loss))
        assert step.path == ONE_OPERATOR
    assert_same_state(ours, stock, mine, theirs)


def test_groups_with_options_of_their_own():
    ours, stock = twins()

    def optimizer(net):
        biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in net.named_parameters() if name.endswith("weight")]
        return SGD([{"params": biases, "lr": 0.2, "momentum": 0.0}, {"params": weights}], lr=0.05, momentum=0.9)

    mine, theirs = optimizer(ours), optimizer(stock)
    step = TrainingStep(ours, mine)
    for number in range(3):
        step(*batch(seed=number))
        plain_step(stock, theirs, *batch(seed=number))
    assert step.path == ONE_OPERATOR
    assert_same_state(ours, stock, mine, theirs)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_schedule_is_read_at_each_step(kind):
    ours, stock = twins()
    options = {"lr": 0.01, "momentum": 0.9} if kind is SGD else {"lr": 0.01}
    mine, theirs = kind(ours.parameters(), **options), kind(stock.parameters(), **options)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=6) for o in (mine, theirs)]
    step = TrainingStep(ours, mine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns where no step came before its own
        for number in range(5):
            step(*batch(seed=number))
            plain_step(stock, theirs, *batch(seed=number))
            for schedule in schedules:
                schedule.step()
    assert step.path == ONE_OPERATOR
    assert_same_state(ours, stock, mine, theirs)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_loop_and_steps_take_turns_and_exchange_checkpoints(kind):
    options = {"lr": 0.05, "momentum": 0.9} if kind is SGD else {"lr": 0.01, "amsgrad": True}
    ours, stock = twins()
    mine, theirs = kind(ours.parameters(), **options), kind(stock.parameters(), **options)
    step = TrainingStep(ours, mine)
    for number in range(6):
        if number % 2:
            plain_step(ours, mine, *batch(seed=number))
        else:
            step(*batch(seed=number))
        if number == 3:  # swapped in the middle: ours goes on with what stock wrote, and stock with ours
            weights, state = copy.deepcopy(ours.state_dict()), copy.deepcopy(mine.state_dict())
            ours.load_state_dict(stock.state_dict())
            mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
            stock.load_state_dict(weights)
            theirs.load_state_dict(state)
        plain_step(stock, theirs, *batch(seed=number))
        if number == 3:
            step(*batch(seed=number))
            plain_step(stock, theirs, *batch(seed=7))
            plain_step(ours, mine, *batch(seed=7))
            return_to = copy.deepcopy(theirs.state_dict()), copy.deepcopy(stock.state_dict())
            mine.load_state_dict(return_to[0])
            ours.load_state_dict(return_to[1])
    assert step.path == ONE_OPERATOR
    assert_same_state(ours, stock, mine, theirs)


@pytest.mark.parametrize("kwargs", [{"in_channels": 3}, {"num_classes": 26}], ids=str)
def test_other_channels_and_classes(kwargs):
    ours, stock = twins(**kwargs)
    mine, theirs = SGD(ours.parameters(), lr=0.1), SGD(stock.parameters(), lr=0.1)
    step = TrainingStep(ours, mine)
    data = batch(channels=kwargs.get("in_channels", 1), classes=kwargs.get("num_classes", 10))
    step(*data)
    plain_step(stock, theirs, *data)
    assert step.path == ONE_OPERATOR
    assert_same_state(ours, stock, mine, theirs)


def test_two_hundred_steps_in_float32_beside_stock():
    ours, stock = twins(torch.float32)
    mine, theirs = (SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (ours, stock))
    step = TrainingStep(ours, mine)
    kinds = torch.randn(10, 1, 32, 32)  # what the pictures of a class have in common
    for number in range(200):
        noise, targets = batch(16, dtype=torch.float32, seed=number)
        images = kinds[targets] + 0.1 * noise
        found, expected = step(images, targets), plain_step(stock, theirs, images, targets)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    assert found < 0.1, "it has not learnt what they have in common"


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {}),
        (SGD, {"weight_decay": 0.1, "maximize": True}),
        (SGD, {"momentum": 0.9, "dampening": 0.3}),
        (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (Adam, {"maximize": True}),
        (Adam, {"weight_decay": 0.1}),
        (Adam, {"weight_decay": 0.1, "amsgrad": True}),
        (AdamW, {"weight_decay": 0.1}),
        (AdamW, {"weight_decay": 0.1, "amsgrad": True, "betas": (0.5, 0.7)}),
    ],
    ids=str,
)
def test_the_updates_own_kernels(kind, options):
    """They are float32's; stock's loop in float64 is the yardstick."""
    ours, _ = twins(torch.float32)
    stock = copy.deepcopy(ours).double()
    mine, theirs = (
        kind(net.parameters(), lr=0.01, eps=1e-3, **options)
        if kind is not SGD
        else kind(net.parameters(), lr=0.01, **options)
        for net in (ours, stock)
    )
    step = TrainingStep(ours, mine)
    for number in range(3):
        images, targets = batch(5, dtype=torch.float32, seed=number)
        step(images, targets)
        plain_step(stock, theirs, images.double(), targets)
    assert step.path == ONE_OPERATOR
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-4, atol=2e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023
        for key, value in mine.state[p].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value.double(), theirs.state[q][key].double(), rtol=1e-4, atol=2e-6)


def test_an_infinite_parameter_stays_one():
    """Without weight decay no product of it with zero comes into the update."""
    for kind in (SGD, Adam):
        net, _ = twins(torch.float32)
        net.fc3.bias.data[2] = -torch.inf
        TrainingStep(net, kind(net.parameters(), lr=0.1))(*batch(dtype=torch.float32))
        assert net.fc3.bias[2] == -torch.inf


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 3, 33, 130])
def test_any_number_of_threads_gives_the_same_bits(size, channels):
    results = []
    for threads in (1, 8):
        torch.set_num_threads(threads)
        ours, _ = twins(torch.float32, in_channels=channels)
        step = TrainingStep(ours, SGD(ours.parameters(), lr=0.1, momentum=0.9))
        losses = [step(*batch(size, dtype=torch.float32, channels=channels, seed=seed)) for seed in range(3)]
        results.append([*losses, *(p.detach().clone() for p in ours.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_are_left_as_they_were():
    net, _ = twins(torch.float32)
    plain_step(net, SGD(net.parameters(), lr=0.0), *batch(dtype=torch.float32))
    before = [p.grad.clone() for p in net.parameters()]
    loss = TrainingStep(net, SGD(net.parameters(), lr=0.1))(*batch(dtype=torch.float32, seed=1))
    assert not loss.requires_grad
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before, strict=True))


def test_a_graph_from_before_the_step_notices():
    net, _ = twins(torch.float32)
    images, targets = batch(dtype=torch.float32)
    output = net(images)
    TrainingStep(net, SGD(net.parameters(), lr=0.1))(images, targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# --- anything else: the plain loop, with the same result and a reason ---


class Subclass(Net):
    pass


def _double(parameter):
    parameter.grad.mul_(2)


def change(net, name):
    """(network, optimizer, what is called around the step) with one thing that is not as usual."""
    kind, options = SGD, {"lr": 0.1}
    if name == "subclass":
        net.__class__ = Subclass
    elif name == "hook":
        net.register_forward_hook(lambda *_: None)
    elif name == "hook of a layer":
        net.fc1.register_forward_hook(lambda *_: None)
    elif name == "hook of a parameter":
        net.fc1.weight.register_hook(lambda grad: 2 * grad)
    elif name == "hook behind a parameter":
        net.fc1.weight.register_post_accumulate_grad_hook(_double)
    elif name == "frozen":
        net.conv1.weight.requires_grad_(False)
    elif name == "another layer":
        torch.manual_seed(2)
        net.fc3 = nn.Linear(84, 10, dtype=torch.float64)
    elif name == "another optimizer":
        kind = RMSprop
    elif name == "subclass of an optimizer":
        kind = type("Own", (SGD,), {})
    elif name in ("betas in tensors", "amsgrad of a group"):
        kind = Adam
    parameters = list(net.parameters())
    if name == "not all parameters":
        parameters = parameters[2:]
    elif name == "one parameter more":
        parameters.append(nn.Parameter(torch.ones(1, dtype=torch.float64)))
    elif name == "amsgrad of a group":
        parameters = [{"params": parameters[:4], "amsgrad": False}, {"params": parameters[4:], "amsgrad": True}]
    optimizer = kind(parameters, **options)
    if name == "hook of the optimizer":
        optimizer.register_step_post_hook(lambda *_: None)
    elif name == "rate in a tensor":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    elif name == "step of its own":
        optimizer.step = functools.partial(SGD.step, optimizer)
    elif name == "betas in tensors":
        optimizer.param_groups[0]["betas"] = (torch.tensor(0.9), torch.tensor(0.999))
    return net, optimizer


CHANGES = [
    *("subclass", "hook", "hook of a layer", "hook of a parameter", "hook behind a parameter", "frozen"),
    *("another layer", "another optimizer", "subclass of an optimizer", "not all parameters", "one parameter more"),
    *("hook of the optimizer", "rate in a tensor", "step of its own", "betas in tensors", "amsgrad of a group"),
]


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_as_usual_takes_the_plain_loop(name):
    net, _ = twins()
    twin = copy.deepcopy(net)
    net, optimizer = change(net, name)
    twin, expected_optimizer = change(twin, name)
    step = TrainingStep(net, optimizer)
    torch.testing.assert_close(step(*batch()), plain_step(twin, expected_optimizer, *batch()), rtol=0, atol=0)
    assert step.path.startswith("plain loop: ")
    assert len(step.path) > len("plain loop: ")
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


MADE_FOR_THE_STEP = [
    *("another optimizer", "subclass of an optimizer", "not all parameters", "one parameter more"),
    *("betas in tensors", "amsgrad of a group"),
]


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_first_step_is_noticed(name):
    if name in MADE_FOR_THE_STEP:
        pytest.skip("the optimizer is made for the step")
    net, _ = twins()
    optimizer = SGD(net.parameters(), lr=0.1)
    step = TrainingStep(net, optimizer)
    step(*batch())
    assert step.path == ONE_OPERATOR
    if name == "step of its own":
        optimizer.step = functools.partial(SGD.step, optimizer)
    elif name in ("hook of the optimizer", "rate in a tensor"):
        optimizer.register_step_post_hook(lambda *_: None)
    else:
        change(net, name)
    step(*batch())
    assert step.path != ONE_OPERATOR


@pytest.mark.parametrize(
    "case",
    [
        *("probabilities", "gradient of the targets", "weight of another class", "autocast", "saved tensor hooks"),
        *("anomaly", "image gradient", "unbatched", "bfloat16"),
    ],
)
def test_arguments_and_contexts_that_are_not_as_usual(case):
    ours, stock = twins(torch.float32)
    images, targets = batch(dtype=torch.float32)
    context, weight = torch.enable_grad(), None
    if case in ("probabilities", "gradient of the targets"):
        targets = torch.softmax(torch.randn(6, 10), 1).requires_grad_(case != "probabilities")
    elif case == "weight of another class":
        weight = nn.Parameter(torch.linspace(0.1, 2.0, 10), requires_grad=False)
    elif case == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    elif case == "saved tensor hooks":
        context = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    elif case == "anomaly":
        context = torch.autograd.detect_anomaly(check_nan=False)
    elif case == "image gradient":
        images.requires_grad_()
    elif case == "unbatched":
        images, targets = images[0], targets[0]
    elif case == "bfloat16":
        ours, stock, images = ours.bfloat16(), stock.bfloat16(), images.bfloat16()
    step = TrainingStep(ours, SGD(ours.parameters(), lr=0.1), weight=weight)
    with warnings.catch_warnings(), context:
        warnings.simplefilter("ignore")  # detect_anomaly says that it is slow
        loss = step(images, targets)
        expected = plain_step(stock, SGD(stock.parameters(), lr=0.1), images, targets, weight=weight)
    assert step.path.startswith("plain loop: ")
    tolerance = 0.05 if case in ("autocast", "bfloat16") else 1e-5
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"net": 1}, TypeError, "net must be an nn.Module"),
        ({"optimizer": "sgd"}, TypeError, "optimizer must be"),
        ({"loss": "nll"}, ValueError, "loss must be one of"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing must be between"),
        ({"weight": [1.0]}, TypeError, "weight must be a Tensor"),
        ({"loss": "mse", "ignore_index": 3}, ValueError, "belong to cross_entropy"),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, got str"),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got NoneType"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    net, _ = twins()
    with pytest.raises(error, match=match):
        TrainingStep(**{"net": net, "optimizer": SGD(net.parameters(), lr=0.1), **arguments})


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize(
    ("images", "targets", "weight", "error"),
    [
        (batch()[0], torch.full((6,), 10), None, IndexError),
        (batch()[0], torch.full((6,), -1), None, IndexError),
        (batch()[0], torch.zeros(5, dtype=torch.int64), None, ValueError),  # stock's
        (batch()[0], torch.zeros(6, dtype=torch.int64), torch.ones(9, dtype=torch.float64), RuntimeError),
        (batch()[0].float(), torch.zeros(6, dtype=torch.int64), None, RuntimeError),
        (torch.zeros(6, 2, 32, 32, dtype=torch.float64), torch.zeros(6, dtype=torch.int64), None, RuntimeError),
    ],
    ids=["class too large", "class negative", "too few targets", "weight", "dtype", "channels"],
)
def test_a_step_that_raises_has_changed_nothing(kind, images, targets, weight, error):
    net, stock = twins()
    options = {"lr": 0.1, "momentum": 0.9} if kind is SGD else {"lr": 0.1}
    optimizer, other = kind(net.parameters(), **options), kind(stock.parameters(), **options)
    step = TrainingStep(net, optimizer, weight=weight)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(error):
        step(images, targets)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert not optimizer.state_dict()["state"]
    good = TrainingStep(net, optimizer)
    good(*batch())
    step.weight = None
    step(*batch(seed=1))
    for seed in range(2):
        plain_step(stock, other, *batch(seed=seed))
    assert_same_state(net, stock, optimizer, other)


@pytest.mark.parametrize(
    ("kind", "options"), [(SGD, {"lr": 0.1, "momentum": 0.9}), (SGD, {"lr": 0.1}), (AdamW, {"lr": 0.01})]
)
@pytest.mark.parametrize("interrupted", [0, 1])
def test_ctrl_c_leaves_a_whole_step(kind, options, interrupted, monkeypatch):
    """Python tells of the signal when the operator has returned: parameters and optimizer are then both a step on."""
    net, (images, targets) = twins()[0], batch()
    other = copy.deepcopy(net)
    steps = [TrainingStep(model, kind(model.parameters(), **options)) for model in (net, other)]
    operator = training_step.ops.lenet_training_step

    def interrupt(*arguments):
        operator(*arguments)
        raise KeyboardInterrupt

    for number in range(3):
        steps[1](images, targets)
        with monkeypatch.context() as patch:
            if number == interrupted:
                patch.setattr(training_step.ops, "lenet_training_step", interrupt)
            with pytest.raises(KeyboardInterrupt) if number == interrupted else contextlib.nullcontext():
                steps[0](images, targets)
        assert_same_state(net, other, steps[0].optimizer, steps[1].optimizer, tolerance=0)


def test_every_target_ignored():
    ours, stock = twins()
    mine, theirs = SGD(ours.parameters(), lr=0.1), SGD(stock.parameters(), lr=0.1)
    images, _ = batch()
    targets = torch.full((6,), -100)
    assert TrainingStep(ours, mine)(images, targets).isnan()
    assert plain_step(stock, theirs, images, targets).isnan()
    assert_same_state(ours, stock, mine, theirs)


# --- at home in PyTorch ---


def test_a_compiled_loop_around_it():
    ours, stock = twins(torch.float32)
    mine, theirs = SGD(ours.parameters(), lr=0.1), SGD(stock.parameters(), lr=0.1)
    step = TrainingStep(ours, mine)

    @torch.compile(backend="aot_eager")
    def train(images, targets):
        return step(2 * images, targets) + 1

    images, targets = batch(dtype=torch.float32)
    loss = train(images, targets)
    expected = plain_step(stock, theirs, 2 * images, targets) + 1
    torch.testing.assert_close(loss, expected)
    assert_same_state(ours, stock, mine, theirs, tolerance=1e-5)


def test_the_operator_says_what_it_changes():
    net, _ = twins(torch.float32)
    parameters = [p.detach() for p in net.parameters()]
    state = [torch.zeros_like(p) for p in parameters]
    images, targets = batch(dtype=torch.float32)
    options = [0.1, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0]
    torch.library.opcheck(
        torch.ops.lenet_ext.lenet_training_step.default,
        (images, targets, None, parameters, state, "cross_entropy", 0.1, -100, "sgd", options),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [{"ignore_index": 3}, {"loss": "mse"}], ids=["cross_entropy", "mse"])
def test_right_answers(loss, dtype):
    """The one operator and the plain loop count what anyone would, from the outputs before the update."""
    images, targets = batch(200, dtype=dtype, loss=loss.get("loss", "cross_entropy"))
    ours, stock = twins(dtype)
    images[7] = torch.nan  # the first NaN is the largest: class 0
    output = stock(images).detach()
    if "loss" not in loss:
        targets[:60] = output[:60].argmax(1)
        targets[7] = 0
    expected = output.argmax(1) == (targets if "loss" not in loss else targets.argmax(1))
    if "loss" not in loss:
        expected &= targets != 3
    assert 0 < expected.sum() < 200
    for net, path in [(ours, ONE_OPERATOR), (stock, "plain loop")]:
        step = TrainingStep(net, SGD(net.parameters(), lr=0.1), **loss, count_correct=True)
        assert step.correct is None
        step(images, targets)
        assert step.path.startswith(path)
        assert (step.correct.dtype, step.correct.shape) == (torch.int64, ())
        assert step.correct == expected.sum()


def test_right_answers_of_equal_outputs_and_of_targets_with_probabilities():
    """The first of equal outputs is the answer, as argmax has it; a target of probabilities means its largest."""
    net, _ = twins(torch.float32)
    for parameter in net.fc3.parameters():
        nn.init.zeros_(parameter)
    images, _ = batch(4, dtype=torch.float32)
    step = TrainingStep(net, SGD(net.parameters(), lr=0.0), count_correct=True)
    for targets in (torch.tensor([0, 0, 1, 9]), torch.eye(10)[[0, 0, 1, 9]]):
        step(images, targets)
        assert step.correct == 2
    assert step.path.startswith("plain loop")
    uncounted = TrainingStep(net, SGD(net.parameters(), lr=0.0))
    uncounted(images, torch.zeros(4, dtype=torch.int64))
    assert uncounted.correct is None


def test_right_answers_of_outputs_that_are_no_numbers():
    """The first NaN is the largest, as argmax has it, also behind numbers."""
    net, _ = twins(torch.float32)
    with torch.no_grad():
        net.fc3.bias[[3, 5]] = torch.nan
    step = TrainingStep(net, SGD(net.parameters(), lr=0.0), count_correct=True)
    loss = step(batch(4, dtype=torch.float32)[0], torch.tensor([3, 3, 5, 0]))
    assert step.path == ONE_OPERATOR
    assert loss.isnan()
    assert step.correct == 2


@pytest.mark.parametrize(
    "loss",
    [{}, {"label_smoothing": 0.1}, {"weight": "weights", "label_smoothing": 0.1, "ignore_index": 3}],
    ids=str,
)
def test_the_operator_in_bfloat16(loss):
    """TrainingStep leaves it to the loop; whoever calls the operator gets the same, from PyTorch's own loss."""
    ours, stock = twins(torch.bfloat16)
    loss = loss_options(loss, torch.bfloat16)
    images, targets = batch(40, dtype=torch.bfloat16)
    answers = ours(images).argmax(1)
    found, correct = torch.ops.lenet_ext.lenet_training_step(
        *(images, targets, loss.get("weight"), [p.detach() for p in ours.parameters()], [], "cross_entropy"),
        *(loss.get("label_smoothing", 0.0), loss.get("ignore_index", -100), "sgd", [0.1, *[0.0] * 5, 1.0]),
    )
    expected = plain_step(stock, SGD(stock.parameters(), lr=0.1), images, targets, **loss)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert correct == ((answers == targets) & (targets != loss.get("ignore_index"))).sum()
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.01)


def test_functionalized():
    """What torch.compile does to an operator that changes its arguments."""
    net, _ = twins(torch.float32)
    images, targets = batch(dtype=torch.float32)

    def run(parameters, images, targets):
        arguments = ("cross_entropy", 0.0, -100, "sgd", [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
        loss, correct = torch.ops.lenet_ext.lenet_training_step(images, targets, None, parameters, [], *arguments)
        return loss, correct, parameters[0] + 1

    eager = [p.detach().clone() for p in net.parameters()]
    compiled = [p.clone() for p in eager]
    expected = run(eager, images, targets)
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(compiled, images, targets)
    for a, b in zip((*found, *compiled), (*expected, *eager), strict=True):
        assert torch.equal(a, b)


@pytest.mark.extended
def test_constant_memory_over_many_steps():
    resource = pytest.importorskip("resource")
    net, _ = twins(torch.float32)
    step = TrainingStep(net, Adam(net.parameters(), lr=1e-4))
    data = batch(8, dtype=torch.float32)
    for _ in range(500):
        step(*data)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        step(*data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096, "kilobytes more than before"
