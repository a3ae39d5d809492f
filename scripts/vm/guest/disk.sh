#!/bin/sh
# In the guest: a little memory above a disk tier on /dev/vda, a verifying hog of many times that, the
# worker killed now and then, what was stored where, swapoff.
# Status 1 if a page was wrong, anything failed or pages are left behind.
# Arguments: block | file (ext4), RAM_TIER, HOG_MIB, THP (always | never), SECONDS of touching, DEATHS
set -eu
kind=$1 ram=$2 hog=$3 thp=$4 seconds=$5 deaths=${6:-0}
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
if [ "$kind" = file ]; then
    modprobe ext4 2> /dev/null || true
    mkfs.ext4 -q /dev/vda
    mkdir -p /mnt
    mount -t ext4 /dev/vda /mnt
    disk=file:/mnt/cold,size=$(($(blockdev --getsize64 /dev/vda) / 5 * 4))
else
    disk=block:/dev/vda
fi
echo "kernel $(uname -r), THP $thp, hog $hog MiB, tiers $ram and $disk, $deaths deaths"
dev=$(ghostswap-ublk add --size 16T --tier "$ram" --tier "$disk")
number() { ghostswap-ublk status --json 2> /dev/null | grep -oE "\"$1\":[0-9]+" | head -n 1 | cut -d: -f2; }
rc=0
if [ "$kind" = file ]; then
    # A disk that does not answer for longer than a full store has a write wait. Not as swap: whoever is to thaw
    # it must not need memory that it frees.
    dd if=/dev/urandom of=/tmp/data bs=1M count=160 2> /dev/null
    dd if=/tmp/data of="$dev" bs=1M oflag=direct 2> /tmp/dd.out &
    for _ in $(seq 600); do
        [ "$(number written_segments)" -lt 40 ] || break
        sleep 0.1
    done
    echo "the file system is frozen with $(number written_segments) segments written"
    fsfreeze --freeze /mnt
    sleep 6
    echo "and thawed with $(number written_segments)"
    fsfreeze --unfreeze /mnt
    wait $! || { cat /tmp/dd.out; rc=1; }
    dd if="$dev" bs=1M count=160 iflag=direct 2> /dev/null | cmp - /tmp/data || { echo "a frozen disk lost data"; rc=1; }
    [ "$(number writes_refused)" = 0 ] || { echo "$(number writes_refused) writes were refused"; rc=1; }
    [ "$(number writes_parked)" -gt 0 ] || { echo "no write had to wait"; rc=1; }
    rm /tmp/data
    blkdiscard "$dev"
fi
ghostswap-ublk swapon 0
if [ "$kind" = block ] && mkfs.ext4 -q -F /dev/vda 2> /dev/null; then echo "somebody else may write to the tier"; rc=1; fi
: > /tmp/hog.out
ghostswap-hog --mib "$hog" --threads 2 --seconds "$seconds" --thp "$thp" --hold --check-all > /tmp/hog.out 2>&1 &
hogpid=$!
died=0
while kill -0 $hogpid 2> /dev/null && ! grep -q touches/s /tmp/hog.out; do
    sleep 1
    # Under pressure a look may come to nothing: then the next one.
    written=$(number written_segments) || written=0
    if [ $died -lt "$deaths" ] && [ "${written:-0}" -gt 0 ]; then
        kill -9 "$(number pid)" 2> /dev/null && died=$((died + 1))
        sleep 2
    fi
done
cat /tmp/hog.out
echo "--- free -m"; free -m
echo "--- status"; ghostswap-ublk status
[ $died = "$deaths" ] || { echo "only $died of $deaths deaths"; rc=1; }
[ "$(number written_segments)" -gt 0 ] || { echo "nothing went to disk"; rc=1; }
[ "$(number writes_refused)" = 0 ] || { echo "$(number writes_refused) writes were refused"; rc=1; }
echo "longest take-over: $(number longest_take_over_us) us of $(number taken_over)"
echo "--- tiers, by hand"
ghostswap-ublk tier list 0
fail() { echo "FAILED: $*"; rc=1; }
limit() { number limit_bytes; }
before=$(limit)
ghostswap-ublk tier set 0 ram,limit=$((before / 4 * 3)) || fail "a lower limit"
[ "$(limit)" = $((before / 4 * 3)) ] || fail "the limit is $(limit)"
for _ in $(seq 30); do [ "$(number held_bytes)" -gt "$(limit)" ] || break; sleep 1; done
[ "$(number held_bytes)" -le "$(limit)" ] || fail "$(number held_bytes) bytes held with a limit of $(limit)"
kill -9 "$(number pid)" || fail "no worker"
sleep 2
[ "$(limit)" = $((before / 4 * 3)) ] || fail "the next worker's limit is $(limit)"
! ghostswap-ublk tier set 0 ram,limit=$((before * 2)) || fail "a limit above the first was taken"
ghostswap-ublk tier set 0 ram,limit=$before || fail "the limit as it was"
ghostswap-ublk writeback 0 --idle 1h || fail "nothing to write back"
ghostswap-ublk writeback 0 || fail "writeback"
# There is no room for all of it: stopped, the tier is used again.
! timeout 5 ghostswap-ublk tier drain 0 || fail "drained to where there is no room"
ghostswap-ublk tier list 0 | grep -q '^disk.* used ' || fail "still being drained"
ghostswap-ublk tier list 0
kill $hogpid 2> /dev/null || rc=1
wait $hogpid 2> /dev/null || [ $? -eq 143 ] || rc=1
grep -q ' 0 errors$' /tmp/hog.out || { echo "the hog found wrong pages"; rc=1; }
sleep 3
ghostswap-ublk swapoff 0
sleep 2
[ "$(number stored_pages)" = 0 ] || { echo "pages are still stored: $(number stored_pages)"; rc=1; }
ghostswap-ublk tier drain 0 || fail "what is empty cannot be drained"
ghostswap-ublk tier drain 0 --stop
[ "$(number used_bytes)" -lt $((8 << 20)) ] || { echo "the disk is not given back: $(number used_bytes)"; rc=1; }
ghostswap-ublk del 0
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|page allocation stall|blocked for more'; then rc=1; fi
[ $rc = 0 ] || cat /run/ghostswap/ublk0.log
exit $rc
