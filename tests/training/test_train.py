"""Training, evaluation, checkpoints and pictures, called as functions."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

import lenet_ext
from lenet_ext.environment import files
from lenet_ext.pretrained.files import load_weights, save_weights
from lenet_ext.training import checkpoint, datasets, plots, predict
from lenet_ext.training.config import TrainConfig
from lenet_ext.training.evaluate import Answer, evaluate, worst_answers
from lenet_ext.training.trainer import Trainer

Sets = tuple[datasets.LabelledImages, datasets.LabelledImages]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Sets:
    return datasets.load("digits")


def config(**given: Any) -> TrainConfig:
    return TrainConfig.for_data("digits", given.pop("model", "fused"), **{"device": "cpu", **given})


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_state(one: Any, other: Any, where: str = "state") -> None:
    """Bitwise equality of nested states, whatever the time took."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if key not in ("seconds", "images_per_second"):
                assert_same_state(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same_state(*pair, f"{where}[{index}]")
    else:
        assert one == other, where


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", -1),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", -1.0),
        ("threads", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("decay", 0.0),
        ("max_shift", -1),
        ("augment", 2),
        ("optimizer", "lbfgs"),
        ("schedule", "cosine"),
        ("device", "tpu"),
    ],
)
def test_bad_configuration_names_the_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*found {value!r}"):
        config(**{name: value})


def test_configuration_survives_json() -> None:
    one = config(epochs=3, threads=2)
    assert TrainConfig.from_dict(json.loads(json.dumps({**one.to_dict(), "unknown": 1}))) == one


def test_learning_rate_follows_the_optimizer() -> None:
    assert config(optimizer="sgd").lr > config(optimizer="adam").lr
    assert config(optimizer="sgd", lr=0.5).lr == 0.5


# --- training ---------------------------------------------------------------------------------------------------------


def test_fused_and_reference_follow_the_same_curve(digits: Sets) -> None:
    trainers = [Trainer(config(model=model), *digits) for model in ("fused", "reference")]
    assert_same_state(*map(weights_of, trainers), "initial weights")
    # Rounding differs in the last bit, and training amplifies that: 1e-6 after one epoch, 1e-2 after three.
    for tolerance in (1e-3, 5e-2):
        fused, reference = (trainer.run_epoch() for trainer in trainers)
        assert fused["train_loss"] == pytest.approx(reference["train_loss"], rel=tolerance)
        assert fused["test_loss"] == pytest.approx(reference["test_loss"], rel=tolerance)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_optimizer_learns(digits: Sets, optimizer: str) -> None:
    trainer = Trainer(config(optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 0.002), *digits)
    before = trainer.evaluate()
    line = trainer.run_epoch()
    assert line["test_loss"] < 0.8 * before.loss
    assert line["test_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("optimizer", "schedule", "augment"),
    [("sgd", "one-cycle", True), ("adamw", "exponential", False), ("adam", "one-cycle", False)],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    digits: Sets, tmp_path: Path, optimizer: str, schedule: str, augment: bool
) -> None:
    options = {"optimizer": optimizer, "schedule": schedule, "augment": augment}
    whole = Trainer(config(**options, epochs=4), *digits)
    for _ in range(4):
        whole.run_epoch()

    # A cycle is as long as the run; the exponential schedule does not know how long that is.
    half = Trainer(config(**options, epochs=4 if schedule == "one-cycle" else 2), *digits)
    for _ in range(2):
        half.run_epoch()
    half.save(tmp_path)

    torch.manual_seed(99)  # the state must come from the file
    state = checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")
    assert state is not None
    resumed = Trainer(config(**options, epochs=4), *digits)
    assert resumed.state_dict()["scheduler"].keys() == state["scheduler"].keys()
    resumed.load_state_dict(state)
    for _ in range(2):
        resumed.run_epoch()
    assert_same_state(resumed.state_dict(), whole.state_dict())


def test_same_seed_same_run_other_seed_other_run(digits: Sets) -> None:
    lines = [Trainer(config(seed=seed), *digits).run_epoch() for seed in (3, 3, 4)]
    assert lines[0]["train_loss"] == lines[1]["train_loss"] != lines[2]["train_loss"]


