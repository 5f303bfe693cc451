"""A proxy that spoils the connections to an S3 server."""

from __future__ import annotations

import http.client
import random
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.'
    b"</Message></Error>"
)


class FaultyProxy:
    """Passes requests on to a server, and spoils a part of them, by a seed.

    Attributes:
        num_requests, num_faults: so far, by kind.
    """

    KINDS = ("refused", "dropped before", "dropped after", "cut", "slow down", "unavailable")

    def __init__(self, backend: str, seed: int, rate: float) -> None:
        self.rate, self._random, self._lock = rate, random.Random(seed), Lock()
        self.num_requests, self.num_faults = 0, dict.fromkeys(self.KINDS, 0)
        proxy, backend_address = self, urlsplit(backend).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                kind = proxy._next_fault()
                if kind == "refused":
                    return self._drop()
                body = self._read_body()
                if kind == "dropped before":
                    return self._drop()
                if kind in ("slow down", "unavailable"):
                    return self._answer(
                        503, "", {"Content-Type": "application/xml"}, SLOW_DOWN if kind == "slow down" else b""
                    )
                upstream = http.client.HTTPConnection(backend_address, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
                if body or self.command in ("PUT", "POST"):
                    headers["Content-Length"] = str(len(body))
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                data = response.read()
                upstream.close()
                if kind == "dropped after":
                    return self._drop()
                answer = {
                    k: v for k, v in response.getheaders() if k.lower() not in ("transfer-encoding", "connection")
                }
                if self.command != "HEAD":
                    answer["Content-Length"] = str(len(data))
                if kind == "cut":
                    self._answer(response.status, response.reason, answer, data[: len(data) // 2])
                    return self._drop()
                self._answer(response.status, response.reason, answer, data)

            def _read_body(self) -> bytes:
                if self.headers.get("Expect", "").lower() == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                chunks = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return b"".join(chunks)

            def _answer(self, status: int, reason: str, headers: dict[str, str], data: bytes) -> None:
                self.send_response_only(status, reason)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

            def _drop(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def _next_fault(self) -> str | None:
        with self._lock:
            self.num_requests += 1
            if self._random.random() >= self.rate:
                return None
            kind = self._random.choice(self.KINDS)
            self.num_faults[kind] += 1
            return kind

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
