#!/bin/sh
# In the guest: a 16T ghost device as swap, a verifying hog, what was stored where.
# Status 1 if a page was wrong, a write failed, a process was OOM-killed or pages are left behind.
# Arguments: AREA (windows | whole | a size for the swap area, by its header), HOG_MIB, THP (always | never),
#            TIER (of --tier), SECONDS of touching, THREADS
set -eu
area=$1 hog=$2 thp=$3 tier=$4 seconds=$5 threads=${6:-2}
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, tier $tier"
t0=$(cut -d' ' -f1 /proc/uptime)
dev=$(ghostswap-ublk add --size 16T --tier "$tier")
t1=$(cut -d' ' -f1 /proc/uptime)
echo "live after $(echo "$t0 $t1" | awk '{printf "%.2f", $2-$1}') s: $dev"
sleep 2 # until those that stand by do
# Of all its processes, what is shared counted once.
held=$(cat $(grep -lE '^Name:.(ghostswap-ublk|gs-worker|gs-agent)' /proc/[0-9]*/status | sed 's/status$/smaps_rollup/') |
    awk '/^Pss:/ {n += $2} END {print n}')
reserve=$(ghostswap-ublk status --json | sed 's/.*"reserve_bytes":\([0-9]*\).*/\1/')
own=$((held - reserve / 1024))
echo "idle daemon: $held KiB resident in all its processes, $own KiB beside the reserve"
if [ "$area" = windows ]; then
    ghostswap-ublk swapon 0
elif [ "$area" = whole ]; then
    mkswap "$dev" > /dev/null
else
    # A header for a smaller area: made on a sparse file of that size, then copied.
    truncate -s "$area" /tmp/header
    chmod 600 /tmp/header
    mkswap /tmp/header > /dev/null
    dd if=/tmp/header of="$dev" bs=4096 count=1 conv=notrunc 2> /dev/null
    rm /tmp/header
fi
[ "$area" = windows ] || swapon --discard=pages "$dev"
worker=$(ghostswap-ublk status --json | grep -oE '"pid":[0-9]+' | cut -d: -f2)
# Page faults of the I/O threads, minor and major (fields 10 and 12 of stat).
faults() { cat /proc/$worker/task/*/stat | awk '/\(gs-queue/ {minor += $10; major += $12} END {print minor + 0, major + 0}'; }
before=$(faults)
rc=0
[ $own -le 10240 ] || { echo "the idle daemon holds more than 10 MiB beside its reserve"; rc=1; }
: > /tmp/hog.out
ghostswap-hog --mib "$hog" --threads "$threads" --seconds "$seconds" --thp "$thp" --hold > /tmp/hog.out 2>&1 &
hogpid=$!
# The hog holds its memory until it is told to go, so that what is shown is shown under load.
while kill -0 $hogpid 2> /dev/null && ! grep -q touches/s /tmp/hog.out; do sleep 0.2; done
cat /tmp/hog.out
echo "--- free -m"; free -m
echo "--- /proc/swaps"; cat /proc/swaps
echo "--- status"; ghostswap-ublk status
after=$(faults)
echo "page faults of the I/O threads, minor and major: $before before, $after after"
# None of these may wait for a disk. Minor ones are told, not judged: two were seen on 6.12 without THP.
[ "${before#* }" = "${after#* }" ] || { echo "an I/O thread had a major page fault"; rc=1; }
kill $hogpid 2> /dev/null || rc=1
wait $hogpid 2> /dev/null || [ $? -eq 143 ] || rc=1
grep -q ' 0 errors$' /tmp/hog.out || rc=1
sleep 3
if [ "$area" = windows ]; then
    ghostswap-ublk swapoff 0
else
    swapoff "$dev"
    blkdiscard --force "$dev"
fi
sleep 4
echo "--- status after everything was discarded"; ghostswap-ublk status
ghostswap-ublk status --json > /tmp/status
grep -q '"stored_pages":0' /tmp/status || { echo "pages are still stored"; rc=1; }
ghostswap-ublk del 0
if dmesg | grep -E 'Write-error|I/O error|Out of memory|page allocation stall|blocked for more'; then rc=1; fi
exit $rc
