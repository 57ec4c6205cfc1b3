"""Calls in processes of one thread each, which one Ctrl-C ends without losing what is finished."""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from hamt.peak_memory import keep_freed_memory, return_freed_memory
from hamt.training.loop import Listener, Trainer

Item = TypeVar("Item")
Result = TypeVar("Result")

_stop: Event | None = None  # set in a worker process, and shared with the process that started it


def in_processes(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    done: Callable[[Item, Result], None],
) -> None:
    """Call ``function`` with each item, ``workers`` at a time, each in a process of one thread.

    ``done`` is called in this process with each item and its result. After an interrupt or an error
    no call begins and those under way are told to end (``check_stop``, which ``function`` calls now
    and then); results that still come in are handed to ``done``, too.
    """
    context, waiting = get_context("spawn"), iter(items)
    stop, running = context.Event(), dict[Future[Result], Item]()
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that start now
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(stop,))
    try:
        while True:
            # Never more than there are workers: what waits within the pool cannot be taken back.
            for item in islice(waiting, workers - len(running)):
                running[_submit(pool, function, item)] = item
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done(running[future], future.result())
                del running[future]
    finally:
        stop.set()
        pool.shutdown()
        for future, item in running.items():
            if future.exception() is None:
                done(item, future.result())
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def check_stop() -> None:
    """Raise KeyboardInterrupt in a worker process that has been told to end."""
    if _stop is not None and _stop.is_set():
        raise KeyboardInterrupt


class Stopper(Listener[Any]):
    """Ends a training in a worker process after the step in which the process is told to end."""

    def stepped(self, trainer: Trainer[Any]) -> None:
        """Raise KeyboardInterrupt if the process is told to end."""
        check_stop()


def whole(result: Any) -> Any:
    """The result of a training; KeyboardInterrupt for half a one, which must not look like it."""
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def _submit(pool: ProcessPoolExecutor, function: Callable, item: object) -> Future:
    """Hand over a call; the process that starts for it ignores Ctrl-C and heeds ``check_stop``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a process inherits it
    try:
        return pool.submit(_call, function, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    """Of a worker process: what one item needed is no burden to the next."""
    try:
        return function(item)
    finally:
        return_freed_memory()


def _prepare(stop: Event) -> None:
    """Make a worker process heed ``stop``, and end it if the process that started it is killed.

    It keeps the memory that it has had, as a command does (``hamt.cpu.process``): handed out anew,
    the pages of large logits took half of the time of a training.
    """
    global _stop
    _stop, parent = stop, parent_process()
    keep_freed_memory()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()
