#!/bin/sh
# In the guest: a hog far beyond what memory and store together can hold, swapped to by windows. To the
# kernel a full store is to be full swap: the hog falls to the OOM killer, by the kernel's own judgement,
# and nothing else does; no write fails on the way; a bystander, the daemon and this shell live on, and
# swapoff works. Status 1 if not so. Arguments: HOG_MIB, THP (always | never), TIER, SECONDS (at most)
set -eu
hog=$1 thp=$2 tier=$3 limit=$4
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, tier $tier"
dev=$(ghostswap-ublk add --size 16T --tier "$tier" --swapon)
seconds() { cut -d. -f1 /proc/uptime; }
# Looks at pages all the time; at the end it says whether one was wrong.
ghostswap-hog --mib 8 --threads 1 --seconds 100000 > /tmp/bystander.out 2>&1 &
bystander=$!
began=$(seconds)
ghostswap-hog --mib "$hog" --threads 2 --seconds 30 --thp "$thp" > /tmp/hog.out 2>&1 &
hogpid=$!
worst=0 last=$(seconds) rc=0 full=''
while kill -0 $hogpid 2> /dev/null; do
    sleep 0.1
    now=$(seconds)
    [ $((now - last)) -le $worst ] || worst=$((now - last))
    last=$now
    # Since when there is no free swap: the OOM killer's turn.
    left=$(awk '/^SwapFree:/ {print $2}' /proc/meminfo)
    if [ "$left" -lt 4096 ]; then full=${full:-$now}; else full=''; fi
    [ -z "${TELL:-}" ] || [ $((now % 5)) != 0 ] || echo "$now: free swap $left; $(ghostswap-ublk status --json | grep -oE '"(writes_refused|writes_parked|held_bytes|limit_bytes|live_bytes|area_bytes|used_bytes|room_bytes_estimated)":[0-9]+' | tr '\n' ' ')"
    [ $((now - began)) -lt "$limit" ] || { echo "the hog still lives after $limit s"; rc=1; kill -9 $hogpid; break; }
done
took=$(($(seconds) - began))
died=0
wait $hogpid || died=$?
echo "the hog ended with $died after $took s, $(($(seconds) - ${full:-$(seconds)})) s after swap was full; this shell stood still for $worst s at most"
[ $died = 137 ] || { echo "not by the OOM killer:"; cat /tmp/hog.out; rc=1; }
kill -0 $bystander 2> /dev/null || { echo "a bystander died:"; cat /tmp/bystander.out; rc=1; }
kill -USR1 $bystander && wait $bystander || rc=1
tail -n 1 /tmp/bystander.out
grep -q ' 0 errors$' /tmp/bystander.out || rc=1
ghostswap-ublk status
cat /run/ghostswap/ublk0.log
ghostswap-ublk status --json | grep -oE '"(oom_victims|writes_parked|writes_refused|taken_over)":[0-9]+' | tr '\n' ' '; echo
ghostswap-ublk status --json | grep -qE '"writes_refused":0[,}]' || { echo "writes were refused"; rc=1; }
began=$(seconds)
ghostswap-ublk swapoff 0 || rc=1
echo "swapoff took $(($(seconds) - began)) s"
ghostswap-ublk del 0 || rc=1
dmesg | grep -E 'Killed process' || true
[ "$(dmesg | grep -c 'Killed process')" = 1 ] || { echo "not one victim"; rc=1; }
if dmesg | grep -E 'Write-error|Read-error|blocked for more'; then rc=1; fi
exit $rc
