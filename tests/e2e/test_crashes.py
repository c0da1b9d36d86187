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


def test_a_memory_bomb_in_a_vmm_dies_in_its_control_group(deploy, site):
    victim = deploy("def handler(event, context): return 'alive'").wait_for_snapshot()
    bystander = deploy("def handler(event, context): return 'bystander'").wait_for_snapshot()
    assert victim.invoke().json == "alive"
    assert bystander.invoke().json == "bystander"
    pid = victim.instances()[0]["Pid"]
    # What a VMM that was taken over does, done by a process that joins its control group.
    bomb = f"""
for line in $(cat /proc/{pid}/cgroup); do
    path=${{line##*:}}
    for root in /sys/fs/cgroup /sys/fs/cgroup/memory; do
        [ -e $root$path/cgroup.procs ] && [ -n "$(ls $root$path/memory.*)" ] && group=$root$path
    done
done
cat $group/memory.max 2> /dev/null || cat $group/memory.limit_in_bytes
sh -c 'echo $$ > '$group'/cgroup.procs && exec tail /dev/zero' > /dev/null 2>&1
echo "bomb: $?"
"""
    limit, said = site.run(bomb).splitlines()
    # Guest memory, VMM, and /tmp where that is in memory, too.
    assert int(limit) < 1 << 30, limit
    assert said == "bomb: 137", "the kernel killed it"
    # No half VMM goes on; whoever calls next gets an instance that works.
    wait_for("the VMM's end", lambda: site.run(f"kill -0 {pid} 2>&1 || echo gone", check=False))
    assert victim.invoke().json == "alive"
    again = bystander.invoke()
    assert (again.json, again.kind) == ("bystander", "warm")
