"""Remote scenes through rasterio: what a store fails at is tried again, as it is for all other files.

GDAL tells a server that did not answer from a broken file in no way that arrives here; so the files that it reads try
again by themselves, and keep what they finally failed with.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..shards.imagery import geotiff
from ..shards.records import ImageProblem
from .streams import StreamError, is_absent, retrying


@contextmanager
def steady_scene(url: str) -> Iterator[Any]:
    """A raster, opened through rasterio, local or by any fsspec URL.

    Raises:
        ImageProblem: it is absent or broken.
        StreamError: its store fails more often than RETRIES_VARIABLE allows.
    """
    failures: list[StreamError] = []

    def steady(opener: Callable[..., Any]) -> Callable[..., Any]:
        return lambda path, *_, **__: _SteadyFile(url, lambda: opener(path, "rb"), failures)

    try:
        with geotiff.open_scene(url, steady) as scene:
            yield scene
    except ImageProblem as problem:
        if failures:
            raise failures[-1] from failures[-1].__cause__
        raise problem


class _SteadyFile(io.RawIOBase):
    """A file to read and seek in, opened again at the place that was reached where the store failed.

    Args:
        url: for complaints.
        opener: opens the file.
        failures: where a failure is left for whoever cannot see what is raised here.
    Raises:
        FileNotFoundError: it is absent, which GDAL expects of the files that may lie beside a scene.
    """

    def __init__(self, url: str, opener: Callable[[], Any], failures: list[StreamError]) -> None:
        self._url, self._opener, self._failures = url, opener, failures
        self._file: Any = None
        self._position = 0
        self._try(self._opened)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._try(lambda: self._read(size))
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = self._try(lambda: self._sought(offset, whence))
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _opened(self) -> Any:
        if self._file is None:
            self._file = self._opener()
        return self._file

    def _read(self, size: int) -> bytes:
        file = self._opened()
        file.seek(self._position)
        return bytes(file.read(size))

    def _sought(self, offset: int, whence: int) -> int:
        file = self._opened()
        file.seek(self._position)
        return int(file.seek(offset, whence))

    def _try(self, action: Callable[[], Any]) -> Any:
        def once() -> Any:
            try:
                return action()
            except Exception:
                self._file = None  # its connection and buffer are in no known state
                raise

        try:
            return retrying(self._url, once)
        except StreamError as error:
            if is_absent(error):
                raise FileNotFoundError(self._url) from error
            self._failures.append(error)
            raise
