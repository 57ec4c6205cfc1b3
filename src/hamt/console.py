"""The console that commands print to, which shows names and texts as they stand."""

import contextlib
import shlex
from typing import Any

from rich.console import Console
from rich.text import Text

from hamt.errors import printable


class PlainConsole(Console):
    """Prints strings as they stand, in lines as long as they are, also in tables.

    Brackets are no markup, ``:smile:`` is no emoji, and control characters are shown as escapes.
    When the reader of a pipe has gone, the work goes on in silence.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(soft_wrap=True, highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Make a string printable before it is laid out."""
        return super().render_str(printable(text), **settings)

    def on_broken_pipe(self) -> None:
        """Rich would exit here, in the middle of a training."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


def try_command(checkpoint: str, data: str = "", prompt: str | None = None) -> str:
    """The ``hamt generate`` command for a checkpoint that ``data`` trained, as a shell takes it."""
    prompt = prompt or ("Fellow citizens" if data == "sotu" else "The")
    return shlex.join(["hamt", "generate", prompt, "--checkpoint", checkpoint])
