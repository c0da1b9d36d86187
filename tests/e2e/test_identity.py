"""`--identity`: boto3 with right, wrong and missing keys against a daemon that knows who may do what."""

import base64
import json
import urllib.error
import urllib.request

import botocore.auth
import botocore.awsrequest
import botocore.credentials
import botocore.exceptions
import pytest
from botocore import UNSIGNED

from conftest import ACCOUNT, ADMIN, BOB, IDENTITY, ROLE, zipped


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


def send(url, body=None):
    """Status, error's name and body of what answers a request without headers of its own."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": ""})) as answer:
            return answer.status, None, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["x-amzn-errortype"], error.read()


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
        url = f"{guarded.endpoint}/2015-03-31/functions/{name}/invocations"
        request = botocore.awsrequest.AWSRequest("POST", url)
        auth = botocore.auth.SigV4QueryAuth(credentials, "lambda", "us-east-1", expires=600)
        auth.add_auth(request)
        return request.prepare().url

    url = presigned("bob-echo")
    assert send(url, b"") == (200, None, b"{}")
    for changed, body in [(url.replace("bob-echo", "bob-echo:1"), b""), (url, b"3")]:
        assert send(changed, body)[:2] == (403, "InvalidSignatureException")
    assert send(presigned("other"), b"")[:2] == (403, "AccessDeniedException")


def test_code_is_found_where_get_function_says(guarded, admin):
    location = admin.get_function(FunctionName="bob-echo")["Code"]["Location"]
    assert send(location)[2].startswith(b"PK")
    assert send(location.split("&")[0])[0] == 403


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
