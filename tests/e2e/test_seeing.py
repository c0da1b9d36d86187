"""What functions do, seen with the clients of CloudWatch: boto3 and the AWS CLI."""

import datetime
import json
import subprocess
import time
import urllib.request

import boto3
import botocore.config
import pytest

from conftest import COMMANDS, PATIENCE, wait_for

TALKER = """
import time

def handler(event, context):
    for line in event.get("say", []):
        print(line, flush=True)
    time.sleep(event.get("sleep", 0))
    if event.get("raise"):
        raise ValueError("as it was told")
    return "done"
"""


def service(endpoint, name):
    config = botocore.config.Config(read_timeout=PATIENCE, retries={"total_max_attempts": 1})
    return boto3.client(name, endpoint_url=endpoint, config=config)


@pytest.fixture(scope="session")
def logs(endpoint):
    return service(endpoint, "logs")


def command_line(endpoint, *arguments):
    """The AWS CLI's."""
    return [*COMMANDS["aws"], "--endpoint-url", endpoint, "--no-cli-pager", "--output", "json", *arguments]


def aws(endpoint, *arguments):
    """Runs the AWS CLI and gives what it says."""
    command = command_line(endpoint, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout or "null")


def test_lines_of_a_function_are_found(deploy, logs, endpoint):
    function = deploy(TALKER, name="talker").wait_for_snapshot()
    group = "/aws/lambda/talker"
    answer = function.invoke({"say": ["plain", "with \u00e4", json.dumps({"level": "WARN", "n": 7})]})
    assert answer.error is None, answer.text

    streams = logs.describe_log_streams(
        logGroupName=group, orderBy="LastEventTime", descending=True, limit=1
    )["logStreams"]
    events = logs.get_log_events(
        logGroupName=group, logStreamName=streams[0]["logStreamName"], startFromHead=True
    )["events"]
    lines = [event["message"] for event in events]
    start = next(i for i, line in enumerate(lines) if line.startswith("START RequestId: "))
    assert lines[start + 1 : start + 3] == ["plain\n", "with \u00e4\n"], lines
    assert lines[-2].startswith("END RequestId: ") and lines[-1].startswith("REPORT RequestId: ")
    now = time.time() * 1000
    for event in events:
        assert now - 3_600_000 < event["timestamp"] <= event["ingestionTime"] < now + 60_000

    def found(pattern):
        pages = logs.get_paginator("filter_log_events").paginate(
            logGroupName=group, filterPattern=pattern, PaginationConfig={"PageSize": 2}
        )
        return [event["message"] for page in pages for event in page["events"]]

    assert found("plain") == ["plain\n"]
    assert found("?plain ?with") == ["plain\n", "with \u00e4\n"]
    assert len(found('{ $.level = "W*" && $.n >= 7 }')) == 1
    assert found("REPORT -REPORT") == []

    # The command line.
    filtered = aws(
        endpoint, "logs", "filter-log-events", "--log-group-name", group,
        "--filter-pattern", "plain", "--interleaved",
    )
    assert [event["message"] for event in filtered["events"]] == ["plain\n"]
    assert len(filtered["events"][0]["eventId"]) == 56
    groups = aws(endpoint, "logs", "describe-log-groups", "--log-group-name-prefix", group)
    assert groups["logGroups"][0]["logGroupName"] == group
    follow = command_line(endpoint, "logs", "tail", group, "--follow", "--since", "1h", "--format", "short")
    follow = ["timeout", str(PATIENCE), *follow]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as tail:
        try:
            told = iter(lambda: tail.stdout.readline().split(" ", 1)[-1], "")
            assert "plain\n" in told
            function.invoke({"say": ["later"]})
            assert "later\n" in told
        finally:
            tail.kill()

    logs.put_retention_policy(logGroupName=group, retentionInDays=1)
    assert logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"][0]["retentionInDays"] == 1
    logs.delete_log_group(logGroupName=group)
    with pytest.raises(logs.exceptions.ResourceNotFoundException):
        logs.filter_log_events(logGroupName=group)


def test_lines_of_a_running_invocation_are_found(deploy, logs, client):
    function = deploy(TALKER, name="slow-talker").wait_for_snapshot()
    event = json.dumps({"say": ["working on it"], "sleep": 20})
    client.invoke(FunctionName=function.name, InvocationType="Event", Payload=event)

    def seen():
        try:
            return logs.filter_log_events(
                logGroupName="/aws/lambda/slow-talker", filterPattern="working"
            )["events"]
        except logs.exceptions.ResourceNotFoundException:
            return None

    wait_for("the line", seen)
    ended = logs.filter_log_events(
        logGroupName="/aws/lambda/slow-talker", filterPattern="REPORT"
    )["events"]
    assert ended == []


def test_metrics_and_metering_say_what_was_invoked(deploy, logs, endpoint):
    function = deploy(TALKER, name="counted").wait_for_snapshot()
    for event in ({}, {"say": ["x"]}, {"raise": True}):
        function.invoke(event)
    cloudwatch = service(endpoint, "cloudwatch")
    dimensions = [{"Name": "FunctionName", "Value": "counted"}]
    now = datetime.datetime.now(datetime.timezone.utc)
    start, end = now - datetime.timedelta(hours=1), now + datetime.timedelta(minutes=5)

    def total(name):
        points = cloudwatch.get_metric_statistics(
            Namespace="AWS/Lambda", MetricName=name, Dimensions=dimensions,
            StartTime=start, EndTime=end, Period=7200, Statistics=["Sum"],
        )["Datapoints"]
        minute = datetime.timedelta(minutes=1)
        assert all(start - minute < point["Timestamp"] <= end for point in points)
        return sum(point["Sum"] for point in points)

    assert (total("Invocations"), total("Errors")) == (3, 1)
    assert total("Duration") > 0
    query = {
        "Id": "p", "MetricStat": {
            "Metric": {"Namespace": "AWS/Lambda", "MetricName": "Duration", "Dimensions": dimensions},
            "Period": 3600, "Stat": "p99",
        },
    }
    data = cloudwatch.get_metric_data(MetricDataQueries=[query], StartTime=start, EndTime=end)
    result = data["MetricDataResults"][0]
    assert len(result["Values"]) == len(result["Timestamps"]) >= 1 and result["Values"][0] > 0
    listed = cloudwatch.list_metrics(Namespace="AWS/Lambda", Dimensions=dimensions)["Metrics"]
    assert {"Invocations", "Duration"} <= {metric["MetricName"] for metric in listed}

    # The command line of the same.
    shown = aws(
        endpoint, "cloudwatch", "get-metric-statistics", "--namespace", "AWS/Lambda",
        "--metric-name", "Invocations", "--dimensions", "Name=FunctionName,Value=counted",
        "--start-time", start.isoformat(), "--end-time", end.isoformat(),
        "--period", "7200", "--statistics", "Sum",
    )
    assert sum(point["Sum"] for point in shown["Datapoints"]) == 3

    with urllib.request.urlopen(f"{endpoint}/firn/v1/metering?FunctionName=counted") as answer:
        days = json.load(answer)["Days"]
    reports = logs.filter_log_events(logGroupName="/aws/lambda/counted", filterPattern="REPORT")
    billed = [
        int(event["message"].split("Billed Duration: ")[1].split(" ")[0]) for event in reports["events"]
    ]
    assert sum(day["Requests"] for day in days) == len(billed) == 3
    assert sum(day["BilledMilliseconds"] for day in days) == sum(billed)
    with urllib.request.urlopen(f"{endpoint}/metrics") as answer:
        text = answer.read().decode()
    assert 'firn_invocations_total{function="counted"} 3' in text
