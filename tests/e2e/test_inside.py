"""What functions do with AWS's own SDKs from inside: as their role, with KMS, and with other functions; and what their
X-Ray SDK tells a collector of traces."""

import base64
import gzip
import http.server
import json
import os
import pathlib
import textwrap
import threading
import time
import urllib.request

import boto3
import botocore
import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.credentials
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from conftest import ACCOUNT, ADMIN, IDENTITY, PATIENCE, ROLE, Guarded, SecondDaemon, wait_for, zipped

PACKAGES = pathlib.Path(botocore.__file__).parent.parent

# What the SDKs read of a service; botocore has some hundred.
SERVICES = ("kms", "lambda", "sts", "xray")


def packages(*names):
    """Files of installed packages for a function's archive."""
    files = {}
    for name in names:
        path = PACKAGES / name
        for file in [path] if path.is_file() else path.rglob("*"):
            inside = file.relative_to(PACKAGES)
            data = inside.parts[:2] == ("botocore", "data") and len(inside.parts) > 3
            if file.is_file() and "__pycache__" not in inside.parts:
                if not data or inside.parts[2] in SERVICES:
                    files[str(inside)] = file.read_bytes()
    return files


SDK = ("botocore", "dateutil", "jmespath", "six.py", "urllib3")

STATEMENTS = [
    {
        "Effect": "Allow",
        "Action": ["kms:Decrypt", "kms:Encrypt"],
        "Resource": "*",
        "Condition": {"StringEquals": {"kms:EncryptionContext:LambdaFunctionName": "insider"}},
    },
    {
        "Effect": "Allow",
        "Action": "lambda:InvokeFunction",
        "Resource": f"arn:aws:lambda:us-east-1:{ACCOUNT}:function:other",
    },
]

INSIDER = """
import base64
import datetime
import os

import botocore.exceptions
import botocore.session

session = botocore.session.get_session()
kms, sts, functions = (session.create_client(name) for name in ("kms", "sts", "lambda"))
CONTEXT = {"LambdaFunctionName": os.environ["AWS_LAMBDA_FUNCTION_NAME"]}

# At initialisation, as Lambda's documentation has it: what is in the snapshot is in the clear.
secret = kms.decrypt(
    CiphertextBlob=base64.b64decode(os.environ["SECRET"]), EncryptionContext=CONTEXT
)["Plaintext"].decode()


def refused(call, **arguments):
    try:
        call(**arguments)
    except botocore.exceptions.ClientError as error:
        return error.response["Error"]["Code"]


def handler(event, context):
    credentials = session.get_credentials()
    before = credentials.get_frozen_credentials()
    if event.get("refresh"):
        # As if the hour were over.
        credentials._expiry_time = datetime.datetime.now(datetime.timezone.utc)
    sealed = kms.encrypt(KeyId=os.environ["KEY"], Plaintext=b"again", EncryptionContext=CONTEXT)
    opened = kms.decrypt(CiphertextBlob=sealed["CiphertextBlob"], EncryptionContext=CONTEXT)
    after = credentials.get_frozen_credentials()
    answer = functions.invoke(FunctionName="other", Payload=b'{"from": "inside"}')
    return {
        "secret": secret,
        "again": opened["Plaintext"].decode(),
        "who": sts.get_caller_identity()["Arn"],
        "method": credentials.method,
        "renewed": before.access_key != after.access_key,
        "foreign": refused(kms.encrypt, KeyId=os.environ["KEY"], Plaintext=b"x", EncryptionContext={}),
        "forbidden": refused(functions.invoke, FunctionName="insider"),
        "other": answer["Payload"].read().decode(),
    }
"""


@pytest.fixture
def insiders(site):
    policies = [{"Version": "2012-10-17", "Statement": STATEMENTS}]
    roles = {"test": {**IDENTITY["roles"]["test"], "policies": policies}}
    with Guarded(site, {**IDENTITY, "roles": roles}).running() as daemon:
        yield daemon


def snapshot(daemon, name):
    """The state of a function's snapshot."""
    request = botocore.awsrequest.AWSRequest("GET", f"{daemon.endpoint}/firn/v1/functions/{name}/snapshot")
    credentials = botocore.credentials.Credentials(*ADMIN)
    botocore.auth.SigV4Auth(credentials, "lambda", "us-east-1").add_auth(request)
    request = request.prepare()
    with urllib.request.urlopen(urllib.request.Request(request.url, headers=dict(request.headers))) as answer:
        return json.load(answer)


