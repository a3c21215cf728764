"""Ending a job before it is done: whoever runs it says when, and the job asks between two samples."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

_running = threading.local()


class Stopped(SystemExit):
    """Raised in a job that is to end; uncaught, it ends the worker process."""


def call_until(stopping: threading.Event, work: Callable[[Job], Result], job: Job) -> Result:
    """`work(job)`, in which `check` raises once `stopping` is set."""
    _running.stopping = stopping
    try:
        return work(job)
    finally:
        _running.stopping = None


def check() -> None:
    """Between two samples of a job.

    Raises:
        Stopped: the job was cancelled.
    """
    stopping: threading.Event | None = getattr(_running, "stopping", None)
    if stopping is not None and stopping.is_set():
        raise Stopped(143)
