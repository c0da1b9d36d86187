"""What the end-to-end tests share: the client, functions, and the place where the daemon runs."""

import base64
import contextlib
import io
import json
import os
import shlex
import subprocess
import textwrap
import time
import urllib.request
import zipfile

import boto3
import botocore.config
import pytest

# Each of pytest's workers has a daemon, and a host VM, of its own: its environment says where. Test files read it
# when they are imported, too.
PLACES = json.loads(os.environ["FIRN_PLACES"])
os.environ.update(PLACES[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))])

# Lines of the daemon's log that a failure shows.
LOG_LINES = 80

ACCOUNT = "000000000000"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/test"

# How to run other clients than boto3, by name.
COMMANDS = json.loads(os.environ.get("FIRN_CLIENTS", "{}"))

# An emulated CPU takes seconds for what takes milliseconds elsewhere; by night it does what takes minutes.
PATIENCE = 900 if os.environ.get("FIRN_NIGHTLY") else 180


def rounds(few, many):
    """How often a test does something: `few` times, or `many` in the nightly run."""
    return many if "FIRN_NIGHTLY" in os.environ else few


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows the end of the log of the daemon that the test had."""
    report = yield
    if report.failed:
        with open(os.environ["FIRN_LOG"], errors="replace") as log:
            report.sections.append(("the daemon's log", "".join(log.readlines()[-LOG_LINES:])))
    return report


def zipped(files, stored=False):
    """A zip archive of {name: content}, without compression if `stored`."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def wait_for(what, condition, limit=PATIENCE):
    """Returns the condition's first true value."""
    end = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what}: not after {limit} s"
        time.sleep(0.1)


class Answer:
    """What an invocation returned."""

    def __init__(self, raw):
        self.status = raw["StatusCode"]
        self.error = raw.get("FunctionError")
        self.version = raw.get("ExecutedVersion")
        self.text = raw["Payload"].read().decode()
        self.headers = raw["ResponseMetadata"]["HTTPHeaders"]
        self.kind = self.headers.get("x-firn-start-kind")
        self.log = base64.b64decode(raw.get("LogResult", "")).decode(errors="replace")

    @property
    def json(self):
        return json.loads(self.text)


class Function:
    """A deployed function."""

    def __init__(self, client, endpoint, name):
        self.client, self.endpoint, self.name = client, endpoint, name

    def invoke(self, event=None, start=None, **more):
        """`start` asks for a start from boot, thaw or warm."""
        header = {"value": start}

        def add(request, **_):
            if header["value"]:
                request.headers["X-Firn-Start"] = header["value"]

        events = self.client.meta.events
        events.register("before-sign.lambda.Invoke", add)
        try:
            payload = json.dumps(event).encode()
            raw = self.client.invoke(
                FunctionName=self.name, **{"Payload": payload, "LogType": "Tail", **more}
            )
            return Answer(raw)
        finally:
            events.unregister("before-sign.lambda.Invoke", add)

    def snapshot(self):
        url = f"{self.endpoint}/firn/v1/functions/{self.name}/snapshot"
        with urllib.request.urlopen(url) as answer:
            return json.load(answer)

    def wait_for_snapshot(self):
        status = wait_for(
            f"the snapshot of {self.name}",
            lambda: (s := self.snapshot())["state"] in ("ready", "failed") and s,
        )
        assert status["state"] == "ready", status
        return self

    def instances(self):
        with urllib.request.urlopen(f"{self.endpoint}/firn/v1/instances") as answer:
            found = json.load(answer)["Instances"].values()
        return [instance for instance in found if instance["FunctionName"] == self.name]


class Site:
    """Where the daemon runs."""

    def __init__(self, runner):
        self.runner = runner

    def run(self, script, check=True):
        """Runs a shell script there and returns what it printed."""
        done = subprocess.run(
            [*self.runner, "sh", "-c", script], capture_output=True, text=True, timeout=PATIENCE
        )
        assert not check or done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def endpoint():
    return os.environ["FIRN_ENDPOINT"]


@pytest.fixture(scope="session")
def client(endpoint):
    config = botocore.config.Config(
        read_timeout=PATIENCE, retries={"total_max_attempts": 1}, parameter_validation=False
    )
    return boto3.client("lambda", endpoint_url=endpoint, config=config)


