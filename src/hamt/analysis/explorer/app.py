"""The page of ``hamt explore``: Gradio components around ``Explorer``."""

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
from starlette.middleware import Middleware

from hamt.analysis.explorer.render import BLUE, STYLE, described, slot_grid
from hamt.analysis.explorer.session import MAX_CHARACTERS, MAX_TOKENS, Explorer, View
from hamt.errors import UserError
from hamt.guard import Guard, in_url

# What the page sends; there is nothing else to be told, and no files.
POSTS = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
MAX_BODY = 4 * 2**20  # bytes; a text is cut long before that

EXAMPLES = (
    "The state of the Union is strong. The Congress of the United States has the power to act, "
    "and the people of the United States expect it to act.",
    "Peace with all nations is our policy. War is the last resort of a nation; peace is its first "
    "duty.",
)
WIDTH = 340  # pixels that a column needs; in a narrow window one goes below the other
KEPT = 3600.0  # seconds that a text is kept for a page that asks nothing more
SESSIONS = 8  # pages whose texts are kept, some 30 MB each; the one asked longest ago is dropped
SHADES = 10  # of blue, from the weakest write gate to the strongest
NOTHING = (
    "<p class='note'>Click a token of the text to see what it read from the memory, and from "
    "where.</p>"
)
GONE = "<p class='note'>This text is not kept any more: press Read once more.</p>"


def build_app(explorer: Explorer, name: str) -> gr.Blocks:
    """The whole page, of which nothing comes from elsewhere; ``name`` is that of the model."""
    layers = list(range(len(explorer.model.model.layers)))
    page = _Page(explorer)
    with gr.Blocks(title="HAMT: inside the memory", analytics_enabled=False) as app:
        gr.Markdown(f"# Inside the memory\n{name}: {explorer.model.num_parameters():,} parameters.")
        with gr.Tab("Read"):
            _reading_tab(app, page, layers)
        with gr.Tab("Write"):
            _writing_tab(page, layers)
    return app


def _reading_tab(app: gr.Blocks, page: "_Page", layers: list[int]) -> None:
    view = gr.State(None, time_to_live=KEPT)
    text = gr.Textbox(label="Text", lines=4, max_lines=4, value=EXAMPLES[0], elem_id="text")
    with gr.Row():
        read = gr.Button("Read", variant="primary", elem_id="read")
        layer = gr.Dropdown(layers, value=layers[-1], label="Layer", elem_id="layer")
    status = gr.Markdown(elem_id="status")
    tokens = gr.HighlightedText(
        label="Tokens: the bluer, the more strongly written. Click one.",
        color_map={str(shade): _colour(shade) for shade in range(SHADES + 1)},
        show_inline_category=False,
        elem_id="tokens",
        interactive=False,
    )
    with gr.Row():
        with gr.Column(min_width=WIDTH):
            found = gr.HTML(NOTHING, elem_id="found")
        with gr.Column(min_width=WIDTH):
            label = "The memory after so many tokens"
            time = gr.Slider(1, 2, value=1, step=1, label=label, elem_id="time")
            slots = gr.HTML(elem_id="slots")
    gr.Examples([[example] for example in EXAMPLES], [text])
    outputs = [view, status, tokens, found, time, slots]
    for event in (read.click, text.submit, app.load):
        event(page.read, [text, layer], outputs, show_progress="minimal")
    shown = [view, layer, time]
    layer.change(page.turn_to_layer, shown, [tokens, found, slots], show_progress="hidden")
    tokens.select(page.retrieve, [view, layer], found, show_progress="hidden")
    time.change(page.slots, shown, slots, show_progress="hidden")


def _writing_tab(page: "_Page", layers: list[int]) -> None:
    start = "The state of the Union is"
    prompt = gr.Textbox(label="Prompt", lines=2, value=start, elem_id="prompt")
    with gr.Row():
        temperature = gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature (0 is greedy)")
        top_p = gr.Slider(0.05, 1, value=0.95, step=0.05, label="Top-p")
        count = gr.Slider(1, 400, value=80, step=1, label="Tokens to write", elem_id="count")
        layer = gr.Dropdown(layers, value=layers[-1], label="Layer")
    with gr.Row():
        write = gr.Button("Write", variant="primary", elem_id="write")
        stop = gr.Button("Stop", elem_id="stop")
    written = gr.Textbox(label="Continuation", lines=6, interactive=False, elem_id="written")
    live = gr.HTML(elem_id="live")
    writing = write.click(page.write, [prompt, count, temperature, top_p, layer], [written, live])
    stop.click(None, None, None, cancels=[writing])


