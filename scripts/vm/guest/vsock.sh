#!/bin/sh
# In the guest: ghostswap-nbd at a vsock port, locked in memory, reached by real clients over the kernel's vsock loopback.
set -eu
modprobe vsock_loopback
ghostswap-nbd --vsock 10809 --lock-memory --export a,size=64M --tier ram,limit=128M &
server=$!
uri='nbd+vsock://1:10809/a'
# shellcheck disable=SC2034
for try in 1 2 3 4 5 6 7 8 9 10; do
    [ "$(nbdinfo --size "$uri" 2> /dev/null)" = 67108864 ] && break
    sleep 0.5
done
nbdinfo "$uri"
for pid in $server $(pidof nbd-worker) $(pidof nbd-standby || true); do
    awk -v score="$(cat /proc/$pid/oom_score_adj)" '
        /^Vm(Lck|RSS|Swap|Exe)/ { kib[$1] = $2 }
        END {
            print "locked of a process:", kib["VmLck:"], "KiB, resident", kib["VmRSS:"], "KiB, OOM score", score
            exit !(kib["VmLck:"] >= kib["VmExe:"] && score == -1000)
        }' /proc/$pid/status
done
dd if=/dev/urandom of=/tmp/there bs=1M count=32 2> /dev/null
truncate -s 64M /tmp/there
nbdcopy /tmp/there "$uri"
nbdcopy "$uri" /tmp/back
cmp /tmp/there /tmp/back
kill -TERM $server
wait $server
echo "64 MiB there and back over vsock"
