"""``hamt serve``: a model for every client of OpenAI's API."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hamt.checkpoint import load_checkpoint, named_or_own
from hamt.console import PlainConsole
from hamt.errors import UserError, reason
from hamt.options import option, parse


@dataclass
class ServeOptions:
    """Serve a model as OpenAI's servers do: chat, completions, streaming."""

    checkpoint: str | None = option(
        None, "a checkpoint folder, or a .pt file; none is the model in HAMT"
    )
    name: str | None = option(
        None, "what clients call the model; none is the folder's name, or hamt"
    )
    host: str = option("127.0.0.1", "the address to serve at; any but the default lets others in")
    port: int = option(8000, "the port", at_least=1, at_most=65535)
    max_rows: int = option(32, "answers that are written at the same time; others wait", at_least=1)
    max_tokens: int = option(
        131072, "the most tokens that a prompt and its answer may have together", at_least=2
    )
    memory: int = option(
        1024, "megabytes for conversations that were read, so that none is read twice", at_least=0
    )


def main(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C."""
    options = parse(ServeOptions, arguments, "serve")
    try:
        import uvicorn

        from hamt.guard import check_address, in_url
        from hamt.serving.server import Service, build_app
    except ImportError as error:
        raise UserError(
            f"hamt serve needs further packages ({reason(error)}): pip install 'hamt[serve]'"
        ) from error
    from hamt.serving.engine import Engine
    from hamt.serving.states import StateStore

    check_address(options.host, options.port)
    model, tokenizer = load_checkpoint(named_or_own(options.checkpoint))
    if not tokenizer.is_fast:
        raise UserError(
            "hamt serve writes answers piece by piece, and the tokenizer of this checkpoint has no "
            "fast form that could decode them so: give another checkpoint, or use hamt chat"
        )
    model.fuse_projections()
    path = Path(options.checkpoint or "hamt").resolve()
    name = options.name or (path.name if path.is_dir() else path.stem)
    engine = Engine(model, StateStore(options.memory * 10**6), options.max_rows)
    app = build_app(Service(engine, tokenizer, name, options.max_tokens), options.host)
    console = PlainConsole()
    console.print(f"{name}: http://{in_url(options.host)}:{options.port}/v1; Ctrl-C ends it.")
    sys.stdout.flush()
    config = uvicorn.Config(
        *(app, options.host, options.port),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            engine.end()  # answers that are being written end, and with them their connections
            super().handle_exit(sig, frame)

    try:
        Server(config).run()
    finally:
        engine.close()
    return 0
