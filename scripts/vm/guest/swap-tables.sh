#!/bin/sh
# In the guest, 7.3 only: how often the kernel cannot have the page that the table of a fresh cluster of swap slots
# takes, while it swaps to zram and has next to no memory set aside for such times. A fact of the kernel, no test of ours.
# Arguments: HOG_MIB, THREADS, ATTEMPTS, MIN_FREE_KIB
set -eu
hog=$1 threads=$2 attempts=$3 min_free=$4
mount -t tracefs none /sys/kernel/tracing
cd /sys/kernel/tracing
echo 'r:table swap_cluster_alloc_table ret=$retval:s32' > kprobe_events
echo 'r:folio folio_alloc_swap ret=$retval:s32' >> kprobe_events
for probe in table folio; do
    echo 'ret!=0' > events/kprobes/$probe/filter
    echo 1 > events/kprobes/$probe/enable
done
echo always > /sys/kernel/mm/transparent_hugepage/enabled
echo "$min_free" > /proc/sys/vm/min_free_kbytes
modprobe zram
echo lz4 > /sys/block/zram0/comp_algorithm
echo 4G > /sys/block/zram0/disksize
mkswap /dev/zram0 > /dev/null
echo "kernel $(uname -r), zram, hog $hog MiB, $threads threads, min_free_kbytes $min_free"
count() { grep -c " $1: " trace || true; }
attempt=0
while [ $attempt -lt "$attempts" ]; do
    attempt=$((attempt + 1))
    swapon --discard=pages /dev/zram0
    : > trace
    # It need not get far: what counts is the beginning, when all clusters are fresh.
    timeout 20 ghostswap-hog --mib "$hog" --threads "$threads" --seconds 1 --thp always > /dev/null 2>&1 || true
    echo "$attempt: $(count table) tables and $(count folio) folios went without;" \
        "$(grep -E '^(pswpout|oom_kill) ' /proc/vmstat | tr '\n' ' ')"
    swapoff /dev/zram0
done
dmesg | grep -E 'allocation failure|invoked oom|Killed process' || echo "nothing in the kernel's log"
