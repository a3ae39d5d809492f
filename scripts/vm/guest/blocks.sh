#!/bin/sh
# In the guest: the ghost device as a plain block device. fio fills and verifies, ext4 holds a tree,
# and a discard of everything brings pages and memory back to the idle level. `doctor` passes here.
set -eu
dev=$(ghostswap-ublk add --size 16T --tier ram,limit=50%)
# Root with the driver loaded: warnings, but nothing failed, and the live device is looked at.
ghostswap-ublk doctor > doctor.txt || { cat doctor.txt; exit 1; }
cat doctor.txt
grep -q '^ok    scheduler: none on ublkb0' doctor.txt
held() { ghostswap-ublk status --json | tr ',' '\n' | grep -m 1 '"held_bytes"' | tr -dc 0-9; }
idle=$(held)
fio --name=verify --filename="$dev" --rw=randwrite --bs=4k-512k --size=96M --offset=3T --direct=1 \
    --ioengine=libaio --iodepth=16 --verify=crc32c --do_verify=1 --buffer_compress_percentage=60 \
    --thread --output-format=terse > /dev/null
echo "fio: filled and verified"
mkfs.ext4 -q -E nodiscard "$dev" 4G
mount "$dev" /mnt
mkdir /mnt/tree
cp -a /bin /lib /mnt/tree/ 2> /dev/null || cp -a /bin /mnt/tree/
umount /mnt
fsck.ext4 -fn "$dev" > /dev/null
mount -o ro "$dev" /mnt
for f in $(cd /mnt/tree && find . -type f); do cmp "/mnt/tree/$f" "/$f"; done
umount /mnt
echo "ext4: clean, and the tree is the same"
blkdiscard "$dev"
ghostswap-ublk status --json | grep -q '"stored_pages":0'
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    now=$(held)
    [ "$now" -gt $((idle + 12582912)) ] || break
    sleep 1
done
echo "held: idle $idle, after discard $now"
[ "$now" -le $((idle + 12582912)) ]
# What a user gets wrong, with the driver there.
for bad in "add --size 0" "add --size 17T" "add --size 4097" "add --tier disk" "add --id 0" "del 7"; do
    rc=0
    message=$(ghostswap-ublk $bad 2>&1) || rc=$?
    echo "$bad: $rc $message"
    [ $rc -ne 0 ]
    case "$bad" in add\ --id*|del*) [ $rc -eq 1 ] ;; *) [ $rc -eq 2 ] ;; esac
done
ghostswap-ublk del 0
if ghostswap-ublk del 0; then exit 1; fi
# Without the driver that is what fails, with its remedy.
# (The driver lets go of a deleted device a little later.)
for i in 1 2 3 4 5 6 7 8 9 10; do rmmod ublk_drv 2> /dev/null && break || sleep 1; done
rc=0
ghostswap-ublk doctor > doctor.txt || rc=$?
grep '^fail' doctor.txt
[ $rc -eq 1 ]
[ "$(grep '^fail' doctor.txt | grep -c 'ublk driver.*modprobe ublk_drv')" -eq 1 ]
