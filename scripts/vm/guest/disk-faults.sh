#!/bin/sh
# In the guest: a disk tier on a device mapper's device that is made to fail in every way it can, under a verifying hog:
# it errs for a second out of three, refuses writes, is slow, stands still: no page may be wrong or lost. Then it errs for
# longer than reads are tried again: the hog gets SIGBUS, and once the disk is well the next hog is as well off as the
# first. At last it gives bytes that were never written: the hog gets SIGBUS and never a wrong byte.
# Only the hog is swapped (a memory cgroup): whoever mends the disk must not need what is on it.
# Status 1 if a page was wrong, a command failed that was not to, or pages are left behind.
# Arguments: HOG_MIB, THP (always | never), RAM_TIER
set -eu
hog=$1 thp=$2 ram=$3
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
for m in dm-mod dm-flakey dm-delay; do modprobe $m; done
mkdir -p /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
echo +memory > /sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/hog
echo $((hog / 2))M > /sys/fs/cgroup/hog/memory.max
rc=0
fail() { echo "FAILED: $*"; rc=1; }
sectors=$(blockdev --getsz /dev/vda)
# No udev here.
export DM_DISABLE_UDEV=1
linear="linear /dev/vda 0"
dmsetup create cold --table "0 $sectors $linear"
# From now on the disk does as the table says.
disk() {
    echo "--- after $(cut -d. -f1 /proc/uptime) s the disk: $*"
    dmsetup suspend --nolockfs cold
    dmsetup load cold --table "0 $sectors $*"
    dmsetup resume cold
}
number() { ghostswap-ublk status --json 2> /dev/null | grep -oE "\"$1\":[0-9]+" | head -n 1 | cut -d: -f2; }
is_failing() { ghostswap-ublk tier list 0 | grep -q '^disk.* failing '; }
begin_hog() {
    : > /tmp/hog.out
    sh -c "echo \$\$ > /sys/fs/cgroup/hog/cgroup.procs; exec ghostswap-hog --mib $hog --threads 2 --seconds $1 --thp $thp --check-all" > /tmp/hog.out 2>&1 &
    hogpid=$!
}
# Until it reads what went to disk.
swaps() {
    while kill -0 $hogpid 2> /dev/null && ! grep -q filled /tmp/hog.out; do sleep 0.5; done
    before=$(number fetches)
    for _ in $(seq 120); do
        [ "$(number fetches)" -le $((before + 50)) ] || return 0
        sleep 0.5
    done
    fail "nothing comes from disk"
}
hog_ends() {
    how=0
    wait $hogpid 2> /dev/null || how=$?
    cat /tmp/hog.out
    [ $how = "$1" ] || fail "the hog ended with $how, not $1"
    # No other error than that.
    [ $how = 0 ] || grep -q 'lost (SIGBUS' /tmp/hog.out || fail "it was no lost page"
    ! grep -qi wrong /tmp/hog.out || fail "wrong pages"
}

echo "kernel $(uname -r), THP $thp, hog $hog MiB, $ram above a device that fails"
ghostswap-ublk add --size 16T --tier "$ram" --tier block:/dev/mapper/cold
ghostswap-ublk swapon 0

begin_hog 100000
swaps
disk "flakey /dev/vda 0 2 1"
sleep 20
[ "$(number read_errors)" -gt 0 ] || fail "no read met the errors"
disk "flakey /dev/vda 0 1 9 1 error_writes"
for _ in $(seq 40); do ! is_failing || break; sleep 0.5; done
is_failing || fail "it is not told that the disk refuses writes"
disk "delay /dev/vda 0 300"
sleep 15
disk "$linear"
for _ in $(seq 80); do is_failing || break; sleep 0.5; done
! is_failing || fail "the disk is not taken back"
dmsetup suspend --nolockfs cold
echo "--- the disk stands still"
sleep 6
dmsetup resume cold
sleep 5
kill -USR1 $hogpid
hog_ends 0
[ "$(number requests_failed)" = 0 ] || fail "$(number requests_failed) requests failed"
ghostswap-ublk status

begin_hog 100000
swaps
disk error
hog_ends 1
disk "$linear"
for _ in $(seq 80); do is_failing || break; sleep 0.5; done
! is_failing || fail "the disk is not taken back"
begin_hog 5
swaps
hog_ends 0

begin_hog 100000
swaps
disk "flakey /dev/vda 0 0 1000 5 corrupt_bio_byte 77 r 165 0"
hog_ends 1
disk "$linear"
sleep 2
ghostswap-ublk status
[ "$(number corrupt)" -gt 0 ] || fail "no damage is told of"
ghostswap-ublk swapoff 0
sleep 2
[ "$(number stored_pages)" = 0 ] || fail "$(number stored_pages) pages are still stored"
ghostswap-ublk del 0
for _ in $(seq 20); do ! dmsetup remove cold 2> /dev/null || break; sleep 0.5; done
[ ! -e /dev/mapper/cold ] || fail "somebody has the disk still"
if dmesg | grep -E 'Out of memory|page allocation stall|blocked for more'; then rc=1; fi
[ $rc = 0 ] || cat /run/ghostswap/ublk0.log
exit $rc
