#!/bin/sh
# In the guest: a hog far beyond what memory and store together can hold, a tier that is too small
# for it. The hog is to fall, by the OOM killer; a bystander, the daemon and this shell live on, and
# swapoff works. Status 1 if not so. Arguments: HOG_MIB, THP (always | never), TIER, SECONDS (at most)
set -eu
hog=$1 thp=$2 tier=$3 limit=$4
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, tier $tier"
dev=$(ghostswap-ublk add --size 64G --tier "$tier")
mkswap "$dev" > /dev/null
swapon --discard=pages "$dev"
seconds() { cut -d. -f1 /proc/uptime; }
# Ticks every 0.1 s as long as it lives; the longest gap is how long a bystander stood still.
ghostswap-hog --mib 8 --threads 1 --seconds 100000 > /tmp/bystander.out 2>&1 &
bystander=$!
began=$(seconds)
ghostswap-hog --mib "$hog" --threads 2 --seconds 30 --thp "$thp" > /tmp/hog.out 2>&1 &
hogpid=$!
worst=0 last=$(seconds) rc=0
while kill -0 $hogpid 2> /dev/null; do
    sleep 0.1
    now=$(seconds)
    [ $((now - last)) -le $worst ] || worst=$((now - last))
    last=$now
    [ $((now - began)) -lt "$limit" ] || { echo "the hog still lives after $limit s"; rc=1; kill -9 $hogpid; break; }
done
took=$(($(seconds) - began))
died=0
wait $hogpid || died=$?
echo "the hog ended with $died after $took s; this shell stood still for $worst s at most"
[ $died = 137 ] || { echo "not by the OOM killer:"; cat /tmp/hog.out; rc=1; }
kill -0 $bystander 2> /dev/null || { echo "a bystander died:"; cat /tmp/bystander.out; rc=1; }
kill -USR1 $bystander && wait $bystander || rc=1
tail -n 1 /tmp/bystander.out
grep -q ' 0 errors$' /tmp/bystander.out || rc=1
ghostswap-ublk status
ghostswap-ublk status --json | grep -oE '"(oom_victims|writes_parked|writes_refused|taken_over)":[0-9]+' | tr '\n' ' '; echo
began=$(seconds)
swapoff "$dev" || rc=1
echo "swapoff took $(($(seconds) - began)) s"
ghostswap-ublk del 0 || rc=1
dmesg | grep -cE 'Write-error' | sed 's/$/ write errors in the log/' || true
dmesg | grep -E 'Killed process' || true
[ "$(dmesg | grep -c 'Killed process')" -le 1 ] || { echo "more than one victim"; rc=1; }
if dmesg | grep -E 'Read-error|blocked for more'; then rc=1; fi
exit $rc
