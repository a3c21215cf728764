"""A worker process: pickled (function, job) on standard input, pickled results on standard output, until input ends.

Unlike multiprocessing's spawn it does not run the caller's main module again (which may import torch, or lack the
`if __name__` guard), and it ends by itself when the caller is killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Event
from typing import Any, TypeVar

from ..records import ShardError
from . import stopping

Job = TypeVar("Job")
Result = TypeVar("Result")

_PATIENCE_S = 10.0  # for a job in one long call, which does not see that it is to end


class Worker:
    """The caller's end of a worker process."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        # The current folder, which may hold anybody's data, is none to import from: Python puts it first, as "".
        start = "import sys; sys.path = [path for path in sys.path if path]"
        # Ctrl-C reaches the whole process group; the caller decides what it means, from the first import on.
        ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
        command = [sys.executable, "-c", f"{start}; {ignore}; from {__package__}.worker import main; main()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def call(self, work: Callable[[Job], Result], job: Job) -> Result:
        """Run `work(job)` there and wait for it; what it raises is raised here.

        Raises:
            ShardError: the process died.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            pickle.dump((work, job), self._process.stdin)
            self._process.stdin.flush()
            fine, value = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            code = self._process.wait()
            raise ShardError(
                f"a worker process died (exit code {code}; -9 is often a lack of memory). Finished shards are kept:"
                " run the same command again, with fewer --workers."
            ) from error
        if not fine:
            raise value
        result: Result = value
        return result

    def terminate(self) -> None:
        """Tell the process to end, in the middle of a job if need be."""
        self._process.terminate()

    def close(self) -> None:
        """Wait until the process has ended; kill it if it does not."""
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # half a job may be left in the buffer
                if pipe:
                    pipe.close()


def main() -> None:
    """The loop of the worker process."""
    stop = Event()

    def end(*_: object) -> None:
        """An exit that lets a half-written file be removed; the event, where a library swallows the exception."""
        stop.set()
        raise stopping.Stopped(143)

    signal.signal(signal.SIGTERM, end)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    while True:
        try:
            work, job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answers.write(_answer(stop, work, job))
            answers.flush()
        except BrokenPipeError:  # the caller was killed
            os._exit(1)


def _answer(stop: Event, work: Callable[[Any], Any], job: Any) -> bytes:
    try:
        return pickle.dumps((True, stopping.call_until(stop, work, job)))
    except Exception as error:
        try:
            return pickle.dumps((False, error))
        except Exception:  # an exception that cannot travel
            return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
