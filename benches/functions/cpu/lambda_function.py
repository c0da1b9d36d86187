"""Pure Python CPU work of a fixed size: primes by sieve, and a checksum over them."""

LIMIT = 20_000


def lambda_handler(event, context):
    sieve = bytearray([1]) * (LIMIT + 1)
    sieve[0:2] = b"\0\0"
    for n in range(2, int(LIMIT**0.5) + 1):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, LIMIT + 1, n)))
    checksum = 0
    for n, prime in enumerate(sieve):
        if prime:
            checksum = (checksum * 31 + n) & 0xFFFFFFFF
    return {"primes": sum(sieve), "checksum": checksum}
