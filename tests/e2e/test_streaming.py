"""Responses that reach the client while their function makes them."""

import base64
import http.client
import json
import textwrap
import time
import urllib.parse

import pytest

from conftest import PATIENCE, create, rounds, wait_for

# A runtime of its own: Python's runtime interface client does not stream. It takes over when it is
# imported, and runs the script in each event.
STREAMER = """
import base64, http.client, json, os, socket, time

API = os.environ["AWS_LAMBDA_RUNTIME_API"]
ROOT = "/2018-06-01/runtime"

class Response:
    def __init__(self, id, content_type="text/plain"):
        self.connection = http.client.HTTPConnection(API)
        self.connection.putrequest("POST", f"{ROOT}/invocation/{id}/response")
        for field in (
            ("Content-Type", content_type), ("Transfer-Encoding", "chunked"),
            ("Lambda-Runtime-Function-Response-Mode", "streaming"),
            ("Trailer", "Lambda-Runtime-Function-Error-Type"),
            ("Trailer", "Lambda-Runtime-Function-Error-Body"),
        ):
            self.connection.putheader(*field)
        self.connection.endheaders()

    def write(self, data):
        data = data.encode() if isinstance(data, str) else data
        self.connection.send(b"%x\\r\\n%s\\r\\n" % (len(data), data))

    def end(self, error=None):
        trailers = ""
        if error:
            body = base64.b64encode(json.dumps(error).encode()).decode()
            trailers = f"Lambda-Runtime-Function-Error-Type: {error['errorType']}\\r\\n"
            trailers += f"Lambda-Runtime-Function-Error-Body: {body}\\r\\n"
        self.connection.send(f"0\\r\\n{trailers}\\r\\n".encode())
        self.connection.getresponse().read()
        self.connection.close()

def serve():
    api = http.client.HTTPConnection(API)
    if os.environ["AWS_LAMBDA_INITIALIZATION_TYPE"] == "snap-start":
        api.request("GET", f"{ROOT}/restore/next")
        api.getresponse().read()
    while True:
        api.request("GET", f"{ROOT}/invocation/next")
        answer = api.getresponse()
        event, id = json.loads(answer.read()), answer.headers["Lambda-Runtime-Aws-Request-Id"]
        scope = {**globals(), "event": event, "id": id}
        exec(event["script"], scope)

serve()
"""


class Stream:
    """What came of an invocation, and when."""

    def __init__(self, raw):
        self.headers = raw["ResponseMetadata"]["HTTPHeaders"]
        self.version = raw["ExecutedVersion"]
        self.content_type = raw["ResponseStreamContentType"]
        self.chunks, self.times, self.complete = [], [], None
        for event in raw["EventStream"]:
            assert self.complete is None, "InvokeComplete is the last event"
            self.times.append(time.monotonic())
            if "PayloadChunk" in event:
                self.chunks.append(event["PayloadChunk"]["Payload"])
            else:
                self.complete = event["InvokeComplete"]
        assert self.complete is not None
        self.text = b"".join(self.chunks).decode()
        self.code = self.complete.get("ErrorCode")
        self.details = self.complete.get("ErrorDetails", "")
        self.log = base64.b64decode(self.complete.get("LogResult", "")).decode()


def invoke(function, event=None, start=None, **more):
    def add(request, **_):
        if start:
            request.headers["X-Firn-Start"] = start

    events = function.client.meta.events
    events.register("before-sign.lambda.InvokeWithResponseStream", add)
    try:
        raw = function.client.invoke_with_response_stream(
            FunctionName=function.name, Payload=json.dumps(event).encode(), **more
        )
        return Stream(raw)
    finally:
        events.unregister("before-sign.lambda.InvokeWithResponseStream", add)


def run(function, script, **more):
    return invoke(function, {"script": textwrap.dedent(script)}, **more)


@pytest.fixture(scope="module")
def streamer(client, endpoint):
    function = create(client, endpoint, "streamer", {"index.py": STREAMER}, Timeout=300)
    yield function.wait_for_snapshot()
    client.delete_function(FunctionName=function.name)


def test_first_bytes_arrive_before_the_function_ends(streamer):
    script = """
    response = Response(id)
    response.write("first")
    time.sleep(4)
    response.write("second")
    response.end()
    """
    for start in ("boot", "thaw", "warm"):
        stream = run(streamer, script, start=start, LogType="Tail")
        assert stream.text == "firstsecond" and stream.chunks[0] == b"first"
        assert stream.times[-1] - stream.times[0] > 2, "between the first chunk and the end"
        assert stream.code is None and stream.version == "$LATEST"
        assert stream.content_type == "application/vnd.amazon.eventstream"
        assert "REPORT RequestId: " in stream.log


