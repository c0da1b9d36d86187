"""Secrets at rest: nothing of a function lies in the clear, and nothing forged is run.

A second daemon, which also encrypts snapshots, runs beside that of the other tests.
"""

import json
import secrets

import pytest

from conftest import SecondDaemon


class Daemon(SecondDaemon):
    def invoke(self, name):
        """The answer of a fresh instance, thawed."""
        head, body = self.call(f"/2015-03-31/functions/{name}/invocations", {})
        assert "x-firn-start-kind: thaw" in head, head + body
        return json.loads(body)

    def holding(self, needle):
        """The files that hold `needle`. busybox's grep does not look behind a null byte of a line."""
        return self.site.run(
            f"find {self.dir} -type f | while read -r file; do"
            f" tr '\\0' '\\n' < $file | grep -qF {needle} && echo $file; done; true"
        ).split()


@pytest.fixture
def daemon(site):
    with Daemon(site, "secret-state", 9096, "--encrypt-snapshots --shells 0").running() as daemon:
        yield daemon


ANSWER = """
import os

def handler(event, context):
    return os.environ["TOKEN"]
"""


def test_nothing_of_a_function_lies_in_the_clear(daemon, site):
    code, value = secrets.token_hex(16), secrets.token_hex(16)
    variables = {"Environment": {"Variables": {"TOKEN": value}}}
    daemon.deploy("planted", f"# {code}{ANSWER}", stored=True, **variables)
    assert daemon.invoke("planted") == value
    # What is looked for can be found: the function's name is no secret.
    assert f"{daemon.state}/store.sqlite" in [f.removesuffix("-wal") for f in daemon.holding("planted")]
    for needle in (code, value):
        assert daemon.holding(needle) == []
    # Nor is anything left where it was made of the archive.
    assert site.run("ls -d /tmp/.firn-tmp-* 2>/dev/null", check=False) == ""

    pid = site.run(f"cat {daemon.dir}/pid").strip()
    limits = site.run(f"grep 'Max core file size' /proc/{pid}/limits")
    assert limits.split()[4:6] == ["0", "0"], limits
    mode = site.run(f"stat -c '%a %s' {daemon.state}/master.key")
    assert mode.split() == ["600", "32"]


def test_what_was_tampered_with_is_not_thawed(daemon, site):
    values = {name: secrets.token_hex(16) for name in ("one", "two")}
    for name, value in values.items():
        daemon.deploy(name, ANSWER, Environment={"Variables": {"TOKEN": value}})
    daemon.stop()
    # One is the other's, authentic, where it does not belong; the other has a byte that is not its own.
    ones = 8 * "\\377"
    site.run(
        f"cd {daemon.state}/snapshots && set -- fn-* && test $# = 2 && rm -r $1 && cp -r $2 $1"
        f" && printf '{ones}' | dd of=$2/memory bs=1 seek=4096 conv=notrunc 2>&1"
    )
    daemon.start()
    for name, value in values.items():
        daemon.wait_for_snapshot(name)
        assert daemon.invoke(name) == value
    assert daemon.log().count("the snapshot was made for") == 1
    assert "was altered" in daemon.log()
    daemon.stop()

    # Another key: neither silently started anew, nor run with what it can't read.
    site.run(f"mv {daemon.state}/master.key {daemon.dir}/aside")
    with pytest.raises(AssertionError, match="put back the key file"):
        daemon.start()
    site.run(f"mv {daemon.dir}/aside {daemon.state}/master.key && chmod 644 {daemon.state}/master.key")
    with pytest.raises(AssertionError, match="chmod 600"):
        daemon.start()
    site.run(f"chmod 600 {daemon.state}/master.key")
    daemon.start()
    daemon.wait_for_snapshot("one")
