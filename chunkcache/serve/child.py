"""`python -m chunkcache.serve.child ...`: chunkcache as a child that is told to end when its parent is no more.

Its stdin is a pipe that the parent never writes to. However the parent ends, the system closes the pipe.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading


def _end_with_parent() -> None:
    os.read(0, 1)  # not by sys.stdin, whose lock would be held when Python ends
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("chunkcache", run_name="__main__", alter_sys=True)
