"""`--isolation per-invocation`: nothing of one request is found by the next.

The daemon of the other tests keeps instances warm. It is the control here: what is planted must be
found there, or looking for it would prove nothing. A second daemon, which resets, runs beside it.
"""

import json
import secrets

import pytest

from conftest import SecondDaemon, wait_for


class Isolated(SecondDaemon):
    def deployed(self, name, source):
        """A function, as something to call with events."""
        self.deploy(name, source)
        return lambda event: self.invoke(name, event)

    def invoke(self, name, event):
        """The answer, after a check that it is a fresh instance's."""
        head, body = self.call(f"/2015-03-31/functions/{name}/invocations", event)
        assert "x-firn-start-kind: reset" in head or "x-firn-start-kind: thaw" in head, head + body
        return json.loads(body)

    def pid(self, name):
        """The VMM of the one instance of that name, once it waits."""

        def idle():
            listed = json.loads(self.call("/firn/v1/instances")[1])["Instances"].values()
            return [i["Pid"] for i in listed if i["FunctionName"] == name and i["State"] == "idle"]

        return wait_for("an idle instance", idle)[0]


@pytest.fixture(scope="module")
def isolated(site):
    with Isolated(site, "isolated", 9097, "--isolation per-invocation").running() as daemon:
        yield daemon


PLANT = """
import builtins, ctypes, os, random, signal, socket, subprocess, sys, threading, time

libm = ctypes.CDLL("libm.so.6")
libc = ctypes.CDLL(None)
kept = []

def look(secret):
    "Which of the places where `plant` leaves something have something."
    time.sleep(0.7)
    found = []
    def check(name, there):
        if there:
            found.append(name)
    check("global", kept)
    check("builtin", hasattr(builtins, "secret"))
    check("module", "secret" in sys.modules)
    check("environment", "SECRET" in os.environ)
    check("directory", os.getcwd() == "/tmp/secret")
    check("umask", os.umask(0o22) == 0o77)
    check("file", os.path.exists("/tmp/secret/file"))
    check("disk", os.statvfs("/tmp").f_ffree != FREE_INODES)
    check("timer", os.path.exists("/tmp/timer"))
    check("alarm", os.path.exists("/tmp/alarm"))
    check("thread", any(t.name == "secret" for t in threading.enumerate()))
    check("rounding", libm.fegetround() != 0)
    check("signal handler", signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL)
    check("thread name", open("/proc/self/task/%d/comm" % os.getpid()).read().startswith("secret"))
    check("priority", os.nice(0) > 0)
    check("descriptor", any("secret" in os.readlink("/proc/self/fd/" + n)
          for n in os.listdir("/proc/self/fd") if os.path.islink("/proc/self/fd/" + n)))
    for name, family, address in (
        ("port", socket.AF_INET, ("127.0.0.1", 5999)), ("socket", socket.AF_UNIX, "\\0secret"),
    ):
        with socket.socket(family) as s:
            check(name, s.connect_ex(address) == 0)
    def command(pid):
        try:
            return open("/proc/%s/cmdline" % pid).read()
        except OSError:
            return ""
    check("process", any("4242" in command(pid) for pid in os.listdir("/proc") if pid.isdigit()))
    return found

def plant(secret):
    "Leaves something wherever something can be left."
    kept.extend(secret + str(i) for i in range(20000))
    builtins.secret = secret
    sys.modules["secret"] = sys
    os.environ["SECRET"] = secret
    os.makedirs("/tmp/secret", exist_ok=True)
    os.chdir("/tmp/secret")
    os.umask(0o77)
    with open("/tmp/secret/file", "w") as file:
        file.write(secret * 10000)
    kept.append(open("/tmp/secret/file"))
    os.sync()
    def touch(path):
        open(path, "w").close()
    timer = threading.Timer(0.3, touch, ["/tmp/timer"])
    timer.start()
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGALRM, lambda *_: touch("/tmp/alarm"))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    threading.Thread(target=time.sleep, args=[4242], name="secret", daemon=True).start()
    libm.fesetround(0x800)
    libc.prctl(15, b"secret", 0, 0, 0)
    os.nice(3)
    for family, address in ((socket.AF_INET, ("127.0.0.1", 5999)), (socket.AF_UNIX, "\\0secret")):
        s = socket.socket(family)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(address)
            s.listen()
        except OSError:
            continue
        kept.append(s)
    kept.append(subprocess.Popen(["sleep", "4242"]))

FREE_INODES = os.statvfs("/tmp").f_ffree

def handler(event, context):
    clock, wall = time.monotonic(), time.time()
    found = look(event["secret"])
    plant(event["secret"])
    return {
        "found": found, "clock": clock, "wall": wall, "random": random.random(),
        "urandom": os.urandom(16).hex(), "pid": kept[-1].pid,
    }
"""

