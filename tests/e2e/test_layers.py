"""Layers: what a function finds in /opt, and which copy of a module it gets."""

import io
import urllib.request
import zipfile

import botocore
import pytest

from conftest import create, zipped

HANDLER = """
import os
import which

def handler(event, context):
    found = {}
    for path in ("/opt/order", "/opt/first", "/opt/second", "/opt/bin/tool"):
        if os.path.exists(path):
            found[path] = open(path).read()
    return {
        "which": which.NAME,
        "colorsys": __import__("colorsys").__file__,
        "tool": os.access("/opt/bin/tool", os.X_OK),
        "found": found,
        "task": sorted(os.listdir("/var/task")),
        "opt": sorted(os.listdir("/opt")),
    }
"""


def archive(files):
    """The same as zipped, with one program."""
    buffer = io.BytesIO(zipped(files))
    with zipfile.ZipFile(buffer, "a") as archive:
        tool = zipfile.ZipInfo("bin/tool")
        tool.external_attr = 0o755 << 16
        archive.writestr(tool, "#!/bin/sh\n")
    return buffer.getvalue()


@pytest.fixture
def publish(client):
    published = []

    def make(name, content, **more):
        layer = client.publish_layer_version(LayerName=name, Content={"ZipFile": content}, **more)
        published.append((name, layer["Version"]))
        return layer

    yield make
    for name, version in published:
        client.delete_layer_version(LayerName=name, VersionNumber=version)


def test_later_layers_win_and_the_functions_copy_before_all(client, endpoint, publish, deploy):
    first = publish(
        "first",
        archive({"order": "1", "first": "1", "python/which.py": "NAME = 'first'"}),
        CompatibleRuntimes=["python3.11"],
    )
    second = publish(
        "second",
        zipped(
            {
                "order": "2",
                "second": "2",
                "python/which.py": "NAME = 'second'",
                # The runtime has one of its own.
                "python/colorsys.py": "",
            }
        ),
    )
    arns = [first["LayerVersionArn"], second["LayerVersionArn"]]
    function = deploy(files={"index.py": HANDLER}, Layers=arns)
    configuration = client.get_function_configuration(FunctionName=function.name)
    assert [layer["Arn"] for layer in configuration["Layers"]] == arns
    function.wait_for_snapshot()

    for start in ("boot", "thaw"):
        got = function.invoke(start=start).json
        assert got["which"] == "second"
        assert got["colorsys"] == "/opt/python/colorsys.py"
        assert got["found"] == {
            "/opt/order": "2", "/opt/first": "1", "/opt/second": "2", "/opt/bin/tool": "#!/bin/sh\n",
        }
        assert got["tool"] and got["task"] == ["index.py"]

    # The other order; the deleted version stays for the function.
    client.update_function_configuration(FunctionName=function.name, Layers=arns[::-1])
    client.delete_layer_version(LayerName="second", VersionNumber=second["Version"])
    got = function.invoke().json
    assert (got["which"], got["found"]["/opt/order"]) == ("first", "1")

    # The function's own copy wins over layers and runtime.
    own = {"index.py": HANDLER, "which.py": "NAME = 'own'", "colorsys.py": ""}
    client.update_function_code(FunctionName=function.name, ZipFile=zipped(own))
    got = function.invoke().json
    assert (got["which"], got["colorsys"]) == ("own", "/var/task/colorsys.py")

    client.update_function_configuration(FunctionName=function.name, Layers=[])
    got = function.invoke().json
    assert (got["opt"], got["which"]) == ([], "own")


def test_layers_by_their_api(client, publish):
    content = zipped({"python/a.py": "A = 1"})
    layer = publish("api", content, Description="d", LicenseInfo="MIT", CompatibleRuntimes=["python3.11"])
    arn = layer["LayerVersionArn"]
    got = client.get_layer_version_by_arn(Arn=arn)
    assert (got["Description"], got["LicenseInfo"]) == ("d", "MIT")
    with urllib.request.urlopen(got["Content"]["Location"]) as answer:
        assert answer.read() == content
    listed = client.list_layers(CompatibleRuntime="python3.11")["Layers"]
    assert arn in [layer["LatestMatchingVersion"]["LayerVersionArn"] for layer in listed]
    versions = client.list_layer_versions(LayerName="api")["LayerVersions"]
    assert versions[0]["Version"] == layer["Version"]
    where = {"LayerName": "api", "VersionNumber": layer["Version"]}
    client.add_layer_version_permission(
        **where, StatementId="s", Action="lambda:GetLayerVersion", Principal="*"
    )
    assert arn in client.get_layer_version_policy(**where)["Policy"]
    client.remove_layer_version_permission(**where, StatementId="s")
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_layer_version_policy(**where)


def test_layers_share_the_limit_with_the_code(client, endpoint, publish):
    large = zipped({"large": bytes(140_000_000)})
    layer = publish("large", large)
    with pytest.raises(client.exceptions.InvalidParameterValueException) as refused:
        create(client, endpoint, "too-large", {"large": bytes(140_000_000)}, Layers=[layer["LayerVersionArn"]])
    assert "Function code combined with layers exceeds the maximum allowed size of 262144000 bytes" in str(
        refused.value
    )
    assert "280000000 bytes" in str(refused.value)


def test_a_hostile_layer_is_refused(client):
    for name in ("../evil", "/etc/passwd"):
        with pytest.raises(botocore.exceptions.ClientError, match="Could not unzip"):
            client.publish_layer_version(LayerName="evil", Content={"ZipFile": zipped({name: "x"})})
    assert client.list_layer_versions(LayerName="evil")["LayerVersions"] == []
