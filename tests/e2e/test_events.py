"""Asynchronous invocation."""

import json
import urllib.request

from conftest import wait_for
from test_crashes import serves

SEEN = """
import time
seen = []
def handler(event, context):
    if event is None:
        return seen
    time.sleep(event.get("sleep", 0))
    seen.append([event, context.aws_request_id])
"""


def queued(endpoint):
    with urllib.request.urlopen(f"{endpoint}/firn/v1/events") as answer:
        return json.load(answer)["Events"]


def test_an_accepted_event_survives_a_killed_daemon(
    client, deploy, endpoint, site
):
    function = deploy(SEEN, Timeout=60).wait_for_snapshot()
    told = deploy(SEEN).wait_for_snapshot()
    arn = client.get_function_configuration(FunctionName=told.name)["FunctionArn"]
    settings = client.put_function_event_invoke_config(
        FunctionName=function.name,
        MaximumRetryAttempts=1,
        DestinationConfig={"OnSuccess": {"Destination": arn}},
    )
    assert settings["MaximumRetryAttempts"] == 1
    event = {"sleep": 10}
    accepted = client.invoke(
        FunctionName=function.name, InvocationType="Event", Payload=json.dumps(event)
    )
    assert accepted["StatusCode"] == 202
    request_id = accepted["ResponseMetadata"]["RequestId"]
    # In the middle of its first attempt.
    site.run("kill -9 $(pidof firnd)")
    wait_for("the daemon", lambda: serves(endpoint))
    wait_for("the last delivery", lambda: queued(endpoint) == 0)
    # Instances are warm: what they saw since the daemon is back, they know.
    assert function.invoke().json == [[event, request_id]]
    [[record, record_id]] = told.invoke().json
    assert record_id != request_id
    assert record["requestContext"]["requestId"] == request_id
    assert record["requestContext"]["condition"] == "Success"
    assert (record["requestPayload"], record["responsePayload"]) == (event, None)
