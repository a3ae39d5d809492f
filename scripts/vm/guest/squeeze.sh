#!/bin/sh
# In the guest: hard swapping for a while, with other processes that take memory and give it back
# all the time, so that there is never any to spare. Status 1 if anything was wrong, failed or was
# killed. Prints how long a bystander stood still at worst. Arguments: HOG_MIB, THP, SECONDS
set -eu
hog=$1 thp=$2 seconds=$3
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB and others, $seconds s"
dev=$(ghostswap-ublk add --size 64G --tier ram,limit=65%,codec=zstd:1)
mkswap "$dev" > /dev/null
swapon --discard=pages "$dev"
now() { cut -d. -f1 /proc/uptime; }
ghostswap-hog --mib "$hog" --threads 2 --seconds "$seconds" --thp "$thp" > /tmp/hog.out 2>&1 &
hogpid=$!
(while kill -0 $hogpid 2> /dev/null; do
    ghostswap-hog --mib 300 --threads 1 --seconds 5 --thp "$thp" > /tmp/other.out 2>&1 || echo "another: $(cat /tmp/other.out)" >> /tmp/failed
done) &
worst=0 last=$(now) rc=0
while kill -0 $hogpid 2> /dev/null; do
    sleep 1
    at=$(now)
    [ $((at - last - 1)) -le $worst ] || worst=$((at - last - 1))
    last=$at
done
wait $hogpid || rc=1
cat /tmp/hog.out
echo "a bystander stood still for $worst s at most"
[ ! -s /tmp/failed ] || { cat /tmp/failed; rc=1; }
grep -q ' 0 errors$' /tmp/hog.out || rc=1
wait
ghostswap-ublk status
swapoff "$dev"
ghostswap-ublk del 0
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|page allocation stall|blocked for more'; then rc=1; fi
exit $rc
