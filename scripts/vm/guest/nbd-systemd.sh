#!/bin/sh
# In a guest whose PID 1 is systemd: ghostswap-nbd.socket, enabled. The first client starts the server; TLS and
# certificates as in the unit that we install; stop, and death. Status 1 if anything failed.
set -eu
service=ghostswap-nbd.service
rc=0
fail() { echo "FAILED: $*"; rc=1; }
of_unit() { systemctl show -p "$1" --value $service; }
size() { nbdinfo --size "$1?${3:-}tls-certificates=/etc/pki/$2" 2>&1 || true; }
over_unix() { size "nbds+unix://localhost/$2" "$1" "socket=/run/ghostswap/nbd.sock&"; }
gib64=68719476736

echo "kernel $(uname -r), $(systemctl --version | head -n 1)"
systemctl is-active ghostswap-nbd.socket || fail "the socket is not active after boot"
[ "$(of_unit ActiveState)" = inactive ] || fail "the service is $(of_unit ActiveState) before anybody asked"
systemd-analyze verify ghostswap-nbd.socket $service || fail "systemd-analyze verify"
[ "$(stat -c %a /run/ghostswap/nbd.sock)" = 600 ] || fail "the socket is open to everybody"
[ "$(over_unix node1 swap1)" = $gib64 ] || fail "node1 over the Unix socket: $(over_unix node1 swap1)"
[ "$(of_unit ActiveState)" = active ] || fail "the first client did not start it"
[ "$(size nbds://127.0.0.1/swap2 node2)" = $gib64 ] || fail "node2 over TCP: $(size nbds://127.0.0.1/swap2 node2)"
[ "$(over_unix node1 swap2)" != $gib64 ] || fail "node1 may go to node2's export"
[ "$(over_unix nobody swap1)" != $gib64 ] || fail "a client without a certificate is let in"
main=$(of_unit MainPID)
[ "$(cat "/proc/$main/oom_score_adj")" = -1000 ] || fail "it is not protected from the OOM killer"

echo "--- killed"
kill -9 "$main"
# The socket stayed: a client that comes meanwhile waits.
[ "$(over_unix node1 swap1)" = $gib64 ] || fail "after its death: $(over_unix node1 swap1)"
[ "$(of_unit MainPID)" != "$main" ] || fail "it was not restarted"
echo "--- stopped, and started by the next client"
systemctl stop $service
[ "$(of_unit Result)/$(of_unit ExecMainStatus)" = success/0 ] || fail "stop: $(of_unit Result), status $(of_unit ExecMainStatus)"
[ -S /run/ghostswap/nbd.sock ] || fail "it removed systemd's socket"
[ "$(over_unix node1 swap1)" = $gib64 ] || fail "after a stop: $(over_unix node1 swap1)"
[ $rc = 0 ] || journalctl --no-pager -u $service -u ghostswap-nbd.socket | tail -n 40
exit $rc
