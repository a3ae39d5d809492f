#!/bin/sh
# In the guest: how long a shell that does nothing but `sleep 0.1` stands still beside a hog that swaps.
# Arguments: HOG_MIB, THP (always | never), SECONDS, DEVICE (zram | ghost)
set -eu
hog=$1 thp=$2 seconds=$3 device=$4
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, $device"
case $device in
    zram)
        modprobe zram
        echo lz4 > /sys/block/zram0/comp_algorithm
        echo 8G > /sys/block/zram0/disksize
        dev=/dev/zram0
        ;;
    ghost) dev=$(ghostswap-ublk add --size 8G --tier ram,limit=65%,codec=lz4) ;;
    *) echo "zram or ghost, not $device"; exit 2 ;;
esac
mkswap "$dev" > /dev/null
swapon --discard=pages "$dev"
ghostswap-hog --mib "$hog" --threads 2 --seconds "$seconds" --thp "$thp" > /tmp/hog.out 2>&1 &
hogpid=$!
# In hundredths of a second.
now() { read -r now rest < /proc/uptime; now=${now%.*}${now#*.}; }
: > /tmp/gaps
now
last=$now
while kill -0 $hogpid 2> /dev/null; do
    sleep 0.1
    now
    echo $(((now - last) * 10)) >> /tmp/gaps
    last=$now
done
wait $hogpid
tail -n 1 /tmp/hog.out
sort -n /tmp/gaps | awk '$1 > 1000 {long++} {gap[NR] = $1} END {
    printf "of %d: median %d ms, p99 %d ms, longest %d ms; %d over 1 s\n",
        NR, gap[int((NR + 1) / 2)], gap[int(NR * 0.99)], gap[NR], long}'
