# Large requests, which several threads of the server may share: in bursts, with pauses long enough for it to take them
# for over, with others between that are not whole pages. Expects an export of 64 MiB that has room for all of it, at URI.
import os
import random
import struct
import time
import nbd

LEN = 128 << 10
COUNT = 128

h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri(os.environ["URI"])
words = [struct.pack("<Q", random.randrange(1000)) for _ in range(4096)]


def some(length):
    return bytearray(b"".join(random.choices(words, k=length // 8)))


def burst(start):
    cookies = [start(n) for n in range(COUNT)]
    for cookie in cookies:
        while not h.aio_command_completed(cookie):
            h.poll(-1)


for turn in range(3):
    content = some(COUNT * LEN)
    burst(lambda n: h.aio_pwrite(nbd.Buffer.from_bytearray(content[n * LEN:(n + 1) * LEN]), n * LEN))
    for at, length in (512, 100 << 10), (1 << 20, 3 << 20), ((8 << 20) - 1024, 64 << 10):
        part = some(length)
        h.pwrite(part, at)
        content[at:at + length] = part
    # The server keeps what it shares by for a second.
    time.sleep(1.3 if turn == 1 else 0.1)
    read = [nbd.Buffer(LEN) for _ in range(COUNT)]
    burst(lambda n: h.aio_pread(read[n], n * LEN))
    for n in range(COUNT):
        assert read[n].to_bytearray() == content[n * LEN:(n + 1) * LEN], (turn, n)
    assert h.pread(len(content), 0) == content
h.shutdown()
