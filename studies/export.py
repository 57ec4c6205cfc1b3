"""What an exported model costs, and the picture of the page: docs/results/export.

OMP_NUM_THREADS=1 venv/bin/python studies/export.py
"""

import argparse
import gzip
import re
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import torch
from playwright.sync_api import Page, sync_playwright

from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.cli import main as hamt
from hamt.environment import describe_environment, environment
from hamt.export.aoti import load_aoti
from hamt.export.check import compare
from hamt.export.native import load_native
from hamt.export.onnx_file import load_onnx
from hamt.export.step import Run, Step, empty_state, run_eagerly
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, paragraphs
from hamt.output import claim

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "export.png"
COMPARED = 200  # tokens
WARM, TIMED = 100, 500  # tokens before the clock starts, and while it runs
FAR = 20  # tokens
LENGTHS = (1_000, 5_000)  # tokens after which the browser's memory is measured


def native(step: Step, run: Run, ids: torch.Tensor) -> tuple[float, float]:
    """Tokens a second of one text: of the clock, and of the processor's time."""
    state, begun = empty_state(step, 1), (0.0, 0.0)
    for index in range(WARM + TIMED):
        if index == WARM:
            begun = time.perf_counter(), time.process_time()
        outputs = run([ids[:, index : index + 1], *state])
        state = list(outputs[1 : len(step.state) + 1])
    return TIMED / (time.perf_counter() - begun[0]), TIMED / (time.process_time() - begun[1])


