"""Ctrl-C and requests to terminate, which wait until a training step is complete."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C, or a request to terminate, sets; a second Ctrl-C raises.

    Whoever looks at the event between two steps never cuts a step in half.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield event
        return

    def note(signum, frame) -> None:
        event.set()
        print(
            "\nstopping after this step; a second Ctrl-C stops at once", file=sys.stderr, flush=True
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
