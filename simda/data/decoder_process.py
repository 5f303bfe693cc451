"""A process beside this one that reads videos, so that a decoder that hangs or crashes costs one file only.

A call into a C library that hangs cannot be ended from within its process, whatever thread it runs in; a process can be
killed. One is started for many files, and a new one only after a kill. What it does with a file is `video_io.py`'s
business.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from simda.errors import VideoError

START_TIMEOUT_S = 120.0
# Imported before it says that it is ready: a file's time is its own.
CHILD = (
    "import sys, simda.data.video_io; from simda.data.decoder_process import serve; serve(*map(float, sys.argv[1:]))"
)

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


class DecoderProcess:
    """Runs functions on one video after the other, each for a limited time.

    The process starts with this object and ends with it, or with the process that made it, however that ends.
    """

    def __init__(self, timeout_s: float) -> None:
        """Start the process.

        Args:
            timeout_s: that a call may take.
        """
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._start()

    def call(
        self,
        function: Callable[Concatenate[str, Rest], Result],
        uri: str,
        *args: Rest.args,
        **kwargs: Rest.kwargs,
    ) -> Result:
        """What `function(uri, *args, **kwargs)` gives; arrays come over as bytes, not as pickles.

        Args:
            function: of a module, so that the process can import it.

        Raises:
            VideoError: it took too long, or the process died of it; otherwise whatever the function raises.
        """
        with self._lock:
            if self._child is None:
                self._start()
            assert self._child is not None
            try:
                self._connection.send((function, (uri, *args), kwargs))
                if not self._connection.poll(self.timeout_s):
                    self._stop()
                    raise VideoError(f"{uri} was not read within {self.timeout_s:g} s, so its decoder was killed")
                result, is_error = _receive(self._connection)
            except (EOFError, ConnectionError):
                self._child.wait()
                died_of = _name_exit(self._child.returncode)
                self._stop()
                raise VideoError(f"{uri} made its decoder crash ({died_of})") from None
        if is_error:
            raise result
        return result

    def close(self) -> None:
        """End the process, whatever it is doing; another call starts a new one."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._connection, far_end = Pipe()
        with far_end:
            # Its own, since a process that is killed leaves its copies of videos behind.
            self._folder = tempfile.mkdtemp(prefix="simda-")
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", CHILD, str(far_end.fileno()), str(self.timeout_s)],
                stdin=subprocess.DEVNULL,
                pass_fds=[far_end.fileno()],
                # What this process can import, that one can.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "TMPDIR": self._folder,
                },
            )
        try:
            ready = self._connection.poll(START_TIMEOUT_S) and self._connection.recv()
        except EOFError:
            ready = False
        if not ready:
            self._stop()
            raise RuntimeError("the process that reads videos did not start; what it printed says why")

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._connection.close()
            self._child = None
            shutil.rmtree(self._folder, ignore_errors=True)


def serve(descriptor: float, timeout_s: float) -> None:
    """The process's work: answer calls until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with Connection(int(descriptor)) as connection:
        connection.send(True)
        while True:
            try:
                function, args, kwargs = connection.recv()
            except EOFError:
                # Whoever started this process may have been killed, and so does not do it.
                with suppress(OSError):
                    os.rmdir(tempfile.gettempdir())
                return
            # The caller kills a call that hangs; the alarm does where the caller was killed before.
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 10)
            try:
                answer = function(*args, **kwargs), False
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = error, True
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                _send(connection, answer)
            except BrokenPipeError:
                return


def _send(connection: Connection, answer: tuple[Any, bool]) -> None:
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(answer, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    connection.send((pickled, [view.nbytes for view in views]))
    for view in views:
        connection.send_bytes(view)


def _receive(connection: Connection) -> tuple[Any, bool]:
    pickled, sizes = connection.recv()
    buffers = [np.empty(size, dtype=np.uint8) for size in sizes]
    for buffer in buffers:
        connection.recv_bytes_into(buffer.data)
    return pickle.loads(pickled, buffers=buffers)


def _name_exit(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"
