"""What the end-to-end tests share: the client, functions, and the place where the daemon runs."""

import base64
import io
import json
import os
import subprocess
import textwrap
import time
import urllib.request
import zipfile

import boto3
import botocore.config
import pytest

ROLE = "arn:aws:iam::000000000000:role/test"

# An emulated CPU takes seconds for what takes milliseconds elsewhere.
PATIENCE = 180


def zipped(files):
    """A zip archive of {name: content}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
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
