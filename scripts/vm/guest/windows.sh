#!/bin/sh
# In the guest: swap windows. A 16T device swapped to by windows; a hog grows and goes, ROUNDS times (3);
# windows follow, and so does what is stored. With NEXT, another build, the worker is killed while the last but one
# grows, and agent and all are replaced while the last does. Then windows by hand. Status 1 if a page was wrong, a write failed, anything was
# OOM-killed, windows did not follow, or areas cost the kernel too much at the start.
# Arguments: HOG_MIB, THP (always | never), TIER, [NEXT], [ROUNDS]
set -eu
hog=$1 thp=$2 tier=$3 next=${4:-} rounds=${5:-3}
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, tier $tier"
rc=0
fail() { echo "FAILED: $*"; rc=1; }
# Of our device, as the kernel has them.
areas() { awk '/^\/dev\/ublkb0/ {n++; kib += $3; used += $4} END {print n + 0, int(kib / 1024), int(used / 1024)}' /proc/swaps; }
free_kib() { awk '/^MemFree:/ {print $2}' /proc/meminfo; }
# Once it stays what it is: processes that stand by take what they need, sooner or later.
settled_kib() {
    last=0
    for _ in $(seq 20); do
        now=$(free_kib)
        [ $((now - last)) -ge 128 ] || [ $((last - now)) -ge 128 ] || break
        last=$now
        sleep 1
    done
    echo "$now"
}
dev=$(ghostswap-ublk add --size 16T --tier "$tier")
sleep 3
before=$(settled_kib)
ghostswap-ublk swapon 0
sleep 1
cost=$((before - $(settled_kib)))
echo "first window: $(areas) (areas, MiB, MiB used); memory that went: $cost KiB"
# What the first window's header takes of the store is in it too.
[ $cost -lt 2048 ] || fail "areas cost $cost KiB at the start"
echo "round grown: areas, MiB, MiB used; gone: areas, MiB, MiB used; dead pages after 5 s"
for round in $(seq "$rounds"); do
    : > /tmp/hog.out
    ghostswap-hog --mib "$hog" --threads 2 --seconds 3 --thp "$thp" > /tmp/hog.out 2>&1 &
    hogpid=$!
    most='0 0 0'
    if [ -n "$next" ]; then
        while kill -0 $hogpid 2> /dev/null && [ "$(areas | cut -d' ' -f1)" -lt 2 ]; do sleep 0.1; done
        sleep 1
        case $((rounds - round)) in
        1) kill -KILL "$(ghostswap-ublk status --json | grep -oE '"pid":[0-9]+' | head -n 1 | cut -d: -f2)" || fail "no worker" ;;
        0)
            kill -KILL "$(pidof gs-agent)" || fail "no agent"
            sleep 1
            ghostswap-ublk upgrade 0 --program "/bin/$next" || fail "upgrade"
            ;;
        esac
    fi
    while kill -0 $hogpid 2> /dev/null; do
        now=$(areas)
        [ "${now##* }" -le "${most##* }" ] || most=$now
        sleep 0.3
    done
    wait $hogpid || fail "the hog ended with $?"
    grep -q ' 0 errors$' /tmp/hog.out || fail "$(cat /tmp/hog.out)"
    sleep 5
    dead=$(ghostswap-ublk status --json | grep -oE '"dead_pages":[0-9]+' | cut -d: -f2)
    # Of the peak, which the areas' use tells in MiB; where discards have to do, it is stated only.
    if ghostswap-ublk status --json | grep -q '"mode":"bpf"' && [ "$dead" -gt $((${most##* } * 256 / 20)) ]; then
        fail "$dead dead pages 5 s after the hog's exit"
    fi
    waited=0
    while [ "$(areas | cut -d' ' -f1)" -gt 1 ] && [ $waited -lt 40 ]; do sleep 1; waited=$((waited + 1)); done
    now=$(areas)
    echo "$round $most; $now after $((waited + 5)) s; $dead"
    [ "${now%% *}" = 1 ] || fail "windows stay open"
    [ "${most%% *}" -gt 1 ] || fail "no window was opened"
done
ghostswap-ublk status
cat /run/ghostswap/ublk0.log
echo "--- by hand"
ghostswap-ublk swapon 0 --window 64M
ghostswap-ublk swapoff 0
[ "$(areas)" = '0 0 0' ] || fail "swapoff left $(areas)"
[ ! -e /dev/ublkb0p1 ] || fail "a partition is left"
ghostswap-ublk swapon 0 --window 64M
ghostswap-ublk swapon 0 --window 128M
sleep 1
[ "$(areas)" = '2 191 0' ] || [ "$(areas)" = '2 192 0' ] || fail "by hand: $(areas)"
ghostswap-ublk swapoff 0 --window 1
[ "$(areas | cut -d' ' -f1)" = 1 ] || fail "one of two: $(areas)"
! ghostswap-ublk swapoff 0 --window 9 || fail "window 9 was swapped off"
! ghostswap-ublk swapon 0 --whole || fail "whole beside windows"
! ghostswap-ublk del 0 || fail "deleted while in use"
ghostswap-ublk swapon 0
swapoff -a
sleep 1
[ "$(areas)" = '0 0 0' ] || fail "windows opened behind swapoff -a"
ghostswap-ublk swapon 0
ghostswap-ublk stop 0
[ ! -e "$dev" ] || fail "the device is still there"
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|page allocation|blocked for more'; then rc=1; fi
exit $rc
