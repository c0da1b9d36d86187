"""`--identity`: boto3 with right, wrong and missing keys against a daemon that knows who may do what."""

import base64
import http.client
import io
import json
import urllib.parse

import boto3
import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.credentials
import botocore.exceptions
import pytest
from botocore import UNSIGNED

from conftest import SecondDaemon, zipped

ACCOUNT = "000000000000"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/functions"
ADMIN = ("AKIDADMIN00000000000", "a-secret-of-the-admin")
BOB = ("AKIDBOB0000000000000", "a-secret-of-bob-himself")


def user(key, *statements):
    return {
        "keys": [{"id": key[0], "secret": key[1]}],
        "policies": [{"Version": "2012-10-17", "Statement": list(statements)}],
    }


IDENTITY = {
    "users": {
        "admin": user(ADMIN, {"Effect": "Allow", "Action": "*", "Resource": "*"}),
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
        "functions": {
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
    # The file must be nobody else's. The daemon must do under such a umask, too.
    before = f"""
umask 077
cat > /tmp/guarded/identity.json <<'IDENTITY'
{json.dumps(IDENTITY)}
IDENTITY
"""
    # What start() asks for must need no signature.
    ready = "/firn/v1/health"

    def send(self, method, url, headers, body):
        """One request as it was signed, sent from where the daemon is."""
        target = urllib.parse.urlsplit(url)
        path = target.path + (f"?{target.query}" if target.query else "")
        lines = [f"{method} {path or '/'} HTTP/1.1"]
        named = {name.lower() for name in headers}
        for name, value in headers.items():
            lines.append(f"{name}: {value.decode() if isinstance(value, bytes) else value}")
        if "host" not in named:
            lines.append(f"Host: {target.netloc}")
        if "content-length" not in named:
            lines.append(f"Content-Length: {len(body)}")
        raw = "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body
        answer = self.site.run(f"""
cd {self.dir} && rm -f fifo && mkfifo fifo
busybox nc 127.0.0.1 {self.port} < fifo > answer &
exec 3> fifo
echo {base64.b64encode(raw).decode()} | base64 -d >&3
wait $!
base64 answer
rm -f answer fifo
""")
        return Received(base64.b64decode(answer))

    def client(self, key=(None, None), **config):
        """boto3's client, which sends through the machine that the daemon is on."""
        client = boto3.client(
            "lambda",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=key[0],
            aws_secret_access_key=key[1],
            config=botocore.config.Config(retries={"total_max_attempts": 1}, **config),
        )
        client.meta.events.register("before-send.lambda", self.transport)
        return client

    def transport(self, request, **_):
        body = request.body or b""
        body = body if isinstance(body, bytes) else body.read()
        received = self.send(request.method, request.url, dict(request.headers), body)
        raw = botocore.awsrequest.AWSResponse(
            request.url, received.status, received.headers, Raw(received.body)
        )
        return raw


class Raw(io.BytesIO):
    """A body as urllib3 would give it."""

    def stream(self, **_):
        yield self.read()


class Received:
    """An answer from the wire."""

    def __init__(self, raw):
        response = http.client.HTTPResponse(FakeSocket(raw))
        response.begin()
        self.status, self.body = response.status, response.read()
        self.headers = botocore.awsrequest.HeadersDict(dict(response.getheaders()))


class FakeSocket:
    def __init__(self, raw):
        self.raw = raw

    def makefile(self, *_, **__):
        return io.BytesIO(self.raw)


@pytest.fixture(scope="module")
def guarded(site):
    flags = "--identity /tmp/guarded/identity.json"
    with Guarded(site, "guarded", 9096, flags).running() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def admin(guarded):
    """Somebody who may do everything, and has made two functions."""
    client = guarded.client(ADMIN)
    code = zipped({"index.py": "def handler(event, context): return event"})
    for name in ("bob-echo", "other"):
        client.create_function(
            FunctionName=name,
            Runtime="python3.11",
            Handler="index.handler",
            Role=ROLE,
            Code={"ZipFile": code},
            Timeout=60,
        )
    return client


def refused(call, **arguments):
    """Name, status and message of the error."""
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call(**arguments)
    response = caught.value.response
    return (
        response["Error"]["Code"],
        response["ResponseMetadata"]["HTTPStatusCode"],
        response["Error"]["Message"],
    )


def test_wrong_missing_and_unknown_keys_are_refused(guarded):
    unsigned = guarded.client(signature_version=UNSIGNED)
    assert refused(unsigned.list_functions)[:2] == ("MissingAuthenticationTokenException", 403)
    wrong = guarded.client((ADMIN[0], "not-the-secret-of-admin"))
    name, status, message = refused(wrong.list_functions)
    assert (name, status) == ("InvalidSignatureException", 403)
    assert message.startswith("The request signature we calculated does not match"), message
    unknown = guarded.client(("AKIDNOBODY0000000000", ADMIN[1]))
    assert refused(unknown.list_functions)[:2] == ("UnrecognizedClientException", 403)


def test_policies_decide(guarded, admin):
    bob = guarded.client(BOB)
    assert {f["FunctionName"] for f in bob.list_functions()["Functions"]} == {"bob-echo", "other"}
    answer = bob.invoke(FunctionName="bob-echo", Payload=b'{"a": 1}')
    assert json.loads(answer["Payload"].read()) == {"a": 1}
    name, status, message = refused(bob.invoke, FunctionName="other", Payload=b"1")
    assert (name, status) == ("AccessDeniedException", 403)
    assert message == (
        f"User: arn:aws:iam::{ACCOUNT}:user/bob is not authorized to perform: lambda:InvokeFunction on "
        f"resource: arn:aws:lambda:us-east-1:{ACCOUNT}:function:other because no identity-based policy "
        "allows the lambda:InvokeFunction action"
    )
    assert refused(bob.delete_function, FunctionName="bob-echo")[0] == "AccessDeniedException"


def test_a_resource_policy_lets_a_user_in(guarded, admin):
    bob = guarded.client(BOB)
    assert refused(bob.invoke, FunctionName="other", Payload=b"1")[0] == "AccessDeniedException"
    admin.add_permission(
        FunctionName="other",
        StatementId="bob",
        Action="lambda:InvokeFunction",
        Principal=f"arn:aws:iam::{ACCOUNT}:user/bob",
    )
    assert json.loads(bob.invoke(FunctionName="other", Payload=b"1")["Payload"].read()) == 1
    admin.remove_permission(FunctionName="other", StatementId="bob")
    assert refused(bob.invoke, FunctionName="other", Payload=b"1")[0] == "AccessDeniedException"


def test_presigned_urls_are_good_for_what_was_signed(guarded, admin):
    credentials = botocore.credentials.Credentials(*BOB)

    def presigned(name):
        url = f"{guarded.url}/2015-03-31/functions/{name}/invocations"
        request = botocore.awsrequest.AWSRequest("POST", url)
        auth = botocore.auth.SigV4QueryAuth(credentials, "lambda", "us-east-1", expires=600)
        auth.add_auth(request)
        return request.prepare().url

    url = presigned("bob-echo")
    assert guarded.send("POST", url, {}, b"").body == b"{}"
    for changed, body in [(url.replace("bob-echo", "bob-echo:1"), b""), (url, b"3")]:
        answer = guarded.send("POST", changed, {}, body)
        assert answer.status == 403, answer.body
        assert answer.headers["x-amzn-errortype"] == "InvalidSignatureException"
    answer = guarded.send("POST", presigned("other"), {}, b"")
    assert answer.headers["x-amzn-errortype"] == "AccessDeniedException"


def test_code_is_found_where_get_function_says(guarded, admin):
    location = admin.get_function(FunctionName="bob-echo")["Code"]["Location"]
    assert guarded.send("GET", location, {}, b"").body.startswith(b"PK")
    assert guarded.send("GET", location.split("&")[0], {}, b"").status == 403


def test_a_user_who_is_taken_out_is_refused_from_the_next_request_on(guarded, admin):
    without = {**IDENTITY, "users": {"admin": IDENTITY["users"]["admin"]}}
    bob = guarded.client(BOB)
    assert bob.list_functions()

    def reload(document):
        guarded.site.run(
            f"printf %s {base64.b64encode(json.dumps(document).encode()).decode()} | base64 -d > "
            f"{guarded.dir}/identity.json; kill -HUP $(cat {guarded.dir}/pid); sleep 1"
        )

    reload(without)
    assert refused(bob.list_functions)[0] == "UnrecognizedClientException"
    reload({**IDENTITY, "planted": 1})
    assert refused(bob.list_functions)[0] == "UnrecognizedClientException"
    assert "stays in force" in guarded.log()
    reload(IDENTITY)
    assert bob.list_functions()


def test_every_call_leaves_a_record(guarded, admin):
    bob = guarded.client(BOB, user_agent="audited")
    refused(bob.delete_function, FunctionName="other")
    admin.update_function_configuration(
        FunctionName="other", Environment={"Variables": {"TOKEN": "planted"}}, Timeout=61
    )
    audit = f"{guarded.state}/audit"
    lines = guarded.site.run(f"cat {audit}/current.jsonl").splitlines()
    records = [json.loads(line) for line in lines]
    deleted = [r for r in records if r["eventName"] == "DeleteFunction20150331"][-1]
    assert deleted["errorCode"] == "AccessDenied"
    assert deleted["userIdentity"]["userName"] == "bob"
    assert deleted["userIdentity"]["accessKeyId"] == BOB[0]
    assert deleted["sourceIPAddress"] == "127.0.0.1"
    assert "audited" in deleted["userAgent"]
    assert deleted["requestParameters"] == {"functionName": "other"}
    changed = records[-1]
    assert changed["eventName"] == "UpdateFunctionConfiguration20150331v2"
    assert changed["userIdentity"]["userName"] == "admin"
    assert changed["requestParameters"]["timeout"] == 61
    assert changed["responseElements"]["timeout"] == 61
    assert "planted" not in json.dumps(records)
    # A daemon that is killed loses none of them.
    guarded.site.run(f"kill -9 $(cat {guarded.dir}/pid); sleep 1")
    guarded.start()
    path = f"{audit}/AWSLogs/{ACCOUNT}/CloudTrail/us-east-1/*/*/*/{ACCOUNT}_CloudTrail_us-east-1_*.json.gz"
    packed = guarded.site.run(f"busybox zcat {path}")
    assert packed.startswith('{"Records":[{')
    assert changed["eventID"] in packed and deleted["eventID"] in packed
