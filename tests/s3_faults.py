"""A proxy that spoils the connections to an S3 server, and a door to one that can be shut."""

from __future__ import annotations

import http.client
import random
import socket
import subprocess
import sys
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.'
    b"</Message></Error>"
)
# In front of a server whose memory must outlive it: to the clients, killing this is killing the server.
DOOR = """
import asyncio, sys

async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()

async def serve(reader, writer):
    there = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pump(reader, there[1]), pump(there[0], writer), return_exceptions=True)

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    print("open", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


class FaultyProxy:
    """Passes requests on to a server, and spoils a part of them, by a seed.

    Attributes:
        backend: host and port of the server.
        num_requests, num_faults: so far, by kind.
        held: parts of the address of a request that is never passed on nor answered; none by default.
        is_holding: set once there was one.
    """

    KINDS = ("refused", "dropped before", "dropped after", "cut", "slow down", "unavailable")

    def __init__(self, backend: str, seed: int, rate: float) -> None:
        self.rate, self._random, self._lock = rate, random.Random(seed), Lock()
        self.num_requests, self.num_faults = 0, dict.fromkeys(self.KINDS, 0)
        self.held: tuple[str, ...] = ()
        self.is_holding = Event()
        self.backend = urlsplit(backend).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def next_fault(self) -> str | None:
        """What to do to the next request, if anything."""
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


class _Handler(BaseHTTPRequestHandler):
    """A connection to a `FaultyProxy`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: FaultyProxy, *connection: Any) -> None:
        self.proxy = proxy
        super().__init__(*connection)

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        if self.proxy.held and all(part in self.path for part in self.proxy.held):
            self.proxy.is_holding.set()
            # Until the client is gone.
            while self.rfile.read(65536):
                pass
            return self._drop()
        kind = self.proxy.next_fault()
        if kind == "refused":
            return self._drop()
        body = self._read_body()
        if kind == "dropped before":
            return self._drop()
        if kind in ("slow down", "unavailable"):
            return self._answer(503, "", {"Content-Type": "application/xml"}, SLOW_DOWN if kind == "slow down" else b"")
        upstream = http.client.HTTPConnection(self.proxy.backend, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        if body or self.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        upstream.request(self.command, self.path, body, headers)
        response = upstream.getresponse()
        data = response.read()
        upstream.close()
        if kind == "dropped after":
            return self._drop()
        answer = {k: v for k, v in response.getheaders() if k.lower() not in ("transfer-encoding", "connection")}
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
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass


class Door:
    """The way to the server, which can be shut and opened again."""

    def __init__(self, server_port: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._server_port = server_port
        self.open()

    def open(self) -> None:
        command = [sys.executable, "-c", DOOR, str(self.port), str(self._server_port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout
        assert self._process.stdout.readline() == b"open\n"

    def shut(self) -> None:
        self._process.kill()
        self._process.communicate()
