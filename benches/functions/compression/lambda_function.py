"""Compresses and decompresses a quarter of a megabyte that is neither random nor constant."""

import zlib

TEXT = b"".join(b"%d: the quick brown fox, %x\n" % (n, n * n) for n in range(8000))


def lambda_handler(event, context):
    packed = zlib.compress(TEXT, 6)
    assert zlib.decompress(packed) == TEXT
    return {"bytes": len(TEXT), "packed": len(packed)}
