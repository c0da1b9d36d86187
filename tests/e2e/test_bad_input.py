"""Requests that must be refused: with the right error, naming the field and the limit, and with
nothing half-done."""

import io
import urllib.error
import urllib.request
import zipfile

import botocore.exceptions
import pytest
from conftest import ROLE, zipped

GOOD = {
    "Runtime": "python3.11",
    "Role": ROLE,
    "Handler": "index.handler",
    "Code": {"ZipFile": zipped({"index.py": "def handler(event, context): return 1"})},
}


def refused(client, name="refused", **changes):
    """Creates a function that must not come to be; returns the error's code and message."""
    try:
        with pytest.raises(botocore.exceptions.ClientError) as error:
            client.create_function(**{"FunctionName": name, **GOOD, **changes})
    except BaseException:
        client.delete_function(FunctionName=name)
        raise
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_function(FunctionName="refused")
    details = error.value.response["Error"]
    return details["Code"], details["Message"]


def archive_with(name, kind=None):
    """A zip archive with one entry of that name; `kind` as in a mode's upper bits."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo(name)
        entry.create_system = 3
        entry.external_attr = ((kind or 0o100000) | 0o644) << 16
        archive.writestr(entry, "target")
    return buffer.getvalue()


@pytest.mark.parametrize("memory", [-1, 0, 64, 127, 10_241])
def test_memory_out_of_range(client, memory):
    code, message = refused(client, MemorySize=memory)
    assert code in ("ValidationException", "InvalidParameterValueException")
    assert "memorySize" in message and str(memory) in message


@pytest.mark.parametrize("timeout", [-1, 0, 901])
def test_timeout_out_of_range(client, timeout):
    code, message = refused(client, Timeout=timeout)
    assert code in ("ValidationException", "InvalidParameterValueException")
    assert "timeout" in message and str(timeout) in message


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 141, "ü"])
def test_names_that_are_none(client, name):
    code, message = refused(client, name=name)
    assert code in ("ValidationException", "InvalidParameterValueException")
    assert "functionName" in message


def test_an_unknown_runtime(client):
    code, message = refused(client, Runtime="cobol85")
    assert code == "InvalidParameterValueException" and "cobol85" in message


@pytest.mark.parametrize(
    ("variables", "needle"),
    [
        ({"AWS_REGION": "mars"}, "AWS_REGION"),
        ({"1A": "x"}, "1A"),
        ({"A": "x"}, "environment"),
        ({"AA": "x" * 4096}, "4096"),
    ],
)
def test_environments_that_are_refused(client, variables, needle):
    code, message = refused(client, Environment={"Variables": variables})
    assert code in ("ValidationException", "InvalidParameterValueException")
    assert needle in message


def test_not_a_zip(client):
    code, message = refused(client, Code={"ZipFile": b"this is no archive"})
    assert code in ("InvalidParameterValueException", "InvalidZipFileException")
    assert "unzip" in message


def test_an_empty_zip(client):
    code, _ = refused(client, Code={"ZipFile": zipped({})})
    assert code == "InvalidParameterValueException"


def test_a_damaged_zip(client):
    good = GOOD["Code"]["ZipFile"]
    broken = good[:35] + bytes(byte ^ 0xFF for byte in good[35:60]) + good[60:]
    code, _ = refused(client, Code={"ZipFile": broken})
    assert code in ("InvalidParameterValueException", "InvalidZipFileException")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("../escape", None), ("a/../../b", None), ("/etc/passwd", None), ("link", 0o120000)],
)
def test_entries_that_lead_out(client, name, kind):
    code, message = refused(client, Code={"ZipFile": archive_with(name, kind)})
    assert code in ("InvalidParameterValueException", "InvalidZipFileException")
    assert name.strip("/").split("/")[-1] in message


def test_an_archive_over_50_megabytes(client):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("blob", bytes(52_428_800))
    code, message = refused(client, Code={"ZipFile": buffer.getvalue()})
    assert code in ("InvalidParameterValueException", "RequestEntityTooLargeException")
    assert "52428800" in message or "70167211" in message


def test_an_archive_that_unpacks_to_more_than_250_megabytes(client):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in range(3):
            archive.writestr(f"zeros{part}", bytes(100_000_000))
    code, message = refused(client, Code={"ZipFile": buffer.getvalue()})
    assert code == "InvalidParameterValueException" and "262144000" in message


def test_no_code_at_all(client):
    code, _ = refused(client, Code={})
    assert code == "InvalidParameterValueException"


def test_an_event_that_is_no_json(client, scripts):
    for payload in (b"{", b"nope", b"\xff\xfe"):
        with pytest.raises(client.exceptions.InvalidRequestContentException):
            client.invoke(FunctionName=scripts.function.name, Payload=payload)


def test_an_event_over_6_megabytes(client, scripts):
    payload = b'"' + b"x" * 6_291_560 + b'"'
    with pytest.raises(client.exceptions.RequestTooLargeException) as error:
        client.invoke(FunctionName=scripts.function.name, Payload=payload)
    assert "limit" in str(error.value)


def test_an_unknown_function(client):
    with pytest.raises(client.exceptions.ResourceNotFoundException) as error:
        client.invoke(FunctionName="nobody-made-this")
    assert "nobody-made-this" in str(error.value)


def test_a_refused_update_changes_nothing(client, deploy):
    function = deploy("def handler(event, context): return 'kept'")
    before = client.get_function_configuration(FunctionName=function.name)
    with pytest.raises(botocore.exceptions.ClientError):
        client.update_function_code(FunctionName=function.name, ZipFile=b"no archive")
    with pytest.raises(botocore.exceptions.ClientError):
        client.update_function_configuration(
            FunctionName=function.name, Timeout=5, MemorySize=100_000
        )
    after = client.get_function_configuration(FunctionName=function.name)
    for answer in (before, after):
        del answer["ResponseMetadata"]
    assert before == after
    assert function.invoke().json == "kept"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/2015-03-31/nothing", 404),
        ("PATCH", "/2015-03-31/functions", 405),
        ("POST", "/2015-03-31/functions", 400),
    ],
)
def test_requests_that_are_none_of_lambdas(endpoint, method, path, status):
    request = urllib.request.Request(endpoint + path, method=method, data=b"{")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == status
    assert b"essage" in error.value.read()
