"""Solve(equation): the worker process behind it, kept warm, replaced when it hangs, ended with the program."""

import atexit
import json
import queue
import subprocess
import sys
import threading

from moss_jt.errors import Reason
from moss_jt.plugins.interface import Outcome, Style

NO_ANSWER = Reason("these equations have no answer within the limits of time and memory")
START_S = 60.0  # importing sympy on a busy machine
WORKER = "moss_jt.plugins.solver_worker"


class _Worker:
    """One solver process and the thread that reads its answers."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the chat ends the answer, not this process
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = False

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def ask(self, equations: str, timeout_s: float) -> str | None:
        """The answer; None for none.

        Raises:
            TimeoutError: the process did not answer in time, or it has died.
        """
        if not self.ready:
            self._next(START_S)
            self.ready = True
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(equations) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise TimeoutError("the solver has ended") from error
        answer = json.loads(self._next(timeout_s))
        return answer if isinstance(answer, str) else None

    def _next(self, timeout_s: float) -> str:
        try:
            line = self.answers.get(timeout=timeout_s)
        except queue.Empty as error:
            raise TimeoutError("the solver takes too long") from error
        if line is None:
            raise TimeoutError("the solver has ended")
        return line

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


_lock = threading.Lock()
_worker: _Worker | None = None


def _end() -> None:
    global _worker
    if _worker is not None:
        _worker.end()
        _worker = None


atexit.register(_end)


def solve(equations: str, timeout_s: float) -> str | None:
    """The answer's lines, or None: no answer, outside the grammar, or beyond the limits of time and memory."""
    global _worker
    with _lock:
        if _worker is not None and _worker.process.poll() is not None:
            _end()  # the system ended it between two calls; that is no fault of these equations
        if _worker is None:
            _worker = _Worker()
        try:
            return _worker.ask(equations, timeout_s)
        except TimeoutError:
            _end()
            return None


class Solver:
    """The plugin."""

    name = "solver"
    label = "Equation solver"
    function = "Solve"
    argument = "equation"
    style: Style = "lines"
    timeout_s = START_S + 20.0  # the first call waits for sympy, too
    solve_s = 10.0

    def call(self, argument: str, wanted: int) -> Outcome:
        return Outcome(text=solve(argument, self.solve_s) or "", failure=NO_ANSWER)
