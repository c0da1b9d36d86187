"""Invocations: what the function gets, what the caller gets, and the three kinds of start."""

import base64
import concurrent.futures
import json
import re

import pytest


def test_the_event_comes_back(deploy):
    function = deploy()
    for event in [{"a": [1, 2.5, None, "ü"]}, [], "text", 0, None, {"deep": {"er": {}}}]:
        answer = function.invoke(event)
        assert (answer.status, answer.error, answer.json) == (200, None, event)
    assert answer.version == "$LATEST"


def test_context_and_environment_are_lambdas(deploy):
    function = deploy(
        """
import os
def handler(event, context):
    return {
        "id": context.aws_request_id, "name": context.function_name,
        "memory": context.memory_limit_in_mb, "arn": context.invoked_function_arn,
        "left": context.get_remaining_time_in_millis(), "version": context.function_version,
        "task": os.environ["LAMBDA_TASK_ROOT"], "cwd": os.getcwd(), "mine": os.environ["MINE"],
        "region": os.environ["AWS_REGION"], "uid": os.getuid(),
    }
""",
        Environment={"Variables": {"MINE": "yes = it is"}},
    )
    answer = function.invoke()
    got = answer.json
    assert got["id"] == answer.headers["x-amzn-requestid"]
    assert got["name"] == function.name
    assert got["memory"] == "128"
    assert got["arn"].endswith(f":function:{function.name}")
    assert 0 < got["left"] <= 35_000
    assert got["version"] == "$LATEST"
    assert (got["task"], got["cwd"]) == ("/var/task", "/var/task")
    assert got["mine"] == "yes = it is"
    assert got["region"] == "us-east-1"
    assert got["uid"] != 0


def test_boot_thaw_and_warm(deploy):
    function = deploy(
        "calls = 0\ndef handler(event, context):\n global calls\n calls += 1\n return calls"
    ).wait_for_snapshot()
    booted = function.invoke(start="boot")
    assert (booted.kind, booted.json) == ("boot", 1)
    thawed = function.invoke(start="thaw")
    assert (thawed.kind, thawed.json) == ("thaw", 1)
    warm = function.invoke(start="warm")
    assert (warm.kind, warm.json) == ("warm", 2)
    for answer in (booted, thawed, warm):
        phases = list(json.loads(answer.headers["x-firn-phases"]).values())
        assert phases and phases == sorted(phases)


def test_the_log_tail_has_start_own_lines_end_and_report(scripts):
    answer = scripts.run("import sys; print('to stdout'); print('to stderr', file=sys.stderr)")
    request = answer.headers["x-amzn-requestid"]
    assert f"START RequestId: {request} Version: $LATEST" in answer.log
    assert "to stdout" in answer.log and "to stderr" in answer.log
    assert f"END RequestId: {request}" in answer.log
    report = next(line for line in answer.log.splitlines() if line.startswith("REPORT"))
    pattern = (
        rf"REPORT RequestId: {request}\s+Duration: [\d.]+ ms\s+Billed Duration: \d+ ms\s+"
        r"Memory Size: 128 MB\s+Max Memory Used: \d+ MB"
    )
    assert re.match(pattern, report), report


def test_a_dry_run_runs_nothing(client, scripts):
    raw = client.invoke(FunctionName=scripts.function.name, InvocationType="DryRun")
    assert raw["StatusCode"] == 204


def test_tmp_is_empty_writable_and_private(scripts):
    script = """
        import os
        result = os.listdir("/tmp")
        open("/tmp/" + event["name"], "w").write("x" * 1_000_000)
    """
    assert scripts.run(script, start="thaw", name="a").json == []
    assert scripts.run(script, start="thaw", name="b").json == []
    assert scripts.run(script, start="warm", name="c").json in (["a"], ["b"])


def test_invocations_at_once_run_in_instances_of_their_own(deploy):
    function = deploy(
        "import time, uuid\nme = None\ndef handler(event, context):\n global me\n"
        " me = me or str(uuid.uuid4())\n time.sleep(3)\n return me"
    ).wait_for_snapshot()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: function.invoke().json, range(2)))
    assert len(set(results)) == 2
    assert function.invoke().json in results


@pytest.mark.parametrize("size", [1, 100_000, 5_900_000])
def test_large_events_and_responses(scripts, size):
    text = "x" * size
    assert scripts.run("result = event['text']", text=text).json == text


def test_a_function_knows_its_client_and_whom_a_gateway_vouches_for(client, deploy):
    function = deploy("""
def handler(event, context):
    custom = context.client_context and context.client_context.custom
    return [custom, context.identity.cognito_identity_id, context.identity.cognito_identity_pool_id]
""")
    assert function.invoke().json == [None, None, None]
    identity = {"cognitoIdentityId": "us-east-1:1", "cognitoIdentityPoolId": "us-east-1:2"}

    def vouch(request, **_):
        request.headers["X-Firn-Cognito-Identity"] = json.dumps(identity)

    client.meta.events.register("before-sign.lambda.Invoke", vouch)
    try:
        context = base64.b64encode(json.dumps({"custom": {"a": "b"}}).encode()).decode()
        answer = function.invoke(ClientContext=context).json
    finally:
        client.meta.events.unregister("before-sign.lambda.Invoke", vouch)
    assert answer == [{"a": "b"}, "us-east-1:1", "us-east-1:2"]
