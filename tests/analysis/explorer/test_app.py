"""The page in a real browser."""

import http.client
import signal
import socket
import subprocess
import sys
from functools import partial

import pytest

from hamt.analysis.explorer.session import MAX_TOKENS

TEXT = "The state of the Union is strong. The Congress has the power to act."
SPEECH = "The Congress of the United States has the power to act, and the people expect it to act. "


@pytest.fixture(scope="module")
def address():
    """``hamt explore`` in a process of its own, ended by Ctrl-C."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hamt.cli", "explore", "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A shell lets jobs in the background, as tests may be, ignore Ctrl-C, and what they start, too.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, **pipes, preexec_fn=hear)
    try:
        said = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in said, said
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[0]
        assert process.returncode == 0, rest
        assert "Traceback" not in rest
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def page(address, chromium):
    """The page, which may talk to nobody else."""
    strangers: list[str] = []
    errors: list[str] = []

    def gate(route):
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            strangers.append(route.request.url)
            route.abort()

    view = chromium.new_page(viewport={"width": 1280, "height": 1000})
    view.set_default_timeout(60_000)
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.route("**/*", gate)
    view.goto(address)
    view.get_by_text("tokens read.").wait_for()
    yield view
    assert strangers == [], "nothing is fetched from elsewhere"
    assert errors == []


@pytest.mark.slow
def test_other_pages_are_not_answered(address):
    """A page of somebody else cannot leave files here, nor ask under a name of its own."""
    host = address.removeprefix("http://")

    def status(method, path, headers, body=None):
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request(method, path, body, headers)
        answer = connection.getresponse().status
        connection.close()
        return answer

    assert status("GET", "/", {}) == 200
    assert status("GET", "/", {"Host": "elsewhere.example"}) == 400
    assert status("GET", "/", {"Origin": "http://elsewhere.example"}) == 403
    assert status("POST", "/gradio_api/upload", {}, "word") == 403


def give(page, text, answer):
    page.locator("#text textarea").fill(text)
    page.locator("#read").click()
    page.locator("#status").get_by_text(answer).wait_for()


def test_load_type_click_and_scrub(page):
    assert page.locator("#slots td").count() == 64, "an example is read when the page opens"
    give(page, TEXT, "16 tokens read.")
    page.locator("#tokens").get_by_text("Congress").click()
    page.locator("#found").get_by_text("Congress” (token 9) read in layer 3").wait_for()
    assert page.locator("#found table").first.locator("tr").count() >= 2
    assert "0 back" in page.locator("#found").inner_text()
    before = page.locator("#slots table").inner_html()
    style = "tokens => tokens.map(token => getComputedStyle(token).{})"
    tokens = page.locator("#tokens .token")
    outlines = tokens.evaluate_all(style.format("outlineStyle"))
    assert outlines[9] == "solid"
    colours = tokens.evaluate_all(style.format("backgroundColor.match(/\\d+/g)"))
    assert len({tuple(colour) for colour in colours}) > 3
    assert all(int(red) <= int(blue) for red, _, blue, *_ in colours), "shades of blue"
    assert 2 <= outlines.count("solid") <= 7, "the token and its sources"
    assert page.locator("#time input[type=range]").get_attribute("max") == "16"
    page.locator("#time input[type=range]").fill("2")
    page.locator("#slots").get_by_text("after 2 tokens").wait_for()
    assert page.locator("#slots table").inner_html() != before
    page.locator("#layer input").click()
    page.get_by_role("option", name="0", exact=True).click()
    page.locator("#slots").get_by_text("Layer 0 after").wait_for()


def test_empty_and_long_texts_are_answered_kindly(page):
    give(page, "", "There is no text yet")
    assert page.locator("#slots td").count() == 0
    give(page, SPEECH * 120, "were left out")
    assert page.locator("#slots td").count() == 64
    assert page.locator("#time input[type=range]").get_attribute("max") == str(MAX_TOKENS)
    page.locator("#tokens").get_by_text("Congress").first.click()
    page.locator("#found").get_by_text("read in layer").wait_for()
    box = page.locator("#found h4").bounding_box()
    assert box["y"] < 950, "the answer is seen without scrolling"
    page.locator("#time input[type=range]").fill("100")
    page.locator("#slots").get_by_text("after 98 tokens").wait_for()


def test_a_narrow_window_shows_everything(page):
    page.set_viewport_size({"width": 420, "height": 900})
    give(page, TEXT, "16 tokens read.")
    page.locator("#tokens").get_by_text("Congress").click()
    page.locator("#found h4").scroll_into_view_if_needed()
    assert page.locator("#found h4").bounding_box()["width"] > 250
    assert page.locator("#slots table").bounding_box()["width"] > 250
    page.set_viewport_size({"width": 1280, "height": 1000})


def test_writing_shows_words_and_slots(page):
    page.get_by_role("tab", name="Write").click()
    page.locator("#count input[type=number]").fill("12")
    page.locator("#write").click()
    page.locator("#live").get_by_text("after 12 new tokens").wait_for()
    text = page.locator("#written textarea").input_value()
    assert 12 < len(text) < 200
    assert page.locator("#live td").count() == 64
