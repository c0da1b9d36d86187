"""What the daemon asks of AWS: code that lies in S3, messages to SQS and SNS, the audit trail in a bucket.

AWS is moto, which checks signatures as botocore makes them; the daemon reaches it from wherever it runs.
"""

import gzip
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import boto3
import pytest

from conftest import ACCOUNT, ADMIN, IDENTITY, PATIENCE, Guarded, wait_for, zipped
from test_identity import refused

SENDER = {
    **IDENTITY["roles"]["test"],
    "policies": [
        {
            "Version": "2012-10-17",
            "Statement": {"Effect": "Allow", "Action": ["sqs:SendMessage", "sns:Publish"], "Resource": "*"},
        }
    ],
}

HANDLER = """
def handler(event, context):
    if event.get("fail"):
        raise RuntimeError("boom")
    return {"seen": event}
"""


ANYTHING = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}


class Aws:
    """Clients of moto, and queues and topics in it."""

    def __init__(self, url):
        def client(name, **key):
            return boto3.client(name, endpoint_url=url, region_name="us-east-1", **key)

        iam = client("iam")
        iam.create_user(UserName="firnd")
        iam.put_user_policy(UserName="firnd", PolicyName="all", PolicyDocument=json.dumps(ANYTHING))
        made = iam.create_access_key(UserName="firnd")["AccessKey"]
        self.key = {
            "aws_access_key_id": made["AccessKeyId"],
            "aws_secret_access_key": made["SecretAccessKey"],
        }
        # These were the requests that moto takes without a signature.
        self.s3, self.sqs, self.sns = (client(name, **self.key) for name in ("s3", "sqs", "sns"))
        wrong = client("s3", **{**self.key, "aws_secret_access_key": "another"})
        assert refused(wrong.list_buckets)[0] == "SignatureDoesNotMatch"
        for bucket in ("code", "trails"):
            self.s3.create_bucket(Bucket=bucket)

    def queue(self, name):
        """Its URL and ARN."""
        url = self.sqs.create_queue(QueueName=name)["QueueUrl"]
        found = self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
        return url, found["Attributes"]["QueueArn"]

    def take(self, url):
        """The next message of a queue."""
        [message] = wait_for(
            f"a message in {url}",
            lambda: self.sqs.receive_message(QueueUrl=url, MessageAttributeNames=["All"]).get("Messages"),
        )
        self.sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        return message

    def objects(self, bucket):
        """Name and content of each."""
        listed = self.s3.list_objects_v2(Bucket=bucket).get("Contents", [])
        return {o["Key"]: self.s3.get_object(Bucket=bucket, Key=o["Key"]) for o in listed}


@pytest.fixture(scope="module")
def aws():
    port = os.environ["FIRN_AWS_PORT"]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", port],
        env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "3"},
    )

    def serves():
        assert server.poll() is None, "moto has ended"
        try:
            return urllib.request.urlopen(f"{url}/moto-api/").status == 200
        except urllib.error.URLError:
            return False

    try:
        wait_for("moto", serves)
        yield Aws(url)
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def daemon(site, aws):
    identity = {**IDENTITY, "roles": {**IDENTITY["roles"], "sender": SENDER}}
    flags = f"--aws-endpoint {os.environ['FIRN_AWS_ENDPOINT']} --audit-bucket trails/firn"
    daemon = Guarded(site, identity, flags)
    daemon.runner = "env " + " ".join(f"{name.upper()}={value}" for name, value in aws.key.items())
    with daemon.running():
        yield daemon


@pytest.fixture(scope="module")
def admin(daemon):
    return daemon.client(ADMIN)


SETTINGS = {
    "FunctionName": "outward",
    "Runtime": "python3.11",
    "Handler": "index.handler",
    "Role": f"arn:aws:iam::{ACCOUNT}:role/sender",
    "Timeout": 60,
}


@pytest.fixture(scope="module")
def function(aws, admin):
    """Name of one whose code is an object's."""
    key = "builds/a function+1.zip"
    aws.s3.put_object(Bucket="code", Key=key, Body=zipped({"index.py": HANDLER}))
    admin.create_function(**SETTINGS, Code={"S3Bucket": "code", "S3Key": key})
    admin.get_waiter("function_active_v2").wait(
        FunctionName="outward", WaiterConfig={"Delay": 1, "MaxAttempts": PATIENCE}
    )
    return "outward"


