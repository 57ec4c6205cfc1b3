"""The page: Gradio components around ``Explorer``."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from hamt.errors import UserError
from hamt.explorer.render import STYLE, retrieved_lists, slot_grid
from hamt.explorer.session import MAX_TOKENS, TIMES, Explorer, View

EXAMPLES = (
    "The state of the Union is strong. The Congress of the United States has the power to act, and the "
    "people of the United States expect it to act.",
    "Peace with all nations is our policy. War is the last resort of a nation; peace is its first duty.",
)
NOTHING = "<p class='note'>Click a token of the text to see what it read from the memory, and from where.</p>"


def build_app(explorer: Explorer, name: str) -> gr.Blocks:
    """All of the page; nothing of it comes from elsewhere."""
    layers = list(range(len(explorer.model.model.layers)))
    with gr.Blocks(title="HAMT: inside the memory", analytics_enabled=False) as app:
        gr.Markdown(f"# Inside the memory\n{name}: {explorer.model.num_parameters():,} parameters.")
        view = gr.State(None)
        with gr.Tab("Read"):
            text = gr.Textbox(label="Text", lines=4, value=EXAMPLES[0], elem_id="text")
            with gr.Row():
                read = gr.Button("Read", variant="primary", elem_id="read")
                layer = gr.Dropdown(layers, value=layers[-1], label="Layer", elem_id="layer")
            gr.Examples([[one] for one in EXAMPLES], [text])
            status = gr.Markdown(elem_id="status")
            tokens = gr.HighlightedText(
                label="Tokens: the darker, the more strongly written. Click one.",
                color_map={"": "white"},
                elem_id="tokens",
                interactive=False,
            )
            with gr.Row():
                found = gr.HTML(NOTHING, elem_id="found")
                with gr.Column():
                    time = gr.Slider(
                        1,
                        2,
                        value=1,
                        step=1,
                        label="Moment: the memory after so much of the text",
                        elem_id="time",
                    )
                    slots = gr.HTML(elem_id="slots")
        with gr.Tab("Write"):
            prompt = gr.Textbox(label="Prompt", lines=2, value="The state of the Union is", elem_id="prompt")
            with gr.Row():
                temperature = gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature (0 is greedy)")
                top_p = gr.Slider(0.05, 1, value=0.95, step=0.05, label="Top-p")
                count = gr.Slider(1, 400, value=80, step=1, label="Tokens to write", elem_id="count")
                shown = gr.Dropdown(layers, value=layers[-1], label="Layer")
            with gr.Row():
                write = gr.Button("Write", variant="primary", elem_id="write")
                stop = gr.Button("Stop", elem_id="stop")
            written = gr.Textbox(label="Continuation", lines=6, interactive=False, elem_id="written")
            live = gr.HTML(elem_id="live")

        def on_read(content: str, index: int) -> list[Any]:
            try:
                got = explorer.read(content)
            except UserError as error:
                return [
                    None,
                    f"**{str(error).capitalize()}.**",
                    [],
                    NOTHING,
                    gr.Slider(interactive=False),
                    "",
                ]
            last = len(got.times)
            slider = gr.Slider(1, max(last, 2), value=last, step=1, interactive=last > 1)
            return [got, _status(got), _tokens(got, index), NOTHING, slider, _slots(got, index, last)]

        def on_layer(got: View | None, index: int, position: int) -> list[Any]:
            if got is None:
                return [[], NOTHING, ""]
            return [_tokens(got, index), NOTHING, _slots(got, index, position)]

        def on_click(got: View | None, index: int, event: gr.SelectData) -> str:
            if got is None:
                return NOTHING
            return retrieved_lists(
                got, explorer.retrieve(got, index, int(event.index)), index, int(event.index)
            )

        def on_time(got: View | None, index: int, position: int) -> str:
            return "" if got is None else _slots(got, index, position)

        def on_write(start: str, number: int, heat: float, p: float, index: int) -> Iterator[list[Any]]:
            largest = 0.0
            yield [start, "<p class='note'>Reading the prompt …</p>"]
            for one in explorer.write(start, int(number), heat, p):
                largest = max(largest, float(one.norms[index].max()))
                caption = f"Layer {index} after {one.new_tokens} new tokens."
                yield [start + one.text, slot_grid(one.norms[index], largest, caption)]

        outputs = [view, status, tokens, found, time, slots]
        for event in (read.click, text.submit, app.load):
            event(on_read, [text, layer], outputs, show_progress="minimal")
        layer.change(on_layer, [view, layer, time], [tokens, found, slots], show_progress="hidden")
        tokens.select(on_click, [view, layer], found, show_progress="hidden")
        time.change(on_time, [view, layer, time], slots, show_progress="hidden")
        writing = write.click(on_write, [prompt, count, temperature, top_p, shown], [written, live])
        stop.click(None, None, None, cancels=[writing])
    return app


def launch(app: gr.Blocks, host: str, port: int | None, block: bool = True) -> Any:
    """Serve the page; fonts are the reader's own."""
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return app.queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        theme=theme,
        css=STYLE,
        prevent_thread_lock=not block,
    )


def _status(view: View) -> str:
    left_out = (
        f" The first {view.left_out:,} were left out: {MAX_TOKENS:,} are shown at most."
        if view.left_out
        else ""
    )
    return f"{len(view.tokens):,} tokens read.{left_out}"


def _tokens(view: View, layer: int) -> list[tuple[str, float]]:
    write = view.write[layer]
    low, high = float(write.min()), float(write.max())
    return [
        (token, (float(w) - low) / ((high - low) or 1.0)) for token, w in zip(view.tokens, write, strict=True)
    ]


def _slots(view: View, layer: int, position: int) -> str:
    index = int(np.clip(position, 1, len(view.times))) - 1
    count = view.times[index]
    word = view.tokens[count - 1]
    caption = f"Layer {layer} after {count:,} tokens, the last “{word}”."
    if len(view.tokens) > TIMES:
        caption += f" {TIMES} moments of the text can be chosen."
    return slot_grid(view.norms[index, layer], float(view.norms[:, layer].max()), caption)
