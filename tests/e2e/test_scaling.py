"""Concurrency, provisioned instances and updates, with microVMs under load."""

import collections
import threading
import time

import botocore.exceptions

from conftest import PATIENCE, Answer, rounds, wait_for, zipped

# The function's time for an event, and how long clients go on.
WORK, LOAD = 0.2, rounds(3, 8)

SLOW = f"import time\ndef handler(event, context): time.sleep({WORK}); return VERSION"


def invoke(function, **more):
    """For several threads, which `Function.invoke` is not."""
    return Answer(function.client.invoke(FunctionName=function.name, Payload=b"null", **more))


def load(function, clients, seconds=LOAD, stop=None):
    """What clients got that ask again as soon as they have an answer: `[(time, status, text)]`."""
    end = time.monotonic() + seconds
    answers = []

    def run():
        while time.monotonic() < end and not (stop and stop.is_set()):
            try:
                answer = invoke(function)
                got = (answer.error or answer.status, answer.text)
            except botocore.exceptions.ClientError as error:
                got = (error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Reason"])
                time.sleep(0.05)
            answers.append((time.monotonic(), *got))

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_overload_is_turned_away_and_serves_as_many_as_it_may(client, deploy):
    function = deploy(f"VERSION = 1\n{SLOW}").wait_for_snapshot()
    client.put_function_concurrency(FunctionName=function.name, ReservedConcurrentExecutions=2)
    load(function, 2, seconds=2)
    served = {}
    for times in (1, 2, 10):
        answers = load(function, 2 * times)
        statuses = collections.Counter(status for _, status, _ in answers)
        reasons = {text for _, status, text in answers if status == 429}
        print(f"{2 * times} clients: {statuses}")
        assert set(statuses) <= {200, 429}, statuses
        assert (429 in statuses) == (times > 1), statuses
        assert reasons <= {"ReservedFunctionConcurrentInvocationLimitExceeded"}
        served[times] = statuses[200]
        assert len(function.instances()) <= 2
    # Twenty clients of an emulated machine with one CPU cost more than two do.
    assert served[10] >= served[1] / 4, served


def test_updates_under_load_fail_no_call(client, deploy):
    function = deploy(f"VERSION = 0\n{SLOW}").wait_for_snapshot()
    answers, stop = [], threading.Event()
    clients = threading.Thread(target=lambda: answers.extend(load(function, 3, seconds=PATIENCE, stop=stop)))
    clients.start()
    done = []
    for version in (1, 2):
        time.sleep(LOAD / 2)
        code = zipped({"index.py": f"VERSION = {version}\n{SLOW}"})
        client.update_function_code(FunctionName=function.name, ZipFile=code)
        done.append(time.monotonic())
        function.wait_for_snapshot()
    time.sleep(LOAD / 2)
    stop.set()
    clients.join()
    assert {status for _, status, _ in answers} == {200}, answers
    for version, at in enumerate(done, start=1):
        stale = [when - at for when, _, text in answers if int(text) < version and when > at]
        fresh = [when - at for when, _, text in answers if int(text) >= version]
        assert fresh and max(stale, default=0) < 60, (stale, fresh)
    assert answers[-1][2] == "2"


def test_provisioned_instances_wait_for_their_requests(client, deploy):
    function = deploy(f"VERSION = 1\n{SLOW}")
    version = client.publish_version(FunctionName=function.name)["Version"]
    of = {"FunctionName": function.name, "Qualifier": version}
    client.put_provisioned_concurrency_config(**of, ProvisionedConcurrentExecutions=2)

    def ready():
        config = client.get_provisioned_concurrency_config(**of)
        assert config["Status"] != "FAILED", config
        return config["Status"] == "READY" and config

    assert wait_for("provisioned instances", ready)["AllocatedProvisionedConcurrentExecutions"] == 2
    started = [i for i in function.instances() if i["Version"] == version]
    assert [instance["Invocations"] for instance in started] == [0, 0]
    kinds = []
    threads = [
        threading.Thread(target=lambda: kinds.append(invoke(function, Qualifier=version).kind)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kinds == ["warm", "warm"]
    client.delete_provisioned_concurrency_config(**of)
