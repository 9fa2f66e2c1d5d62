"""``lenet-ext demo`` as a person uses it: drawn on with mouse and finger, in headless Chromium.

``DEMO_PICTURE=docs/pictures/demo.png`` makes the README's picture again.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("safetensors")
pytest.importorskip("selenium")
pytest.importorskip("PIL")

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.actions import interaction
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver (Debian: chromium-driver) are not here"
    ),
]

Stroke = list[tuple[float, float]]  # in shares of the paper's width
ZERO: Stroke = [
    (0.5 + 0.2 * math.sin(angle), 0.5 - 0.33 * math.cos(angle)) for angle in (n * math.tau / 24 for n in range(25))
]
STROKES: dict[str, list[Stroke]] = {
    "1": [[(0.53, 0.15), (0.52, 0.5), (0.5, 0.87)]],
    "7": [[(0.26, 0.2), (0.5, 0.2), (0.74, 0.2), (0.6, 0.5), (0.46, 0.85)]],
    "4": [[(0.36, 0.15), (0.26, 0.55), (0.75, 0.55)], [(0.66, 0.15), (0.63, 0.9)]],
    "0": [ZERO],
}


class Page:
    """The page in a browser of its own."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver = driver
        self.address = address

    def open(self) -> None:
        self.driver.get(self.address)
        self.until(lambda: len(self.driver.find_elements(By.CSS_SELECTOR, "#classes .track")) == 10)

    def text(self, name: str) -> str:
        return self.driver.find_element(By.ID, name).text

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        WebDriverWait(self.driver, seconds, poll_frequency=0.1).until(lambda _: condition())

    def stroke(self, points: Stroke, kind: str = interaction.POINTER_MOUSE, *, lift: bool = True) -> None:
        paper = self.driver.find_element(By.ID, "drawing")
        side = paper.size["width"]
        actions = ActionBuilder(self.driver, mouse=PointerInput(kind, kind), duration=30)
        pointer = actions.pointer_action
        for n, (x, y) in enumerate(points):
            # Offsets count from the middle of the element.
            pointer.move_to(paper, round((x - 0.5) * side), round((y - 0.5) * side))
            if n == 0:
                pointer.pointer_down()
        if lift:
            pointer.pointer_up()
        actions.perform()

    def draw(self, digit: str, kind: str = interaction.POINTER_MOUSE) -> None:
        for points in STROKES[digit]:
            self.stroke(points, kind)

    def expect(self, digit: str) -> None:
        self.until(lambda: self.text("best") == digit and "unsure" not in self.text("sure"))

    def painted(self, name: str) -> list[int]:
        """How many pixels of each map show something."""
        return self.driver.execute_script(
            """const shown = (byte, n) => n % 4 === 3 && byte > 0;
            const pixels = ({ width, height }, pen) => pen.getImageData(0, 0, width, height).data;
            const canvases = [...document.getElementById(arguments[0]).querySelectorAll("canvas")];
            return canvases.map((canvas) => pixels(canvas, canvas.getContext("2d")).filter(shown).length);""",
            name,
        )

    def requested(self) -> list[str]:
        """What was requested since the last time that this was asked."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@contextmanager
def serving() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command as a process, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lenet_ext", "demo", "--port", "0", "--no-browser"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[2], process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as (address, _):
        yield address


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        # As on a machine without a network.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
        "--window-size=1280,800",
        *(["--no-sandbox", "--disable-dev-shm-usage"] if os.geteuid() == 0 else []),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, address: str) -> Iterator[Page]:
    """Opened anew; afterwards nothing was requested from elsewhere, and the browser found no error."""
    page = Page(driver, address)
    page.requested()
    driver.get_log("browser")
    page.open()
    yield page
    requested = page.requested()
    assert page.address + "look" in requested
    assert {urlsplit(url).hostname for url in requested} == {"127.0.0.1"}
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("kind", [interaction.POINTER_MOUSE, interaction.POINTER_TOUCH])
@pytest.mark.parametrize("digit", STROKES)
def test_a_digit(digit: str, kind: str, page: Page) -> None:
    assert page.text("best") == "?"
    assert page.text("sure") == "Nothing is drawn yet"
    assert page.text("hint") == "Draw a digit"
    page.draw(digit, kind)
    page.expect(digit)
    assert page.text("hint") == ""
    bars = page.driver.find_elements(By.CSS_SELECTOR, "#classes .fill")
    widths = [bar.size["width"] for bar in bars]
    assert widths.index(max(widths)) == int(digit)
    assert min(page.painted("picture") + page.painted("layer1")) > 0
    assert max(page.painted("layer2")) > 0
    assert [text.endswith("µs") for text in page.text("times").splitlines()] == [False, True, False, True]
    assert "times as long" in page.text("ratio")


def test_the_answer_comes_before_the_pen_is_lifted(page: Page) -> None:
    page.stroke(STROKES["7"][0], lift=False)
    page.expect("7")


def test_undo_and_clear(page: Page) -> None:
    page.draw("1")
    page.expect("1")
    page.stroke(ZERO)
    page.until(lambda: page.text("best") != "1" or "unsure" in page.text("sure"))
    page.driver.find_element(By.ID, "undo").click()
    page.expect("1")
    page.driver.find_element(By.ID, "clear").click()
    assert page.text("best") == "?"
    assert page.text("hint") == "Draw a digit"
    assert set(page.painted("picture") + page.painted("layer1") + page.painted("layer2")) == {0}
    assert not page.driver.find_element(By.ID, "clear").is_enabled()


def test_another_button_draws_nothing(page: Page) -> None:
    paper = page.driver.find_element(By.ID, "drawing")
    webdriver.ActionChains(page.driver).context_click(paper).perform()
    assert page.text("hint") == "Draw a digit"
    page.draw("1")
    page.expect("1")


@pytest.mark.parametrize("width", [320, 412, 820, 1280, 1920])
def test_the_page_fits(width: int, page: Page) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.draw("7")
        page.expect("7")
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_light_and_dark(page: Page) -> None:
    inks = []
    page.draw("7")
    for theme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        page.until(lambda: page.text("best") == "7")
        center = "return [...document.getElementById('drawing').getContext('2d').getImageData(256, 102, 1, 1).data]"
        red, green, blue, alpha = page.driver.execute_script(center)
        assert alpha == 255
        inks.append(red + green + blue)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert inks[0] < 3 * 64
    assert inks[1] > 3 * 192


def test_a_picture_of_it(page: Page, tmp_path: Path) -> None:
    page.draw("4")
    page.expect("4")
    shown = Image.open(io.BytesIO(page.driver.find_element(By.TAG_NAME, "main").screenshot_as_png))
    picture = Path(os.environ.get("DEMO_PICTURE", tmp_path / "demo.png"))
    # A palette is enough for it, and a third of the bytes.
    shown.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)
    assert 10_000 < picture.stat().st_size < 60_000


def test_a_server_that_has_gone(driver: webdriver.Chrome) -> None:
    with serving() as (address, process):
        page = Page(driver, address)
        page.open()
        process.terminate()
        process.wait(timeout=60)
        page.draw("1")
        page.until(lambda: "still running" in page.text("sure"))
