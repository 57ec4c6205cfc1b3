"""``hamt explore``: a local web page to look into a model's memories."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from hamt.analysis.explorer.converted import ConvertedExplorer
from hamt.analysis.explorer.session import Explorer
from hamt.analysis.record import memory_layers
from hamt.checkpoint import load_checkpoint, named_or_own
from hamt.console import PlainConsole
from hamt.converted_model import ConvertedForCausalLM
from hamt.errors import UserError, reason
from hamt.options import option, parse


@dataclass
class ExploreOptions:
    """Look into a model's memories in the browser: read a text, click a token, let it write."""

    checkpoint: str | None = option(
        None, "a checkpoint folder, or a .pt file; none is the model in HAMT"
    )
    host: str = option("127.0.0.1", "the address to serve at; any but the default lets others in")
    port: int | None = option(
        None, "the port; none is the first free one from 7860 on", at_least=1, at_most=65535
    )


def main(arguments: Sequence[str]) -> int:
    """Serve the page until Ctrl-C."""
    options = parse(ExploreOptions, arguments, "explore")
    # Gradio reads this when it is imported; it then reports nothing to its makers.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio asks its own page whether it is there, which no proxy can answer.
    for name in ("NO_PROXY", "no_proxy"):
        hosts = (os.environ.get(name), "127.0.0.1", "localhost", options.host)
        os.environ[name] = ",".join(filter(None, hosts))
    try:
        from hamt.analysis.explorer.app import build_app, launch
        from hamt.guard import check_address
    except ImportError as error:
        if getattr(error, "name", None) == "gradio":
            raise UserError("hamt explore needs Gradio: pip install 'gradio>=6'") from error
        raise UserError(f"Gradio cannot be used here: {reason(error)}") from error
    check_address(options.host, options.port)
    model, tokenizer = load_checkpoint(named_or_own(options.checkpoint))
    converted = isinstance(model, ConvertedForCausalLM)
    if not converted and len(memory_layers(model)) < len(model.model.layers):
        raise UserError("hamt explore looks into memories: not all mixers of this model are one")
    explorer = (ConvertedExplorer if converted else Explorer)(model, tokenizer)
    name = options.checkpoint or "The model in HAMT"
    app = build_app(explorer, name)
    try:
        _, address, _ = launch(app, options.host, options.port)
    except Exception as error:  # whatever the libraries trip over
        where = f"{options.host}, port {options.port or 'any'}"
        raise UserError(f"cannot serve at {where}: {reason(error)}") from error
    PlainConsole().print(f"{name}: open {address} in a browser; Ctrl-C ends it.")
    app.block_thread()
    return 0
