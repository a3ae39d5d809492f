#!/bin/sh
# In the guest: the slot-free feed at its limits. A swap file on a file system on the device, whose
# slots are not the device's pages, must not be heard; a ring that overflows while the worker is
# stopped costs memory and no page, and is told; without BTF the device lives on discards and says
# why, and a feed that was asked for by name is refused. Status 1 if any of that is not so.
# Argument: HOG_MIB
set -eu
hog=$1 rc=0
echo never > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), hog $hog MiB"
look() { ghostswap-ublk status --json > /tmp/status 2> /dev/null && read -r status < /tmp/status; }
number() { value=${status#*\"$1\":}; value=${value%%[,\}]*}; }
wrong() { echo "$1"; rc=1; }
ghostswap-ublk doctor 2> /dev/null | grep slot-free || wrong "doctor does not tell of the feed"

dev=$(ghostswap-ublk add --size 1G --tier ram,limit=65%,codec=lz4 --slot-free bpf)
modprobe ext4
mkfs.ext4 -q "$dev"
mount "$dev" /mnt
fallocate -l 600M /mnt/swap
chmod 600 /mnt/swap
mkswap /mnt/swap > /dev/null
swapon /mnt/swap
ghostswap-hog --mib "$hog" --touches 2000 --thp never --churn 32 > /tmp/hog.out 2>&1 || wrong "the hog failed"
tail -n 1 /tmp/hog.out
swapoff /mnt/swap
look
number events
[ "$value" = 0 ] || wrong "$value ranges of a swap file were taken for the device's"
umount /mnt
fsck.ext4 -fn "$dev" > /tmp/fsck 2>&1 || { cat /tmp/fsck; wrong "the file system is damaged"; }
ghostswap-ublk del 0

dev=$(ghostswap-ublk add --size 600M --tier ram,limit=65%,codec=lz4 --watchdog 30)
mkswap "$dev" > /dev/null
swapon "$dev"
: > /tmp/hog.out
ghostswap-hog --mib "$hog" --touches 8000 --thp never --churn 2 --hold > /tmp/hog.out 2>&1 &
hogpid=$!
while kill -0 $hogpid 2> /dev/null && ! grep -q errors /tmp/hog.out; do sleep 0.2; done
tail -n 1 /tmp/hog.out
look
number pid
kill -STOP "$value"
kill $hogpid
sleep 3
kill -CONT "$value"
sleep 3
look
number lost
lost=$value
ghostswap-ublk status | grep slot-free
if [ "$lost" = 0 ]; then
    echo "nothing was lost: this kernel frees longer ranges"
else
    sleep 10
    [ "$(grep -c 'found the ring full' /run/ghostswap/ublk0.log)" = 1 ] || wrong "the loss is not told once"
fi
ghostswap-hog --mib "$hog" --touches 1000 --thp never --churn 8 --check-all > /tmp/hog.out 2>&1 || wrong "a page was wrong"
tail -n 1 /tmp/hog.out
swapoff "$dev"
ghostswap-ublk del 0

mount --bind /dev/null /sys/kernel/btf/vmlinux
if ghostswap-ublk add --size 1G --slot-free bpf 2> /tmp/said; then wrong "a feed that cannot be was not refused"; fi
cat /tmp/said
[ "$(wc -l < /tmp/said)" = 1 ] || wrong "more or less than a line"
dev=$(ghostswap-ublk add --size 1G --tier ram,limit=65%,codec=lz4 --swapon)
ghostswap-ublk status | grep slot-free
look
case $status in *'"mode":"discard"'*) ;; *) wrong "not on discards" ;; esac
umount /sys/kernel/btf/vmlinux
ghostswap-ublk swapoff 0
ghostswap-ublk del 0
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|page allocation stall|blocked for more|BUG|WARNING'; then rc=1; fi
exit $rc
