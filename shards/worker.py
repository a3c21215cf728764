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
from typing import Any, TypeVar

from .records import ShardError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Worker:
    """The caller's end of a worker process."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        command = [sys.executable, "-c", f"from {__package__}.worker import main; main()"]
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

    def stop(self) -> None:
        """End the process, in the middle of a job if need be."""
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


def main() -> None:
    """The loop of the worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what an interrupt means
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that lets a half-written file be removed
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    while True:
        try:
            work, job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answers.write(_answer(work, job))
            answers.flush()
        except BrokenPipeError:  # the caller was killed
            os._exit(1)


def _answer(work: Callable[[Any], Any], job: Any) -> bytes:
    try:
        return pickle.dumps((True, work(job)))
    except Exception as error:
        try:
            return pickle.dumps((False, error))
        except Exception:  # an exception that cannot travel
            return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
