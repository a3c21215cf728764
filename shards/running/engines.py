"""Where the jobs run: in this process, in threads, in processes, or on a Ray cluster; the jobs never know."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from queue import SimpleQueue
from threading import Event
from typing import Any

from ..records import ShardError
from . import stopping
from .worker import Job, Result, Worker

ENGINES = ("auto", "process", "thread", "ray")
_RAY_PATIENCE_S = 30.0  # for cancelled jobs to clean up behind themselves


def run(
    work: Callable[[Job], Result], jobs: Iterator[Job], engine: str, workers: int, *, in_memory: bool
) -> Generator[Result, None, None]:
    """Results of `work` as they are finished; never more than two jobs a worker are made ahead.

    Closed before its end (or interrupted), it cancels what waits, stops the jobs in flight in the middle, and returns
    when they have cleaned up behind themselves.

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
        stop = Event()
        yield from _run_in_threads(partial(stopping.call_until, stop, work), jobs, workers, stop.set)
    else:
        yield from _run_in_processes(work, jobs, workers)


def _run_in_processes(work: Callable[[Job], Result], jobs: Iterator[Job], workers: int) -> Iterator[Result]:
    """A thread for each worker process, which hands it jobs and waits for it."""
    idle: SimpleQueue[Worker] = SimpleQueue()
    started = [Worker() for _ in range(workers)]
    for worker in started:
        idle.put(worker)

    def hand_over(job: Job) -> Result:
        worker = idle.get()
        try:
            return worker.call(work, job)
        finally:
            idle.put(worker)

    def stop() -> None:
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.close()

    yield from _run_in_threads(hand_over, jobs, workers, stop)


def _run_in_threads(
    work: Callable[[Job], Result], jobs: Iterator[Job], workers: int, stop: Callable[[], None]
) -> Iterator[Result]:
    pool = ThreadPoolExecutor(workers)
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
        pool.shutdown(wait=False, cancel_futures=True)
        stop()
        pool.shutdown()


def start_ray(workers: int) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine that has a processor for each worker."""
    import ray

    if not ray.is_initialized():
        # "local": not whichever cluster runs here already, which would refuse these settings.
        own: dict[str, Any] = {"address": "local", "num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else own))


def _run_on_ray(work: Callable[[Job], Result], jobs: Iterator[Job], workers: int) -> Iterator[Result]:
    try:
        import ray
    except ImportError as error:
        raise ShardError("engine: ray is not installed; pip install ray, or use --engine process.") from error
    start_ray(workers)
    remote: Any = ray.remote(num_cpus=1)(work)
    pending: list[Any] = []
    try:
        while True:
            pending += [remote.remote(job) for job in itertools.islice(jobs, 2 * workers - len(pending))]
            if not pending:
                return
            done, pending = ray.wait(pending)
            yield from ray.get(done)
    finally:
        for job in pending:
            ray.cancel(job)  # raises KeyboardInterrupt in it
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=_RAY_PATIENCE_S)
