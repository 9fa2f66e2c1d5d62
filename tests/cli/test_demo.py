"""``lenet-ext demo`` without a browser: what it makes of a drawing, and how it answers those who ask."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import logging
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

from PIL import Image, ImageDraw

import lenet_ext
from lenet_ext.cli import demo as command
from lenet_ext.cli import main
from lenet_ext.demo import Viewer, build_server
from lenet_ext.demo.viewer import SIDE
from lenet_ext.training.datasets import DATA_SETS

PAGE = Path(command.__file__).parents[1] / "demo" / "page"
# Strokes on a field of 128 by 128, as a hand would draw them.
STROKES = {
    "1": [[(67, 15), (64, 113)]],
    "7": [[(32, 26), (96, 26), (58, 109)]],
    "4": [[(45, 19), (32, 70), (96, 70)], [(83, 19), (80, 115)]],
}


def draw(digit: str) -> Image.Image:
    image = Image.new("L", (SIDE, SIDE), 0)
    for points in STROKES[digit]:
        ImageDraw.Draw(image).line(points, fill=255, width=10, joint="curve")
    return image


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def viewer() -> Iterator[Viewer]:
    gc.freeze()  # as the command does: a measurement collects garbage first, which takes long where there is much
    yield Viewer(lenet_ext.Net.from_pretrained("mnist"), "mnist", DATA_SETS["mnist"])
    gc.unfreeze()


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digit", STROKES)
def test_a_drawing(digit: str, viewer: Viewer) -> None:
    found = viewer.look(draw(digit).tobytes())
    assert found is not None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["best"]["label"] == digit
    assert found["sure"]
    assert [entry["label"] for entry in found["classes"]] == list("0123456789")
    assert sum(entry["probability"] for entry in found["classes"]) == pytest.approx(1, abs=1e-4)
    assert found["times"]["fused_us"] > 0
    assert found["times"]["stock_us"] > 0
    assert found["times"]["threads"] == 1


def test_the_layers_are_those_of_the_stock_network(viewer: Viewer) -> None:
    found = viewer.look(draw("4").tobytes())
    assert found is not None
    picture, first, second = (
        torch.tensor(layer["values"], dtype=torch.float64).view(layer["shape"]) for layer in found["layers"]
    )
    assert picture.max() == 255
    mean, std = 0.1, 0.2752
    stock = viewer.net.to_reference().double()
    expected_first = F.max_pool2d(F.relu(stock.conv1((picture[None] / 255 - mean) / std)), 2)
    expected_second = F.max_pool2d(F.relu(stock.conv2(expected_first)), 2)
    for maps, expected in ((first, expected_first[0]), (second, expected_second[0])):
        # To half a step of the 255, and a rounding error.
        torch.testing.assert_close(maps, 255 * expected / expected.max(), rtol=0, atol=0.51)


def test_the_page_sees_what_predict_sees(viewer: Viewer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw("7").save(tmp_path / "7.png")
    assert main(["predict", "--json", "--top", "10", str(tmp_path / "7.png")]) == 0
    (expected,) = json.loads(capsys.readouterr().out)
    found = viewer.look(draw("7").tobytes())
    assert found is not None
    for entry in expected["top"]:
        assert found["classes"][int(entry["label"])]["probability"] == pytest.approx(entry["probability"], abs=1e-5)


@pytest.mark.parametrize("ink", [0, 51])
def test_nothing_is_seen_where_there_is_no_ink(ink: int, viewer: Viewer) -> None:
    assert viewer.look(bytes([ink]) * SIDE * SIDE) is None


def test_a_drawing_has_its_size(viewer: Viewer) -> None:
    with pytest.raises(ValueError, match="a drawing has 16384 bytes, found 3"):
        viewer.look(b"ink")


@pytest.mark.parametrize("pixels", [[0], [SIDE * SIDE - 1], range(SIDE * SIDE), range(SIDE)])
def test_any_ink_has_an_answer(pixels: Any, viewer: Viewer) -> None:
    drawing = bytearray(SIDE * SIDE)
    for pixel in pixels:
        drawing[pixel] = 255
    found = viewer.look(drawing)
    assert found is not None
    assert len(found["classes"]) == 10


def test_a_doubtful_answer_is_not_sure(viewer: Viewer) -> None:
    net = lenet_ext.Net.from_pretrained("mnist")
    with torch.no_grad():
        net.fc3.weight.mul_(0.01)
    found = Viewer(net, "mnist", DATA_SETS["mnist"]).look(draw("7").tobytes())
    assert found is not None
    assert not found["sure"]


def test_of_many_classes_the_most_probable() -> None:
    data_set = DATA_SETS["emnist-balanced"]
    net = lenet_ext.Net(num_classes=data_set.num_classes)
    viewer = Viewer(net, "emnist-balanced", data_set)
    assert viewer.about()["labels"] == data_set.labels[:10]
    found = viewer.look(draw("7").tobytes())
    assert found is not None
    probabilities = [entry["probability"] for entry in found["classes"]]
    assert len(probabilities) == 10
    assert probabilities == sorted(probabilities, reverse=True)
    assert found["best"] == found["classes"][0]


def test_weights_that_are_no_numbers() -> None:
    net = lenet_ext.Net()
    torch.nn.init.constant_(net.conv1.weight, torch.nan)
    found = Viewer(net, "mnist", DATA_SETS["mnist"]).look(draw("7").tobytes())
    assert found is not None
    json.dumps(found, allow_nan=False)
    assert not found["sure"]


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port(viewer: Viewer) -> Iterator[int]:
    """Of a server in another thread."""
    server = build_server(viewer, "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(timeout=30)
    assert not thread.is_alive()


DRAWING = {"Content-Type": "application/octet-stream"}


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def look(port: int, drawing: bytes) -> tuple[int, Any]:
    status, body = ask(port, "POST", "/look", drawing, **DRAWING)
    return status, json.loads(body) if status == 200 else body.decode()


def test_the_page_and_its_files(port: int) -> None:
    status, page = ask(port, "GET", "/")
    assert status == 200
    assert b"<!doctype html>" in page
    for name in re.findall(r'(?:href|src)="([^"]+)"', page.decode()):
        assert ask(port, "GET", f"/{name}") == (200, (PAGE / name).read_bytes())
    status, about = ask(port, "GET", "/about")
    assert (status, json.loads(about)["data"]) == (200, "mnist")


def test_the_page_names_nothing_elsewhere() -> None:
    for path in PAGE.iterdir():
        assert re.findall(r"(?:https?:)?//[\w.]+", path.read_text().replace("http://www.w3.org/2000/svg", "")) == []


def test_look(port: int) -> None:
    status, found = look(port, draw("7").tobytes())
    assert (status, found["best"]["label"]) == (200, "7")
    assert look(port, bytes(SIDE * SIDE)) == (200, None)


def test_several_tabs_at_once(port: int) -> None:
    drawings = {digit: draw(digit).tobytes() for digit in STROKES}
    digits = [*STROKES] * 2
    with ThreadPoolExecutor(len(digits)) as tabs:
        answers = list(tabs.map(lambda digit: look(port, drawings[digit]), digits))
    assert [(status, found["best"]["label"]) for status, found in answers] == [(200, digit) for digit in digits]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "expected"),
    [
        ("POST", "/look", b"", DRAWING, 400),
        ("POST", "/look", bytes(SIDE * SIDE - 1), DRAWING, 400),
        ("POST", "/look", bytes(SIDE * SIDE + 1), DRAWING, 413),
        ("POST", "/look", bytes(1 << 24), DRAWING, 413),
        ("POST", "/look", bytes(SIDE * SIDE), {"Content-Type": "text/plain"}, 415),
        ("POST", "/look", bytes(SIDE * SIDE), {}, 415),
        ("GET", "/look", None, {}, 404),
        ("POST", "/about", b"", {}, 405),
        ("DELETE", "/", None, {}, 405),
        ("GET", "/nothing", None, {}, 404),
        ("GET", "/../viewer.py", None, {}, 404),
        ("GET", "/%2e%2e/viewer.py", None, {}, 404),
        ("GET", "//etc/passwd", None, {}, 404),
        ("GET", "/", None, {"Host": "evil.example"}, 400),
        ("POST", "/look", bytes(SIDE * SIDE), {**DRAWING, "Host": "evil.example:7860"}, 400),
    ],
)
def test_what_is_refused(
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    expected: int,
    port: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    try:
        status, text = ask(port, method, path, body, **headers)
    except (BrokenPipeError, ConnectionResetError):
        # Told while the rest of the sixteen megabytes was still on its way.
        assert expected == 413
    else:
        assert status == expected
        assert b"Traceback" not in text
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert ask(port, "GET", "/about")[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\xff\x16\x03\x01 garbage\r\n\r\n",
        b"POST /look HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /look HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16384\r\n"
        b"Content-Type: application/octet-stream\r\n\r\nno more than this",
        b"GET / HTTP/1.1\r\nX: " + bytes(1 << 20),
        b"",
    ],
)
def test_a_client_that_talks_nonsense_and_leaves(sent: bytes, port: int, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        try:
            client.sendall(sent)
            with contextlib.suppress(OSError):  # the other side may have closed already
                client.shutdown(socket.SHUT_WR)
            reply = client.recv(1 << 16)
        except ConnectionError:
            reply = b""
    assert reply == b"" or reply.startswith(b"HTTP/1.1 4")
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert ask(port, "GET", "/about")[0] == 200


# --- the command ------------------------------------------------------------------------------------------------------


def failure(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    try:
        code = main(["demo", *map(str, args)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return code, line


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, line = failure(capsys, "--port", port)
    assert code == 1
    assert line == f"lenet-ext demo: error: 127.0.0.1:{port}: Address already in use"


def test_without_a_port_the_next_free_one() -> None:
    with command._listen("127.0.0.1", None) as first, command._listen("127.0.0.1", None) as second:
        assert first.getsockname()[1] != second.getsockname()[1]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org", ""])
def test_other_machines_are_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = failure(capsys, "--host", host)
    assert code == 2
    assert "--host" in line
    assert "this machine alone" in line


def test_photographs_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lenet_ext.Net(in_channels=3).save_pretrained(tmp_path / "net", config={"data": "cifar10"})
    code, line = failure(capsys, tmp_path / "net")
    assert code == 2
    assert "cifar10" in line


def test_a_checkpoint_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.pt").write_text("notes")
    code, line = failure(capsys, tmp_path / "notes.pt")
    assert code == 1
    assert "notes.pt" in line


def test_missing_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, line = failure(capsys)
    assert code == 1
    assert line.endswith("uvicorn is needed for the drawing page: pip install 'lenet_ext[demo]'")


@pytest.mark.parametrize(
    ("terminal", "desktop", "expected"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_a_browser_is_opened_for_a_person_only(
    terminal: bool, desktop: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    if desktop:
        monkeypatch.setenv("DISPLAY", ":0")
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: terminal, raising=False)
    assert command._somebody_watches() is expected


def test_the_browser_is_told_the_address(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr("webbrowser.open", told.put)
    monkeypatch.setattr(command, "_somebody_watches", lambda: True)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)  # until Ctrl-C
    assert main(["demo", "--port", "0"]) == 0
    address = told.get(timeout=60)
    assert f"draw at {address} (Ctrl-C ends)" in capsys.readouterr().out
    assert main(["demo", "--port", "0", "--no-browser"]) == 0
    assert told.empty()
    gc.unfreeze()


def test_from_the_first_line_to_control_c(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lenet_ext", "demo", "--port", "0", "--threads", "1"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.fullmatch(r"draw at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends\)\n", line)
        assert address is not None, line
        port = int(address[1])
        # Held open, as a browser holds it.
        with socket.create_connection(("127.0.0.1", port), timeout=30):
            assert look(port, draw("7").tobytes())[1]["best"]["label"] == "7"
            process.send_signal(signal.SIGINT)
            rest, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, rest, stderr) == (1, "", "lenet-ext demo: interrupted\n")