# What `look` looks for.
PLACES = [line.split('"')[1] for line in PLANT.splitlines() if line.startswith('    check("')]
PLACES += ["port", "socket"]


def test_nothing_of_one_request_is_found_by_the_next(isolated, deploy, site):
    warm = deploy(PLANT, Timeout=60).wait_for_snapshot()
    first = warm.invoke({"secret": "one"}, start="thaw")
    assert first.error is None and first.json["found"] == [], first.text
    found = warm.invoke({"secret": "two"}, start="warm").json["found"]
    assert sorted(found) == sorted(PLACES), "the control"

    fresh = isolated.deployed("secrets", PLANT)
    answers = []
    for _ in range(4):
        now = int(site.run("date +%s"))
        answers.append(fresh({"secret": secrets.token_hex(16)}))
        assert answers[-1]["found"] == []
        assert abs(answers[-1]["wall"] - now) < 30
        isolated.pid("secrets")
        site.run("sleep 3")
    # The same guest each time: the next process id does not go on from request to request (by at
    # least three, if it did; the kernel may make a thread or two), and its clock stands while it
    # waits.
    pids = [answer["pid"] for answer in answers]
    assert max(pids) - min(pids) < 6, pids
    clocks = [answer["clock"] for answer in answers]
    assert max(clocks) - min(clocks) < 3, clocks
    # But no two draw the same bytes.
    for name in ("random", "urandom"):
        assert len({answer[name] for answer in answers}) == len(answers), answers


# Looks for a text in all memory of a process that it could have written, up to the first mapping
# that has it. What was never touched reads as zeroes.
SEARCH = r"""
total=0
while read range mode rest; do
    case $mode in rw*) ;; *) continue ;; esac
    start=$((0x${range%-*} / 4096)); end=$((0x${range#*-} / 4096))
    count=$(dd if=/proc/$PID/mem bs=4096 skip=$start count=$((end - start)) 2>/dev/null |
        tr -s '\000' '\n' | grep -c -e "$TEXT")
    total=$((total + count))
    [ $total -eq 0 ] || break
done < /proc/$PID/maps
echo $total
"""


def occurrences(site, pid, text):
    return int(site.run(f"PID={pid}\nTEXT={text}\n{SEARCH}"))


def test_an_instance_that_waits_holds_nothing_of_its_last_request(isolated, deploy, site):
    keep = "kept = []\ndef handler(event, context):\n    kept.append(event)\n    return len(kept)\n"
    secret = secrets.token_hex(16)
    warm = deploy(keep).wait_for_snapshot()
    assert warm.invoke({"secret": secret}).json == 1
    instance = wait_for("it is idle", lambda: [i for i in warm.instances() if i["State"] == "idle"])
    assert occurrences(site, instance[0]["Pid"], secret) > 0, "the control"

    fresh = isolated.deployed("keep", keep)
    for _ in range(2):
        assert fresh({"secret": secret}) == 1
    assert occurrences(site, isolated.pid("keep"), secret) == 0
