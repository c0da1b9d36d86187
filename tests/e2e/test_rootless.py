"""A daemon as an ordinary user, who has nothing but `/dev/kvm` and a control group of its own."""

import json

import pytest

from conftest import SecondDaemon

USER = 1000
GROUP = "/sys/fs/cgroup/rootless"


class Rootless(SecondDaemon):
    # What a service manager does for a user: the device's group, a group of processes to govern.
    before = f"""
chown 0:{USER} /dev/kvm && chmod 0660 /dev/kvm
chown {USER} /tmp/rootless
mkdir -p {GROUP}
chown {USER} {GROUP} {GROUP}/cgroup.procs {GROUP}/cgroup.subtree_control
"""
    # Matched by a file that is not there: other daemons run, and are none of its business.
    runner = f"sh -c 'echo $$ > {GROUP}/cgroup.procs; exec \"$@\"' sh busybox start-stop-daemon -S -c user:user -p /nonexistent -a /bin/busybox -- env"

    def remove(self):
        super().remove()
        self.site.run(f"rmdir {GROUP}/* {GROUP}", check=False)


@pytest.fixture(scope="module")
def rootless(site):
    if "cgroup.procs" not in site.run("ls /sys/fs/cgroup"):
        pytest.skip("control groups of version 1 can't be delegated")
    with Rootless(site, "rootless", 9099, "--isolation per-invocation").running() as daemon:
        yield daemon


def test_an_ordinary_user_runs_functions(rootless, site):
    rootless.deploy("plain", "def handler(event, context):\n    return {'got': event}\n")
    path = "/2015-03-31/functions/plain/invocations"
    kinds = set()
    for number in range(4):
        head, body = rootless.call(path, {"number": number})
        assert json.loads(body) == {"got": {"number": number}}, head
        kinds |= {kind for kind in ("thaw", "reset") if f"x-firn-start-kind: {kind}" in head}
    assert "reset" in kinds, "which needs the pagemap of a process in another user namespace"

    listed = json.loads(rootless.call("/firn/v1/instances")[1])["Instances"].values()
    pids = [instance["Pid"] for instance in listed]
    assert pids
    for pid in pids:
        status = site.run(f"cat /proc/{pid}/status")
        assert f"Uid:\t{USER}\t{USER}\t{USER}\t{USER}" in status
        assert "CapEff:\t0000000000000000" in status and "CapBnd:\t0000000000000000" in status
        assert site.run(f"cat /proc/{pid}/uid_map").split() == ["0", str(USER), "1"]
        assert site.run(f"readlink /proc/{pid}/ns/user") != site.run("readlink /proc/self/ns/user")
        group = site.run(f"grep ^0:: /proc/{pid}/cgroup").strip()
        assert group.startswith("0::/rootless/firn/"), group
        assert site.run(f"cat /sys/fs/cgroup{group[3:]}/memory.max").strip() != "max"
