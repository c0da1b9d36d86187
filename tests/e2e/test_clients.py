"""A function's whole life through the AWS CLI and AWS's SDKs for JavaScript and Rust, signed by a user who may do
what one needs for that and nothing else."""

import json
import os
import subprocess

import pytest

from conftest import COMMANDS, DEVELOPER, PATIENCE, ROLE, zipped

ENVIRONMENT = {
    **os.environ,
    "AWS_ACCESS_KEY_ID": DEVELOPER[0],
    "AWS_SECRET_ACCESS_KEY": DEVELOPER[1],
    "AWS_MAX_ATTEMPTS": "1",
    "AWS_PAGER": "",
}

SOURCE = """
def handler(event, context):
    if event.get("do") == "raise":
        raise ValueError("as asked")
    if event.get("do") == "context":
        custom = context.client_context.custom if context.client_context else None
        return {"version": VERSION, **({"custom": custom} if custom else {})}
"""

STEPS = ["create", "configure", "invoke", "versions", "aliases", "tags", "concurrency", "events", "delete"]


@pytest.fixture
def zips(tmp_path):
    """Two versions of the code."""
    paths = []
    for version in (1, 2):
        path = tmp_path / f"{version}.zip"
        path.write_bytes(zipped({"function.py": f"VERSION = {version}\n{SOURCE}"}))
        paths.append(str(path))
    return paths


@pytest.fixture
def name(guarded, request):
    name = f"life-{request.node.name.rstrip(']').split('[')[-1]}"
    yield name
    client = guarded.client(DEVELOPER)
    try:
        client.delete_function(FunctionName=name)
    except client.exceptions.ResourceNotFoundException:
        pass


@pytest.mark.parametrize("sdk", ["node", "rust"])
def test_a_life_through_another_sdk(sdk, guarded, name, zips):
    command = [*COMMANDS[sdk], guarded.endpoint, name, *zips]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE, env=ENVIRONMENT)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.split("\n")[:-1] == [f"ok {step}" for step in STEPS]


def test_a_life_through_the_cli(guarded, name, zips, tmp_path):
    def aws(*arguments, refused=None):
        command = [*COMMANDS["aws"], "--endpoint-url", guarded.endpoint, "--output", "json", "lambda", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=ENVIRONMENT)
        if refused:
            assert done.returncode in (254, 255) and f"({refused})" in done.stderr, done.stderr
            return None
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return json.loads(done.stdout) if done.stdout.strip() else None

    def function(operation, *arguments, **more):
        return aws(operation, "--function-name", name, *arguments, **more)

    def invoke(event, *arguments):
        answer = tmp_path / "answer"
        meta = function("invoke", "--payload", json.dumps(event), *arguments, str(answer))
        return meta, json.loads(answer.read_text() or "null")

    code = ("--zip-file", f"fileb://{zips[0]}")
    made = ("--runtime", "python3.11", "--handler", "function.handler", "--role", ROLE, *code)
    created = function("create-function", *made, "--tags", "team=cli", "--environment", "Variables={GREETING=hello}")
    assert created["Version"] == "$LATEST"
    aws("wait", "function-active-v2", "--function-name", name)
    function("create-function", *made, refused="ResourceConflictException")

    function("update-function-configuration", "--timeout", "7", "--revision-id", created["RevisionId"])
    aws("wait", "function-updated-v2", "--function-name", name)
    assert function("get-function-configuration")["Timeout"] == 7
    stale = ("--timeout", "8", "--revision-id", created["RevisionId"])
    function("update-function-configuration", *stale, refused="PreconditionFailedException")

    meta, answer = invoke({"do": "context"}, "--log-type", "Tail")
    assert (meta["StatusCode"], answer) == (200, {"version": 1})
    assert "LogResult" in meta
    meta, answer = invoke({"do": "raise"})
    assert (meta["FunctionError"], answer["errorType"]) == ("Unhandled", "ValueError")
    assert invoke({}, "--invocation-type", "Event")[0]["StatusCode"] == 202

    assert function("publish-version")["Version"] == "1"
    update = ("--zip-file", f"fileb://{zips[1]}", "--publish")
    assert function("update-function-code", *update)["Version"] == "2"
    versions = function("list-versions-by-function", "--page-size", "1")["Versions"]
    assert [version["Version"] for version in versions] == ["$LATEST", "1", "2"]

    function("create-alias", "--name", "prod", "--function-version", "1")
    meta, answer = invoke({"do": "context"}, "--qualifier", "prod")
    assert (meta["ExecutedVersion"], answer["version"]) == ("1", 1)
    function("update-alias", "--name", "prod", "--function-version", "2")
    assert invoke({"do": "context"}, "--qualifier", "prod")[1]["version"] == 2
    function("delete-alias", "--name", "prod")
    function("get-alias", "--name", "prod", refused="ResourceNotFoundException")

    aws("tag-resource", "--resource", created["FunctionArn"], "--tags", "stage=test")
    aws("untag-resource", "--resource", created["FunctionArn"], "--tag-keys", "team")
    assert aws("list-tags", "--resource", created["FunctionArn"])["Tags"] == {"stage": "test"}

    function("put-function-concurrency", "--reserved-concurrent-executions", "3")
    assert function("get-function-concurrency")["ReservedConcurrentExecutions"] == 3
    limit = aws("get-account-settings")["AccountLimit"]
    assert limit["UnreservedConcurrentExecutions"] == limit["ConcurrentExecutions"] - 3
    function("delete-function-concurrency")

    function("put-function-event-invoke-config", "--maximum-retry-attempts", "1")
    assert function("get-function-event-invoke-config")["MaximumRetryAttempts"] == 1
    function("delete-function-event-invoke-config")

    function("delete-function")
    function("get-function", refused="ResourceNotFoundException")
