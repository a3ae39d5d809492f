#!/bin/sh
# In a guest whose PID 1 is systemd: ghostswap-nbd.socket, enabled. The first client starts the server; TLS and
# certificates as in the unit that we install; reload and restart, which lose nothing, good ones and bad ones; stop, and
# death. Status 1 if anything failed.
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

program=/usr/local/sbin/ghostswap-nbd
tls="tls-certificates=/etc/pki/node1&socket=/run/ghostswap/nbd.sock"
uri="nbds+unix://localhost/image?$tls"
main_pid() { of_unit MainPID; }
identity() { nbdinfo --no-content "$uri" | sed -n 's/.*description: ghostswap volume //p'; }
version_of_main() { "/proc/$(main_pid)/exe" --version; }
# 8 MiB that compress to about half, and the same from the export.
bytes=8388608
head -c $((bytes / 2)) /dev/urandom >/tmp/image
seq 1 1200000 2>/dev/null | head -c $((bytes / 2)) >>/tmp/image
has_all() {
  rm -f /tmp/back
  nbdcopy "$uri" /tmp/back && cmp /tmp/image /tmp/back && [ "$(identity)" = "$who" ]
}
put() { cp "$1" $program.new && mv $program.new $program; }

# Added at run time: that outlives all of it too.
for export in image,size=8M,client=node1 writer,size=64K,client=node2; do
  $program exports add "$export" --control /run/ghostswap-nbd/control.sock || fail "no export $export"
done
nbdcopy /tmp/image "$uri" || fail "the image was not taken"
who=$(identity)
[ -n "$who" ] || fail "the export does not tell who it is"
has_all || fail "the image does not come back"

echo "--- writes that go on meanwhile: another client, which comes again and looks whether its last page is there"
cat >/tmp/writer <<'END'
tls="tls-certificates=/etc/pki/node2"
uri="nbds://127.0.0.1/writer?$tls"
n=0
while [ ! -e /tmp/enough ]; do
  n=$((n + 1))
  yes "$n" 2>/dev/null | head -c 65536 >/tmp/page
  until nbdcopy /tmp/page "$uri" 2>/dev/null; do sleep 0.1; done
  until nbdcopy "$uri" /tmp/page-back 2>/dev/null; do sleep 0.1; done
  cmp /tmp/page /tmp/page-back || { echo "round $n" >/tmp/damaged; exit 1; }
  echo "$n" >/tmp/rounds
done
END
sh /tmp/writer & writer=$!

echo "--- reload: the installed program, the same process"
main=$(main_pid)
put $program-next
systemctl reload $service || fail "reload"
case $(version_of_main) in *+next) ;; *) fail "still $(version_of_main)" ;; esac
[ "$(main_pid)/$(of_unit ActiveState)" = "$main/active" ] || fail "reload: process $(main_pid), $(of_unit ActiveState)"
has_all || fail "after a reload"
put /bin/false
if systemctl reload $service; then fail "a reload with a program that only fails succeeds"; fi
[ "$(main_pid)/$(of_unit ActiveState)" = "$main/active" ] || fail "bad reload: $(main_pid), $(of_unit ActiveState)"
has_all || fail "after a reload that failed"
put $program-next
systemctl reload $service || fail "reload again"
has_all || fail "after three reloads"

echo "--- restart: another process, the same pages, other options"
sed -i 's/--export swap2/--export extra,size=8M,client=node1 --export swap2/' /etc/systemd/system/$service
systemctl daemon-reload
systemctl restart $service || fail "restart"
[ "$(main_pid)" != "$main" ] || fail "restart: the same process"
has_all || fail "after a restart"
[ "$(over_unix node1 extra)" = 8388608 ] || fail "an export that the restart brings: $(over_unix node1 extra)"
put /bin/false
if systemctl restart $service; then fail "a restart with a program that only fails succeeds"; fi
sleep 3
put $program-next
for _ in 1 2 3 4 5 6 7 8 9 10; do [ "$(of_unit ActiveState)" != active ] || break; sleep 1; done
[ "$(of_unit ActiveState)" = active ] || fail "with a good program it is still $(of_unit ActiveState)"
has_all || fail "after a restart that failed at first"

echo "--- killed, all of it"
main=$(main_pid)
kill -9 "$main"
# The socket stayed: a client that comes meanwhile waits.
[ "$(over_unix node1 swap1)" = $gib64 ] || fail "after its death: $(over_unix node1 swap1)"
[ "$(main_pid)" != "$main" ] || fail "it was not restarted"
has_all || fail "after its death"
systemctl kill -s KILL $service
sleep 2
has_all || fail "after the death of all processes"

touch /tmp/enough
wait $writer || fail "the other client: $(cat /tmp/damaged)"
echo "the other client went round $(cat /tmp/rounds) times"
echo "--- stopped, and started by the next client"
systemctl stop $service
[ "$(of_unit Result)/$(of_unit ExecMainStatus)" = success/0 ] || fail "stop: $(of_unit Result), status $(of_unit ExecMainStatus)"
[ -S /run/ghostswap/nbd.sock ] || fail "it removed systemd's socket"
[ "$(over_unix node1 swap1)" = $gib64 ] || fail "after a stop: $(over_unix node1 swap1)"
[ -z "$(identity 2>/dev/null)" ] || fail "a stop kept the pages"
[ $rc = 0 ] || journalctl --no-pager -u $service -u ghostswap-nbd.socket | tail -n 40
exit $rc
