"""What survives when parts die."""

import concurrent.futures
import urllib.request

from conftest import wait_for


def serves(endpoint):
    try:
        with urllib.request.urlopen(f"{endpoint}/firn/v1/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_a_vmm_killed_in_an_invocation_hurts_only_it(deploy, site):
    function = deploy(
        "import time\ndef handler(event, context):\n time.sleep(event)\n return 'alive'", Timeout=60
    ).wait_for_snapshot()
    # An instance is listed once its first invocation is over.
    assert function.invoke(0).json == "alive"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending = pool.submit(function.invoke, 59)
        busy = wait_for(
            "a busy instance", lambda: [i for i in function.instances() if i["State"] == "busy"]
        )
        site.run(f"sleep 1; kill -9 {busy[0]['Pid']}")
        answer = pending.result()
    assert answer.error == "Unhandled", answer.text
    assert answer.json["errorType"] == "Runtime.ExitError", answer.text
    assert function.invoke(0).json == "alive"


def test_a_killed_daemon_comes_back_with_everything_and_no_orphans(client, deploy, endpoint, site):
    function = deploy("def handler(event, context): return 'kept'").wait_for_snapshot()
    assert function.invoke().json == "kept"
    site.run("kill -9 $(pidof firnd)")
    wait_for("the daemon", lambda: serves(endpoint))
    found = client.get_function_configuration(FunctionName=function.name)
    assert found["State"] == "Active"
    assert function.invoke().json == "kept"
    wait_for("the daemon's only copy", lambda: len(site.run("pidof firnd").split()) == 1)
