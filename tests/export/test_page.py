"""The page of ``hamt export --format web`` in a real browser: it needs no server but files."""

import os
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch

from hamt.analysis.contributions import contributions
from hamt.analysis.record import memory_layers, record
from hamt.checkpoint import load_checkpoint, save_checkpoint
from hamt.cli import main
from hamt.export.runtime import FILES

pytestmark = pytest.mark.skipif(
    "HAMT_TEST_BROWSER" not in os.environ, reason="HAMT_TEST_BROWSER=1 asks for the browser"
)
PROMPT = "the sum of 12 and 13 is\n25"


@pytest.fixture(scope="module")
def checkpoint(folders, tmp_path_factory):
    """A model whose memories matter to what it writes."""
    model, tokenizer = load_checkpoint(folders / "ours")
    torch.manual_seed(2)  # its first token is a whole character
    with torch.no_grad():
        model.model.layers[0].mixer.output_proj.weight.normal_(std=0.5)
        embedding = model.model.embed_tokens.weight.normal_(std=0.3)
        embedding[tokenizer.eos_token_id] = 0  # no text ends before a test ends it
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny & <new>"
    save_checkpoint(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def site(checkpoint, runtime, tmp_path_factory):
    """The exported folder."""
    folder = tmp_path_factory.mktemp("site")
    arguments = ["--format", "web", "--checkpoint", str(checkpoint), "--output_dir", str(folder)]
    assert main(["export", *arguments]) == 0
    return folder


class Quiet(SimpleHTTPRequestHandler):
    """As ``python -m http.server``, with a log for the tests; it calls .mjs files no scripts."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "application/octet-stream"}
    asked: ClassVar[list[str]] = []

    def log_message(self, *arguments):
        self.asked.append(self.path)


@pytest.fixture(scope="module")
def address(site):
    """Where the folder is served; browsers take old files for such as will not change soon."""
    for file in site.rglob("*"):
        os.utime(file, (0, 1e9))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def page(address, chromium):
    """The page when it is ready. It may say nothing on the console, and ask nobody else."""
    view, told = chromium.new_page(), []
    view.on("console", lambda message: told.append(message.text))
    view.on("pageerror", lambda error: told.append(str(error)))
    view.on("request", lambda request: request.url.startswith(address) or told.append(request.url))
    view.on("response", lambda answer: answer.status == 200 or told.append(answer.url))
    view.goto(address)
    view.get_by_text("Ready.").wait_for()
    yield view
    view.close()
    assert told == []


def write(page, prompt: str, count: int) -> None:
    """The likeliest tokens: no chance lets the text end."""
    page.locator("#temperature").fill("0")
    page.locator("#count").fill(str(count))
    page.locator("#prompt").fill(prompt)
    page.locator("#write").click()
    page.locator("#status").get_by_text("start anew").wait_for()


def greedy(checkpoint, prompt: str, count: int) -> tuple[list[int], int]:
    model, tokenizer = load_checkpoint(checkpoint)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return output[0].tolist(), ids.shape[1]


@pytest.mark.slow
def test_it_writes_what_hamt_generate_writes(page, checkpoint):
    _, tokenizer = load_checkpoint(checkpoint)
    ids, given = greedy(checkpoint, PROMPT, 30)
    write(page, PROMPT, 30)
    assert page.locator("#tokens").inner_text() == str(len(ids))
    pieces = page.locator("#text [role=option]").all_text_contents()
    assert "".join(pieces[:given]) == PROMPT
    assert "".join(pieces) == tokenizer.decode(ids).rstrip("\ufffd")
    assert page.locator("#text .written").count() == 30


def test_it_goes_on_with_what_is_typed(page, checkpoint):
    """Which is the same as one text."""
    write(page, PROMPT, 1)
    first = page.locator("#text").text_content()
    assert len(first) > len(PROMPT), "a token of part of a character could not be typed again"
    assert page.locator("#write").inner_text() == "Go on"
    write(page, " and", 5)
    ids, _ = greedy(checkpoint, first + " and", 5)
    assert page.locator("#tokens").inner_text() == str(len(ids))
    _, tokenizer = load_checkpoint(checkpoint)
    assert page.locator("#text").text_content() == tokenizer.decode(ids).rstrip("\ufffd")


SHARES = """async (ids) => {
  const {Model} = await import("./model.js");
  const model = await Model.load(), sizes = new Set();
  for (const id of ids) {
    await model.read(id);
    sizes.add(model.stateBytes);
  }
  const shares = model.step.page.layers.map(
    (_, index) => Array.from(model.record.shares(index, ids.length - 1).shares));
  return {shares, sizes: [...sizes], begin: model.record.begin};
}"""


def test_it_tells_where_tokens_come_from(page, checkpoint):
    """The shares of the analysis to 1e-4, from the traces of the file in the browser."""
    model, _ = load_checkpoint(checkpoint)
    ids = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
    found = page.evaluate(SHARES, ids[0].tolist())
    recording = record(model, ids)
    for index, shares in zip(memory_layers(model), found["shares"], strict=True):
        wanted = contributions(recording.trace(index), [39]).tokens[0, 0].mean(dim=0)
        assert torch.allclose(torch.tensor(shares), wanted, atol=1e-4)
        assert wanted.abs().max() > 0.05


def test_a_chosen_token_names_its_sources(page):
    write(page, PROMPT, 12)
    token = page.locator("#text [role=option]").nth(9)
    token.click()
    assert token.get_attribute("aria-selected") == "true"
    shares = page.locator("#sources .share").all_inner_texts()
    assert 1 < len(shares) <= 8
    # All sources of the ninth read-out but those that are not listed: the largest come first.
    sizes = [abs(float(share.removesuffix(" %").replace("−", "-"))) for share in shares]
    assert sizes == sorted(sizes, reverse=True)
    kind = "was written" if "written" in token.get_attribute("class") else "was given"
    assert kind in page.locator("#asked").inner_text()
    # The keyboard does as well, and layers have shares of their own.
    page.locator("#text").press("ArrowLeft")
    assert page.locator("#text [aria-selected=true]").get_attribute("id") == "token-8"
    page.locator("#text").press("Home")
    assert "is the first token: nothing was" in page.locator("#asked").inner_text()
    page.locator("#text").press("Escape")
    assert page.locator("#text [aria-selected=true]").get_attribute("id") != "token-0"


CONTRASTS = """([share, against]) => {
  const numbers = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[0-9.]+(e-?[0-9]+)?/g).map(Number);
    return [...[r, g, b].map((x) => colour.startsWith("rgb") ? x / 255 : x), a];
  };
  const paper = numbers(getComputedStyle(document.body).backgroundColor);
  const light = (rgb) => rgb.slice(0, 3)
    .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  return Array.from(document.querySelectorAll("#text [role=option]"), (token) => {
    token.style.setProperty("--share", share);
    token.classList.toggle("against", against);
    const style = getComputedStyle(token), [r, g, b, a] = numbers(style.backgroundColor);
    const behind = [r, g, b].map((x, i) => a * x + (1 - a) * paper[i]);
    const [one, other] = [light(numbers(style.color)), light(behind)].sort((x, y) => y - x);
    return (one + 0.05) / (other + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_read_on_their_colours(scheme, page):
    """With the contrast that WCAG 2.2 asks for (AA, 1.4.3), whatever their shares."""
    page.emulate_media(color_scheme=scheme)
    write(page, PROMPT, 12)
    for share in (0, 0.25, 0.5, 0.75, 1):
        for against in (False, True):
            assert min(page.evaluate(CONTRASTS, [share, against])) >= 4.5, (share, against)


def test_its_memory_stays_the_same(page):
    """State and window, beside a cache that grows; and old tokens leave the list."""
    write(page, PROMPT, 20)
    state, cache = (page.locator(name).inner_text() for name in ("#state", "#cache"))
    write(page, "", 600)
    assert page.locator("#state").inner_text() == state
    assert page.locator("#cache").inner_text() != cache
    assert 448 <= page.locator("#text [role=option]").count() <= 512
    assert page.locator("#text .older").text_content().startswith(PROMPT)
    page.locator("#text [role=option]").first.click()
    assert "what it comes from is forgotten" in page.locator("#asked").inner_text()
    page.locator("#text [role=option]").last.click()
    assert "What came before the" in page.locator("#before").inner_text()
    listed = page.locator("#text [role=option]").evaluate_all("all => all.map((each) => each.id)")
    assert listed[-1] == f"token-{int(page.locator('#tokens').inner_text()) - 1}"
    page.locator("#anew").click()
    assert page.locator("#tokens").inner_text() == "0"
    assert page.locator("#text").text_content() == ""


def test_it_pauses(page):
    page.locator("#count").fill("100000")
    page.locator("#temperature").fill("0")
    page.locator("#write").click()
    page.get_by_text("Writing.").wait_for()
    page.locator("#write").click()
    page.get_by_text("Paused.").wait_for()
    assert 0 < int(page.locator("#tokens").inner_text().replace(",", "")) < 100_000


# As soon as the page hears of it, and not when a busy machine has come to it.
READ_AND_PAUSE = """(text) => {
  const prompt = document.getElementById("prompt"), button = document.getElementById("write");
  prompt.value = text;
  button.click();
  setTimeout(() => {
    prompt.value = "typed";
    button.click();
  });
}"""


def test_it_goes_on_reading_where_it_paused(page, checkpoint):
    """Characters of several tokens and special tokens come whole; what is typed comes behind."""
    _, tokenizer = load_checkpoint(checkpoint)
    prompt = "a <|endoftext|>🙂漢 " * 200
    page.locator("#count").fill("1")
    page.evaluate(READ_AND_PAUSE, prompt)
    page.get_by_text("still to be read").wait_for()
    assert page.locator("#prompt").input_value() == "typed"
    write(page, "typed", 1)
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, "typed")]
    assert page.locator("#tokens").inner_text() == f"{sum(map(len, parts)) + 1:,}"
    given = "".join(page.locator("#text .given").all_text_contents())
    assert len(given) > 100
    assert (prompt.replace("<|endoftext|>", "") + "typed").endswith(given)
    # What is still to be read when a text is left is of that text.
    page.evaluate(READ_AND_PAUSE, prompt)
    page.get_by_text("still to be read").wait_for()
    page.locator("#anew").click()
    write(page, "a", 1)
    assert page.locator("#tokens").inner_text() == "2"


def test_it_shows_what_it_takes(page):
    """A number of tokens that is none, and what a browser fills in when one comes back."""
    write(page, "a", 0)
    assert page.locator("#count").input_value() == "1"
    assert page.locator("#text .written").count() == 1
    page.locator("#temperature").fill("0.3")
    page.goto("about:blank")
    page.go_back()
    page.get_by_text("Ready.").wait_for()
    value = page.locator("#temperature").input_value()
    assert page.locator("#temperature-value").inner_text() == value


def test_files_of_two_exports_do_not_meet(page, address):
    """A browser asks again whether what it has kept is still so."""
    Quiet.asked.clear()
    page.goto("about:blank")
    page.goto(address)
    page.get_by_text("Ready.").wait_for()
    assert {"/model.onnx", "/step.json", "/tokenizer.json"} <= {*Quiet.asked}


def test_what_fails_is_told(address, chromium):
    view = chromium.new_page()
    view.goto(address)
    view.get_by_text("Ready.").wait_for()
    view.evaluate("() => { BigInt64Array.of = () => { throw new Error('out of memory'); }; }")
    view.locator("#write").click()
    view.get_by_text("The model cannot go on: out of memory").wait_for()
    assert view.locator("#write").inner_text() == "Write"
    view.close()


def test_as_a_file_it_says_what_to_do(site, chromium):
    view = chromium.new_page()
    view.goto(f"file://{site / 'index.html'}")
    notice = view.locator("#notice").inner_text()
    assert "python -m http.server" in notice
    assert view.locator("#write").is_disabled()
    view.close()


def test_a_missing_file_is_told(address, chromium):
    """And stays told when others come later."""
    view, later = chromium.new_page(), []
    view.route("**/model.onnx", lambda route: route.fulfill(status=404))
    view.route("**/tokenizer.json", lambda route: later.append(route))
    view.goto(address)
    view.get_by_text("model.onnx is not there (404)").wait_for()
    with view.expect_event("requestfinished", lambda request: "tokenizer.json" in request.url):
        later[0].continue_()
    view.wait_for_timeout(200)
    assert view.locator("#status").inner_text() == "Not running."
    view.close()


@pytest.mark.parametrize(("file", "answer"), [
    ("chart.js", {"status": 404}), ("app.js", {"body": "a =", "content_type": "text/javascript"}),
])  # fmt: skip
def test_a_script_that_does_not_run_is_told(file, answer, address, chromium):
    """One that is missing, and one that this browser does not understand."""
    view = chromium.new_page()
    view.route(f"**/{file}", lambda route: route.fulfill(**answer))
    view.goto(address)
    view.get_by_text("one of its files is missing, or the browser is older").wait_for()
    assert view.locator("#status").inner_text() == "Not running."
    view.close()


def test_the_folder_has_what_it_needs_and_no_more(site):
    """Names are escaped, and no file but those of the runtime names another host."""
    runtime = {path.name for path in (site / "runtime").iterdir()}
    assert runtime == {name.replace(".mjs", ".js") for name in FILES}
    index = (site / "index.html").read_text(encoding="utf-8")
    assert "tiny &amp; &lt;new&gt;: " in index
    assert "<!--" not in index.replace("<!-- Nothing is loaded", "")
    for path in site.glob("*"):
        if path.suffix in (".html", ".js", ".css", ".json") and path.name != "tokenizer.json":
            hosts = re.findall(r"\w+://[\w.]*", path.read_text(encoding="utf-8"))
            assert {*hosts} <= {"http://www.w3.org"}, path  # the name of SVG
