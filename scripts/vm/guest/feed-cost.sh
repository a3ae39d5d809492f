#!/bin/sh
# In the guest: what hearing of freed slots costs, and what it saves. The same hog on a device with the
# feed, with discards instead, and with neither; then it exits, and the processor time of the queues'
# threads and of the BPF program (the kernel counts it) is told for each million slots freed, and what
# is still dead in the store 5 s later. Arguments: HOG_MIB, THP, SECONDS, [HOWS]
set -eu
echo "$2" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $2, hog $1 MiB"
look() { ghostswap-ublk status --json > /tmp/status && read -r status < /tmp/status; }
number() { value=${status#*\"$1\":}; value=${value%%[,\}]*}; }
in_use() { while read -r name _ _ used _; do [ "$name" != "$dev" ] || slots=$((used / 4)); done < /proc/swaps; }
stored() { look; number stored_pages; stored=$value; number filled_pages; stored=$((stored + value)); number zero_pages; stored=$((stored + value)); }
# Nanoseconds that the queues' threads have run.
queues() { cat /proc/$1/task/*/stat /proc/$1/task/*/schedstat | awk '/\(gs-queue/ {q[++n] = 1; next} /\(/ {q[++n] = 0; next} {if (q[++m]) ns += $1} END {print ns + 0}'; }
program() { cat /proc/$1/fdinfo/* 2> /dev/null | awk '/^run_time_ns/ {print $2; exit}'; }
for how in ${4:-bpf kprobe discards neither}; do
    case $how in bpf|kprobe) feed=$how ;; *) feed=discard ;; esac
    dev=$(ghostswap-ublk add --size 16G --tier ram,limit=65%,codec=lz4 --slot-free $feed)
    mkswap "$dev" > /dev/null
    [ $how = discards ] && flag=--discard=pages || flag=
    swapon $flag "$dev"
    : > /tmp/hog.out
    ghostswap-hog --mib "$1" --threads 2 --seconds "$3" --thp "$2" --hold > /tmp/hog.out 2>&1 &
    hogpid=$!
    while kill -0 $hogpid 2> /dev/null && ! grep -q errors /tmp/hog.out; do sleep 0.5; done
    echo "$how: $(tail -n 1 /tmp/hog.out)"
    grep -q ' 0 errors$' /tmp/hog.out || { echo "the hog found wrong pages, or died"; exit 1; }
    sleep 1
    stored; peak=$stored
    number pid; pid=$value
    number pages; heard=$value
    in_use; before=$slots
    echo 1 > /proc/sys/kernel/bpf_stats_enabled
    q0=$(queues "$pid")
    kill $hogpid
    wait $hogpid 2> /dev/null || [ $? -eq 143 ]
    sleep 5
    q1=$(queues "$pid")
    kernel=$(program "$pid")
    echo 0 > /proc/sys/kernel/bpf_stats_enabled
    in_use
    stored
    number pages; heard=$((value - heard))
    number lost
    echo "$how $((before - slots)) $heard $((q1 - q0)) ${kernel:-0} $stored $slots $peak $value" | awk '{
        printf "%s: exit: %d slots freed, %d heard, %d lost; queues %.3f s, program %.3f s for a million freed; dead 5 s later: %d pages, %.1f %% of the peak of %d\n",
            $1, $2, $3, $9, $4 / 1e3 / $2, $5 / 1e3 / $2, $6 - $7, 100 * ($6 - $7) / $8, $8}'
    swapoff "$dev"
    ghostswap-ublk del 0
done
