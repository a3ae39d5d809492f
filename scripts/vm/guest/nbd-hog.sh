#!/bin/sh
# In the guest: swap over NBD to 10.0.2.9 (run --net) by `ghostswap-nbd connect`, and a verifying hog that checks every
# page at its end. What the server keeps its pages on may stand still meanwhile: how long nothing was read is told.
# Status 1 if a page was wrong, a request failed, a process was OOM-killed or the device stays in use.
# Arguments: EXPORT, HOG_MIB, THP (always | never), SECONDS of touching, THREADS
set -eu
export=$1 hog=$2 thp=$3 seconds=$4 threads=$5
rc=0
fail() { echo "FAILED: $*"; rc=1; }
wait_for() { # SECONDS WHAT COMMAND...
    left=$(($1 * 5)) what=$2; shift 2
    until "$@"; do
        left=$((left - 1))
        [ $left -gt 0 ] || { fail "no $what in time"; return; }
        sleep 0.2
    done
}
is_swap() { grep -q nbd0 /proc/swaps; }
is_free() { [ ! -e /sys/block/nbd0/pid ]; }
reads() { awk '{print $1}' /sys/block/nbd0/stat; }
now() { cut -d. -f1 /proc/uptime; }

echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, export $export"
modprobe nbd max_part=0
ghostswap-nbd connect --tcp 10.0.2.9:10809 --export "$export" --swapon /dev/nbd0 > /tmp/connect.out 2>&1 &
watcher=$!
wait_for 30 swap is_swap
: > /tmp/hog.out
ghostswap-hog --mib "$hog" --threads "$threads" --seconds "$seconds" --thp "$thp" --check-all --hold > /tmp/hog.out 2>&1 &
hogpid=$!
told='' last=0 since=$(now) longest=0
while kill -0 $hogpid 2> /dev/null && ! grep -q touches/s /tmp/hog.out; do
    sleep 1
    if [ -z "$told" ]; then
        since=$(now)
        grep filled /tmp/hog.out || continue
        told=1
    fi
    read=$(reads)
    if [ "$read" = "$last" ]; then
        [ $(($(now) - since)) -le "$longest" ] || longest=$(($(now) - since))
    else
        last=$read since=$(now)
    fi
done
grep -v filled /tmp/hog.out || fail "the hog told nothing"
echo "longest time in which nothing was read: $longest s"
echo "--- /proc/swaps"; cat /proc/swaps
used=$(awk '/nbd0/ {print $4}' /proc/swaps)
[ "$used" -gt 65536 ] || fail "hardly anything was swapped out: $used KiB"
sleep 3 # for whoever looks at what lies where
kill $hogpid 2> /dev/null || rc=1
wait $hogpid 2> /dev/null || [ $? -eq 143 ] || rc=1
grep -q ' 0 errors$' /tmp/hog.out || fail "the hog found wrong pages, or ended"
swapoff /dev/nbd0
blkdiscard --force /dev/nbd0
ghostswap-nbd disconnect /dev/nbd0 || fail "no disconnect"
wait $watcher || fail "connect ended with $?"
wait_for 5 disconnection is_free
[ $rc = 0 ] || cat /tmp/connect.out
if dmesg | grep -E 'Write-error|I/O error|Out of memory|page allocation stall|WARNING:|BUG:'; then rc=1; fi
exit $rc
