"""What `firn doctor --run` asks of a guest."""

import os
import random
import time
import uuid

KEPT = None


def lambda_handler(event, context):
    global KEPT
    now = time.time_ns()
    what = event["what"]
    if what == "time":
        return now
    if what == "cpus":
        return os.cpu_count()
    if what == "random":
        return [os.urandom(16).hex(), str(uuid.uuid4()), random.SystemRandom().getrandbits(64)]
    if what == "keep":
        before, KEPT = KEPT, event["value"]
        return before
    if what == "pause":
        start = time.monotonic_ns()
        time.sleep(event["seconds"])
        return time.monotonic_ns() - start
    if what == "fill":
        return len([bytearray(b"x" * 2**20) for _ in range(event["mib"])])
    raise ValueError(what)
