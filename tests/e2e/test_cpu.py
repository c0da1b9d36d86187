"""`--cpu-template`: functions see the CPU that all hosts of a fleet have."""

import json

import pytest

from conftest import SecondDaemon

SEEN = """
def handler(event, context):
    lines = open("/proc/cpuinfo").read().splitlines()
    return dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
"""

# What x86-64-v3 has, and what no CPU of a fleet has although the emulated one, or many real ones, do.
THERE = {"avx2", "bmi2", "fma", "movbe", "aes", "rdrand", "fsgsbase", "xsaveopt", "lahf_lm", "abm"}
NOT_THERE = {"avx512f", "smap", "clwb", "sha_ni", "rdseed", "constant_tsc", "svm", "vmx", "la57"}


@pytest.fixture(scope="module")
def fleet(site):
    with SecondDaemon(site, "fleet", 9095, "--cpu-template x86-64-v3 --numa interleave").running() as daemon:
        yield daemon


def test_functions_of_a_fleet_see_its_cpu_booted_and_thawed(fleet):
    fleet.deploy("seen", SEEN)
    for start in ("thaw", "warm"):
        head, body = fleet.call("/2015-03-31/functions/seen/invocations", {})
        assert f"x-firn-start-kind: {start}" in head, head + body
        seen = json.loads(body)
        flags = set(seen["flags"].split())
        assert seen["model name"] == "x86-64-v3", seen
        assert flags >= THERE and not flags & NOT_THERE, (THERE - flags, flags & NOT_THERE)

