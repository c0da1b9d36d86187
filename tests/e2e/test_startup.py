"""What a second daemon or bench says when its surroundings are wrong. The first one keeps serving."""

import pytest

# An installation of links to the real one, to be spoilt.
INSTALLATION = r"""
set -e
argument() { tr '\0' '\n' < /proc/$(pidof firnd | cut -d' ' -f1)/cmdline | grep -A1 -x -e "$1" | tail -n1; }
real=$(argument --artifacts)
rm -rf /tmp/spoilt
mkdir -p /tmp/spoilt/kernel /tmp/spoilt/images /tmp/spoilt/state
ln -s $real/bin /tmp/spoilt/bin
ln -s $real/kernel/vmlinux /tmp/spoilt/kernel/vmlinux
for image in $real/images/*; do ln -s $image /tmp/spoilt/images/; done
"""

DAEMON = "/tmp/spoilt/bin/firnd --artifacts /tmp/spoilt --state /tmp/spoilt/state --listen 127.0.0.1:9099"


@pytest.mark.parametrize(
    "spoil, command, needles",
    [
        ("", f"unshare -m sh -c 'mount -t tmpfs none /dev && exec {DAEMON}'", ["/dev/kvm"]),
        (
            "",
            f"unshare -m sh -c 'mount --bind /dev/null /dev/kvm && exec {DAEMON}'",
            ["/dev/kvm"],
        ),
        ("rm -r /tmp/spoilt/images/*", DAEMON, ["images"]),
        ("rm /tmp/spoilt/kernel/vmlinux", DAEMON, ["kernel"]),
        ("chmod 000 /tmp/spoilt/state; rm -r /tmp/spoilt/state; touch /tmp/spoilt/state", DAEMON, ["state"]),
        (
            "rm /tmp/spoilt/kernel/vmlinux; echo no kernel at all > /tmp/spoilt/kernel/vmlinux",
            "/tmp/spoilt/bin/firn bench run --artifacts /tmp/spoilt --state /tmp/spoilt/bench "
            "--patience 20 --iterations 1 --scenario boot --function nothing",
            ["not a kernel", "ELF"],
        ),
    ],
    ids=["no kvm", "not kvm", "no image", "no kernel", "no state directory", "not a kernel"],
)
def test_what_is_wrong_is_said(site, spoil, command, needles):
    said = site.run(
        f"{INSTALLATION}\n{spoil}\nset +e\n{command} 2>&1\necho code $?\nrm -rf /tmp/spoilt", check=False
    )
    for needle in needles:
        assert needle in said, said
    assert "code 0" not in said, said
    assert "panicked" not in said, said


def test_a_state_directory_has_one_daemon(site):
    said = site.run(
        f"{INSTALLATION}\n"
        "state=$(argument --state)\nset +e\n"
        "/tmp/spoilt/bin/firnd --artifacts /tmp/spoilt --state ${state:-/var/lib/firn} "
        "--listen 127.0.0.1:9098 2>&1\necho code $?\nrm -rf /tmp/spoilt",
        check=False,
    )
    assert "code 0" not in said, said
    assert "use" in said, said
