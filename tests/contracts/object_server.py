"""An S3 server of our own on the loopback address: moto's, with every request counted and faults on demand."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Response

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that was answered."""

    method: str
    path: str
    num_bytes: int
    """Of the answer's body."""
    num_sent: int
    """Of the request's body."""


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass


class ObjectServer:
    """Serves until `stop`. One request at a time, so that a condition and its put are one step, as on S3."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.lose_answer: Callable[[str, str], bool] = lambda method, path: False
        """(method, path) -> whether to do what is asked and then answer 500."""
        self.deny = False
        self.ignore_conditions = False
        self._app: Wsgi = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if self.ignore_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
            environ.pop("HTTP_IF_MATCH", None)
        if self.deny:
            response = Response("<Error><Code>AccessDenied</Code></Error>", 403)
        else:
            with self._one_at_a_time:
                response = Response.from_app(self._app, environ, buffered=True)
                if self.lose_answer(method, path):
                    response = Response("<Error><Code>InternalError</Code></Error>", 500)
        num_bytes = 0 if method == "HEAD" else len(response.get_data())
        self.seen.append(Seen(method, path, num_bytes, int(environ.get("CONTENT_LENGTH") or 0)))
        return response(environ, start_response)

    def make_bucket(self, name: str) -> None:
        """As the owner of the account does before the first extraction."""
        urlopen(Request(f"{self.url}/{name}", method="PUT")).close()

    def behave(self) -> None:
        """No more faults."""
        self.lose_answer = lambda method, path: False
        self.deny = self.ignore_conditions = False

    def stop(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
