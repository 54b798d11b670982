"""A server of pages over a store, on this machine and for its user alone; it only reads.

Any program on a machine, and any web site that its user visits, can send requests to a port of it. So the server
listens on the loopback address, answers to no other name than its own (a site whose name is made to lead here is
refused), asks for a secret in each address, and takes GET and HEAD alone. The one door to Starlette and uvicorn.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from featstore.errors import FeatureStoreError
from featstore.images.image_set import ImageSet
from featstore.pages.figures import program
from featstore.pages.page import Page, asset, content_policy
from featstore.pages.store_pages import StorePages
from featstore.store.store import FeatureStore

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn import Server

HOST = "127.0.0.1"
_HEADERS = {
    "content-security-policy": content_policy("'self'", connects=True) + "; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "private, no-store",
}
_ASSETS = {"page.js": "text/javascript", "page.css": "text/css", "plotly.js": "text/javascript"}


class Viewing:
    """A server that is ready to answer; `run` answers until it is ended.

    Args:
        store: what is shown.
        images: image files of its image sets, as `StorePages` takes them.
        port: on the loopback address; 0: one that is free.

    Attributes:
        address: to open in a browser; it holds the secret.

    Raises:
        FeatureStoreError: if Starlette, uvicorn or plotly aren't installed.
        OSError: if the port is taken.
    """

    def __init__(self, store: FeatureStore, images: ImageSet | None = None, *, port: int = 0) -> None:
        _check_installed()
        self._socket = _listening(port)
        root = f"/{secrets.token_urlsafe(24)}"
        self.port: int = self._socket.getsockname()[1]
        self.address = f"http://{HOST}:{self.port}{root}/"
        self._server = _server(guarded(application(StorePages(store, images, root=root), root), self.port))

    def run(self) -> None:
        """Answers until a signal or `end` ends it; the signal is then raised again."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def end(self) -> None:
        """Lets `run` return, from another thread."""
        self._server.should_exit = True


def application(pages: StorePages, root: str) -> Starlette:
    """The addresses below `root`, a slash and a secret."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Mount, Route

    def found(answer: Callable[..., Any], *given: Any, **options: Any) -> Any:
        try:
            return answer(*given, **options)
        except LookupError as error:
            raise HTTPException(404, "There is no such page.") from error

    def page(answer: Callable[..., Page], *given: Any, **options: Any) -> Response:
        made = found(answer, *given, **options)
        return Response(made.served(f"{root}/assets"), media_type="text/html")

    def place_in(request: Request, name: str) -> int:
        number = _whole(request.path_params[name], None)  # Starlette's own takes digits that int refuses
        if number is None or number < 0:
            raise HTTPException(404, "There is no such page.")
        return number

    def overview(request: Request) -> Response:
        return page(pages.overview)

    def images(request: Request) -> Response:
        query = request.query_params
        return page(
            pages.images,
            place_in(request, "number"),
            split=query.get("split"),
            label=_whole(query.get("label"), None),
            page=_whole(query.get("page"), 0),
        )

    def feature_set(request: Request) -> Response:
        return page(pages.set, request.path_params["key"], place_in(request, "number"))

    def thumbnail(request: Request) -> Response:
        made = found(pages.thumbnail, place_in(request, "number"), place_in(request, "place"))
        return Response(made.data, media_type=made.media_type)

    def near(request: Request) -> Response:
        number, place = place_in(request, "number"), place_in(request, "place")
        return JSONResponse(found(pages.near, request.path_params["key"], number, place))

    def asset_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _ASSETS:
            raise HTTPException(404, "There is no such page.")
        return Response(program() if name == "plotly.js" else asset(name), media_type=_ASSETS[name])

    routes = [
        Route("/", overview),
        Route("/images/{number}", images),
        Route("/sets/{key}/{number}", feature_set),
        Route("/thumbnails/{number}/{place}", thumbnail),
        Route("/near/{key}/{number}/{place}", near),
        Route("/assets/{name}", asset_file),
    ]
    return Starlette(routes=[Mount(root, routes=routes)])


def guarded(app: ASGIApp, port: int) -> ASGIApp:
    """`app` for requests that only read and name this server; its answers forbid a browser all that pages don't need.

    Args:
        app: what answers.
        port: on which it is asked.
    """
    from starlette.responses import PlainTextResponse

    own = {f"{name}:{port}".encode() for name in (HOST, "localhost")}

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *given]
            await send(message)

        if scope["type"] != "http":  # no web socket, no lifespan
            return
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or hosts[0] not in own:
            refusal = PlainTextResponse("This server answers to its own address alone.\n", 421)
            await refusal(scope, receive, with_headers)
        elif scope["method"] not in ("GET", "HEAD"):
            refusal = PlainTextResponse("This server is only read.\n", 405, headers={"allow": "GET, HEAD"})
            await refusal(scope, receive, with_headers)
        else:
            await app(scope, receive, with_headers)

    return answered


def _listening(port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((HOST, port))
        found.listen(128)  # a browser that is quicker than the server waits
    except OSError as error:
        found.close()
        raise OSError(error.errno, f"port {port} can't be had ({error.strerror}); give another one, or 0") from error
    return found


def _server(app: ASGIApp) -> Server:
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
    )


def _check_installed() -> None:
    try:
        import starlette.applications  # noqa: F401 - it says what is missing
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise FeatureStoreError(
            f"Pages over a store are served by Starlette and uvicorn, which can't be loaded ({error}). Install them: "
            "pip install 'featstore[view]'."
        ) from error
    program()


def _whole(text: str | None, default: int | None) -> int | None:
    """A number of an address; -1, which nothing has, for what is none."""
    if text is None:
        return default
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
