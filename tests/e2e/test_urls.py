"""Function URLs, called by their host names."""

import http.client
import json
import time
import urllib.parse

import pytest
from test_streaming import STREAMER

from conftest import PATIENCE, create

HANDLER = """
import json

def handler(event, context):
    if event["rawPath"] == "/fail":
        raise ValueError("as asked")
    if event["rawPath"] == "/plain":
        return {"arn": context.invoked_function_arn}
    return {
        "statusCode": 201, "headers": {"X-Own": "1", "Content-Type": "application/json"},
        "cookies": ["a=1", "b=2"], "body": json.dumps(event),
    }
"""


class Url:
    def __init__(self, endpoint, config):
        self.endpoint = urllib.parse.urlsplit(endpoint)
        self.host = urllib.parse.urlsplit(config["FunctionUrl"]).netloc

    def open(self, path="/", method="GET", body=None, **headers):
        """The response, its body unread. The daemon may be elsewhere than its URLs say."""
        connection = http.client.HTTPConnection(
            self.endpoint.hostname, self.endpoint.port, timeout=PATIENCE
        )
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"Host": self.host, **headers})
        return connection.getresponse()

    def get(self, *arguments, **more):
        answer = self.open(*arguments, **more)
        return answer, answer.read().decode()


def test_a_function_and_an_alias_answer_http(client, endpoint, deploy):
    function = deploy(HANDLER).wait_for_snapshot()
    config = client.create_function_url_config(FunctionName=function.name, AuthType="NONE")
    assert config["InvokeMode"] == "BUFFERED"
    url = Url(endpoint, config)
    answer, body = url.get(
        "/a/b?x=1&x=2", method="POST", body=b"\x00\xff", Cookie="c=3; d=4", Content_Type="image/png"
    )
    assert answer.status == 201 and answer.headers["X-Own"] == "1"
    assert answer.headers.get_all("Set-Cookie") == ["a=1", "b=2"]
    event = json.loads(body)
    assert event["version"] == "2.0" and event["rawPath"] == "/a/b"
    assert event["queryStringParameters"] == {"x": "1,2"} and event["cookies"] == ["c=3", "d=4"]
    assert (event["body"], event["isBase64Encoded"]) == ("AP8=", True)
    assert event["requestContext"]["http"]["method"] == "POST"
    assert event["requestContext"]["domainName"] == url.host.split(":")[0]

    answer, body = url.get("/plain")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body)["arn"] == config["FunctionArn"]
    answer, body = url.get("/fail")
    assert (answer.status, body) == (502, "Internal Server Error")

    cors = {"AllowOrigins": ["https://a.example"], "AllowMethods": ["GET"], "MaxAge": 60}
    client.update_function_url_config(FunctionName=function.name, Cors=cors)
    assert client.get_function_url_config(FunctionName=function.name)["Cors"] == cors
    asks = {"Origin": "https://a.example", "Access_Control_Request_Method": "GET"}
    answer, _ = url.get(method="OPTIONS", **asks)
    assert answer.status == 200 and answer.headers["Access-Control-Allow-Methods"] == "GET"
    answer, _ = url.get(Origin="https://a.example")
    assert answer.headers["Access-Control-Allow-Origin"] == "https://a.example"

    version = client.publish_version(FunctionName=function.name)["Version"]
    client.create_alias(FunctionName=function.name, Name="live", FunctionVersion=version)
    live = client.create_function_url_config(
        FunctionName=function.name, Qualifier="live", AuthType="NONE"
    )
    assert live["FunctionArn"].endswith(":live")
    _, body = Url(endpoint, live).get("/plain")
    assert json.loads(body)["arn"] == live["FunctionArn"]
    listed = client.list_function_url_configs(FunctionName=function.name)["FunctionUrlConfigs"]
    assert {u["FunctionUrl"] for u in listed} == {config["FunctionUrl"], live["FunctionUrl"]}
    client.delete_alias(FunctionName=function.name, Name="live")
    assert Url(endpoint, live).get()[0].status == 403

    client.update_function_url_config(FunctionName=function.name, AuthType="AWS_IAM")
    assert url.get()[0].status == 403
    client.delete_function_url_config(FunctionName=function.name)
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_function_url_config(FunctionName=function.name)


# What Node.js's `HttpResponseStream` writes before the body.
SERVED = STREAMER.replace('exec(event["script"], scope)', 'serve_http(event, id)').replace(
    "serve()\n",
    '''
def serve_http(event, id):
    response = Response(id, "application/vnd.awslambda.http-integration-response")
    head = {"statusCode": 202, "headers": {"X-Path": event["rawPath"]}, "cookies": ["a=1"]}
    response.write(json.dumps(head).encode() + bytes(8))
    response.write("first")
    time.sleep(4)
    if event["rawPath"] == "/torn":
        os._exit(1)
    response.write("second")
    response.end()

serve()
''',
)


def test_a_streamed_response_with_a_prelude(client, endpoint):
    function = create(client, endpoint, "served", {"index.py": SERVED}, Timeout=60)
    try:
        function.wait_for_snapshot()
        url = Url(endpoint, client.create_function_url_config(
            FunctionName=function.name, AuthType="NONE", InvokeMode="RESPONSE_STREAM"
        ))
        answer = url.open("/p")
        assert (answer.status, answer.headers["X-Path"]) == (202, "/p")
        assert answer.headers["Set-Cookie"] == "a=1"
        assert answer.read(5) == b"first"
        started = time.monotonic()
        assert answer.read() == b"second"
        assert time.monotonic() - started > 2, "between the first bytes and the rest"
        answer = url.open("/torn")
        assert answer.status == 202
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
    finally:
        client.delete_function(FunctionName=function.name)
