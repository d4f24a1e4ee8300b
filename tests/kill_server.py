"""Runs main.py in forks that a library, preloaded into this process, kills at the k-th change below a directory.

Reads one JSON object a line: {"argv": […], "place": directory, "k": 0 for no kill, "seconds": null, or when it gets
"signal", "fork": 0, or the number of its fork in which it gets "signal", "env": {…} or null, "limit": seconds after
which it is ended and says where it was}. Answers with {"status", "out", "err", "pid", "changes", "orphans": the
commands of processes that are still there two seconds after it}.
"""

import ctypes
import faulthandler
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # nothing else may speak to the one who reads our answers

from helpers import run  # noqa: E402  imports torch and transformers, once

library = ctypes.CDLL(os.environ["LD_PRELOAD"])
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become our children


def orphans(seconds):
    """Wait so many seconds at most for all children to end. Returns: [command line] of those that have not."""
    until = time.time() + seconds
    while time.time() < until:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return []
        time.sleep(0.05)
    left = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()
    return [Path("/proc", number, "cmdline").read_text().replace("\0", " ") for number in left]


last = os.getpid()
for line in sys.stdin:
    job = json.loads(line)

    def prepare(job=job, last=last):
        if len(str(os.getpid())) != len(str(last)):  # 10000 after 9999
            time.sleep(1)  # TensorBoard reads the files of one second in the order of the digits of these numbers
        library.kill_at(job["place"].encode(), job["k"])
        faulthandler.enable()  # a run that does not end says where it waits
        forks = itertools.count(1)
        os.register_at_fork(before=lambda: next(forks) == job["fork"] and os.kill(os.getpid(), job["signal"]))

    signals = [(job["limit"], signal.SIGABRT)] + [(job["seconds"], job["signal"])] * (job["seconds"] is not None)
    library.kill_at(b"", 0)  # the counter is shared with the fork
    done = run(*job["argv"], prepare=prepare, env=job["env"], signals=signals)
    last = done.pid
    left = orphans(2)
    print(json.dumps(vars(done) | {"changes": library.kill_count(), "orphans": left}), file=answers, flush=True)
