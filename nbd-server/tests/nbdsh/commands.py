# Every command with every flag it knows, and what must be refused. Expects exports a (16 MiB) and long-name
# (1 MiB, ro) at the Unix socket SOCKET.
import os
import nbd

socket = os.environ["SOCKET"]


def connect(name):
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.add_meta_context("ghostswap:kind")
    handle.set_export_name(name)
    # What libnbd itself would not send is to be refused by the server.
    handle.set_strict_mode(0)
    handle.connect_unix(socket)
    return handle


def refused(errno, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errno == errno, (error.errno, error.string)
        return
    raise AssertionError("it was not refused")


def extents(length, offset, context="base:allocation", flags=0):
    told = {}
    h.block_status(length, offset, lambda name, at, entries, error: told.setdefault(name, entries), flags)
    return list(zip(told[context][::2], told[context][1::2]))


h = connect("a")
page = bytes(range(256)) * 16
h.trim(16 << 20, 0)

# WRITE, FUA and not; READ, plain and with DF; FLUSH.
h.pwrite(page * 16, 0)
h.pwrite(page, 1 << 20, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(65536, 0) == page * 16
parts = []
data = h.pread_structured(65536, 0, lambda part, offset, status, error: parts.append((offset, len(part), status)), nbd.CMD_FLAG_DF)
assert data == page * 16 and parts == [(0, 65536, nbd.READ_DATA)], parts
parts.clear()
h.pread_structured(1 << 20, 8 << 20, lambda part, offset, status, error: parts.append((offset, status)))
assert parts == [((8 << 20) + n * (256 << 10), nbd.READ_HOLE) for n in range(4)], parts
refused("EOVERFLOW", lambda: h.pread_structured(1 << 20, 0, lambda *_: 0, nbd.CMD_FLAG_DF))

# BLOCK_STATUS
assert extents(2 << 20, 0) == [(65536, 0), ((1 << 20) - 65536, 3), (4096, 0), ((1 << 20) - 4096, 3)]
assert extents(2 << 20, 0, "ghostswap:kind")[0] == (65536, 3)
assert extents(2 << 20, 0, flags=nbd.CMD_FLAG_REQ_ONE) == [(65536, 0)]

# WRITE_ZEROES with each flag; TRIM; CACHE.
h.zero(4096, 0)
h.zero(4096, 4096, nbd.CMD_FLAG_FUA)
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
h.zero(4096, 12288, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(16384, 0) == bytes(16384) and h.pread(4096, 16384) == page
assert extents(65536, 0)[0] == (16384, 3)
h.trim(4096, 16384, nbd.CMD_FLAG_FUA)
assert h.pread(8192, 16384) == bytes(4096) + page
h.cache(16 << 20, 0)
# The parts of a page.
h.pwrite(b"y" * 512, 20480 + 512)
h.zero(1024, 20480 + 1024)
h.trim(512, 20480)
assert h.pread(4096, 20480)[512:] == b"y" * 512 + bytes(1024) + page[2048:]

# Beyond the end, not aligned, flags that do not belong: refused, each by its error.
end = 16 << 20
refused("EINVAL", lambda: h.pread(512, end))
refused("EINVAL", lambda: h.pread(512, 1))
refused("ENOSPC", lambda: h.pwrite(page, end))
refused("EINVAL", lambda: h.pwrite(b"z" * 100, 0))
refused("EINVAL", lambda: h.trim(8192, end - 4096))
refused("ENOSPC", lambda: h.zero(8192, end - 4096))
refused("EINVAL", lambda: h.cache(512, end))
refused("EINVAL", lambda: h.block_status(0, 0, lambda *_: 0))
refused("EINVAL", lambda: h.pwrite(page, 0, nbd.CMD_FLAG_DF))
refused("EINVAL", lambda: h.flush(nbd.CMD_FLAG_REQ_ONE))
refused("EINVAL", lambda: h.trim(4096, 0, nbd.CMD_FLAG_FAST_ZERO))
refused("EINVAL", lambda: h.pread(33 << 20, 0))
assert h.pread(2048, 22528) == page[2048:]

# Many in flight, answered all.
buffers = [nbd.Buffer.from_bytearray(bytearray([number]) * 4096) for number in range(64)]
cookies = [h.aio_pwrite(buffer, (2 << 20) + number * 4096) for number, buffer in enumerate(buffers)]
while not all(h.aio_command_completed(cookie) for cookie in list(cookies) if cookies.remove(cookie) is None):
    h.poll(-1)
h.flush()
assert h.pread(4096, (2 << 20) + 63 * 4096) == bytes([63]) * 4096
# Another connection sees it: MULTI_CONN.
other = connect("a")
assert other.can_multi_conn() and other.pread(4096, (2 << 20) + 5 * 4096) == bytes([5]) * 4096
other.shutdown()
h.shutdown()
assert h.aio_is_closed()

# Read-only: whatever changes something is refused.
h = connect("long-name")
assert h.is_read_only() and not h.can_trim() and not h.can_zero() and h.can_fua()
for change in (lambda: h.pwrite(page, 0), lambda: h.trim(4096, 0), lambda: h.zero(4096, 0)):
    refused("EPERM", change)
assert h.pread(4096, 0) == bytes(4096)
h.shutdown()