class _Page:
    """What happens on the page; whatever a visitor gives is answered."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer

    def read(self, text: str | None, layer: int) -> list[Any]:
        try:
            view = self.explorer.read(text)
        except UserError as error:
            return [None, f"**{_sentence(error)}**", [], NOTHING, gr.Slider(interactive=False), ""]
        last = len(view.tokens)
        status = f"{last:,} tokens read."
        if view.left_out:
            status += f" The tokens before them were left out: {MAX_TOKENS:,} are shown at most."
        tokens, found, slots = self.turn_to_layer(view, layer, last)
        slider = gr.Slider(1, max(last, 2), value=last, step=1, interactive=last > 1)
        return [view, status, tokens, found, slider, slots]

    def turn_to_layer(self, view: View | None, layer: int, time: int) -> list[Any]:
        if view is None:
            return [[], NOTHING, ""]
        return [_tokens(view, layer), NOTHING, self.slots(view, layer, time)]

    def retrieve(self, view: View | None, layer: int, event: gr.SelectData) -> str:
        if view is None:
            return GONE
        token = int(event.index)
        if token >= len(view.tokens):  # a click may come while another text is being drawn
            return NOTHING
        try:
            return described(view, self.explorer.retrieve(view, layer, token), layer, token)
        except UserError as error:
            return f"<p class='note'>{html.escape(_sentence(error))}</p>"

    def slots(self, view: View | None, layer: int, time: int) -> str:
        if view is None:
            return ""
        index = int(np.abs(np.array(view.times) - time).argmin())
        count = view.times[index]
        caption = f"Layer {layer} after {count:,} tokens, the last “{view.tokens[count - 1]}”."
        if len(view.tokens) > len(view.times):
            caption += f" Of the text {len(view.times)} moments are kept; this is the nearest."
        held = view.held[layer]
        if not held.size:
            return f"<p class='note'>Layer {layer} has a window and no slots.</p>"
        largest, measured = float(held.max()), self.explorer.measured
        return slot_grid(held[index], largest, caption, measured, view.half_lives[layer])

    def write(
        self, prompt: str | None, count: int, temperature: float, top_p: float, layer: int
    ) -> Iterator[list[Any]]:
        prompt, largest = prompt or "", 0.0
        yield ["", "<p class='note'>Reading the prompt …</p>"]
        try:
            for written in self.explorer.write(prompt, int(count), temperature, top_p):
                held = written.held[layer]
                largest = max(largest, float(held.max(initial=0)))
                caption = f"Layer {layer} after {written.new_tokens} new tokens."
                if len(prompt) > MAX_CHARACTERS:
                    caption += f" Of the prompt the last {MAX_CHARACTERS:,} characters were read."
                if written.ended:
                    caption += " The model ended the document here."
                yield [written.text, slot_grid(held, largest, caption, self.explorer.measured)]
        except UserError as error:
            yield ["", f"<p class='note'>{html.escape(_sentence(error))}</p>"]


def launch(app: gr.Blocks, host: str, port: int | None) -> Any:
    """Serve the page without waiting for its end; fonts are the reader's own.

    It takes no files, and answers its own page alone (``Guard``).
    """
    text, code = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return app.queue(default_concurrency_limit=1).launch(
        server_name=in_url(host),
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Base(font=text, font_mono=code),
        css=STYLE,
        max_file_size=0,
        state_session_capacity=SESSIONS,
        app_kwargs={"middleware": [Middleware(Guard, host=host, posts=POSTS, max_body=MAX_BODY)]},
        prevent_thread_lock=True,
    )


def _sentence(error: UserError) -> str:
    said = str(error)
    return f"{said[:1].upper()}{said[1:]}."


def _tokens(view: View, layer: int) -> list[tuple[str, str]]:
    """Tokens with the shades of their write gates."""
    write = view.write[layer]
    spread = np.ptp(write)
    if spread <= 1e-5 * np.abs(write).max():  # rounding, where all are written alike
        spread = np.inf
    shades = SHADES * (write - write.min()) / spread
    return [(token, f"{shade:.0f}") for token, shade in zip(view.tokens, shades, strict=True)]


def _colour(shade: int) -> str:
    """White for 0, blue for ``SHADES``; the page draws half of it, so that words can be read."""
    parts = (round(255 + (int(part) - 255) * shade / SHADES) for part in BLUE.split(","))
    return "#" + "".join(f"{part:02x}" for part in parts)
