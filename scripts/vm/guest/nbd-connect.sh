#!/bin/sh
# In the guest: the kernel's own nbd module and `ghostswap-nbd connect` over the guest's network (run --net), the
# export as swap, a verifying hog. What watches the connections is told to end, which it refuses; it is killed, and
# what stands by follows it; both are killed, and started again. Then swapoff, disconnect. Whoever runs this may kill
# the server's worker meanwhile.
# First of all the network may be cut: what is sent is lost without a word, and no connection is told.
# Status 1 if a page was wrong, a request failed, a process was OOM-killed or the device stays in use.
# Arguments: EXPORT, CONNECTIONS, HOG_MIB, THP (always | never), SECONDS of touching, THREADS, [SECONDS of the cut]
set -eu
export=$1 connections=$2 hog=$3 thp=$4 seconds=$5 threads=${6:-2} cut=${7:-0}
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
swapped() { awk '/nbd0/ {n = $4} END {print n + 0}' /proc/swaps; }
more_than_64_mib_swapped() { [ "$(swapped)" -gt 65536 ]; }
is_swap() { grep -q nbd0 /proc/swaps; }
is_free() { [ ! -e /sys/block/nbd0/pid ]; }
timeout=''
# Short, as it is what the hog waits for when a connection dies.
[ "$connections" = 1 ] || timeout='--timeout 5'
connect() { # CONNECTIONS OPTIONS...; in a shell of its own, which it becomes
    n=$1; shift
    # shellcheck disable=SC2086
    exec ghostswap-nbd connect --tcp 10.0.2.9:10809 --export "$export" --connections "$n" $timeout "$@" /dev/nbd0
}
start() {
    connect "$connections" "$@" >> /tmp/connect.out 2>&1 &
    watcher=$!
}
said() { grep -q "$1" /tmp/connect.out; }
none_is_left() { [ -z "$(pidof ghostswap-nbd)" ]; }
two_run() { [ "$(pidof ghostswap-nbd | wc -w)" = 2 ]; }

echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, export $export on $connections connections"
modprobe nbd max_part=0
start --swapon
wait_for 30 "standby" said 'stands by'
wait_for 30 "swap" is_swap
wait_for 30 "word of it" said 'is connected'
echo "connected: $(cat /sys/block/nbd0/size) sectors, backend '$(cat /sys/block/nbd0/backend)'," \
    "request time-out $(cat /sys/block/nbd0/queue/io_timeout) ms"
grep VmRSS /proc/$watcher/status
[ "$(cat /proc/$watcher/oom_score_adj)" = -1000 ] || fail "it is not protected from the OOM killer"
if ghostswap-nbd disconnect /dev/nbd0; then fail "swap in use was disconnected"; fi
kill -TERM $watcher
: > /tmp/hog.out
ghostswap-hog --mib "$hog" --threads "$threads" --seconds "$seconds" --thp "$thp" --hold > /tmp/hog.out 2>&1 &
hogpid=$!
wait_for 120 "swapping" more_than_64_mib_swapped
kill -0 $watcher || fail "it left a swap device in use"
if [ "$cut" != 0 ]; then
    echo "--- the network is cut for $cut s, $(swapped) KiB swapped" | tee -a /tmp/connect.out
    requests() { awk '{print $1 + $5}' /sys/block/nbd0/stat; }
    # To the loopback, which drops what is for others.
    ip route add 10.0.2.9/32 dev lo
    sleep 1
    before=$(requests)
    sleep $((cut - 1))
    now=$(requests)
    ip route del 10.0.2.9/32 dev lo
    began=$(cut -d. -f1 /proc/uptime)
    goes_on() { [ "$(requests)" -gt $((now + 100)) ]; }
    wait_for 60 "traffic after the cut" goes_on
    echo "$((now - before)) requests were answered meanwhile; it went on within" \
        "$(($(cut -d. -f1 /proc/uptime) - began + 1)) s" | tee -a /tmp/connect.out
fi
echo "--- it is killed, $(swapped) KiB swapped" | tee -a /tmp/connect.out
kill -9 $watcher
wait $watcher 2> /dev/null || true
if (connect 3) > /tmp/second.out 2>&1; then fail "taken over with other connections"; fi
cat /tmp/second.out
# The one that stood by follows, and has another stand by as soon as all connections are there.
while kill -0 $hogpid 2> /dev/null && ! grep -q touches/s /tmp/hog.out; do sleep 0.2; done
cat /tmp/hog.out
wait_for 30 "another that stands by" two_run
echo "--- both are killed, $(swapped) KiB swapped" >> /tmp/connect.out
# shellcheck disable=SC2046
kill -9 $(pidof ghostswap-nbd)
wait $watcher 2> /dev/null || true
start --swapon
wait_for 30 "two of them" two_run
grep VmRSS /proc/$watcher/status
echo "--- /proc/swaps"; cat /proc/swaps
more_than_64_mib_swapped || fail "hardly anything was swapped out"
kill $hogpid 2> /dev/null || rc=1
wait $hogpid 2> /dev/null || [ $? -eq 143 ] || rc=1
grep -q ' 0 errors$' /tmp/hog.out || fail "the hog"
swapoff /dev/nbd0
blkdiscard --force /dev/nbd0
ghostswap-nbd disconnect /dev/nbd0 || fail "no disconnect"
wait $watcher || fail "it ended with $?"
wait_for 5 "disconnection" is_free
wait_for 5 "end of all" none_is_left
echo "--- it said:"; cat /tmp/connect.out
for what in 'Receive control failed' 'reconnected socket' 'timed out, retrying' 'Possible stuck request' 'Dead connection'; do
    echo "kernel: $(dmesg | grep -c "$what" || true) of '$what'"
done
if dmesg | grep -E 'Write-error|I/O error|Out of memory|page allocation stall|blocked for more|WARNING:|BUG:'; then rc=1; fi
exit $rc