@pytest.fixture(scope="session")
def site():
    return Site(json.loads(os.environ["FIRN_RUNNER"]))


class SecondDaemon:
    """A daemon with other flags beside that of the other tests; only programs at its own place can reach
    it."""

    # What else is done before it, and what runs it.
    before = ""
    runner = ""
    # What it answers once it serves.
    ready = "/firn/v1/instances"

    def __init__(self, site, name, port, flags):
        self.site, self.port, self.flags = site, port, flags
        self.dir = f"/tmp/{name}"
        self.state = f"{self.dir}/state"
        self.url = f"http://127.0.0.1:{port}"

    def start(self):
        # A session of its own, made before the script ends: whatever else it started ends with it.
        self.site.run(f"""
argument() {{ tr '\\0' '\\n' < /proc/$(pidof firnd | cut -d' ' -f1)/cmdline | grep -A1 -x -e "$1" | tail -n1; }}
artifacts=$(argument --artifacts)
mkdir -p {self.dir}
{self.before}
setsid {self.runner} $artifacts/bin/firnd --artifacts $artifacts --state {self.state} --listen 127.0.0.1:{self.port} \\
    --patience 20 --no-cpu-limits {self.flags} >> {self.dir}/log 2>&1 &
echo $! > {self.dir}/pid
for _ in $(seq 120); do
    busybox wget -q -O /dev/null {self.url}{self.ready} && exit 0
    kill -0 $(cat {self.dir}/pid) || break
    sleep 0.5
done
cat {self.dir}/log
exit 1
""")

    def stop(self):
        """Waits until it is gone, and returns the end of its log."""
        return self.site.run(f"""
pid=$(cat {self.dir}/pid)
kill $pid 2>/dev/null
while kill -0 $pid 2>/dev/null; do sleep 0.1; done
tail -n 20 {self.dir}/log
""")

    def remove(self):
        self.site.run(f"rm -rf {self.dir}")

    @contextlib.contextmanager
    def running(self):
        """Starts it, and leaves nothing of it."""
        try:
            self.start()
            yield self
        finally:
            print(self.stop())
            self.remove()

    def log(self):
        return self.site.run(f"cat {self.dir}/log")

    def call(self, path, body=None):
        """The answer's head and body."""
        command = f"busybox wget -S -q -O {self.dir}/answer {self.url}{path}"
        if body is not None:
            self.site.run(f"printf %s {shlex.quote(json.dumps(body))} > {self.dir}/body")
            command += f" --post-file={self.dir}/body"
        head = self.site.run(f"{command} 2>&1; rm -f {self.dir}/body", check=False)
        read = f"cat {self.dir}/answer; rm -f {self.dir}/answer"
        return head.lower(), self.site.run(read, check=False)

    def deploy(self, name, source, stored=False, **more):
        """Makes a function and waits for its snapshot."""
        code = zipped({"index.py": textwrap.dedent(source)}, stored)
        settings = {"Runtime": "python3.11", "Handler": "index.handler", "MemorySize": 128}
        settings.update({"FunctionName": name, "Role": ROLE, "Timeout": 60, **more})
        settings["Code"] = {"ZipFile": base64.b64encode(code).decode()}
        self.call("/2015-03-31/functions", settings)
        self.wait_for_snapshot(name)

    def wait_for_snapshot(self, name):
        path = f"/firn/v1/functions/{name}/snapshot"
        state = wait_for(
            "the snapshot",
            lambda: (s := json.loads(self.call(path)[1] or "{}").get("state")) in ("ready", "failed") and s,
        )
        assert state == "ready", self.log()


ADMIN = ("AKIDADMIN00000000000", "a-secret-of-the-admin")
DEVELOPER = ("AKIDDEVELOPER0000000", "a-secret-of-the-developer")
BOB = ("AKIDBOB0000000000000", "a-secret-of-bob-himself")


def user(key, *statements):
    return {
        "keys": [{"id": key[0], "secret": key[1]}],
        "policies": [{"Version": "2012-10-17", "Statement": list(statements)}],
    }


