"""What a user of Lambda does, with boto3: deploy a function, invoke it, read its log.

Run by `cargo xtask demo`. Only the header X-Firn-Start (which kind of start the daemon is to use)
and the path /firn/v1 (is the snapshot ready?) are Firn's own.
"""

import argparse
import base64
import io
import json
import pathlib
import sys
import time
import urllib.request
import zipfile

import boto3
import botocore.config

NAME = "hello"
SNAPSHOT_LIMIT = 180


def zipped(folder):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(pathlib.Path(folder).rglob("*.py")):
            archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


def wait_for_snapshot(endpoint):
    """The daemon takes it by itself, after the function was created."""
    end = time.monotonic() + SNAPSHOT_LIMIT
    while True:
        with urllib.request.urlopen(f"{endpoint}/firn/v1/functions/{NAME}/snapshot") as answer:
            status = json.load(answer)
        if status["state"] == "ready":
            return
        if status["state"] == "failed":
            sys.exit(f"the snapshot failed: {status.get('reason', 'no reason was given')}")
        if time.monotonic() > end:
            sys.exit(f"the snapshot is still {status['state']} after {SNAPSHOT_LIMIT} s")
        time.sleep(0.05)


class Client:
    def __init__(self, endpoint):
        config = botocore.config.Config(read_timeout=300, retries={"total_max_attempts": 1})
        self.api = boto3.client("lambda", endpoint_url=endpoint, config=config)
        self.start = None
        self.api.meta.events.register("before-sign.lambda.Invoke", self._add_header)

    def _add_header(self, request, **_):
        request.headers["X-Firn-Start"] = self.start

    def invoke(self, start, event):
        self.start = start
        begun = time.perf_counter()
        answer = self.api.invoke(FunctionName=NAME, Payload=json.dumps(event), LogType="Tail")
        payload = answer["Payload"].read().decode()
        took = time.perf_counter() - begun
        if "FunctionError" in answer:
            sys.exit(f"the function failed: {payload}")
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        kind = headers.get("x-firn-start-kind")
        if kind != start:
            sys.exit(f"asked for a start from {start}, got {kind}")
        log = base64.b64decode(answer["LogResult"]).decode(errors="replace")
        return payload, log, json.loads(headers["x-firn-phases"]), took


def milliseconds(value):
    return f"{value / 1000:>12,.3f}"


def show(start, payload, log, phases, took):
    print(f"\n== {start} ".ljust(72, "="))
    print(f"response  {payload}")
    report = [line.strip() for line in log.splitlines() if line.startswith("REPORT")]
    print("\n".join(report) or "(no REPORT line)")
    print(f"\n  {'phase':<36}{'at, ms':>12}{'took, ms':>12}")
    before = 0
    for name, at in phases.items():
        print(f"  {name:<36}{milliseconds(at)}{milliseconds(at - before)}")
        before = at
    print(f"  {'the client had its answer':<36}{milliseconds(took * 1e6)}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--function", required=True)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()

    client = Client(arguments.endpoint)
    begun = time.monotonic()
    client.api.create_function(
        FunctionName=NAME,
        Runtime="python3.11",
        Role="arn:aws:iam::000000000000:role/demo",
        Handler="lambda_function.lambda_handler",
        Code={"ZipFile": zipped(arguments.function)},
        MemorySize=128,
        Timeout=30,
    )
    client.api.get_waiter("function_active_v2").wait(
        FunctionName=NAME, WaiterConfig={"Delay": 1, "MaxAttempts": 120}
    )
    print(f"created the function {NAME} ({time.monotonic() - begun:.1f} s)", flush=True)
    wait_for_snapshot(arguments.endpoint)
    print(f"its snapshot is ready ({time.monotonic() - begun:.1f} s)", flush=True)

    for start in ["boot", "thaw", "warm"]:
        show(start, *client.invoke(start, {"name": "Firn"}))
        sys.stdout.flush()
    if not arguments.keep:
        client.api.delete_function(FunctionName=NAME)


if __name__ == "__main__":
    main()
