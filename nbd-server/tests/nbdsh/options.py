# Every option of the negotiation, by libnbd's own names. Expects exports a (16 MiB), long-name (1 MiB, ro)
# at the Unix socket SOCKET.
import os
import nbd

socket = os.environ["SOCKET"]


def connect():
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.set_full_info(True)
    handle.connect_unix(socket)
    assert handle.get_protocol() == "newstyle-fixed"
    return handle


def refused(call, errno=None):
    try:
        call()
    except nbd.Error as error:
        assert errno is None or error.errno == errno, (error.errno, error.string)
        return
    raise AssertionError("it was not refused")


# LIST
h = connect()
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == ["a", "long-name"], names

# INFO: of one, of the default, of none; and the next option is understood.
h.set_export_name("long-name")
h.opt_info()
assert h.get_size() == 1 << 20 and h.is_read_only()
assert h.get_canonical_export_name() == "long-name" and h.get_export_description().startswith("ghostswap volume ")
h.set_export_name("")
h.opt_info()
assert h.get_size() == 16 << 20 and h.get_canonical_export_name() == "a"
h.set_export_name("none")
refused(h.opt_info, "ENOENT")
h.set_export_name("x" * 4096)
refused(h.opt_info)
h.set_export_name("a")
h.opt_info()
assert [h.get_block_size(what) for what in (0, 1, 2)] == [512, 4096, 32 << 20]

# LIST_META_CONTEXT: all, a namespace, one by name, one that is not.
def listed(*queries):
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    found = []
    h.opt_list_meta_context(lambda name: found.append(name))
    return found


assert listed() == ["base:allocation", "ghostswap:kind"]
assert listed("base:") == ["base:allocation"]
assert listed("ghostswap:kind") == ["ghostswap:kind"]
assert listed("qemu:dirty-bitmap:x") == []

# SET_META_CONTEXT, and GO: what was set holds.
h.clear_meta_contexts()
h.add_meta_context("ghostswap:kind")
h.opt_go()
assert h.can_meta_context("ghostswap:kind") and not h.can_meta_context("base:allocation")
assert h.get_structured_replies_negotiated()
h.shutdown()

# GO to none fails and leaves the negotiation open.
h = connect()
h.set_export_name("none")
refused(h.opt_go, "ENOENT")
h.set_export_name("a")
h.opt_go()
assert h.get_size() == 16 << 20
h.shutdown()

# ABORT
h = connect()
h.opt_abort()
assert h.aio_is_closed()

# Without structured replies there are no contexts, and no DF.
h = nbd.NBD()
h.set_request_structured_replies(False)
h.add_meta_context("base:allocation")
h.connect_unix(socket)
assert not h.get_structured_replies_negotiated() and not h.can_meta_context("base:allocation") and not h.can_df()
h.pwrite(b"x" * 512, 0)
assert h.pread(512, 0) == b"x" * 512
h.shutdown()

# EXPORT_NAME, as clients without FIXED_NEWSTYLE do, with and without the zeros.
for flags in (0, nbd.HANDSHAKE_FLAG_NO_ZEROES, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE):
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.set_export_name("a")
    h.connect_unix(socket)
    assert h.get_size() == 16 << 20
    assert h.pread(512, 0) == b"x" * 512
    h.shutdown()

# STARTTLS where there is none.
h = nbd.NBD()
h.set_tls(nbd.TLS_REQUIRE)
refused(lambda: h.connect_unix(socket))
h = nbd.NBD()
h.set_tls(nbd.TLS_ALLOW)
h.connect_unix(socket)
assert not h.get_tls_negotiated()
h.shutdown()
