"""Functions that take more memory than they have: each is ended in time, and nothing else is."""

import collections
import concurrent.futures
import itertools
import os
import statistics
import time

from conftest import create, wait_for

# Overruns in an ordinary run and in a nightly one.
ROUNDS = 300 if os.environ.get("FIRN_NIGHTLY") else 12

# Seconds that a function may take: to fill 3,008 MB takes minutes under emulation.
TIMEOUT = 800 if ROUNDS > 12 else 170

# Overruns of one size from one start that have a meaningful median.
ENOUGH = 10

# Large blocks, small objects, a table that is moved as it grows, and pages that are all zeros.
WAYS = {
    "blocks": "kept.append(bytearray(b'x' * 2**20))",
    "lists": "kept.append([len(kept)] * 8)",
    "dictionary": "table[len(table)] = str(len(table))",
    "zeros": "kept.append(b'\\0' * 2**20)",
}

STARTS = ("boot", "thaw", "warm")

GREEDY = """
def handler(event, context):
    if not event:
        return "alive"
    print("begun", flush=True)
    kept, table = [], {}
    exec(f"while True: {event}")
"""


def rounds():
    """Each way from each start; nightly a quarter of them, another one each time, in the larger size: one that
    is thawed takes more of its host's memory than it should, and its VMM may be killed."""
    for cycle in itertools.count():
        for start in STARTS:
            for number, way in enumerate(WAYS):
                larger = ROUNDS > 12 and (number + STARTS.index(start) + cycle) % 4 == 0
                size = 512 if larger else 128
                yield size, start, way


def test_whoever_takes_more_memory_than_it_has_is_killed_in_time(client, endpoint):
    functions = {
        size: create(client, endpoint, f"greedy-{size}", {"index.py": GREEDY}, MemorySize=size, Timeout=TIMEOUT)
        for size in ((128, 512) if ROUNDS > 12 else (128,))
    }
    try:
        times = collections.defaultdict(list)
        for function in functions.values():
            function.wait_for_snapshot()
            assert function.invoke().json == "alive"
        for size, start, way in itertools.islice(rounds(), ROUNDS):
            function, what = functions[size], f"{way}, from {start}, {size} MB"
            began = time.monotonic()
            answer = function.invoke(WAYS[way], start=start)
            times[size, start].append((time.monotonic() - began, what))
            assert answer.kind == start, what
            assert answer.error == "Unhandled", f"{what}: {answer.text}"
            assert answer.json["errorType"] == "Runtime.ExitError", f"{what}: {answer.text}"
            assert answer.json["errorMessage"].endswith("signal: killed"), f"{what}: {answer.text}"
            # What it printed before arrived, and the guest that it was in serves the next.
            assert "begun" in answer.log.splitlines(), what
            after = function.invoke(start="warm")
            assert after.json == "alive", f"after {what}: {after.text}"
        for (size, start), taken in times.items():
            median = statistics.median(time for time, _ in taken)
            longest, what = max(taken)
            print(f"{size} MB from {start}: {len(taken)}, median {median:.1f} s, at most {longest:.1f} s ({what})")
        # A few say nothing about the spread: the first to fill a fresh instance takes twice as long as the next.
        for taken in (taken for taken in times.values() if len(taken) >= ENOUGH):
            longest, what = max(taken)
            assert longest <= 3 * statistics.median(time for time, _ in taken), what
    finally:
        for function in functions.values():
            client.delete_function(FunctionName=function.name)


# Holds half of its memory, and writes and reads more than the other half has room for.
LARGE_FILES = """
import os

def handler(event, context):
    kept = [bytearray(b"x" * 2**20) for _ in range(64)]
    block, size = os.urandom(2**20), 0
    with open("/tmp/large", "wb") as file:
        for _ in range(160):
            file.write(block)
    for _ in range(2):
        with open("/tmp/large", "rb") as file:
            while piece := file.read(2**20):
                size += len(piece)
    os.remove("/tmp/large")
    return [len(kept), size >> 20]
"""


