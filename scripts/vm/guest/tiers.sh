#!/bin/sh
# In the guest: a tier below memory comes and goes under a verifying hog that is swapped out, again and again: added,
# written back to, drained, removed, a block device and a file in turn. In every third round the worker is killed beside
# the command that adds, or that removes. In each round codec and group, marks and the limit are set anew, in some with a
# worker killed in the middle of it. Before that what cannot be is refused; in between the supervisor dies
# once, and the program is upgraded once. Status 1 if a page was wrong, a command failed that was not to, or a tier was
# lost. Arguments: HOG_MIB, THP (always | never), RAM_TIER, ROUNDS
set -eu
hog=$1 thp=$2 ram=$3 rounds=$4
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, $ram, $rounds rounds"
rc=0
fail() { echo "FAILED: $*"; rc=1; }
# Half of the disk is a device, half a file system.
half=$(($(blockdev --getsz /dev/vda) / 2 / 2048 * 2048))
addpart /dev/vda 1 0 $half
addpart /dev/vda 2 $half $half
block=block:/dev/vda1 second=/dev/vda2
modprobe ext4 2> /dev/null || true
mkfs.ext4 -q "$second"
mkdir -p /mnt
mount -t ext4 "$second" /mnt
file=file:/mnt/cold,size=$((half / 5 * 4 * 512))
ghostswap-ublk add --size 64G --tier "$ram" --watchdog 30 > /dev/null
look() { ghostswap-ublk status --json > /tmp/status 2> /dev/null && read -r status < /tmp/status; }
number() { look || return 1; value=${status#*\"$1\":}; value=${value%%[,\}]*}; echo "$value"; }
what_of() { ghostswap-ublk tier list 0 | sed -n "s/^$1 .* //p"; }
# All that was set last, whoever serves by now.
holds() {
    [ "$(what_of ram)" = "$told,$marks" ] || fail "round $n: $(what_of ram) in place of $told,$marks"
    [ "$(number limit_bytes)" = $((limit << 20)) ] || fail "round $n: a limit of $(number limit_bytes), not of $limit MiB"
}
has_disk() { ghostswap-ublk tier list 0 | grep -q '^disk '; }
ghostswap-ublk swapon 0
ghostswap-hog --mib "$hog" --threads 2 --seconds 100000 --thp "$thp" --check-all > /tmp/hog.out 2>&1 &
hogpid=$!
# In the end some 200 MiB of pages are out of memory.
for _ in $(seq 120); do
    [ "$(number stored_pages)" -lt 15000 ] || break
    sleep 1
done

echo "--- what cannot be"
refused() {
    why=$1
    shift
    if ghostswap-ublk "$@" 2> /tmp/why; then fail "$* was not refused"; return; else status_of=$?; fi
    [ "$(wc -l < /tmp/why)" = 1 ] || fail "more than a line: $(cat /tmp/why)"
    grep -q "$why" /tmp/why || fail "$*: $(cat /tmp/why)"
    echo "$status_of: $(cat /tmp/why)"
}
echo "dear all" > /mnt/letter
pid=$(number pid)
refused 'something else' tier add 0 file:/mnt/letter,size=64M
refused 'No such file' tier add 0 file:/nowhere/cold,size=64M
refused mounted tier add 0 "block:$second"
refused 'no room' tier add 0 "file:/mnt/large,size=1T"
[ "$(stat -c %s /mnt/large)" = 0 ] || fail "what could not be taken was not given back"
rm /mnt/large
refused 'only a tier below' tier add 0 ram,limit=1G
refused 'no tier below' tier remove 0
refused 'no tier below' tier set 0 disk,timeout=5s
refused 'no second' tier set 0 cold codec=zstd:3
refused 'made for' tier set 0 ram limit=95%
refused 'must be below' tier set 0 ram high=50%,low=60%
refused 'from 2%' tier set 0 ram high=99%
refused 'remove the tier' tier set 0 disk encrypt=off
[ "$(number pid)" = "$pid" ] || fail "refusals cost a worker"
[ "$(cat /mnt/letter)" = "dear all" ] || fail "a letter was written over"

echo "--- rounds"
n=0
while [ $n -lt "$rounds" ]; do
    kill -0 $hogpid 2> /dev/null || { fail "the hog died"; break; }
    spec=$block
    [ $((n % 2)) = 0 ] || spec=$file
    if [ $((n % 3)) = 1 ]; then
        # The one that serves, at some moment of it; whatever becomes of the command, all is well after another.
        ghostswap-ublk tier add 0 "$spec" 2> /tmp/why & adding=$!
        sleep "0.$((n % 10))"
        kill -9 "$(number pid)" 2> /dev/null || true
        wait $adding || echo "round $n: $(cat /tmp/why)"
        has_disk || ghostswap-ublk tier add 0 "$spec" || fail "round $n: added after a death"
    else
        ghostswap-ublk tier add 0 "$spec" || fail "round $n: add"
    fi
    has_disk || fail "round $n: no tier"
    refused 'two tiers' tier add 0 "$spec"
    case $n in
    3) kill -9 "$(number process)"; sleep 8; has_disk || fail "the heir has no tier" ;;
    5) ghostswap-ublk upgrade 0 --program /bin/ghostswap-next || fail "upgrade"; has_disk || fail "upgraded without the tier" ;;
    6) kill -9 "$(number pid)"; sleep 2; has_disk || fail "the next worker has no tier" ;;
    esac
    [ $n = 0 ] || holds
    limit=$((300 + n % 3 * 40))
    marks=high=$((60 + n * 7 % 30))%,low=$((20 + n * 11 % 30))%
    pid=$(number pid)
    ghostswap-ublk tier set 0 "ram,limit=${limit}M,$marks" || fail "round $n: set limit and marks"
    [ "$(number pid)" = "$pid" ] || fail "round $n: that cost a worker"
    packing=codec=lz4
    [ $((n % 2)) = 1 ] || packing=codec=zstd:1
    packing=$packing,group=$((4 << n % 3 * 2))K
    # On by itself where zstd compresses single pages.
    told=$packing
    [ "$packing" != codec=zstd:1,group=4K ] || told=$packing,dict=32K
    if [ $((n % 4)) = 2 ]; then
        ghostswap-ublk tier set 0 ram "$packing" 2> /tmp/why & setting=$!
        sleep "0.$((n % 10))"
        kill -9 "$(number pid)" 2> /dev/null || true
        wait $setting || echo "round $n: $(cat /tmp/why)"
        # It may have been the one of the new codec: while it is being followed nothing is changed.
        until ghostswap-ublk tier set 0 ram "$packing" 2> /tmp/why || ! grep -q 'not now' /tmp/why; do sleep 1; done
    fi
    ghostswap-ublk tier set 0 ram "$packing" || fail "round $n: set codec and group"
    holds
    ghostswap-ublk writeback 0 > /tmp/written || fail "round $n: writeback"
    [ "$(number used_bytes)" -gt $((4 << 20)) ] || fail "round $n: $(number used_bytes) bytes went down"
    if [ $((n % 3)) = 2 ]; then
        # Ended at once, the tier is used on.
        if timeout 1 ghostswap-ublk tier remove 0 2> /dev/null; then fail "round $n: removed within a moment"; fi
        ghostswap-ublk tier list 0 | grep -q '^disk.* used ' || fail "round $n: not used any more"
        ghostswap-ublk tier remove 0 2> /tmp/why & removing=$!
        sleep "1.$((n % 10))"
        kill -9 "$(number pid)" 2> /dev/null || true
        wait $removing || echo "round $n: $(tail -n 1 /tmp/why)"
        ! has_disk || ghostswap-ublk tier remove 0 2> /dev/null || fail "round $n: removed after a death"
    else
        ghostswap-ublk tier remove 0 2> /tmp/why || fail "round $n: remove: $(tail -n 1 /tmp/why)"
    fi
    ! has_disk || fail "round $n: the tier is still there"
    echo "round $n: $spec, $packing, $marks, $(cat /tmp/written), last take-over $(number last_take_over_us) us"
    n=$((n + 1))
done
echo "--- status"; ghostswap-ublk status
grep 'taken over' /run/ghostswap/ublk0.log
kill -USR1 $hogpid 2> /dev/null || fail "the hog died"
wait $hogpid || fail "the hog ended with $?"
cat /tmp/hog.out
grep -q ' 0 errors$' /tmp/hog.out || fail "the hog found wrong pages"
[ "$(number requests_failed)" = 0 ] || fail "$(number requests_failed) requests failed"
ghostswap-ublk swapoff 0
ghostswap-ublk del 0
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|blocked for more'; then rc=1; fi
[ $rc = 0 ] || cat /run/ghostswap/ublk0.log
exit $rc