def submit(client, name, event):
    """The id of an event's request."""
    accepted = client.invoke(FunctionName=name, InvocationType="Event", Payload=json.dumps(event))
    assert accepted["StatusCode"] == 202
    return accepted["ResponseMetadata"]["RequestId"]


def test_code_lies_in_a_bucket(admin, function):
    answer = admin.invoke(FunctionName=function, Payload=b'{"n": 1}')
    assert json.loads(answer["Payload"].read()) == {"seen": {"n": 1}}
    missing = {"S3Bucket": "code", "S3Key": "builds/none.zip"}
    name, status, message = refused(admin.update_function_code, FunctionName=function, **missing)
    assert (name, status) == ("InvalidParameterValueException", 400)
    assert message == (
        "Error occurred while GetObject. S3 Error Code: NoSuchKey. S3 Error Message: The specified key "
        "does not exist."
    )


def test_queues_and_topics_hear_what_became_of_events(aws, admin, function):
    good, good_arn = aws.queue("good")
    bad, bad_arn = aws.queue("bad")
    dead, dead_arn = aws.queue("dead")
    topic = aws.sns.create_topic(Name="failures")["TopicArn"]
    aws.sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=bad_arn)
    admin.update_function_configuration(FunctionName=function, DeadLetterConfig={"TargetArn": dead_arn})
    admin.get_waiter("function_updated_v2").wait(
        FunctionName=function, WaiterConfig={"Delay": 1, "MaxAttempts": PATIENCE}
    )
    admin.put_function_event_invoke_config(
        FunctionName=function,
        MaximumRetryAttempts=0,
        DestinationConfig={
            "OnSuccess": {"Destination": good_arn},
            "OnFailure": {"Destination": topic},
        },
    )

    event = {"n": 2}
    request_id = submit(admin, function, event)
    record = json.loads(aws.take(good)["Body"])
    context = record["requestContext"]
    assert (context["requestId"], context["condition"]) == (request_id, "Success")
    assert (record["requestPayload"], record["responsePayload"]) == (event, {"seen": event})

    event = {"fail": "ü"}
    request_id = submit(admin, function, event)
    letter = aws.take(dead)
    assert json.loads(letter["Body"]) == event
    said = {name: (a["DataType"], a["StringValue"]) for name, a in letter["MessageAttributes"].items()}
    assert said == {
        "RequestID": ("String", request_id),
        "ErrorCode": ("Number", "200"),
        "ErrorMessage": ("String", "boom"),
    }
    notice = json.loads(aws.take(bad)["Body"])
    assert (notice["Type"], notice["TopicArn"]) == ("Notification", topic)
    record = json.loads(notice["Message"])
    context = record["requestContext"]
    assert (context["requestId"], context["condition"]) == (request_id, "RetriesExhausted")
    assert context["approximateInvokeCount"] == 1
    assert record["requestPayload"] == event
    assert record["responseContext"]["functionError"] == "Unhandled"
    assert record["responsePayload"]["errorMessage"] == "boom"


def test_the_audit_trail_goes_to_a_bucket(aws, daemon, admin):
    refused(admin.get_function, FunctionName="planted")
    # One that stops finishes the file that it has begun.
    daemon.stop()
    objects = aws.objects("trails")
    daemon.start()
    names = []
    for key, found in objects.items():
        assert key.startswith(f"firn/AWSLogs/{ACCOUNT}/CloudTrail/us-east-1/20"), key
        assert key.rsplit("/", 1)[1].startswith(f"{ACCOUNT}_CloudTrail_us-east-1_20"), key
        assert (found["ContentType"], found["ContentEncoding"]) == ("application/json", "gzip")
        records = json.loads(gzip.decompress(found["Body"].read()))["Records"]
        names += [(record["eventName"], record.get("errorCode")) for record in records]
    assert ("GetFunction20150331v2", "ResourceNotFoundException") in names, names
