#!/bin/sh
# In the guest: a little memory above a block device of 32 MiB above a file, both on one disk, under a verifying hog of
# which a part goes through the first to the second. The worker is killed while that is under way; the first is removed
# with pages in it and added again above the second, and again with the worker killed beside it; the second cannot be
# removed, as there is no room for what lies there. Status 1 if a page was wrong, a command failed that was not to, or
# pages are left behind. Arguments: HOG_MIB, THP (always | never), RAM_TIER
set -eu
hog=$1 thp=$2 ram=$3
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
rc=0
fail() { echo "FAILED: $*"; rc=1; }
addpart /dev/vda 1 0 $((32 << 11))
addpart /dev/vda 2 $((32 << 11)) $(($(blockdev --getsz /dev/vda) - (32 << 11)))
modprobe ext4 2> /dev/null || true
mkfs.ext4 -q /dev/vda2
mkdir -p /mnt
mount -t ext4 /dev/vda2 /mnt
first=block:/dev/vda1,name=first
last=file:/mnt/cold,size=$(($(blockdev --getsize64 /dev/vda2) / 5 * 4)),name=last
echo "kernel $(uname -r), THP $thp, hog $hog MiB, tiers $ram, $first, $last"
ghostswap-ublk add --size 16T --tier "$ram" --tier "$first" --tier "$last" > /dev/null
number() { ghostswap-ublk status --json 2> /dev/null | grep -oE "\"$1\":[0-9]+" | head -n 1 | cut -d: -f2; }
# Bytes live on a tier by its name, 0: there is none.
live() {
    of=$(ghostswap-ublk tier list 0 --json | tr '{' '\n' | grep "\"name\":\"$1\"" | grep -oE '"live_bytes":[0-9]+' | cut -d: -f2)
    echo "${of:-0}"
}
# Whether within a while there are so many MiB.
has() {
    for _ in $(seq 60); do
        [ "$(live "$1")" -lt $(($2 << 20)) ] || return 0
        sleep 1
    done
    echo "--- after $(cut -d. -f1 /proc/uptime) s"; ghostswap-ublk tier list 0; ghostswap-ublk status
    return 1
}
kill_worker() { kill -9 "$(number pid)" 2> /dev/null || fail "no worker"; }
ghostswap-ublk swapon 0
ghostswap-hog --mib "$hog" --threads 2 --seconds 100000 --thp "$thp" --check-all > /tmp/hog.out 2>&1 &
hogpid=$!
has first 8 || fail "the first has $(live first) bytes"
kill_worker
has last 4 || fail "the second has $(live last) bytes"
kill_worker
sleep 5
ghostswap-ublk tier list 0
for n in 1 2; do
    if [ $n = 2 ]; then
        ghostswap-ublk tier remove 0 first 2> /tmp/why & removing=$!
        sleep 1
        kill_worker
        wait $removing || echo "beside a death: $(tail -n 1 /tmp/why)"
        sleep 2
    fi
    [ "$(live first)" = 0 ] && [ $n = 2 ] || ghostswap-ublk tier remove 0 first 2> /tmp/why || fail "remove: $(tail -n 1 /tmp/why)"
    [ "$(live first)" = 0 ] || fail "the first is still there"
    ghostswap-ublk tier list 0
    ghostswap-ublk tier add 0 "$first" --before last || fail "add above the other"
    ghostswap-ublk tier list 0 | sed -n 's/ .*//p' | tr '\n' ' ' | grep -q 'first last' || fail "not above the other"
    # A hog that has what it touches most may write little for minutes.
    ghostswap-ublk writeback 0 || fail "write back"
    has first 4 || fail "nothing goes there again"
done
if ghostswap-ublk tier remove 0 last 2> /tmp/why; then fail "there was room for all of it"; fi
grep -q 'does not fit' /tmp/why || fail "$(cat /tmp/why)"
sleep 3
echo "--- status"; ghostswap-ublk status
kill -USR1 $hogpid 2> /dev/null || fail "the hog died"
wait $hogpid || fail "the hog ended with $?"
cat /tmp/hog.out
grep -q ' 0 errors$' /tmp/hog.out || fail "the hog found wrong pages"
[ "$(number requests_failed)" = 0 ] || fail "$(number requests_failed) requests failed"
sleep 2
ghostswap-ublk swapoff 0
sleep 2
[ "$(number stored_pages)" = 0 ] || fail "pages are still stored: $(number stored_pages)"
for name in first last; do ghostswap-ublk tier remove 0 $name || fail "what is empty cannot be removed: $name"; done
ghostswap-ublk del 0
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|blocked for more'; then rc=1; fi
[ $rc = 0 ] || cat /run/ghostswap/ublk0.log
exit $rc
