"""Functions that fail: the caller gets HTTP 200 and an error in the shape that Lambda gives it."""

import re

import pytest


def fails(answer, kind):
    assert answer.status == 200
    assert answer.error == "Unhandled", answer.text
    assert answer.json.get("errorType") == kind, answer.text
    return answer.json["errorMessage"]


def test_a_handler_that_raises(scripts):
    answer = scripts.run("raise ValueError('not today')")
    assert fails(answer, "ValueError") == "not today"
    assert any("handler" in line for line in answer.json["stackTrace"])
    assert "[ERROR] ValueError: not today" in answer.log


@pytest.mark.parametrize(
    ("files", "handler", "kind", "message"),
    [
        ({"other.py": ""}, "index.handler", "Runtime.ImportModuleError", "No module named 'index'"),
        ({"index.py": "import nope"}, "index.handler", "Runtime.ImportModuleError", "'nope'"),
        ({"index.py": "x = 1"}, "index.handler", "Runtime.HandlerNotFound", "'handler' missing"),
        ({"index.py": "def handler(:"}, "index.handler", "Runtime.UserCodeSyntaxError", "Syntax"),
        ({"index.py": "x = 1"}, "nodot", "Runtime.MalformedHandlerName", "'nodot'"),
    ],
)
def test_code_that_cannot_be_loaded(deploy, files, handler, kind, message):
    function = deploy(files=files, Handler=handler)
    assert message in fails(function.invoke(), kind)


def test_a_handler_that_exits(scripts):
    message = fails(scripts.run("import os; os._exit(3)"), "Runtime.ExitError")
    assert re.search(r"Runtime exited with error: exit status 3$", message), message
    assert scripts.alive()


def test_a_handler_that_kills_itself(scripts):
    answer = scripts.run("import os; os.kill(os.getpid(), 9)")
    assert "signal: killed" in fails(answer, "Runtime.ExitError")
    assert scripts.alive()


def test_a_handler_that_hangs(deploy):
    # The next invocation starts the runtime anew within the same limit, as in Lambda.
    function = deploy(
        "import time\ndef handler(event, context):\n if event: time.sleep(600)\n return 'alive'",
        Timeout=12,
    ).wait_for_snapshot()
    answer = function.invoke(True)
    assert answer.error == "Unhandled"
    assert re.search(r"Task timed out after 12\.00 seconds", answer.json["errorMessage"])
    assert "Task timed out after 12.00 seconds" in answer.log
    assert function.invoke(False).json == "alive"


def test_a_handler_that_returns_no_json(scripts):
    answer = scripts.run("result = {1, 2}")
    assert "not JSON serializable" in fails(answer, "Runtime.MarshalError")


def test_a_response_that_is_too_large(scripts):
    answer = scripts.run("result = 'x' * 6_400_000")
    assert "6291556" in fails(answer, "Function.ResponseSizeTooLarge")
    assert scripts.alive()


def test_a_handler_that_prints_without_end(deploy):
    function = deploy(
        "def handler(event, context):\n for _ in range(event): print('y' * 1000)\n return 'done'",
        Timeout=120,
    ).wait_for_snapshot()
    answer = function.invoke(20_000)
    assert answer.json == "done"
    assert len(answer.log) <= 4096 and "REPORT" in answer.log


def test_a_function_that_takes_too_much_memory(scripts):
    answer = scripts.run("result = len(bytearray(1 << 30))")
    assert answer.error == "Unhandled", answer.text
    assert scripts.alive()
