#!/bin/sh
# In the guest: the slot-free feed. First a hog that fills and exits: what it leaves dead in the store
# must be gone within 5 s. Then the race: several hogs that free and rewrite runs of pages all the time
# in a swap area so small that it is nearly full, so that the kernel uses freed slots again at once.
# Every page is checked. At the end the store must hold what the kernel's swap holds and no more.
# Status 1 if a page was wrong, an event was lost, dead pages stay, or the feed is not as asked for.
# Arguments: AREA_MIB (of swap), HOG_MIB (all hogs together), HOGS, THP (always | never),
#            MODE (bpf | kprobe | discard: dead pages are then only told), SECONDS of the race, [KILLS]
set -eu
area=$1 hog=$2 hogs=$3 thp=$4 mode=$5 seconds=$6 kills=${7:-0}
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, $hogs hogs, $hog MiB in all, an area of $area MiB, slot-free $mode"
dev=$(ghostswap-ublk add --size 16T --tier ram,limit=65%,codec=lz4 --slot-free "$mode")
# A partition that begins 3 GiB into the device: slot and page differ.
addpart "$dev" 1 $((3 << 21)) $((area << 11))
until [ -b "$dev"p1 ]; do sleep 0.1; done
whole=$dev dev=${dev}p1
mkswap "$dev" > /dev/null
[ "$mode" = discard ] && how=--discard=pages || how=
swapon $how "$dev"
rc=0
look() { ghostswap-ublk status --json > /tmp/status 2> /dev/null && read -r status < /tmp/status; }
number() { value=${status#*\"$1\":}; value=${value%%[,\}]*}; }
# Pages in the store that no slot of the kernel's stands for. The area's header is one; slots of zero
# pages have none.
dead() {
    look
    number stored_pages; stored=$value
    number filled_pages; stored=$((stored + value))
    number zero_pages; stored=$((stored + value))
    # Twice, as slots come and go: the store is looked at in between.
    while read -r name _ _ used _; do [ "$name" != "$dev" ] || used=$((used / 4)) ; [ "$name" != "$dev" ] || break; done < /proc/swaps
    dead=$((stored - used - 1))
}
look
case $status in *"\"slot_free\":{\"events\":"*"\"mode\":\"$mode\""*) ;; *) echo "not the feed that was asked for"; ghostswap-ublk status; exit 1 ;; esac

# --- a hog that fills and exits
: > /tmp/hog.out
ghostswap-hog --mib "$hog" --touches 0 --thp "$thp" --hold > /tmp/hog.out 2>&1 &
hogpid=$!
while kill -0 $hogpid 2> /dev/null && ! grep -q errors /tmp/hog.out; do sleep 0.2; done
dead
peak=$stored
kill $hogpid
wait $hogpid || true
t0=$(cut -d' ' -f1 /proc/uptime)
within=no
for i in $(seq 50); do
    dead
    now=$(cut -d' ' -f1 /proc/uptime)
    [ $((dead * 20)) -ge "$peak" ] || { within=$(echo "$t0 $now" | awk '{printf "%.1f s", $2 - $1}'); break; }
    sleep 0.1
done
echo "hog gone: $peak pages at the peak; dead under 5 % after: $within; $dead dead of $stored, $used in use"
[ "$mode" = discard ] || [ "$within" != no ] || { echo "dead pages stay"; rc=1; }

# --- the race
i=0 pids=''
while [ $i -lt "$hogs" ]; do
    i=$((i + 1))
    ghostswap-hog --mib $((hog / hogs)) --threads $((i % 2 + 1)) --seconds "$seconds" --thp "$thp" --seed $i \
        --churn 32 --check-all > /tmp/hog.$i 2>&1 &
    pids="$pids $!"
done
number pid
pid=$value
while [ "$kills" -gt 0 ]; do
    sleep 3
    kill -KILL "$pid"
    kills=$((kills - 1)) waited=0
    until look && number pid && [ "$value" != "$pid" ]; do
        waited=$((waited + 1))
        [ $waited -lt 300 ] || { echo "no take-over"; exit 1; }
        sleep 0.1
    done
    pid=$value
done
for each in $pids; do wait "$each" || rc=1; done
for each in $(seq "$hogs"); do
    tail -n 3 /tmp/hog.$each
    grep -q ' 0 errors$' /tmp/hog.$each || rc=1
done

# --- what is left
sleep 3
dead
number taken_over; echo "$value deaths of the worker"
number events; events=$value
number pages; pages=$value
number lost; lost=$value
echo "quiet: $stored pages stored, $used slots in use, $dead dead; $pages pages in $events ranges heard, $lost lost"
if [ "$mode" != discard ]; then
    [ "$events" -ge 5000 ] || { echo "too little was freed to be a test"; rc=1; }
    [ "$lost" = 0 ] || { echo "events were lost"; rc=1; }
    [ "$dead" -le 16 ] || { echo "dead pages stay"; rc=1; }
fi
ghostswap-ublk status | grep slot-free
swapoff "$dev"
sleep 2
look
number stored_pages
echo "after swapoff: $value pages stored"
[ "$mode" = discard ] || [ "$value" -le 1 ] || { echo "swapoff left pages"; rc=1; }
ghostswap-ublk del 0
sleep 1
! pidof ghostswap-ublk gs-worker gs-agent || { echo "processes are left behind"; rc=1; }
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|page allocation stall|blocked for more|BUG|WARNING'; then rc=1; fi
[ $rc = 0 ] || { cat /run/ghostswap/ublk0.log; dmesg | grep -A 70 'invoked oom-killer' | head -n 100; }
exit $rc