def test_both_operations_take_both_kinds_of_functions(streamer, deploy):
    response = "response = Response(id); response.write('he'); response.write('llo'); response.end()"
    assert streamer.invoke({"script": response}).text == "hello"
    long = streamer.invoke({"script": """
response = Response(id)
for _ in range(110):
    response.write(b"x" * 65536)
response.end()
"""})
    assert long.error == "Unhandled"
    assert long.json["errorType"] == "Function.ResponseSizeTooLarge"
    assert "7208960" in long.json["errorMessage"]
    assert streamer.invoke({"script": response}).text == "hello"

    buffered = deploy("def handler(event, context): return 1 / event")
    stream = invoke(buffered, 2)
    assert (stream.chunks, stream.complete) == ([b"0.5"], {})
    failed = invoke(buffered, 0, LogType="Tail")
    assert failed.chunks == [] and failed.code == "ZeroDivisionError"
    assert json.loads(failed.details)["errorMessage"] == "division by zero"
    assert "ZeroDivisionError" in failed.log


BEGUN = "response = Response(id); response.write('some')\n"


def test_an_error_behind_the_first_bytes(streamer):
    error = {"errorType": "Function.Torn", "errorMessage": "half way"}
    torn = run(streamer, BEGUN + f"response.end({error})")
    assert (torn.text, torn.code, json.loads(torn.details)) == ("some", "Function.Torn", error)
    crashed = run(streamer, BEGUN + "time.sleep(1); os._exit(3)")
    assert (crashed.text, crashed.code) == ("some", "Runtime.ExitError")
    assert "exit status 3" in crashed.details
    broken = run(streamer, BEGUN + "response.connection.close()")
    assert (broken.text, broken.code) == ("some", "Runtime.TruncatedResponse")
    # Three times the instance has lived on.
    assert run(streamer, BEGUN + "response.end()", start="warm").text == "some"


def test_memory_and_time_end_a_stream(client, endpoint, streamer):
    greedy = run(streamer, BEGUN + "time.sleep(1); kept = [bytearray(b'x' * 2**20) for _ in range(4096)]")
    assert (greedy.text, greedy.code) == ("some", "Runtime.ExitError")
    assert "signal: killed" in greedy.details
    # A new runtime takes an emulated CPU seconds, and they count.
    assert run(streamer, BEGUN + "response.end()").code is None
    client.update_function_configuration(FunctionName=streamer.name, Timeout=5)
    try:
        late = run(streamer, BEGUN + "time.sleep(100)")
        assert (late.text, late.code) == ("some", "Sandbox.Timedout")
        assert late.details.count("Task timed out after 5.00 seconds") == 1
    finally:
        client.update_function_configuration(FunctionName=streamer.name, Timeout=300)
    assert run(streamer, BEGUN + "response.end()").code is None


def test_a_function_that_does_not_initialise(deploy):
    broken = deploy("import nothing_of_this_name\ndef handler(event, context): pass")
    stream = invoke(broken, start="boot")
    assert stream.chunks == [] and stream.code == "Runtime.ImportModuleError", stream.complete


def memory(site):
    """Resident memory of the daemon in MiB."""
    line = site.run("grep VmRSS /proc/$(pidof firnd | cut -d' ' -f1)/status")
    return int(line.split()[1]) / 1024


def test_a_hundred_megabytes_leave_the_daemons_memory_flat(client, site, streamer):
    run(streamer, BEGUN + "response.end()")
    before, most, size, blocks = memory(site), 0, 0, rounds(480, 1600)
    script = f"""
response = Response(id)
block = bytes(range(256)) * 256
for _ in range({blocks}):
    response.write(block)
response.end()
"""
    started = time.monotonic()
    raw = client.invoke_with_response_stream(
        FunctionName=streamer.name, Payload=json.dumps({"script": script})
    )
    measured = 0
    for event in raw["EventStream"]:
        if "PayloadChunk" in event:
            payload = event["PayloadChunk"]["Payload"]
            assert payload[0] == size % 256, "nothing is missing"
            size += len(payload)
            if size > measured + 10_000_000:
                measured, most = size, max(most, memory(site))
        else:
            assert "ErrorCode" not in event["InvokeComplete"], event
    took = time.monotonic() - started
    print(f"{size} bytes in {took:.1f} s; the daemon: {before:.1f} MiB before, {most:.1f} MiB at most")
    assert size == blocks * 65536
    assert most - before < 16, "MiB more than before"
    # The first 6 MiB as fast as may be, the rest at 2 MiB a second.
    assert took > 0.85 * (size / 2**20 - 6) / 2


def test_a_client_that_stops_or_leaves_harms_nobody(endpoint, streamer):
    run(streamer, BEGUN + "response.end()")
    before = streamer.instances()
    body = json.dumps({"script": """
response = Response(id)
for _ in range(500):
    response.write(b"x" * 65536)
response.end()
print("whole")
"""})
    url = urllib.parse.urlsplit(endpoint)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=PATIENCE)
    path = f"/2021-11-15/functions/{streamer.name}/response-streaming-invocations"
    connection.request("POST", path, body)
    answer = connection.getresponse()
    assert answer.status == 200
    answer.read(1000)

    def busy():
        return [i for i in streamer.instances() if i["State"] == "busy"]

    # 32 MB don't fit into what lies between: the function waits.
    time.sleep(5)
    assert len(busy()) == 1
    connection.close()
    wait_for("the function's end", lambda: not busy())
    assert len(streamer.instances()) == len(before)
    assert run(streamer, BEGUN + "response.end()", start="warm").text == "some"
