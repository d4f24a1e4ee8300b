"""Runs main.py in forks that a library, preloaded into this process, kills at the k-th change below a directory.

Reads one JSON object a line: {"argv": […], "place": directory, "k": 0 for no kill, "seconds": null, or when to send
itself "signal"}. Answers with {"status", "out", "err", "changes"}.
"""

import ctypes
import json
import os
import signal
import sys

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # nothing else may speak to the one who reads our answers

from conftest import run  # noqa: E402  imports torch and transformers, once

library = ctypes.CDLL(os.environ["LD_PRELOAD"])
for line in sys.stdin:
    job = json.loads(line)

    def prepare(job=job):
        library.kill_at(job["place"].encode(), job["k"])
        if job.get("seconds"):
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), job["signal"]))
            signal.setitimer(signal.ITIMER_REAL, job["seconds"])

    library.kill_at(b"", 0)  # the counter is shared with the fork
    done = run(*job["argv"], prepare=prepare)
    print(json.dumps(vars(done) | {"changes": library.kill_count()}), file=answers, flush=True)
