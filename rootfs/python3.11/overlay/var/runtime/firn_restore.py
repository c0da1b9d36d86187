"""Makes the random number generators of a thawed Python process its own.

Every clone of a snapshot starts with the same memory. The kernel's generator has new entropy by the
time this runs; generators in user space have to be told. See the image's README for what still
repeats.
"""

import os
import sys


def register():
    """Has `reseed` called after every thaw, before the hooks that the function registers, and
    `prime` before the snapshot, after them."""
    from snapshot_restore_py import register_after_restore, register_before_snapshot

    register_after_restore(reseed)
    register_before_snapshot(prime)


def prime():
    """Does once, before the snapshot, what a thawed process would have to do for the first time.

    The first use of OpenSSL's generators sets them up, which takes longer than all the rest of a
    thaw; from then on `reseed` has only to reseed them. awslambdaric asks for the restore through
    `http.client`, which imports, compiles and specializes as it goes; asking the Runtime API for
    what it does not have takes the same way there and back.
    """
    import http.client

    reseed()
    ssl = sys.modules.get("_ssl")
    if ssl is not None:
        ssl.RAND_bytes(1)
    try:
        for _ in range(3):
            connection = http.client.HTTPConnection(os.environ["AWS_LAMBDA_RUNTIME_API"])
            connection.request("GET", "/2018-06-01/runtime/")
            connection.getresponse().read()
            connection.close()
    except OSError:
        # It was worth a try; the real request will say what is wrong.
        pass


def reseed():
    """Reseeds the generators that the process has loaded; loads none."""
    random = sys.modules.get("random")
    if random is not None:
        random.seed()

    # OpenSSL's public and private generators reseed from the primary one, and that from the
    # kernel, when bytes are added to it.
    ssl = sys.modules.get("_ssl")
    if ssl is not None:
        ssl.RAND_add(os.urandom(48), 48.0)

    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        try:
            numpy_random.seed()
        except TypeError:
            # The function has replaced numpy's global generator by one that can't be reseeded.
            pass
