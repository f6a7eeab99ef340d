"""A process for a peer, and what is said between it and the command."""

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from quark_inductor.peers.base import Place, Prepared
from quark_inductor.schemes.errors import QuarkInductorError

# A turn is long enough for a median and short enough for many of them.
TURN_SECONDS = 0.02
# After its last parallel loop a thread pool spins for a while before it sleeps; the next peer must not pay for that.
SETTLE_SECONDS = 0.01


class Died(QuarkInductorError):
    """The process of a peer ended."""


def _turn(call: Callable[[], Any], linears: int) -> list[float]:
    """Milliseconds a Linear, of every call in a turn but the first, which wakes the threads."""
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first > TURN_SECONDS:
        return [first * 1e3 / linears]
    times: list[float] = []
    end = time.perf_counter() + TURN_SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3 / linears)
    return times


def _serve(connection: Connection, log: str, peer_name: str, place: Place) -> None:
    """Answers what the command asks, in the process of the peer."""
    # Libraries print; what they print is shown only if they crash.
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from quark_inductor.peers import OURS, PEERS

    peers: dict[str, Any] = {}
    calls: dict[str, Prepared] = {}
    while True:
        try:
            question, scheme, argument = connection.recv()
        except EOFError:
            return
        try:
            answer: Any = None
            if question == "prepare":
                if scheme not in peers:
                    peers[scheme] = {**PEERS, OURS.name: OURS}[peer_name](place, scheme)
                calls.pop(scheme, None)
                done = calls[scheme] = peers[scheme].prepare(argument)
                answer = (
                    done.linears,
                    done.weights,
                    done.weight_bytes,
                    done.provider,
                    done.huge_pages,
                    done.read is not None,
                )
            elif question == "turn":
                answer = _turn(calls[scheme].call, calls[scheme].linears)
            elif question == "read":
                read = calls[scheme].read
                assert read is not None
                answer = _turn(read, calls[scheme].linears)
        except Exception as e:
            traceback.print_exc()
            first = (str(e).strip() or type(e).__name__).splitlines()[0]
            connection.send((False, first if isinstance(e, QuarkInductorError) else f"{type(e).__name__}: {first}"))
        else:
            connection.send((True, answer))


class Host:
    """The process of one peer at one place, seen from the command."""

    def __init__(self, peer_name: str, place: Place) -> None:
        self.peer_name, self.place = peer_name, place
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        handle, log = tempfile.mkstemp(prefix="quark-inductor-bench-", suffix=".log")
        os.close(handle)
        self._log = Path(log)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, log, self.peer_name, self.place), daemon=False)
        # Read when the thread pools are made: before anything of ours runs there.
        mine = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ.update(dict.fromkeys(mine, str(self.place.threads)))
        try:
            self._process.start()
        finally:
            for name, value in mine.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    def ask(self, question: str, scheme: str, argument: int = 0) -> Any:
        """What the process answers.

        Raises:
            Died: it crashed. The next question starts another.
            QuarkInductorError: it answers that it cannot.
        """
        if not self._process.is_alive():
            self.close()
            self._start()
        try:
            self._connection.send((question, scheme, argument))
            done, answer = self._connection.recv()
        except (EOFError, OSError) as e:
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise Died(f"its process ended with {how}" + (f": {said[-1]}" if said else "")) from e
        if not done:
            raise QuarkInductorError(answer)
        return answer

    def hang_up(self) -> None:
        """Ask the process to end, which takes torch seconds: first ask all of them, then :meth:`close`."""
        self._connection.close()

    def close(self) -> None:
        """End the process."""
        self.hang_up()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._log.unlink(missing_ok=True)
