"""Where the jobs run: in this process, in threads, in processes, or on a Ray cluster; the jobs never know."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, TypeVar

from .records import ShardError

ENGINES = ("auto", "process", "thread", "ray")
Job = TypeVar("Job")
Result = TypeVar("Result")


def run(
    work: Callable[[Job], Result], jobs: Iterator[Job], engine: str, workers: int, *, in_memory: bool
) -> Iterator[Result]:
    """Results of `work` as they are finished; never more than two jobs a worker are made ahead.

    Args:
        in_memory: source or target is memory://, which other processes cannot see; auto then takes threads.
    """
    if engine not in ENGINES:
        raise ShardError(f"engine: {engine!r} is unknown; choose one of {', '.join(ENGINES)}.")
    if workers < 1:
        raise ShardError(f"workers: {workers} must be at least 1.")
    if in_memory and engine in ("process", "ray"):
        raise ShardError(f"engine: {engine} cannot see memory:// files of this process; use --engine thread.")
    if engine == "ray":
        yield from _run_on_ray(work, jobs, workers)
    elif workers == 1:
        yield from map(work, jobs)
    elif engine == "thread" or in_memory:
        yield from _run_in_pool(work, jobs, ThreadPoolExecutor(workers), workers)
    else:
        # A spawned process starts clean: it inherits no locks or threads of the caller.
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent)
        yield from _run_in_pool(work, jobs, pool, workers)


def _run_in_pool(work: Callable[[Job], Result], jobs: Iterator[Job], pool: Executor, workers: int) -> Iterator[Result]:
    pending: set[Future[Result]] = set()
    try:
        while True:
            pending |= {pool.submit(work, job) for job in itertools.islice(jobs, 2 * workers - len(pending))}
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A killed build must not leave its workers waiting for ever."""

    def wait_and_end() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait_and_end, daemon=True).start()


def _run_on_ray(work: Callable[[Job], Result], jobs: Iterator[Job], workers: int) -> Iterator[Result]:
    try:
        import ray
    except ImportError as error:
        raise ShardError("engine: ray is not installed; pip install ray, or use --engine process.") from error
    if not ray.is_initialized():
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    remote: Any = ray.remote(num_cpus=1)(work)
    pending: list[Any] = []
    while True:
        pending += [remote.remote(job) for job in itertools.islice(jobs, 2 * workers - len(pending))]
        if not pending:
            return
        done, pending = ray.wait(pending)
        yield from ray.get(done)
