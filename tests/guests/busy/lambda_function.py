"""Keeps two vCPUs busy while its module is imported, then tells what it saw.

The VMM's tests stop and thaw the guest in the middle of the import: both processes are then inside
their loops, and both must go on as if nothing had happened.
"""

import os
import time

SPIN_SECONDS = 3.0

# What every CPU says of itself.
ABOUT = ("physical id", "siblings", "cpu cores")


def spin(seconds):
    """Counts for `seconds`; returns rounds, monotonicity of the clock, and a checksum of them."""
    start = last = time.monotonic()
    rounds = 0
    backwards = 0
    check = 1
    while last - start < seconds:
        now = time.monotonic()
        backwards += now < last
        last = now
        for i in range(1000):
            check = (check * 31 + i) % 1_000_003
        rounds += 1
    # The checksum is a function of the rounds alone; computing it again finds a corrupted register.
    again = 1
    for _ in range(rounds):
        for i in range(1000):
            again = (again * 31 + i) % 1_000_003
    return {"rounds": rounds, "backwards": backwards, "sound": check == again}


reader, writer = os.pipe()
child = os.fork()
if child == 0:
    seen = spin(SPIN_SECONDS)
    os.write(writer, repr(seen).encode())
    os._exit(0)
PARENT = spin(SPIN_SECONDS)
CHILD = eval(os.read(reader, 4096))
os.waitpid(child, 0)


def lambda_handler(event, context):
    now = time.time_ns()
    with open("/proc/cpuinfo") as file:
        lines = [line.partition(":")[::2] for line in file]
    about = {name: sorted({value.strip() for key, value in lines if key.strip() == name}) for name in ABOUT}
    return {"time_ns": now, "parent": PARENT, "child": CHILD, "cpus": os.cpu_count(), **about}
