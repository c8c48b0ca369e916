"""The server of `iwm play`: Python's own HTTP server, for the page, its answers and images that somebody uploads.

Other web pages in the same browser could send requests to it, too. It therefore answers only those that name it as
their host and, if they have an origin, come from its own page.
"""

import json
import logging
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any, cast

import numpy as np

from iwm_fast.evals.playing.page import build_page, to_json
from iwm_fast.evals.playing.player import Player
from iwm_fast.evals.retrieval.sweeps import BankedImage
from iwm_fast.pipelines.errors import UndecodableImageError
from iwm_fast.pipelines.transforms.image_decoding import decode_image
from iwm_fast.rendering.imagine_page import data_uri

log = logging.getLogger(__name__)

MAX_BYTES = 20 * 2**20
"""Largest request."""
# Each uploaded image keeps the tokens of its bank.
_MAX_UPLOADS = 32
_TIMEOUT_S = 30
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class PlayServer(ThreadingHTTPServer):
    """Serves one model. Requests are answered one at a time, but a slow connection delays no other one."""

    daemon_threads = True

    def __init__(self, player: Player, subjects: list[BankedImage], run: str, host: str, port: int) -> None:
        """Listen on an address.

        Raises:
            OSError: if the address is in use or not one of this machine.
        """
        self.player = player
        self.subjects = subjects
        self.num_given = len(subjects)
        self.lock = Lock()
        images = [data_uri(subject.pixels.cpu().numpy()) for subject in subjects]
        has_decoder = player.decoder is not None
        self.page = build_page(run, player.controls, images, has_decoder=has_decoder, can_upload=True)
        super().__init__((host, port), _Handler)
        self.is_open_to_others: bool = host not in ("127.0.0.1", "localhost", "::1")

    @property
    def address(self) -> str:
        """Address of the page."""
        return f"http://{self.server_address[0]}:{self.server_address[1]}/"

    def is_own_host(self, host: str) -> bool:
        """Return whether a request names this server as its host.

        A server that is open to others accepts all names, because it cannot know its own in the network.
        """
        port = self.server_address[1]
        return self.is_open_to_others or host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}")

    def answer(self, body: bytes) -> dict[str, Any]:
        """Answer a request of the page's script: an image, values of sliders, and switches that are on.

        Raises:
            ValueError: if it is not such a request.
        """
        try:
            request = json.loads(body)
            number = request["image"]
            values = {str(name): float(value) for name, value in request["values"].items()}
            switched_on = [str(name) for name in request["switchedOn"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"is not a request of this page: {type(error).__name__}") from None
        if not isinstance(number, int) or not 0 <= number < len(self.subjects):
            raise ValueError(f"image must be a number from 0 to {len(self.subjects) - 1}, got {number!r}")
        with self.lock:
            return to_json(self.player.answer(self.subjects[number], values, switched_on))

    def add_image(self, body: bytes) -> dict[str, Any]:
        """Take an image file and return its number; when there are too many, the last one makes room.

        Raises:
            UndecodableImageError: if it is not an image, or has too many pixels.
        """
        model = self.player.model
        pixels = decode_image(np.frombuffer(body, np.uint8), model.config.data.max_pixels)
        with self.lock:
            if len(self.subjects) == self.num_given + _MAX_UPLOADS:
                self.subjects.pop()
            number = len(self.subjects)
            (crop,) = model.crop_images([pixels.numpy()])
            self.subjects.append(self.player.open(crop, number))
        return {"image": number, "address": data_uri(crop.cpu().numpy())}


class _Handler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT_S
    protocol_version = "HTTP/1.1"

    @property
    def _play(self) -> PlayServer:
        return cast("PlayServer", self.server)

    def do_GET(self) -> None:
        """Send the page."""
        if self._is_refused():
            return
        if self.path != "/":
            self._send_json({"error": "there is only the page itself here: /"}, HTTPStatus.NOT_FOUND)
            return
        self._send(self._play.page.encode(), "text/html; charset=utf-8", HTTPStatus.OK)

    def do_POST(self) -> None:
        """Answer the page's script."""
        actions: dict[str, Callable[[bytes], dict[str, Any]]] = {
            "/answer": self._play.answer, "/image": self._play.add_image
        }  # fmt: skip
        if self._is_refused():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._refuse("needs a Content-Length", HTTPStatus.LENGTH_REQUIRED)
        elif int(length) > MAX_BYTES:
            problem = f"has {int(length) / 1e6:.1f} MB; the limit is {MAX_BYTES / 1e6:.1f} MB"
            self._refuse(problem, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        elif self.path not in actions:
            self._refuse("goes to an address that does not exist", HTTPStatus.NOT_FOUND)
        else:
            try:
                answer = actions[self.path](self.rfile.read(int(length)))
            except UndecodableImageError as error:
                self._send_json({"error": f"The file {error}."}, HTTPStatus.BAD_REQUEST)
            except ValueError as error:
                self._send_json({"error": f"The request cannot be answered: {error}."}, HTTPStatus.BAD_REQUEST)
            else:
                self._send_json(answer)

    def _is_refused(self) -> bool:
        """Refuse a request of another host's page, and return whether it was one."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        is_refused = not self._play.is_own_host(host) or origin not in (None, f"http://{host}")
        if is_refused:
            self._refuse(f"comes from another page; open {self._play.address}", HTTPStatus.FORBIDDEN)
        return is_refused

    def _refuse(self, problem: str, status: HTTPStatus) -> None:
        # Its body was not read, so the connection cannot be used again.
        self.close_connection = True
        self._send_json({"error": f"The request {problem}."}, status)

    def _send_json(self, content: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(content).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests only where somebody looks for them."""
        log.debug(format, *args)