def test_augmented_pictures_are_others(digits: Sets) -> None:
    plain, augmented = (Trainer(config(augment=augment), *digits) for augment in (False, True))
    assert_same_state(*map(weights_of, (plain, augmented)), "initial weights")
    assert plain.run_epoch()["train_loss"] != augmented.run_epoch()["train_loss"]
    # What is tested on stays as it is.
    augmented.load_state_dict(plain.state_dict())
    assert augmented.evaluate().loss == plain.history[-1]["test_loss"]


def test_the_learning_rate_does_not_depend_on_the_number_of_epochs(digits: Sets) -> None:
    lines = [Trainer(config(epochs=epochs), *digits).run_epoch() for epochs in (1, 50)]
    assert lines[0]["lr"] == lines[1]["lr"] == pytest.approx(config().lr * config().decay)


def few(digits: Sets, count: int) -> datasets.LabelledImages:
    train = digits[0]
    return datasets.LabelledImages(train.images[:count], train.labels[:count], train.normalization)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_one_cycle_rises_and_falls_once(digits: Sets, optimizer: str) -> None:
    trainer = Trainer(
        config(optimizer=optimizer, schedule="one-cycle", lr=0.001, epochs=5, batch_size=10), few(digits, 40), digits[1]
    )
    rates = [trainer.rate]
    before = [group.get("momentum", group.get("betas")) for group in trainer.optimizer.param_groups]
    for _ in range(5):
        trainer.run_epoch(lambda _: rates.append(trainer.rate))
    assert rates[-1] == rates[-2]  # the last step's
    del rates[-1]
    assert len(rates) == 20
    assert rates[0] == pytest.approx(0.001 / 5)
    assert rates[3] == max(rates) == pytest.approx(0.001)  # a fifth of the 20 steps
    assert rates[-1] == min(rates) == pytest.approx(0.001 / 100)
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert [line["lr"] for line in trainer.history] == [*rates[4::4], rates[-1]]
    # Neither the momentum nor the betas go round with it.
    assert [group.get("momentum", group.get("betas")) for group in trainer.optimizer.param_groups] == before


@pytest.mark.parametrize("count", [1, 2, 5, 9, 10, 11])
def test_runs_of_very_few_steps(digits: Sets, count: int) -> None:
    trainer = Trainer(
        config(optimizer="sgd", schedule="one-cycle", epochs=1, batch_size=1), few(digits, count), digits[1]
    )
    assert 0 < trainer.run_epoch()["lr"] <= trainer.config.lr


def test_defaults_follow_the_data_set() -> None:
    assert (config().optimizer, config().schedule) == ("adamw", "exponential")
    mnist = TrainConfig.for_data("mnist")
    assert (mnist.epochs, mnist.batch_size, mnist.optimizer, mnist.schedule) == (2, 64, "sgd", "one-cycle")
    assert mnist.lr == 0.05
    with pytest.raises(ValueError, match=r"data must be one of digits, .*, found 'runes'"):
        TrainConfig.for_data("runes")
    assert TrainConfig.for_data("mnist", lr=0.1).lr == TrainConfig.for_data("mnist", lr=0.1, batch_size=1).lr == 0.1
    # Half a batch takes half the step; a larger one no larger step.
    assert TrainConfig.for_data("mnist", batch_size=32).lr == 0.025
    assert TrainConfig.for_data("mnist", batch_size=1024).lr == 0.05
    assert TrainConfig.for_data("mnist", optimizer="adam").lr < 0.05


def test_checkpoints_from_before_there_were_schedules_and_augmentation_go_on(digits: Sets) -> None:
    new = ("schedule", "augment")
    old = {name: value for name, value in config(epochs=3).to_dict().items() if name not in new}
    assert TrainConfig.from_dict(old) == config(epochs=3)
    old.update(data="mnist", decay=0.75)
    assert TrainConfig.from_dict(old).schedule == "exponential"


