"""Functions as Lambda's users keep them: create, look at, change, list, delete."""

import base64
import hashlib

import pytest
from conftest import ROLE, zipped


def test_a_function_is_as_it_was_created(client, deploy):
    function = deploy(Description="greets", Environment={"Variables": {"GREETING": "hello"}}, Timeout=7)
    found = client.get_function(FunctionName=function.name)
    configuration = found["Configuration"]
    assert configuration["FunctionName"] == function.name
    assert configuration["Handler"] == "index.handler"
    assert configuration["Runtime"] == "python3.11"
    assert configuration["MemorySize"] == 128
    assert configuration["Timeout"] == 7
    assert configuration["Description"] == "greets"
    assert configuration["Environment"] == {"Variables": {"GREETING": "hello"}}
    assert configuration["State"] == "Active"
    assert configuration["Version"] == "$LATEST"
    assert configuration["Role"] == ROLE
    assert found["Code"]["Location"].startswith("http://")
    alone = client.get_function_configuration(FunctionName=configuration["FunctionArn"])
    assert alone["CodeSha256"] == configuration["CodeSha256"]


def test_the_code_hash_is_that_of_the_zip(client, deploy):
    files = {"index.py": "def handler(event, context): return 1"}
    archive = zipped(files)
    function = deploy()
    answer = client.update_function_code(FunctionName=function.name, ZipFile=archive)
    assert answer["CodeSize"] == len(archive)
    assert base64.b64decode(answer["CodeSha256"]) == hashlib.sha256(archive).digest()


def test_functions_are_listed(client, deploy):
    names = {deploy(name=f"listed-{i}").name for i in range(3)}
    pages = client.get_paginator("list_functions").paginate(PaginationConfig={"PageSize": 2})
    listed = [f["FunctionName"] for page in pages for f in page["Functions"]]
    assert names <= set(listed)
    assert len(listed) == len(set(listed))


def test_new_code_is_what_runs_next(client, deploy):
    function = deploy("def handler(event, context): return 'old'")
    assert function.invoke().json == "old"
    archive = zipped({"index.py": "def handler(event, context): return 'new'"})
    client.update_function_code(FunctionName=function.name, ZipFile=archive)
    client.get_waiter("function_updated_v2").wait(FunctionName=function.name)
    assert function.invoke().json == "new"


def test_new_configuration_is_what_runs_next(client, deploy):
    function = deploy("import os\ndef handler(event, context): return os.environ.get('GREETING')")
    assert function.invoke().json is None
    client.update_function_configuration(
        FunctionName=function.name, Environment={"Variables": {"GREETING": "1"}}, Timeout=9
    )
    client.get_waiter("function_updated_v2").wait(FunctionName=function.name)
    assert function.invoke().json == "1"
    assert client.get_function_configuration(FunctionName=function.name)["Timeout"] == 9


def test_a_deleted_function_is_gone(client, deploy):
    function = deploy()
    client.delete_function(FunctionName=function.name)
    for call in (client.get_function, client.delete_function, client.invoke):
        with pytest.raises(client.exceptions.ResourceNotFoundException) as error:
            call(FunctionName=function.name)
        assert function.name in str(error.value)


def test_a_name_is_taken_once(client, deploy):
    function = deploy()
    with pytest.raises(client.exceptions.ResourceConflictException):
        deploy(name=function.name)


def test_a_stale_revision_changes_nothing(client, deploy):
    function = deploy()
    with pytest.raises(client.exceptions.PreconditionFailedException):
        client.update_function_configuration(
            FunctionName=function.name, Timeout=5, RevisionId="00000000-0000-0000-0000-000000000000"
        )
    assert client.get_function_configuration(FunctionName=function.name)["Timeout"] == 30