class Quiet(SimpleHTTPRequestHandler):
    """As ``python -m http.server``, without its log."""

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@contextmanager
def served(folder: Path):
    """The address at which a folder is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


def renderer() -> psutil.Process:
    """The process of the page."""
    found = (
        each
        for each in psutil.Process().children(recursive=True)
        if "--type=renderer" in " ".join(each.cmdline())
    )
    return max(found, key=lambda each: each.cpu_times().user)  # another one waits for work


def write(page: Page, prompt: str, count: int, temperature: float) -> None:
    """Let the page read a prompt, and write so many tokens; if the text ends, begin a sentence."""
    page.locator("#temperature").fill(str(temperature))
    target = int(page.locator("#tokens").inner_text().replace(",", "")) + count
    page.locator("#prompt").fill(prompt)
    while (left := target - int(page.locator("#tokens").inner_text().replace(",", ""))) > 0:
        page.locator("#count").fill(str(left))
        page.locator("#write").click()
        page.locator("#status").get_by_text("start anew").wait_for(timeout=600_000)
        if "ended" in page.locator("#status").inner_text():
            page.locator("#prompt").fill("\n\nThe Congress")


def browser(folder: Path) -> dict:
    """Figures of the page in a headless Chromium, and its picture."""
    with served(folder) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        page = chromium.new_page(viewport={"width": 1180, "height": 1000})
        begun = time.perf_counter()
        page.goto(address)
        page.get_by_text("Ready.").wait_for(timeout=120_000)
        found: dict = {"browser": chromium.version, "ready_seconds": time.perf_counter() - begun}
        write(page, page.locator("#prompt").input_value(), WARM, 0.8)
        process = renderer()
        before = process.cpu_times()
        page.locator("#count").fill(str(TIMED))
        wall = time.perf_counter()
        length = int(page.locator("#tokens").inner_text().replace(",", ""))
        write(page, "", TIMED, 0.8)
        wall = time.perf_counter() - wall
        after = process.cpu_times()
        wrote = int(page.locator("#tokens").inner_text().replace(",", "")) - length
        found["tokens_a_second"] = wrote / wall
        used = after.user + after.system - before.user - before.system
        found["tokens_a_processor_second"] = wrote / used
        found["memory"] = []
        for length in LENGTHS:
            write(page, "", length - int(page.locator("#tokens").inner_text().replace(",", "")), 1)
            shown = {name: page.locator(f"#{name}").inner_text() for name in ("state", "cache")}
            found["memory"].append({"tokens": length, "rss": process.memory_info().rss, **shown})
        picture(page)
        chromium.close()
    return found


def picture(page: Page) -> None:
    """A text, at the last layer, with the token that most of comes from far."""
    page.locator("#anew").click()
    write(page, "The state of the Union is", 180, 0.6)
    page.locator("#layers label").nth(4).click()
    tokens, far = page.locator("#text [role=option]"), {}
    for place in range(80, tokens.count()):
        tokens.nth(place).click()
        shares = page.locator("#sources li").all_inner_texts()
        found = (re.search(r"(\d+) tokens back\s+([\d.]+) %", each) for each in shares)
        far[place] = sum(float(each[2]) for each in found if each and int(each[1]) > FAR)
    tokens.nth(max(far, key=lambda place: far[place])).click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    page.screenshot(path=PICTURE, full_page=True)


def main() -> None:
    """Export in all formats, measure, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="docs/results/export")
    options = parser.parse_args()
    header = environment()
    model, _ = load_checkpoint(PRETRAINED)
    step = Step(model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (5, WARM + TIMED), generator=draw)
    rows, figures, sizes = [], {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in ("onnx", "aoti", "c", "web")}
        runs: dict[str, Run] = {"PyTorch, eager": run_eagerly(step)}
        for name, folder in folders.items():
            begun = time.perf_counter()
            assert hamt(["export", "--format", name, "--output_dir", str(folder)]) == 0
            sizes[name] = {"seconds": time.perf_counter() - begun}
        runs["ONNX, onnxruntime"] = load_onnx(folders["onnx"] / "model.onnx")[0]
        runs["AOTInductor"] = load_aoti(folders["aoti"] / "model.pt2")[0]
        runs["C++"] = load_native(folders["c"] / "model.hamt", step)[0]
        files = {
            "ONNX, onnxruntime": "onnx/model.onnx",
            "AOTInductor": "aoti/model.pt2",
            "C++": "c/model.hamt",
        }
        for name, run in runs.items():
            wall, processor = native(step, run, ids[:1])
            agreement = [compare(step, run, ids[:n, :COMPARED]) for n in (1, 5)]
            size = (Path(temporary) / files[name]).stat().st_size if name in files else None
            worst = max(each.difference for each in agreement)
            figures[name] = {
                "tokens_a_second": wall,
                "tokens_a_processor_second": processor,
                "difference": worst,
                "bytes": size,
            }
            shown = "–" if size is None else f"{size / 1e6:.1f}"
            rows.append([name, f"{wall:,.0f}", f"{processor:,.0f}", f"{worst:.1e}", shown])
        web = [x for x in folders["web"].rglob("*") if x.is_file() and ".hamt" not in x.parts]
        sizes["web"]["bytes"] = sum(x.stat().st_size for x in web)
        sizes["web"]["compressed_bytes"] = sum(len(gzip.compress(x.read_bytes())) for x in web)
        found = browser(folders["web"])
    wall, processor = found["tokens_a_second"], found["tokens_a_processor_second"]
    loaded = f"{sizes['web']['bytes'] / 1e6:.1f}"
    rows.append(["web page, Chromium", f"{wall:,.0f}", f"{processor:,.0f}", "", loaded])
    headings = ["the model in HAMT as", "tokens/s", "tokens per second of processor time"]
    headings += [f"largest difference over {COMPARED} tokens", "MB"]
    memory = [
        [f"{each['tokens']:,}", each["state"], each["cache"], f"{each['rss'] / 1e6:.0f}"]
        for each in found["memory"]
    ]
    page = paragraphs(
        "# A model for other programs",
        f"One text, one thread, a token at a time: {TIMED} tokens after {WARM}. The difference is "
        "that of logits from the model's own, as a share of the largest, with one text and with "
        "five. The page also records where tokens come from, and shows it. "
        f"All its files are {loaded} MB, {sizes['web']['compressed_bytes'] / 1e6:.1f} MB if a "
        f"server compresses them; it was ready after {found['ready_seconds']:.1f} s.",
        markdown(headings, rows, text=[0]),
        "The page while it writes: the state, what a key–value cache of a transformer as wide and "
        "as deep would take, and all memory of the page's process.",
        markdown(["tokens", "state", "cache", "process, MB"], memory, text=[]),
        f"Chromium {found['browser']}; {describe_environment(header)}",
    )
    content = {"environment": header, "formats": figures, "exports": sizes, "page": found}
    with claim(options.output_dir, "export-study", [r"export\.(json|md)"], adopt=True) as output:
        write_report(output, "export", content, page, {})
    print(page)


if __name__ == "__main__":
    main()
