#!/bin/sh
# In the guest: worker and supervisor replaced by another build and back, again and again, under a
# verifying hog larger than memory. `ghostswap-next` is the other build.
# Status 1 if a page was wrong, an upgrade failed or anything else did.
# Arguments: HOG_MIB, THP (always | never), TIMES
set -eu
hog=$1 thp=$2 times=$3
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, $times upgrades"
dev=$(ghostswap-ublk add --size 64G --tier ram,limit=65%,codec=lz4)
mkswap "$dev" > /dev/null
swapon --discard=pages "$dev"
# Descriptors that the supervisor has, waiting for both standbys to be made.
descriptors() { sleep 3; ls "/proc/$(awk '/^PPid/ {print $2}' "/proc/$(number pid)/status")/fd" | wc -l; }
number() { ghostswap-ublk status --json 2> /dev/null | grep -oE "\"$1\":[0-9]+" | head -n 1 | cut -d: -f2; }
: > /tmp/hog.out
ghostswap-hog --mib "$hog" --threads 2 --seconds 100000 --thp "$thp" --check-all > /tmp/hog.out 2>&1 &
hogpid=$!
rc=0 done=0 early=0
: > /tmp/times
while [ $done -lt "$times" ]; do
    sleep 1
    kill -0 $hogpid 2> /dev/null || { echo "the hog died"; rc=1; break; }
    if [ $((done % 2)) = 0 ]; then ghostswap-next upgrade 0; else ghostswap-ublk upgrade 0; fi || { rc=1; break; }
    done=$((done + 1))
    number last_take_over_us >> /tmp/times
    [ $done != 2 ] || early=$(descriptors)
done
late=$(descriptors)
echo "the supervisor's descriptors: $early after two upgrades, $late after $done"
[ "$early" = "$late" ] || rc=1
# Two more, to what is no program of ours: nothing happens, and it is said why.
for bad in /nowhere /bin/cat; do
    if ghostswap-ublk upgrade 0 --program $bad; then echo "upgraded to $bad"; rc=1; fi
done
kill -USR1 $hogpid 2> /dev/null || rc=1
wait $hogpid || rc=1
cat /tmp/hog.out
ghostswap-ublk status
sort -n /tmp/times | awk '{t[NR] = $1} END {
    printf "%d upgrades; served again after: median %.0f ms, longest %.0f ms\n", NR, t[int((NR + 1) / 2)] / 1000, t[NR] / 1000}'
[ "$(number upgrades)" = "$times" ] && [ "$(number taken_over)" = 0 ] || { echo "not $times upgrades but $(number upgrades), or workers died: $(number taken_over)"; rc=1; }
grep -q ' 0 errors$' /tmp/hog.out || rc=1
swapoff "$dev"
ghostswap-ublk del 0
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|page allocation stall|blocked for more'; then rc=1; fi
exit $rc
