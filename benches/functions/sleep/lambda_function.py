"""Takes as long as the event says, asleep or at work: the rows of a replayed trace."""

import time


def lambda_handler(event, context):
    end = time.monotonic() + event.get("sleep_s", 0)
    if event.get("spin"):
        while time.monotonic() < end:
            pass
    else:
        time.sleep(max(0, end - time.monotonic()))
    return {}
