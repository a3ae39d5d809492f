# A store without room: what needs none overtakes what waits for some. Expects an export of 64 MiB, on a store
# that holds less, at URI.
import os
import nbd

h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri(os.environ["URI"])
first = os.urandom(4096)
h.pwrite(first, 0)
pages = 1
try:
    while True:
        h.pwrite(os.urandom(4096), pages * 4096)
        pages += 1
except nbd.Error as error:
    assert error.errno == "ENOSPC", error.errno
assert pages > 1000, pages

last = os.urandom(4096)
waiting = h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(last)), 60 << 20)
assert h.pread(4096, 0) == first
assert not h.aio_command_completed(waiting)
h.trim(pages // 2 * 4096, 0)
while not h.aio_command_completed(waiting):
    h.poll(-1)
assert h.pread(4096, 60 << 20) == last
h.shutdown()
