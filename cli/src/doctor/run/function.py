"""What `firn doctor --run` asks of a guest."""

import mmap
import os
import random
import time
import uuid

KEPT = None

# rdtsc; shl rdx, 32; or rax, rdx; ret
READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")


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
    if what == "tsc":
        return compare_tsc(event["seconds"])
    if what == "fill":
        return len([bytearray(b"x" * 2**20) for _ in range(event["mib"])])
    raise ValueError(what)


def compare_tsc(seconds):
    """Reads the TSC around the monotonic clock, twice with a pause between: [[tsc, ns, tsc], [tsc, ns, tsc]]."""
    try:
        import ctypes
    except ImportError as error:
        raise RuntimeError("the image's Python has no ctypes, which reads the TSC") from error
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(READ_TSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)

    def closest():
        readings = [(tsc(), time.monotonic_ns(), tsc()) for _ in range(20)]
        return min(readings, key=lambda reading: reading[2] - reading[0])

    before = closest()
    time.sleep(seconds)
    return [before, closest()]
