"""Processes forked off one that has imported a module and done nothing else: importing takes longer than what tests have them do.

python forks.py MODULE serves; orders come as lines of JSON, and a number answers each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any


class Forks:
    """Starts processes, each of which runs the ``main`` of a module with arguments of its own."""

    def __init__(self, module: str, **environment: str):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, __file__, module], env=os.environ | environment, **pipes)

    def start(self, arguments: list[str], said: Path, **environment: str) -> int:
        """Its process ID; what it says on standard output and of errors goes to a file."""
        return self._ask(arguments=arguments, said=str(said), environment=environment)

    def wait(self, pid: int) -> int:
        """Its exit status, as that of `subprocess.Popen`."""
        return self._ask(wait=pid)

    def _ask(self, **order: Any) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate(timeout=60)


def serve(module: str) -> None:
    main = import_module(module).main
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            status = 1
            try:
                os.environ |= order["environment"]
                said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(said, 1)
                os.dup2(said, 2)
                status = main(order["arguments"])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)  # the rest of the orders is not for this process


if __name__ == "__main__":
    serve(sys.argv[1])
