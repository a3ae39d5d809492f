#!/bin/sh
# In the guest: the same pages written once to zram with lz4 and once to ghostswap with lz4, which are then
# compressed again in groups of 64K by zstd:3. For each: how much memory it took of the guest, by the guest's own
# count (MemFree) and by the store's, and what the CPUs spent on a page, all processes and the kernel together.
# Arguments: IMAGE (copied in), COPIES of it
set -eu
image=$1 copies=$2
bytes=$(($(stat -c %s "$image") * copies))
pages=$((bytes / 4096))
free() { awk '/^MemFree/ {print $2 * 1024}' /proc/meminfo; }
# Microseconds that the CPUs were at work.
# (Times in /proc/stat are in hundredths of a second everywhere.)
work() { awk '/^cpu / {printf "%d", ($2 + $3 + $4 + $7 + $8) * 10000}' /proc/stat; }
fill() {
    n=0
    while [ $n -lt "$copies" ]; do
        dd if="$image" of="$1" bs=128K seek=$((n * $(stat -c %s "$image") / 131072)) conv=notrunc oflag=direct 2> /dev/null
        n=$((n + 1))
    done
}
# Name, what the store says it takes.
tell() {
    now=$(free)
    awk -v name="$1" -v bytes="$bytes" -v own="$2" -v taken=$((before - now)) -v pages="$pages" -v us=$(($(work) - began)) 'BEGIN {
        printf "%-24s %d MiB in %.1f MiB of memory: %.2f to 1; by its own count %.1f MiB: %.2f to 1; %.1f us of CPU a page\n",
            name, bytes / 1048576, taken / 1048576, bytes / taken, own / 1048576, bytes / own, us / pages }'
}
echo "kernel $(uname -r), $pages pages"
modprobe zram
sync; echo 3 > /proc/sys/vm/drop_caches
before=$(free)
echo lz4 > /sys/block/zram0/comp_algorithm
echo $bytes > /sys/block/zram0/disksize
began=$(work)
fill /dev/zram0
tell "zram, lz4" "$(awk '{print $3}' /sys/block/zram0/mm_stat)"
echo 1 > /sys/block/zram0/reset
sleep 2
sync; echo 3 > /proc/sys/vm/drop_caches
before=$(free)
dev=$(ghostswap-ublk add --size $bytes --tier ram,limit=60%,codec=lz4 --tier ram,codec=zstd:3,group=64K,idle=24h)
began=$(work)
fill "$dev"
number() { ghostswap-ublk status --json | grep -oE "\"$1\":[0-9]+" | head -n 1 | cut -d: -f2; }
# The reserve goes back when writing has stopped.
sleep 20
tell "ghostswap, lz4" "$(number held_bytes)"
ghostswap-ublk recompress 0 > /dev/null
while sleep 2; now=$(number recompressed_segments); [ "$now" != "${last:-}" ]; do last=$now; done
sleep 20
tell "and compressed again" "$(number held_bytes)"
ghostswap-ublk status | sed -n '/^pages/,/^metadata/p'
# All of it is as it was written.
n=0
while [ $n -lt "$copies" ]; do
    dd if="$dev" bs=128K skip=$((n * $(stat -c %s "$image") / 131072)) count=$(($(stat -c %s "$image") / 131072)) iflag=direct 2> /dev/null | cmp - "$image"
    n=$((n + 1))
done
ghostswap-ublk del 0
