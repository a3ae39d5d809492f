#!/bin/sh
# In the guest: the kernel's own nbd module and Debian's nbd-client over the guest's network
# (run --net), the export as swap, a verifying hog, swapoff, disconnect.
# Status 1 if a page was wrong, a request failed, a process was OOM-killed or the device stays in use.
# Arguments: EXPORT, CONNECTIONS, HOG_MIB, THP (always | never), SECONDS of touching, THREADS
set -eu
export=$1 connections=$2 hog=$3 thp=$4 seconds=$5 threads=${6:-2}
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, export $export on $connections connections"
# That there is no other way out is part of what is tried.
for other in "10.0.2.2 10809" "10.0.2.9 10810" "10.0.2.3 53"; do
    # shellcheck disable=SC2086
    if nc -w 2 $other < /dev/null > /dev/null 2>&1; then echo "the guest reaches $other"; exit 1; fi
done
modprobe nbd max_part=0
nbd-client -N "$export" 10.0.2.9 10809 /dev/nbd0 -b 4096 -swap -C "$connections"
sockets=$(netstat -tn 2> /dev/null | grep -c '10.0.2.9:10809 *ESTABLISHED' || true)
echo "connected: $(cat /sys/block/nbd0/size) sectors, $sockets connections," \
    "discard $(cat /sys/block/nbd0/queue/discard_max_bytes), zeroes $(cat /sys/block/nbd0/queue/write_zeroes_max_bytes)"
rc=0
[ "$sockets" = "$connections" ] || { echo "$sockets connections instead of $connections"; rc=1; }
mkswap /dev/nbd0
swapon --discard=pages /dev/nbd0
cat /proc/swaps
: > /tmp/hog.out
ghostswap-hog --mib "$hog" --threads "$threads" --seconds "$seconds" --thp "$thp" --hold > /tmp/hog.out 2>&1 &
hogpid=$!
while kill -0 $hogpid 2> /dev/null && ! grep -q touches/s /tmp/hog.out; do sleep 0.2; done
cat /tmp/hog.out
echo "--- free -m"; free -m
echo "--- /proc/swaps"; cat /proc/swaps
used=$(awk '/nbd0/ {print $4}' /proc/swaps)
[ "$used" -gt 65536 ] || { echo "hardly anything was swapped out: $used KiB"; rc=1; }
kill $hogpid 2> /dev/null || rc=1
wait $hogpid 2> /dev/null || [ $? -eq 143 ] || rc=1
grep -q ' 0 errors$' /tmp/hog.out || rc=1
swapoff /dev/nbd0
blkdiscard --force /dev/nbd0
nbd-client -d /dev/nbd0
for _ in 1 2 3 4 5 6 7 8 9 10; do [ -e /sys/block/nbd0/pid ] || break; sleep 0.5; done
[ ! -e /sys/block/nbd0/pid ] || { echo "nbd0 is still connected"; rc=1; }
if dmesg | grep -E 'Write-error|I/O error|Out of memory|page allocation stall|blocked for more|nbd0: (Connection timed out|Receive control failed|Possible stuck request)'; then rc=1; fi
exit $rc
