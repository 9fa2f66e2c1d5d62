"""A process that tries calls: one a line of its input, the answer a line of its output.

What crashes it, or never ends, is the parent's to notice; `Child` is the parent's side.
"""

from __future__ import annotations

import ast
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from .calls import Call

TESTS = Path(__file__).resolve().parents[1]
SERVE = "from fuzz.child import serve; serve()"


def serve() -> None:
    """Answers until its input ends."""
    # What a library prints goes to stderr, and cannot be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    from .check import check

    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        call = Call(**ast.literal_eval(line))
        try:
            finding = check(call)
        except Exception as error:
            finding = f"{type(error).__name__}: {error}"
        print(json.dumps(finding), file=answers)


class Child:
    """Tries calls in a process of its own, which is begun again after a crash and after a while."""

    def __init__(self, timeout: float = 60, code: str = SERVE, calls_per_process: int = 5000) -> None:
        self.timeout, self.code, self.calls_per_process = timeout, code, calls_per_process
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def check(self, call: Call) -> str | None:
        """What is wrong with this call, a crash and a hang included; None where nothing is."""
        if self._process is None or self._calls >= self.calls_per_process:
            self._end()
            self._begin()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self._calls += 1
        try:
            process.stdin.write(f"{call.choices()!r}\n".encode())
            process.stdin.flush()
        except BrokenPipeError:
            return self._crash()
        if not self._selector.select(self.timeout):
            self._end()
            return f"hangs: no answer within {self.timeout} s"
        answer = process.stdout.readline()
        return json.loads(answer) if answer.endswith(b"\n") else self._crash()

    def _begin(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in _end
        command = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", self.code]
        self._process = subprocess.Popen(
            command, cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._calls = 0
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b'"ready"\n':  # torch has been imported
            raise RuntimeError(f"the fuzzer's process cannot begin: {self._crash()}")

    def _crash(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        self._end()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"crashes: {name}\n{said[-3000:]}"

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()
        self._selector.close()
        self._stderr.close()
        self._process = None
