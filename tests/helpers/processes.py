"""Fresh Python processes that start in a moment: forked from one that has imported the libraries, but nothing of ours.

In that one torch has loaded no entry point, and neither open_clip nor this package is imported.  What is forked loads
the entry points first, as torch does at the end of its import, and goes on like any Python process: it imports
open_clip, is extended by the plugin, runs its exit handlers.  It saves the seconds that the libraries take.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch.distributed.fsdp",
    "torchvision.transforms.v2",
    "timm",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "webdataset",
    "pandas",
    "ftfy",
    "pyarrow.parquet",
)
READ_AT_START = ("OMP_", "HF_", "TRITON_", "TORCH", "PYTHON")
"""How environment variables begin that Python or the libraries read when they start."""
READ_LATER = ("PYTHONPATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")


def run_new_python(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    timeout: float = 600,
    ranks: int = 1,
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([sys.executable, *arguments], capture_output=True, text=True, …)` gives, sooner.

    Not sooner where the environment differs in what is read at the start.

    Args:
        arguments: `-c` and code, `-m` and a module, or a file, then those of the program.
        env: all variables; None for this process's own.
        cwd: the current folder there.
        timeout: in seconds.
        ranks: how many processes, which find each other as those of torchrun do; the output is that of all.
    Raises:
        subprocess.TimeoutExpired: it took longer; all are dead.
    """
    command = [sys.executable, *map(str, arguments)]
    environment = dict(os.environ if env is None else env)
    server, started_with = _server()
    if ranks == 1 and _read_at_start(environment) != started_with:
        return subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
        )
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "arguments": command[1:],
            "environments": _of_ranks(environment, ranks),
            "cwd": str(cwd or Path.cwd()),
            "folder": folder,
            "timeout": timeout,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            raise RuntimeError(f"{__file__}: the process that forks has ended; its complaint is above.")
        code = json.loads(answer)
        output, errors = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("1", "2"))
    if code is None:
        raise subprocess.TimeoutExpired(command, timeout, output, errors)
    return subprocess.CompletedProcess(command, code, output, errors)


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    names = {name for name in environment if name.startswith(READ_AT_START)} - {*READ_LATER}
    return {name: environment[name] for name in names}


def _of_ranks(environment: dict[str, str], ranks: int) -> list[dict[str, str]]:
    if ranks == 1:
        return [environment]
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    return [environment | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@functools.cache
def _server() -> tuple[subprocess.Popen[str], dict[str, str]]:
    """The process that forks, and what its start has read of the environment."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    server = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.wait)
    atexit.register(server.kill)  # before it is waited for
    return server, _read_at_start(environment)


def spawn_ranks(function: Callable[..., None], arguments: tuple[object, ...], ranks: int) -> None:
    """What `torch.multiprocessing.spawn` does, sooner: call `function(rank, *arguments)` in so many processes.

    Raises:
        ProcessRaisedException: the call raised in one of them.
    """
    from torch.multiprocessing import start_processes

    multiprocessing.set_forkserver_preload(["open_clip", "msa_openclip.training.loss", "torch.distributed.fsdp"])
    start_processes(function, arguments, nprocs=ranks, start_method="forkserver")


# ---- in the process that forks


def serve() -> None:
    """Answer each request of standard input with the code that its processes ended with, null if they took too long.

    It returns in the children, which then end as any process does.
    """
    import torch

    sys.path.remove(str(Path(__file__).parent))
    for name in LIBRARIES:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    gc.freeze()  # what is imported is not looked at again by each child, which would copy it
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for environment in request["environments"]:
            children.append(os.fork())
            if not children[-1]:
                become(request, environment)
                if torch._is_device_backend_autoload_enabled():
                    torch._import_device_backends()
                return run(*request["arguments"])
        print(json.dumps(end(children, time.monotonic() + request["timeout"])), file=answers, flush=True)
    return None


def become(request: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Be a process of the environment, folder and files that are asked for."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        os.dup2(os.open(f"{request['folder']}/{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)


def run(first: str, *more: str) -> None:
    """What `python first *more` does."""
    if first == "-m":
        sys.argv = list(more)
        sys.path.insert(0, os.getcwd())
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
        return
    is_code = first == "-c"
    code, name = (more[0], "<string>") if is_code else (Path(first).read_text(encoding="utf-8"), first)
    sys.argv = [first, *more[is_code:]]
    sys.path.insert(0, "" if is_code else str(Path(first).resolve().parent))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if not is_code:
        main.__file__ = first
    exec(compile(code, name, "exec"), main.__dict__)


def end(children: list[int], deadline: float) -> int | None:
    """Wait for processes; the exit code of the first that failed, else 0, None if they had to be killed."""
    codes: dict[int, int] = {}
    while time.monotonic() < deadline and not any(codes.values()) and len(codes) < len(children):
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            codes[done] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
    for child in set(children) - set(codes):  # they would wait for the one that failed
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return next((code for code in codes.values() if code), 0 if len(codes) == len(children) else None)


if __name__ == "__main__":
    serve()
