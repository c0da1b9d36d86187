"""Keeps 200 MB resident, and reads one page in sixteen of them and writes one in 256 a call."""

PAGE = 4096
STATE = bytearray(200 * 1000 * 1000)
for at in range(0, len(STATE), PAGE):
    # Distinct, so that no page is the zero page or merges with another.
    STATE[at : at + 8] = at.to_bytes(8, "little")


def lambda_handler(event, context):
    total = 0
    for at in range(0, len(STATE), PAGE * 16):
        total += STATE[at + 1]
    for at in range(0, len(STATE), PAGE * 256):
        STATE[at + 100] = 1
    return {"total": total}