def test_the_step_is_one_operator_where_it_can_be(digits: Sets, tmp_path: Path) -> None:
    for model, path in (("fused", "one operator"), ("reference", "plain loop: the network is a ReferenceNet")):
        trainer = Trainer(config(model=model), few(digits, 40), digits[1])
        trainer.run_epoch()
        trainer.save(tmp_path)
        assert json.loads((tmp_path / "history.json").read_text())["environment"]["step"] == path


def test_divergence_is_an_error_that_names_lr(digits: Sets) -> None:
    trainer = Trainer(config(optimizer="sgd", lr=1e30), *digits)
    with pytest.raises(FloatingPointError, match=r"training loss became (nan|inf) in epoch 1: try a smaller --lr"):
        trainer.run_epoch()


def test_batch_larger_than_the_data(digits: Sets) -> None:
    steps: list[int] = []
    Trainer(config(batch_size=10_000), *digits).run_epoch(steps.append)
    assert steps == [1]


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_against_a_plain_loop(digits: Sets) -> None:
    _, test = digits
    torch.manual_seed(0)
    net = lenet_ext.ReferenceNet().train()
    result = evaluate(net, test, batch_size=100)
    assert net.training
    with torch.no_grad():
        scores = net(test.normalization(test.images))
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(scores, test.labels).item(), rel=1e-5)
    right = scores.argmax(1) == test.labels
    assert result.accuracy == pytest.approx(right.double().mean().item())
    assert result.confusion.sum() == len(test)
    assert torch.equal(result.confusion.sum(1), torch.bincount(test.labels, minlength=10))
    for digit, count, hits, recall, _ in result.per_class():
        assert count == int((test.labels == digit).sum())
        assert hits == int(right[test.labels == digit].sum())
        assert recall == pytest.approx(hits / count)


def test_evaluation_of_nothing(digits: Sets) -> None:
    net = lenet_ext.Net()
    empty = datasets.LabelledImages(
        torch.zeros(0, 1, 32, 32, dtype=torch.uint8), torch.zeros(0).long(), digits[0].normalization
    )
    with pytest.raises(ValueError, match="empty"):
        evaluate(net, empty)
    with pytest.raises(ValueError, match="empty"):
        worst_answers(net, empty, 5)


def test_the_worst_answers_against_a_plain_loop(digits: Sets) -> None:
    _, test = digits
    torch.manual_seed(0)
    net = lenet_ext.ReferenceNet().train()
    with torch.no_grad():
        probabilities = net(test.normalization(test.images)).double().softmax(1)
    found = worst_answers(net, test, 10_000, batch_size=100)
    assert net.training
    predicted = probabilities.argmax(1)
    assert {answer.index for answer in found} == set((predicted != test.labels).nonzero().flatten().tolist())
    for answer in found:
        assert not answer.is_right
        assert answer.label == int(test.labels[answer.index])
        assert answer.predicted == int(predicted[answer.index])
        assert answer.probability == pytest.approx(float(probabilities[answer.index].max()), rel=1e-4)
    losses = [-math.log(float(probabilities[answer.index, answer.label])) for answer in found]
    assert all(one > other - 1e-4 for one, other in itertools.pairwise(losses))
    assert worst_answers(net, test, 3) == worst_answers(net, test, 10_000)[:3]


