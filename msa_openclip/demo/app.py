"""Serves the page and its answers (Starlette and uvicorn, extra `demo`) to browsers that may see them.

/                   page/index.html and what it names, Leaflet among it; nothing comes from elsewhere
/index              what the index holds        POST /search?q=...    answers; the body is a picture, if any
/tile/ROW           the picture of a row        /reasons?row=&q=      why a row was found
"""

from __future__ import annotations

import contextlib
import ipaddress
import mimetypes
import re
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..search.searcher import Searcher
from ..shards.output import printable
from .answers import Answers

PAGE = Path(__file__).parent / "page"
_LARGEST_UPLOAD = 20_000_000
_Asgi = Callable[[dict[str, Any], Any, Any], Awaitable[None]]
_Headers = Sequence[tuple[bytes, bytes]]


class DemoError(ValueError):
    """The demo cannot start: something is missing, or an argument is wrong."""


def serve(
    searcher: Searcher, host: str, port: int, names: Sequence[str] = (), basemap: str = "", credit: str = ""
) -> None:
    """Serve the page until interrupted.

    Args:
        searcher: over the index.
        host: whom to serve: an address of this machine.
        port: where.
        names: by which browsers may call this machine, beside `localhost`, its own name and any address.
        basemap: URL template, with {z}, {x}, {y}, of map tiles to lie below; browsers fetch nothing else elsewhere.
        credit: whom these want to be named.
    Raises:
        DemoError: uvicorn or Starlette is missing, the template is none, or the address is not to be had.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise missing(error) from error
    known = {"localhost", host.lower(), socket.gethostname().lower(), *map(str.lower, names)}
    served = app(Answers(searcher), known, basemap, credit)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise DemoError(f"{host}, port {port}: {error}; choose others with --host and --port.") from error
    address = f"[{host}]" if ":" in host else host
    print(
        f"http://{address}:{listener.getsockname()[1]}/ shows {len(searcher.index):,} images; Ctrl+C ends it.",
        flush=True,
    )
    settings = uvicorn.Config(served, log_level="warning", ws="none", lifespan="off", proxy_headers=False)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listener])


def app(answers: Answers, names: Collection[str], basemap: str = "", credit: str = "") -> _Asgi:
    """What `serve` serves, as an ASGI application."""
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles
    except ImportError as error:
        raise missing(error) from error
    mimetypes.add_type("text/javascript", ".js")  # some machines say otherwise, and browsers then refuse it
    about = answers.about() | {"basemap": basemap, "credit": credit}

    async def index(request: Request) -> Response:
        return JSONResponse(about)

    async def search(request: Request) -> Response:
        picture = bytearray()
        async for part in request.stream():
            picture += part
            if len(picture) > _LARGEST_UPLOAD:
                text = f"The picture is larger than {_LARGEST_UPLOAD // 1_000_000} MB."
                return JSONResponse({"error": text}, 413, {"connection": "close"})
        return JSONResponse(await run_in_threadpool(answers.search, request.query_params, bytes(picture)))

    async def tile(request: Request) -> Response:
        return Response(await run_in_threadpool(answers.tile, request.path_params["row"]), media_type="image/jpeg")

    async def reasons(request: Request) -> Response:
        asked = request.query_params
        return JSONResponse(await run_in_threadpool(answers.reasons, asked.get("row", ""), asked.get("q", "")))

    async def refused(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": printable(str(error))}, 400)

    routes = [
        Route("/index", index),
        Route("/search", search, methods=["POST"]),
        Route("/tile/{row:int}", tile),
        Route("/reasons", reasons),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    plain = Starlette(routes=routes, exception_handlers={ValueError: refused})
    return KnownHosts(SafeHeaders(plain, policy(basemap)), names)


def missing(error: ImportError) -> DemoError:
    """Names what is missing, and the remedy."""
    return DemoError(f"{error.name} is missing: pip install 'msa_openclip[demo]'.")


def policy(basemap: str) -> str:
    """The Content-Security-Policy: everything from here, pictures from the basemap's host besides.

    Raises:
        DemoError: the basemap's template is none.
    """
    tiles = ""
    if basemap:
        at = urlsplit(basemap)
        if not re.fullmatch(r"https?://(\{s\}\.)?[\w.-]+(:\d+)?", f"{at.scheme}://{at.netloc}") or not all(
            part in basemap for part in ("{z}", "{x}", "{y}")
        ):
            raise DemoError(
                f"--tiles {basemap!r}: expected a URL such as https://tile.example.org/{{z}}/{{x}}/{{y}}.png."
            )
        tiles = f" {at.scheme}://{at.netloc.replace('{s}', '*')}"
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        f"img-src 'self' data: blob:{tiles}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class SafeHeaders:
    """Adds to every answer what keeps it on the page: nothing is loaded from elsewhere, embedded there, or kept."""

    def __init__(self, app: _Asgi, policy: str) -> None:
        self.app = app
        headers = {
            "content-security-policy": policy,
            "cross-origin-resource-policy": "same-origin",
            "referrer-policy": "strict-origin",  # map services want to know who asks
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass the request on."""

        async def sent(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        await self.app(scope, receive, sent)


class KnownHosts:
    """Answers requests for this machine alone, not for a name that somebody else's page has just pointed to it.

    Without it any web page could ask the demo through the visitor's browser (DNS rebinding).  An address in the place
    of a name is harmless: only names can be pointed elsewhere.  Pages of others may link to the page, and no more:
    they could not read an answer, but keep this machine busy with searches.
    """

    def __init__(self, app: _Asgi, names: Collection[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass the request on, or refuse it."""
        if not self._is_known(scope["headers"]):
            await _refuse(send, 421, b"This name is not known here; see `msa-openclip demo --allow-host`.\n")
        elif scope["path"] != "/" and _only(scope["headers"], b"sec-fetch-site") not in ("same-origin", "none", ""):
            await _refuse(send, 403, b"Only the demo's own page may ask for this.\n")
        else:
            await self.app(scope, receive, send)

    def _is_known(self, headers: _Headers) -> bool:
        host = _only(headers, b"host")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        try:
            ipaddress.ip_address(name.strip("[]"))
            return True
        except ValueError:
            return name != "" and name in self.names


def _only(headers: _Headers, wanted: bytes) -> str:
    """The header's value in lower case; empty unless it is there once."""
    values = [value.decode("latin-1").strip().lower() for name, value in headers if name.lower() == wanted]
    return values[0] if len(values) == 1 else ""


async def _refuse(send: Any, status: int, text: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text})