IDENTITY = {
    "users": {
        "admin": user(ADMIN, {"Effect": "Allow", "Action": "*", "Resource": "*"}),
        "developer": user(
            DEVELOPER,
            {"Effect": "Allow", "Action": "lambda:*", "Resource": "*"},
            {"Effect": "Allow", "Action": "iam:PassRole", "Resource": ROLE},
        ),
        "bob": user(
            BOB,
            {"Effect": "Allow", "Action": "lambda:ListFunctions", "Resource": "*"},
            {
                "Effect": "Allow",
                "Action": "lambda:InvokeFunction",
                "Resource": f"arn:aws:lambda:*:{ACCOUNT}:function:${{aws:username}}-*",
            },
        ),
    },
    "roles": {
        "test": {
            "trust": {
                "Version": "2012-10-17",
                "Statement": {
                    "Effect": "Allow",
                    "Principal": {"Service": "lambda.amazonaws.com"},
                    "Action": "sts:AssumeRole",
                },
            }
        }
    },
}


class Guarded(SecondDaemon):
    """A daemon with `--identity` that clients here reach, too."""

    # What start() asks for must need no signature.
    ready = "/firn/v1/health"

    def __init__(self, site, identity=IDENTITY, flags=""):
        port = int(os.environ["FIRN_SECOND_PORT"])
        super().__init__(site, "guarded", port, f"--identity /tmp/guarded/identity.json {flags}")
        # The file must be nobody else's. The daemon must do under such a umask, too.
        self.before = f"""
umask 077
cat > {self.dir}/identity.json <<'IDENTITY'
{json.dumps(identity)}
IDENTITY
"""
        self.endpoint = os.environ["FIRN_SECOND_ENDPOINT"]

    def client(self, key=(None, None), **config):
        """boto3's client with that key."""
        config = {"read_timeout": PATIENCE, "retries": {"total_max_attempts": 1}, **config}
        return boto3.client(
            "lambda",
            endpoint_url=self.endpoint,
            aws_access_key_id=key[0],
            aws_secret_access_key=key[1],
            config=botocore.config.Config(**config),
        )


@pytest.fixture(scope="module")
def guarded(site):
    with Guarded(site).running() as daemon:
        yield daemon


SCRIPT_RUNNER = """
def handler(event, context):
    scope = {"event": event, "context": context, "result": None}
    exec(event["script"], scope)
    return scope["result"]
"""


class Scripts:
    """One function that runs the script in its event, for tests that need none of their own.

    Making a function means booting it and taking its snapshot: seconds, where only QEMU is.
    """

    def __init__(self, function):
        self.function = function

    def run(self, script, start=None, **more):
        """Runs a script, which may set `result`, and returns the answer."""
        return self.function.invoke({"script": textwrap.dedent(script), **more}, start=start)

    def alive(self):
        """The next invocation is unharmed by the last."""
        answer = self.run("result = 'alive'")
        assert answer.json == "alive", answer.text
        return True


@pytest.fixture(scope="session")
def scripts(client, endpoint):
    function = create(client, endpoint, "scripts", {"index.py": SCRIPT_RUNNER})
    yield Scripts(function.wait_for_snapshot())
    client.delete_function(FunctionName=function.name)


def create(client, endpoint, name, files, **more):
    """Makes a function and waits until it is active."""
    settings = {"Runtime": "python3.11", "Handler": "index.handler", "MemorySize": 128}
    settings.update({"Timeout": 30, "Role": ROLE, **more})
    client.create_function(FunctionName=name, Code={"ZipFile": zipped(files)}, **settings)
    client.get_waiter("function_active_v2").wait(
        FunctionName=name, WaiterConfig={"Delay": 1, "MaxAttempts": PATIENCE}
    )
    return Function(client, endpoint, name)


@pytest.fixture
def deploy(client, endpoint, request):
    """Makes functions that are deleted after the test."""
    names = []

    def make(source="def handler(event, context): return event", name=None, files=None, **more):
        name = name or f"{request.node.name.split('[')[0]}-{len(names)}"[:64]
        names.append(name)
        return create(client, endpoint, name, files or {"index.py": source}, **more)

    yield make
    for name in names:
        try:
            client.delete_function(FunctionName=name)
        except client.exceptions.ResourceNotFoundException:
            pass