class Certain(torch.nn.Module):
    """Answers by the number that the pixels hold: the class in tens, and how certain in ones."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        number = images[:, 0, 0, 0].long()
        return torch.nn.functional.one_hot(number // 10, 10) * (1.0 + number % 10)[:, None]


def numbers(*values: int, labels: tuple[int, ...]) -> datasets.LabelledImages:
    pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 32, 32)
    return datasets.LabelledImages(pixels, torch.tensor(labels), datasets.Normalization(0.0, 1 / 255))


def test_without_wrong_answers_the_least_certain_are_the_worst() -> None:
    right = numbers(35, 72, 19, 44, labels=(3, 7, 1, 4))
    found = worst_answers(Certain(), right, 3)
    assert [(answer.index, answer.label, answer.predicted) for answer in found] == [(1, 7, 7), (3, 4, 4), (0, 3, 3)]
    assert all(answer.is_right for answer in found)
    # One wrong answer, however uncertain, and the right ones are not shown.
    found = worst_answers(Certain(), numbers(35, 72, 10, 44, labels=(3, 7, 2, 4)), 3)
    assert [(answer.index, answer.label, answer.predicted) for answer in found] == [(2, 2, 1)]


# --- files ------------------------------------------------------------------------------------------------------------


def test_weights_load_into_both_nets_and_keep_their_metadata(tmp_path: Path) -> None:
    net = lenet_ext.Net()
    save_weights(tmp_path / "w.safetensors", net, {"config": {"data": "mnist"}, "epoch": 7})
    weights = load_weights(tmp_path / "w.safetensors")
    assert weights.data == "mnist"
    assert weights.metadata["epoch"] == 7
    for model in (lenet_ext.Net(), lenet_ext.ReferenceNet()):
        model.load_state_dict(weights.state, strict=True)
        assert_same_state(dict(model.state_dict()), dict(net.state_dict()))


def test_plain_state_dicts_are_weights_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = lenet_ext.ReferenceNet().state_dict()
    torch.save(state, tmp_path / "plain.pt")
    save_file(state, tmp_path / "plain.safetensors")
    for name in ("plain.pt", "plain.safetensors"):
        weights = load_weights(tmp_path / name)
        assert weights.data is None
        assert_same_state(weights.state, dict(state))
        assert checkpoint.load_checkpoint(tmp_path / name) is None


class Malicious:
    """What must not be executed when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of the checkpoint was executed",))


def test_checkpoints_never_execute_code(tmp_path: Path) -> None:
    torch.save({"format": "lenet_ext checkpoint 1", "model": Malicious()}, tmp_path / "evil.pt", pickle_module=pickle)
    for load in (checkpoint.load_checkpoint, load_weights):
        with pytest.raises(ValueError, match="not a checkpoint that can be read safely"):
            load(tmp_path / "evil.pt")


@pytest.mark.parametrize("content", [b"", b"hello world, this is text", b"PK\x03\x04 and nothing more", b"\xff" * 64])
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file: not a checkpoint"):
        load_weights(tmp_path / "file")


