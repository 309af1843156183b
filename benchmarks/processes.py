"""Worker processes: one per system, each with memory, caches and log of its own."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_LOG_LINES = 15


class WorkerError(Exception):
    """A worker that failed, with the end of what it said."""


@dataclass(frozen=True)
class _Failure:
    text: str


class Worker:
    """A fresh Python process that runs one function and answers over a pipe."""

    def __init__(self, name: str, log: Path, function: Callable[..., Any], *arguments: Any):
        """Starts the process: `function(connection, *arguments)`.

        Args:
            name: How errors call it.
            log: Where all that it prints goes.
            function: A function of a module, which the process imports.
            arguments: What it is called with, after the connection.
        """
        context = multiprocessing.get_context("spawn")
        self.name, self._log = name, log
        self._connection, theirs = context.Pipe()
        # A daemon ends with its parent, whatever ends that.
        self._process = context.Process(
            target=_serve, args=(theirs, log, function, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        """Sends the worker a message."""
        self._connection.send(message)

    def receive(self) -> Any:
        """Waits for the worker's next message.

        Raises:
            WorkerError: if it failed or ended.
        """
        try:
            message = self._connection.recv()
        except EOFError:
            self._process.join()
            raise WorkerError(
                f"{self.name}: ended with exit code {self._process.exitcode} (killed for want of "
                f"memory, if that is -9)\n{self._tail()}"
            ) from None
        if isinstance(message, _Failure):
            raise WorkerError(f"{self.name}: {message.text}\n{self._tail()}")
        return message

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def call(name: str, log: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a process of its own and returns what it returns."""
    worker = Worker(name, log, _answer, function, arguments)
    try:
        return worker.receive()
    finally:
        worker.close()


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    connection.send(function(*arguments))


def _serve(connection: Connection, log: Path, function: Callable[..., Any], arguments: tuple):
    """Runs in the worker. What libraries print must not disturb the parent's table."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    try:
        function(connection, *arguments)
    except (EOFError, BrokenPipeError):
        pass  # The parent has gone.
    except BaseException as error:
        traceback.print_exc()
        connection.send(_Failure(f"{type(error).__name__}: {error}"))
