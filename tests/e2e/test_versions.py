"""Versions and aliases, each version in microVMs of its own."""

import botocore
import pytest

from conftest import zipped

SOURCE = "def handler(event, context): return [{}, context.function_version, context.invoked_function_arn]"


def test_versions_stay_and_aliases_move(client, deploy):
    function = deploy(SOURCE.format("'old'"))
    name = function.name
    first = client.publish_version(FunctionName=name)
    assert first["Version"] == "1"
    code = zipped({"index.py": SOURCE.format("'new'")})
    second = client.update_function_code(FunctionName=name, ZipFile=code, Publish=True)
    assert second["Version"] == "2"
    assert second["CodeSha256"] != first["CodeSha256"]
    listed = client.list_versions_by_function(FunctionName=name)["Versions"]
    assert [version["Version"] for version in listed] == ["$LATEST", "1", "2"]
    alias = client.create_alias(FunctionName=name, Name="prod", FunctionVersion="1")

    def served(qualifier):
        answer = function.invoke(Qualifier=qualifier)
        assert answer.error is None, answer.text
        said, version, arn = answer.json
        assert (version, arn) == (answer.version, f"{first['FunctionArn'][:-2]}:{qualifier}")
        return said, version

    assert served("1") == ("old", "1")
    assert served("2") == ("new", "2")
    assert served("prod") == ("old", "1")
    client.update_alias(
        FunctionName=name,
        Name="prod",
        RoutingConfig={"AdditionalVersionWeights": {"2": 0.5}},
        RevisionId=alias["RevisionId"],
    )
    # That all of these are one version's happens once in half a million runs.
    assert {served("prod") for _ in range(20)} == {("old", "1"), ("new", "2")}
    with pytest.raises(botocore.exceptions.ClientError, match="prod"):
        client.delete_function(FunctionName=name, Qualifier="2")
    client.delete_alias(FunctionName=name, Name="prod")
    client.delete_function(FunctionName=name, Qualifier="2")
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        function.invoke(Qualifier="2")
    assert served("1") == ("old", "1")