def test_incomplete_checkpoint(tmp_path: Path) -> None:
    checkpoint.save_checkpoint(tmp_path / "c.pt", {"model": {}, "epoch": 1})
    with pytest.raises(ValueError, match="incomplete checkpoint, without config, history, optimizer, rng, scheduler"):
        checkpoint.load_checkpoint(tmp_path / "c.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def write() -> None:
        with files.atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_no_file_stays(tmp_path: Path) -> None:
    """As root, a write to /dev/null put a file in the place of the device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    before = sorted(tmp_path.rglob("*"))
    for name, reason in (("pipe", "Not a regular file"), ("folder", "Is a directory"), ("link", "Not a regular file")):
        with pytest.raises(OSError, match=reason) as caught, files.atomic_path(tmp_path / name) as temporary:
            temporary.write_text("new")
        assert caught.value.filename == str(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(there: bool, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "file", tmp_path / "link"
    link.symlink_to(target)
    if there:
        target.write_text("old")
    with files.atomic_path(link) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert link.is_symlink()
    assert sorted(tmp_path.rglob("*")) == sorted([tmp_path / "folder", target, link])


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"loss": math.nan})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("epochs", [0, 1, 60])
def test_curves_of_any_length(tmp_path: Path, epochs: int) -> None:
    line = {"train_loss": 0.5, "test_loss": 0.6, "test_accuracy": 0.9}
    plots.plot_curves(tmp_path / "c.png", [{"epoch": n + 1, **line} for n in range(epochs)], "title")
    with Image.open(tmp_path / "c.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 300


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (8, 1), (9, 3), (40, 1)])
def test_any_number_of_answers(tmp_path: Path, count: int, channels: int) -> None:
    pictures = torch.randint(256, (count, channels, 32, 32), dtype=torch.uint8)
    answers = [Answer(n, n % 10, (n + 1) % 10, 0.5) for n in reversed(range(count))]
    names = [f"thing number {n}" for n in range(10)]
    plots.plot_answers(tmp_path / "a.png", pictures, answers, "title", names if channels == 3 else None)
    assert_white_and_opaque(tmp_path / "a.png")


@pytest.mark.parametrize(
    "weight", [torch.full((6, 1, 5, 5), math.nan), torch.randn(6, 3, 5, 5), torch.randn(9, 1, 3, 3)]
)
def test_filters_of_any_kind(tmp_path: Path, weight: torch.Tensor) -> None:
    plots.plot_filters(tmp_path / "f.png", torch.nn.Parameter(weight), "title")
    assert_white_and_opaque(tmp_path / "f.png")


def assert_white_and_opaque(path: Path) -> None:
    """A ground of its own: what is dark on it does not depend on the page that it is shown on."""
    with Image.open(path) as image:
        assert min(image.size) > 200
        pixels = torch.frombuffer(bytearray(image.convert("RGBA").tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 4).int()
    assert (pixels[:, :, 3] == 255).all()
    edge = torch.cat((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    assert (edge == 255).all()
    assert pixels[:, :, :3].amax(2).min() < 64  # and something dark on it


def test_pictures_do_not_take_the_users_style(tmp_path: Path) -> None:
    """Dark text on a dark ground it would be, as some of the colors are chosen here."""
    import matplotlib.style

    line = {"epoch": 1, "train_loss": 0.5, "test_loss": 0.6, "test_accuracy": 0.9}

    def draw(folder: Path) -> list[bytes]:
        plots.plot_curves(folder / "curves.png", [line], "title")
        plots.plot_confusion(folder / "confusion.png", torch.eye(3, dtype=torch.int64), "title")
        plots.plot_filters(folder / "filters.png", torch.ones(6, 1, 5, 5), "title")
        plots.plot_answers(folder / "answers.png", torch.zeros(1, 1, 32, 32), [Answer(0, 1, 2, 0.5)], "title")
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    usual = draw(tmp_path / "usual")
    with matplotlib.style.context(["dark_background", {"savefig.transparent": True}]):
        assert draw(tmp_path / "dark") == usual
    for path in (tmp_path / "dark").iterdir():
        assert_white_and_opaque(path)


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven() -> torch.Tensor:
    """A drawn digit, ink 1 on ground 0, 60x40."""
    picture = torch.zeros(60, 40)
    picture[8:13, 8:32] = 1
    for row in range(13, 52):
        column = 29 - (row - 13) // 3
        picture[row, column - 2 : column + 3] = 1
    return picture


def save(path: Path, gray: torch.Tensor, mode: str = "L", **kwargs: Any) -> Path:
    Image.fromarray(gray.mul(255).round().byte().numpy(), "L").convert(mode).save(path, **kwargs)
    return path


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_every_way_to_store_a_picture_gives_the_same_digit(tmp_path: Path, seven: torch.Tensor, dataset: str) -> None:
    expected = predict.frame_ink(predict.load_ink(save(tmp_path / "plain.png", seven)), dataset).int()
    inverted = 1 - seven
    wide = seven.mul(65535).round().numpy().astype("uint16")
    transparent = Image.new("RGBA", (40, 60), (0, 0, 0, 0))  # black ink on nothing
    transparent.putalpha(Image.fromarray(seven.mul(255).byte().numpy(), "L"))
    transparent.save(tmp_path / "black-on-nothing.png")
    white = Image.new("RGBA", (40, 60), (255, 255, 255, 0))
    white.putalpha(Image.fromarray(seven.mul(255).byte().numpy(), "L"))
    white.save(tmp_path / "white-on-nothing.png")
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(seven.numpy() * 1000.0).save(tmp_path / "float.tiff")
    turned = Image.fromarray(seven.mul(255).byte().numpy(), "L").rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    paths = [
        save(tmp_path / "inverted.png", inverted),
        save(tmp_path / "rgb.png", seven, "RGB"),
        save(tmp_path / "rgba.png", inverted, "RGBA"),
        save(tmp_path / "palette.png", seven, "P"),
        save(tmp_path / "bits.png", inverted, "1"),
        save(tmp_path / "la.png", seven, "LA"),
        save(tmp_path / "cmyk.tiff", inverted, "CMYK"),
        save(tmp_path / "photo.jpg", inverted, "RGB", quality=95),
        *(tmp_path / name for name in ("black-on-nothing.png", "white-on-nothing.png", "wide.png", "float.tiff")),
        tmp_path / "turned.png",
        save(tmp_path / "large.png", inverted.repeat_interleave(40, 0).repeat_interleave(40, 1)),
        save(tmp_path / "gray.png", 0.7 - 0.4 * seven),
    ]
    for path in paths:
        found = predict.frame_ink(predict.load_ink(path), dataset).int()
        assert (found - expected).abs().float().mean() < 4, path.name


@pytest.mark.parametrize("dataset", ["cifar10", "runes"])
def test_no_ink_is_framed_for_photographs(dataset: str, seven: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=rf"data must be one of digits, mnist, .*, found '{dataset}'"):
        predict.frame_ink(seven, dataset)


def test_uneven_light_and_noise(tmp_path: Path, seven: torch.Tensor) -> None:
    expected = predict.frame_ink(predict.load_ink(save(tmp_path / "plain.png", seven)), "mnist").int()
    big = torch.nn.functional.pad(seven.repeat_interleave(5, 0).repeat_interleave(5, 1), (50, 120, 80, 30))
    light = 0.7 + 0.2 * torch.linspace(-1, 1, big.shape[1]) + 0.02 * torch.randn(big.shape)
    photo = (light * (1 - 0.7 * big)).clamp(0, 1)
    found = predict.frame_ink(predict.load_ink(save(tmp_path / "photo.png", photo)), "mnist").int()
    assert (found - expected).abs().float().mean() < 8


def test_mnist_frame(seven: torch.Tensor) -> None:
    framed = predict.frame_ink(seven, "mnist")[0].float()
    rows, columns = (framed > 30).any(1).nonzero(), (framed > 30).any(0).nonzero()
    assert 19 <= int(rows.max() - rows.min()) + 1 <= 21
    assert int(columns.max() - columns.min()) + 1 < 20
    mass = (framed.sum(1) * torch.arange(32)).sum() / framed.sum()
    assert abs(mass - 15.5) <= 0.6


def test_pictures_of_the_data_set_pass_unchanged(tmp_path: Path, digits: Sets) -> None:
    picture = digits[1].images[3]
    path = tmp_path / "digit.png"
    Image.fromarray(picture[0].numpy(), "L").save(path)
    found = predict.frame_ink(predict.load_ink(path), "digits")
    stretched = picture.float() * 255 / picture.max()  # the strongest ink becomes 255
    assert (found - stretched).abs().max() <= 1


@pytest.mark.parametrize("level", [0, 128, 255])
def test_blank_picture(tmp_path: Path, level: int) -> None:
    path = save(tmp_path / "blank.png", torch.full((40, 30), level / 255))
    with pytest.raises(ValueError, match=r"blank\.png: the picture is blank"):
        predict.load_ink(path)


def test_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png: not a picture in a known format"):
        predict.load_ink(tmp_path / "text.png")


def test_cut_off_picture(tmp_path: Path, seven: torch.Tensor) -> None:
    path = save(tmp_path / "cut.jpg", seven.repeat(8, 8), "RGB")
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises((OSError, ValueError)):
        predict.load_ink(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 3), (600, 1)])
def test_tiny_pictures_do_not_crash(tmp_path: Path, size: tuple[int, int]) -> None:
    picture = torch.zeros(size)
    picture[size[0] // 2, size[1] // 2] = 1
    path = save(tmp_path / "tiny.png", picture)
    try:
        ink = predict.load_ink(path)
    except ValueError:
        return
    for dataset in ("digits", "mnist"):
        assert predict.frame_ink(ink, dataset).shape == (1, 32, 32)
