"""What a thaw must renew, what it must keep, and what repeats."""

import time

# Bytes that clones draw from the kernel after their thaw. A thread draws without pause, across the
# snapshot too; it notices the thaw by the step of the wall clock, which comes before anything in the
# clone runs. A call that was on its way out of the kernel when the guest was frozen returns bytes
# of before: the first draw after the step is left out.
SPINNER = """
import os, threading, time

after = []

def spin():
    last = time.time()
    thawed = False
    while len(after) < 2000:
        drawn = os.getrandom(16).hex()
        now = time.time()
        if thawed:
            after.append(drawn)
        elif now - last > 2:
            thawed = True
        last = now

threading.Thread(target=spin, daemon=True).start()

def handler(event, context):
    end = time.monotonic() + 20
    while len(after) < 2000 and time.monotonic() < end:
        time.sleep(0.05)
    return {"spun": after, "fresh": [os.urandom(16).hex() for _ in range(200)]}
"""


def test_clones_never_share_kernel_random_bytes(deploy):
    function = deploy(SPINNER, MemorySize=256).wait_for_snapshot()
    time.sleep(3)
    clones = [function.invoke(start="thaw").json for _ in range(3)]
    drawn = [set(clone["spun"]) | set(clone["fresh"]) for clone in clones]
    for clone, own in zip(clones, drawn):
        assert len(clone["spun"]) == 2000
        assert len(own) == 2200
    assert not drawn[0] & drawn[1]
    assert not drawn[0] & drawn[2]
    assert not drawn[1] & drawn[2]


GENERATORS = """
import random, ssl, uuid

random.random()
ssl.RAND_bytes(16)
OWN = random.Random(42)

def handler(event, context):
    return {
        "random": random.random(), "ssl": ssl.RAND_bytes(16).hex(), "uuid": str(uuid.uuid4()),
        "own": OWN.random(),
    }
"""


def test_the_images_hook_reseeds_random_and_openssl(deploy):
    function = deploy(GENERATORS).wait_for_snapshot()
    first, second = (function.invoke(start="thaw").json for _ in range(2))
    for name in ("random", "ssl", "uuid"):
        assert first[name] != second[name], name
    # A generator of the function's own repeats; the image's README says so.
    assert first["own"] == second["own"]


CLOCKS = """
import threading, time

WALL, MONOTONIC = time.time(), time.monotonic()
fired = []
armed = threading.Timer(2.0, lambda: fired.append(time.monotonic() - MONOTONIC))
armed.start()

def handler(event, context):
    now = time.time()
    before = time.monotonic()
    time.sleep(0.5)
    slept = time.monotonic() - before
    armed.join(20)
    return {
        "now": now, "wall": now - WALL, "monotonic": before - MONOTONIC, "slept": slept,
        "fired": fired,
    }
"""


def test_clocks_and_timers_are_right_after_a_thaw(deploy, site):
    function = deploy(CLOCKS).wait_for_snapshot()
    time.sleep(5)
    for _ in range(2):
        earliest = int(site.run("date +%s"))
        answer = function.invoke(start="thaw").json
        latest = int(site.run("date +%s")) + 1
        assert earliest - 0.1 <= answer["now"] <= latest, (earliest, answer, latest)
        # The wall clock saw the time in between, the monotonic clock did not.
        assert answer["wall"] - answer["monotonic"] > 4, answer
        assert 0 <= answer["monotonic"] < 60, answer
        assert 0.5 <= answer["slept"] < 5, answer
        # The timer was armed before the snapshot and counts the guest's own time.
        assert answer["fired"] and 2.0 <= answer["fired"][0] < 60, answer


HOOKS = """
from snapshot_restore_py import register_before_snapshot, register_after_restore
import os

order = []
register_before_snapshot(lambda: order.append("before"))
register_after_restore(lambda: order.append("after"))

def handler(event, context):
    order.append("handler")
    return {"order": order, "type": os.environ["AWS_LAMBDA_INITIALIZATION_TYPE"]}
"""


def test_restore_hooks_run_before_the_handler(deploy):
    function = deploy(HOOKS).wait_for_snapshot()
    thawed = function.invoke(start="thaw")
    assert thawed.json == {"order": ["before", "after", "handler"], "type": "snap-start"}
    booted = function.invoke(start="boot")
    assert booted.json == {"order": ["handler"], "type": "on-demand"}


def test_a_failing_restore_hook_fails_the_invocation(deploy):
    function = deploy(
        "from snapshot_restore_py import register_after_restore\n"
        "def hook(): raise RuntimeError('not today')\n"
        "register_after_restore(hook)\n"
        "def handler(event, context): return 'served'"
    ).wait_for_snapshot()
    answer = function.invoke(start="thaw")
    assert answer.error == "Unhandled", answer.text
    assert "not today" in answer.text + answer.log


TMP = """
import os

with open("/tmp/init", "w") as file:
    file.write("x" * 100_000)

def handler(event, context):
    with open("/tmp/init") as file:
        kept = len(file.read())
    found = sorted(os.listdir("/tmp"))
    with open("/tmp/own", "w") as file:
        file.write("y" * 5_000_000)
    os.sync()
    return {"kept": kept, "found": [name for name in found if name != "lost+found"]}
"""


def test_tmp_survives_the_snapshot_and_belongs_to_one_clone(deploy):
    function = deploy(TMP).wait_for_snapshot()
    for _ in range(2):
        assert function.invoke(start="thaw").json == {"kept": 100_000, "found": ["init"]}
    assert function.invoke(start="warm").json["found"] == ["init", "own"]


def test_nothing_else_is_writable(deploy):
    function = deploy(
        """
def handler(event, context):
    refused = []
    for path in ("/var/task/x", "/opt/x", "/etc/x", "/x", "/var/runtime/x", "/usr/lib/x"):
        try:
            open(path, "w")
        except OSError as error:
            refused.append(path)
    return refused
"""
    )
    assert len(function.invoke().json) == 6


def test_a_thawed_instance_is_paused_and_resumed(deploy, site):
    function = deploy(
        "import time, threading\n"
        "ticks = []\n"
        "def tick():\n"
        " while True:\n"
        "  ticks.append(1)\n"
        "  time.sleep(0.05)\n"
        "def handler(event, context):\n"
        " if not ticks: threading.Thread(target=tick, daemon=True).start()\n"
        " return len(ticks)"
    ).wait_for_snapshot()
    function.invoke(start="thaw")
    first = function.invoke(start="warm").json
    time.sleep(6)
    second = function.invoke(start="warm").json
    # Unpaused, six seconds would be a hundred ticks.
    assert second - first < 60, (first, second)
