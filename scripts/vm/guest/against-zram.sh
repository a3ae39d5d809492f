#!/bin/sh
# In the guest: the same hog once on zram with lz4 and once on ghostswap with lz4, the store inside
# the guest's memory in both. Arguments: HOG_MIB, THP, SECONDS
set -eu
echo "$2" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $2, hog $1 MiB"
modprobe zram
echo lz4 > /sys/block/zram0/comp_algorithm
echo 4G > /sys/block/zram0/disksize
mkswap /dev/zram0 > /dev/null
swapon --discard=pages /dev/zram0
echo "zram:      $(ghostswap-hog --mib "$1" --threads 2 --seconds "$3" --thp "$2" | tail -n 1)"
swapoff /dev/zram0
echo 1 > /sys/block/zram0/reset
dev=$(ghostswap-ublk add --size 4G --tier ram,limit=65%,codec=lz4)
mkswap "$dev" > /dev/null
swapon --discard=pages "$dev"
echo "ghostswap: $(ghostswap-hog --mib "$1" --threads 2 --seconds "$3" --thp "$2" | tail -n 1)"
ghostswap-ublk status --json | grep -oE "writes_(parked|refused).:[0-9]+" | tr "\n" " "; echo
swapoff "$dev"