def test_a_function_uses_kms_with_its_role_and_its_credentials_are_renewed(insiders):
    config = botocore.config.Config(read_timeout=PATIENCE, retries={"total_max_attempts": 1})
    kms = boto3.client(
        "kms",
        endpoint_url=insiders.endpoint,
        aws_access_key_id=ADMIN[0],
        aws_secret_access_key=ADMIN[1],
        config=config,
    )
    key = kms.create_key()["KeyMetadata"]["KeyId"]
    context = {"LambdaFunctionName": "insider"}
    sealed = kms.encrypt(KeyId=key, Plaintext=b"planted", EncryptionContext=context)["CiphertextBlob"]
    client = insiders.client(ADMIN)
    settings = {"Runtime": "python3.11", "Handler": "index.handler", "Role": ROLE, "Timeout": 60}
    echo = zipped({"index.py": "def handler(event, context): return event"})
    client.create_function(FunctionName="other", Code={"ZipFile": echo}, **settings)
    client.create_function(
        FunctionName="insider",
        Code={"ZipFile": zipped({"index.py": INSIDER, **packages(*SDK)})},
        MemorySize=256,
        Environment={"Variables": {"KEY": key, "SECRET": base64.b64encode(sealed).decode()}},
        **settings,
    )
    state = wait_for(
        "the snapshot", lambda: (s := snapshot(insiders, "insider"))["state"] in ("ready", "failed") and s
    )
    assert state["state"] == "ready", f"{state} {insiders.log()}"

    def invoke(**event):
        answer = client.invoke(FunctionName="insider", Payload=json.dumps(event))
        payload = json.loads(answer["Payload"].read())
        assert "FunctionError" not in answer, payload
        return answer["ResponseMetadata"]["HTTPHeaders"]["x-firn-start-kind"], payload

    expected = {
        "secret": "planted",
        "again": "again",
        "who": f"arn:aws:sts::{ACCOUNT}:assumed-role/test/insider",
        "method": "container-role",
        "renewed": False,
        "foreign": "AccessDeniedException",
        "forbidden": "AccessDeniedException",
        "other": '{"from": "inside"}',
    }
    assert invoke() == ("thaw", expected)
    assert invoke() == ("warm", expected)
    assert invoke(refresh=True) == ("warm", {**expected, "renewed": True})


TRACED = """
from aws_xray_sdk.core import xray_recorder


def handler(event, context):
    with xray_recorder.in_subsegment("work") as work:
        work.put_annotation("size", 7)
        with xray_recorder.in_subsegment("part"):
            pass
    return event
"""


class Collector(http.server.ThreadingHTTPServer):
    """Takes traces."""

    def __init__(self):
        self.spans = []
        super().__init__(("127.0.0.1", int(os.environ["FIRN_AWS_PORT"])), Take)


class Take(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans.extend(scope.spans)
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def traced(site, collector):
    flags = f"--otlp-endpoint {os.environ['FIRN_AWS_ENDPOINT']}"
    with SecondDaemon(site, "traced", int(os.environ["FIRN_SECOND_PORT"]), flags).running() as daemon:
        yield daemon


def test_what_the_xray_sdk_says_is_in_the_trace(traced, collector):
    files = {"index.py": textwrap.dedent(TRACED), **packages(*SDK, "aws_xray_sdk", "wrapt")}
    config = botocore.config.Config(read_timeout=PATIENCE, retries={"total_max_attempts": 1})
    client = boto3.client("lambda", endpoint_url=os.environ["FIRN_SECOND_ENDPOINT"], config=config)
    client.create_function(
        FunctionName="traced",
        Runtime="python3.11",
        Handler="index.handler",
        Role=ROLE,
        Timeout=60,
        MemorySize=256,
        Code={"ZipFile": zipped(files)},
        TracingConfig={"Mode": "Active"},
    )
    traced.wait_for_snapshot("traced")
    root = f"1-{int(time.time()):08x}-a006649127e371903a2de979"
    header = {"value": f"Root={root};Parent=53995c3f42cd8ad8;Sampled=1"}
    add = lambda request, **_: request.headers.add_header("X-Amzn-Trace-Id", header["value"])
    client.meta.events.register("before-sign.lambda.Invoke", add)
    answer = client.invoke(FunctionName="traced", Payload=b'{"a": 1}')
    assert "FunctionError" not in answer, answer["Payload"].read()
    told = answer["ResponseMetadata"]["HTTPHeaders"]["x-amzn-trace-id"]
    assert root in told and "Sampled=1" in told

    trace = bytes.fromhex(root.replace("1-", "", 1).replace("-", ""))
    names = {"traced", "Overhead", "Thaw", "Invocation", "work", "part"}
    mine = lambda: {span.name: span for span in list(collector.spans) if span.trace_id == trace}
    spans = wait_for("the trace", lambda: (m := mine()) and names <= m.keys() and m, limit=30)
    assert spans.keys() == names
    for name, above in [
        ("Overhead", "traced"), ("Thaw", "traced"), ("Invocation", "traced"), ("work", "Invocation"),
        ("part", "work"),
    ]:
        assert spans[name].parent_span_id == spans[above].span_id, name
        assert spans[above].start_time_unix_nano <= spans[name].start_time_unix_nano, name
        assert spans[name].end_time_unix_nano <= spans[above].end_time_unix_nano, name
    assert spans["traced"].parent_span_id.hex() == "53995c3f42cd8ad8"
    assert {a.key: a.value.int_value for a in spans["work"].attributes}["size"] == 7
