#!/bin/sh
# In the guest: the same hog swapping to the same disk, /dev/vda, in three ways: to the disk itself; through
# zswap with lz4 in front of it, its pool as large as POOL_MIB (where the kernel has zswap); to ghostswap with as
# much memory and the disk below it. For each: touches, and MiB that went to and came from the disk.
# Arguments: HOG_MIB, THP (always | never), SECONDS, POOL_MIB
set -eu
hog=$1 thp=$2 seconds=$3 pool=$4
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
total=$(awk '/^MemTotal:/ {print int($2 / 1024)}' /proc/meminfo)
echo "kernel $(uname -r), THP $thp, hog $hog MiB in $total MiB, $pool MiB for compressed pages"
rc=0
# Sectors read and written.
traffic() { awk '{print $3, $7}' /sys/block/vda/stat; }
run() {
    name=$1 before=$(traffic)
    ghostswap-hog --mib "$hog" --threads 2 --seconds "$seconds" --thp "$thp" > /tmp/hog.out 2>&1 || rc=1
    grep -q ' 0 errors$' /tmp/hog.out || rc=1
    echo "$name: $(tail -n 1 /tmp/hog.out); $(echo "$before $(traffic)" | awk '{print int(($4 - $2) / 2048), "MiB written,", int(($3 - $1) / 2048), "read"}')"
}
zswap=/sys/module/zswap/parameters
mkswap /dev/vda > /dev/null
swapon /dev/vda
[ ! -d $zswap ] || echo N > $zswap/enabled
run "disk     "
if [ -d $zswap ]; then
    echo lz4 > $zswap/compressor
    echo $((pool * 100 / total)) > $zswap/max_pool_percent
    echo Y > $zswap/enabled
    run "zswap    "
    echo N > $zswap/enabled
fi
swapoff /dev/vda
dd if=/dev/zero of=/dev/vda bs=1M count=1 2> /dev/null
dev=$(ghostswap-ublk add --size 16T --tier "ram,limit=${pool}M,codec=lz4" --tier block:/dev/vda --swapon)
run "ghostswap"
ghostswap-ublk tier list 0
ghostswap-ublk status --json | grep -oE '"writes_(parked|refused)":[0-9]+' | tr '\n' ' '; echo
ghostswap-ublk swapoff 0
ghostswap-ublk del 0
if dmesg | grep -E 'Write-error|Read-error|Out of memory'; then rc=1; fi
exit $rc