def test_who_works_on_files_larger_than_its_memory_lives(deploy):
    function = deploy(LARGE_FILES, Timeout=TIMEOUT).wait_for_snapshot()
    for start in ("thaw", "warm"):
        answer = function.invoke(start=start)
        assert answer.json == [64, 320], f"{start}: {answer.text}"


# Takes so many MiB and keeps them.
FILL = """
def handler(event, context):
    kept = [bytearray(b"x" * 2**20) for _ in range(event)]
    return sum(len(block) for block in kept) >> 20
"""

# Blocks of 512 bytes that each of the daemon's memory files takes, by inode.
RESIDENT = r"""
for file in /proc/$(pidof -s firnd)/fd/*; do
    case $(readlink $file) in *firn-memory*) stat -L -c '%i %b' $file ;; esac
done | sort -u
"""


def resident(site):
    """Bytes of memory that resident snapshots take, by inode."""
    lines = (line.split() for line in site.run(RESIDENT).splitlines())
    return {inode: int(blocks) * 512 for inode, blocks in lines}


def test_clones_that_fill_their_memory_take_no_more_than_their_share(client, endpoint, site):
    for size in (512, 1024, 3008) if ROUNDS > 12 else (512,):
        function = create(
            client, endpoint, f"full-{size}", {"index.py": FILL}, MemorySize=size, Timeout=TIMEOUT
        )
        try:
            function.wait_for_snapshot()
            assert function.invoke(1, start="thaw").json == 1
            before, charged = resident(site), charge_of_all(site, function)
            much = size * 9 // 10

            def fill(clones):
                with concurrent.futures.ThreadPoolExecutor() as pool:
                    answers = list(pool.map(lambda _: function.invoke(much, start="thaw"), range(clones)))
                assert [answer.json for answer in answers] == [much] * clones, answers[0].text
                peaks = [charges(site, instance["Pid"]) for instance in function.instances()]
                # The first has not filled anything.
                assert sum(peak > much << 20 for peak, _ in peaks) == clones
                for peak, limit in peaks:
                    print(f"{size} MB: at most {peak >> 20} MiB of {limit >> 20} MiB")
                    assert peak < limit
                # Nothing of it stays charged when they end.
                for instance in function.instances():
                    site.run(f"kill -9 {instance['Pid']}")
                assert function.invoke(1, start="thaw").json == 1
                wait_for(
                    "the memory of clones that have ended is given back",
                    # A clone's own, and shells that wait, come and go.
                    lambda: charge_of_all(site, function) < charged + (much // 2 << 20),
                )

            for clones in (1, 1, 1, 2) if ROUNDS > 12 else (1, 2):
                fill(clones)
            # Small holes may be filled: those of less than 2 MiB between pages that it has.
            for inode, bytes in resident(site).items():
                grown = bytes - before.get(inode, bytes)
                print(f"resident: {bytes >> 20} MiB, grown by {grown >> 10} KiB")
                assert grown <= 16 << 20, f"by {grown} to {bytes}"
        finally:
            client.delete_function(FunctionName=function.name)


def charge_of_all(site, function):
    """Bytes that the control group of all VMMs is charged with."""
    pids = " ".join(str(instance["Pid"]) for instance in function.instances())
    path = site.run(f"for pid in {pids}; do tail -n 1 /proc/$pid/cgroup 2>/dev/null && break; done").strip()
    return int(site.run(f"cat /sys/fs/cgroup$(dirname {path.partition('::')[2]})/memory.current"))


def charges(site, pid):
    """The most that a VMM's control group was charged with, and its limit, in bytes."""
    peak, limit = site.run(
        f"path=/sys/fs/cgroup$(cut -d: -f3 /proc/{pid}/cgroup | tail -n 1); cat $path/memory.peak $path/memory.max"
    ).split()
    return int(peak), int(limit)
