"""Rows of a table of which a condition in DuckDB's SQL is true, told by a process of its own.

    matching("cloud < 10", pa.table({"cloud": [3, 30]}))      # array([True, False])

The condition may be a stranger's, typed into the demo: it sees the table and nothing else, no files, no network, no
extensions, no variables of a process, and cannot allow them again.  DuckDB bounds neither the memory of a long text
(`repeat('x', 4e9)`) nor the time of its parser, and what runs too long in one function it cannot interrupt.  A process
can be bounded in both, and ended.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

LONGEST_S = 20
"""Seconds of processor time that a condition may take."""
MEMORY_BYTES = 4 << 30
"""Memory that it may take beside that of the table; limited on Linux alone."""
_MOST_S = 600  # by the clock, where processor time cannot be limited or the machine is busy with other things
_ROW = "row number in the index"
_LIMITED = "it takes too much time or memory; ask for less."
_REFUSED, _TOO_MUCH = 3, 4
"""Exit codes of the process."""
_MOST_LETTERS = 400  # of a complaint, which may repeat the condition
# Nothing is imported from the current folder, which Python puts first, as "".
_CHILD = (
    "import sys; sys.path = [path for path in sys.path if path]; "
    "from msa_openclip.search.condition import answer; answer()"
)
_LOCKED: dict[str, Any] = {
    "enable_external_access": False,
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",
    "threads": 2,
}


class ConditionError(ValueError):
    """A condition cannot be evaluated; the message says why."""


def matching(condition: str, table: pa.Table) -> NDArray[np.bool_]:
    """Of which rows (n,) it is true.

    Raises:
        ConditionError: DuckDB is missing or refuses the condition, or it takes too much time or memory.
    """
    try:
        import duckdb  # noqa: F401 - the other process needs it
    except ImportError as error:
        raise ConditionError("DuckDB is missing: pip install 'msa_openclip[archive]'.") from error
    row = _ROW
    while row.lower() in map(str.lower, table.column_names):
        row += "_"
    # The last column, of which alone the process tells anything, and which is there whatever the others are.
    numbered = pa.table({**dict(zip(table.column_names, table.columns, strict=True)), row: np.arange(len(table))})
    sink = pa.BufferOutputStream()
    try:
        limits = {"seconds": str(LONGEST_S), "bytes": str(MEMORY_BYTES)}
        described = numbered.replace_schema_metadata({"condition": condition, **limits})
    except UnicodeEncodeError as error:
        raise ConditionError("it is not Unicode.") from error
    with pa.ipc.new_stream(sink, described.schema) as stream:
        stream.write_table(described)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD], input=sink.getvalue(), capture_output=True, timeout=_MOST_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConditionError(_LIMITED) from error
    if done.returncode == _REFUSED:
        raise ConditionError(done.stdout.decode("utf-8", "replace"))
    if done.returncode == _TOO_MUCH or done.returncode < 0:  # a signal, of the limits or of what gave up at them
        raise ConditionError(_LIMITED)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ConditionError(f"DuckDB's process ended with code {done.returncode}: {said[-1] if said else 'silent'}.")
    return np.unpackbits(np.frombuffer(done.stdout, np.uint8), count=len(table)).astype(np.bool_)


def answer() -> None:
    """The process: a table with its condition from standard input, and to standard output a bit for each row."""
    import duckdb

    with pa.ipc.open_stream(sys.stdin.buffer) as stream:
        table = stream.read_all()
    asked = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    _limit(int(asked["seconds"]), int(asked["bytes"]) + 4 * table.nbytes)
    row = table.column_names[-1]
    found = np.zeros(len(table), dtype=np.bool_)
    try:
        with duckdb.connect(":memory:", config={**_LOCKED, "memory_limit": f"{asked['bytes']}B"}) as connection:
            connection.execute("SET enable_progress_bar = false")  # it would be printed among the answer
            connection.execute("SET lock_configuration = true")
            relation = connection.from_arrow(table).filter(asked["condition"]).select(duckdb.ColumnExpression(row))
            found[relation.fetchnumpy()[row]] = True
    except (MemoryError, duckdb.OutOfMemoryException):
        sys.exit(_TOO_MUCH)
    except duckdb.Error as error:
        sys.stdout.buffer.write(str(error).strip().splitlines()[0][:_MOST_LETTERS].encode("utf-8", "replace"))
        sys.exit(_REFUSED)
    sys.stdout.buffer.write(np.packbits(found).tobytes())


def _limit(seconds: int, memory_bytes: int) -> None:
    """Bound what this process may still take, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CORE: 0,  # what is ended leaves no file
    }
    for kind, limit in limits.items():
        most = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
