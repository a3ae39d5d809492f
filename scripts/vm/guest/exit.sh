#!/bin/sh
# In the guest: a worker that is killed ends without asking for memory that it would wait for, whether it made the
# device or took it over. The kernel's own allocations in the name of its threads are traced from the kill on.
# Status 1 if one of them may reclaim memory, or anything failed on the way.
set -eu
echo "kernel $(uname -r)"
dev=$(ghostswap-ublk add --size 64G --tier ram,limit=30%,codec=zstd:1)
mkswap "$dev" > /dev/null
swapon --discard=pages "$dev"
trace=/sys/kernel/tracing
mount -t tracefs none $trace
echo 8192 > $trace/buffer_size_kb
number() { ghostswap-ublk status --json | sed "s/.*\"$1\"://; s/[,}].*//"; }
rc=0
for round in 1 2 3; do
    sleep 2
    pid=$(number pid)
    tasks=$(ls "/proc/$pid/task")
    echo 0 > $trace/tracing_on
    echo > $trace/trace
    echo 1 > $trace/events/kmem/enable
    echo 1 > $trace/events/sched/sched_process_exit/enable
    echo 1 > $trace/tracing_on
    kill -KILL "$pid"
    waited=0
    until [ "$(number taken_over)" = $round ]; do
        waited=$((waited + 1))
        [ $waited -lt 100 ] || { echo "no take-over"; exit 1; }
        sleep 0.1
    done
    echo 0 > $trace/tracing_on
    echo 0 > $trace/events/kmem/enable
    for task in $tasks; do grep -- "-$task  *\[" $trace/trace || true; done > /tmp/its
    ended=$(grep -c sched_process_exit /tmp/its || true)
    allocated=$(grep -cE ' (kmalloc|kmem_cache_alloc|mm_page_alloc): ' /tmp/its || true)
    # What may reclaim says so, or is called by a name that stands for it (include/trace/events/mmflags.h).
    grep -E ' (kmalloc|kmem_cache_alloc|mm_page_alloc): .*(GFP_(KERNEL|NOFS|NOIO|USER|HIGHUSER|TRANSHUGE)|__GFP_(DIRECT_)?RECLAIM)' \
        /tmp/its > /tmp/waits || true
    echo "round $round: $(echo "$tasks" | wc -l) threads, $ended ended, $allocated allocations, $(wc -l < /tmp/waits) that may wait"
    cat /tmp/waits
    # It cannot be told by what was not seen.
    [ "$ended" -ge "$(echo "$tasks" | wc -l)" ] && [ "$allocated" -gt 0 ] && [ ! -s /tmp/waits ] || rc=1
done
swapoff "$dev"
ghostswap-ublk del 0
exit $rc
