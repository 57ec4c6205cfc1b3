"""Runs in processes of their own, which one Ctrl-C ends: none begins after it, none that is done is lost."""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_stop: Event | None = None  # of this process, if it is a worker


def in_processes(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    done: Callable[[Item, Result], None],
) -> None:
    """Call ``function`` with each item, ``workers`` at a time, each in a process of one thread.

    Args:
        function: of a module; it calls ``check_stop`` now and then.
        items: what it is called with.
        workers: processes.
        done: called here with an item and its result, as soon as it is there; also with those that
            are finished when an interrupt or an error has ended the others.
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
    """Raise KeyboardInterrupt in a worker that is to give up."""
    if _stop is not None and _stop.is_set():
        raise KeyboardInterrupt


def _submit(pool: ProcessPoolExecutor, function: Callable, item: object) -> Future:
    """Hand over a call; the process that starts for it does not see Ctrl-C, and is told by ``check_stop``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a process inherits it
    try:
        return pool.submit(function, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare(stop: Event) -> None:
    """Of a worker: know when to stop, and leave no process behind if the one that started it is killed."""
    global _stop
    _stop, parent = stop, parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()
