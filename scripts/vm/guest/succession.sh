#!/bin/sh
# In the guest: the supervisor is killed under a verifying hog larger than memory, again and again, its
# agent becomes the next, and worker and agent are killed before, after and beside it; then upgrades to a program
# that fails or dies where it is to go on; then workers that die while the device is being removed.
# `ghostswap-crash` is scripts/build-crash's build. Status 1 if a page was wrong, nobody went on, or a
# device was left behind. Arguments: HOG_MIB, THP (always | never), ROUNDS (a multiple of 5)
set -eu
hog=$1 thp=$2 rounds=$3
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, $rounds rounds"
rc=0
fail() { echo "FAILED: $*"; rc=1; }
# False: nobody answers now.
look() {
    ghostswap-ublk status --json > /tmp/status 2> /dev/null && read -r status < /tmp/status || return 1
    case $status in *'"supervisor":'*) ;; *) return 1 ;; esac
}
number() { value=${status#*\"$1\":}; value=${value%%[,\}]*}; }
hundredths() { read -r up _ < /proc/uptime; now=${up%.*}${up#*.}; }
seed=${SEED:-$(($(cut -d. -f1 /proc/uptime) + $$))}
echo "seed $seed"
random() { seed=$(((seed * 1103515245 + 12345) % 2147483648)); random=$((seed / 65536 % $1)); }
dev=$(ghostswap-ublk add --size 64G --tier ram,limit=65%,codec=zstd:1 --watchdog 5)
mkswap "$dev" > /dev/null
swapon --discard=pages "$dev"
ghostswap-hog --mib "$hog" --threads 2 --seconds 100000 --thp "$thp" --check-all > /tmp/hog.out 2>&1 &
hogpid=$!
look
number process; supervisor=$value
number pid; worker=$value
done=0 workers=0
: > /tmp/times
while [ $done -lt "$rounds" ]; do
    random 4
    sleep "$((random / 2 + 2)).$((random * 2))"
    kill -0 $hogpid 2> /dev/null || { fail "the hog died"; break; }
    killed=''
    case $((done % 5)) in
    0) kill -KILL "$supervisor" ;;
    1) kill -KILL "$supervisor"; hundredths; sleep 1; kill -KILL "$worker"; killed=1 ;;
    2) kill -KILL "$worker"; random 10; sleep "0.0$random"; kill -KILL "$supervisor"; killed=1 ;;
    3) kill -KILL "$supervisor" "$worker"; killed=1 ;;
    # The agent first, while the supervisor cannot start another: with a supervisor dead for a moment the agent may
    # have taken its place, and it would be the second one that is killed.
    4) kill -STOP "$supervisor"; kill -KILL "$(pidof gs-agent)" "$supervisor" ;;
    esac
    [ $((done % 5)) = 1 ] || hundredths
    began=$now waited=0 value=$supervisor
    until look && number process && [ "$value" != "$supervisor" ]; do
        waited=$((waited + 1))
        [ $waited -lt 600 ] || { fail "no next supervisor"; ghostswap-ublk status; exit 1; }
        sleep 0.05
    done
    hundredths
    echo $((now - began)) >> /tmp/times
    supervisor=$value
    [ -z "$killed" ] || workers=$((workers + 1))
    waited=0
    until look && number pid && { [ -z "$killed" ] || [ "$value" != "$worker" ]; }; do
        waited=$((waited + 1))
        [ $waited -lt 600 ] || { fail "no take-over"; ghostswap-ublk status; exit 1; }
        sleep 0.05
    done
    worker=$value
    done=$((done + 1))
done
look
case $status in *"\"supervisor\":{\"alive\":true,\"died\":$done,"*) ;; *) fail "not $done supervisors were lost" ;; esac
ghostswap-ublk status | grep '^supervisor' || fail "status does not tell"
number taken_over
echo "$done supervisors and $workers workers killed, $value taken over from"
sort -n /tmp/times | awk '{t[NR] = $1} END {
    printf "status told of the next supervisor after: median %.2f s, longest %.2f s\n", t[int((NR + 1) / 2)] / 100, t[NR] / 100}'

echo "--- a new program that fails, one that dies, one that works; and back"
unchanged() {
    look
    number upgrades; [ "$value" = 0 ] || fail "$1: $value upgrades"
    number pid; [ "$value" = "$worker" ] || fail "$1: the worker was replaced"
    number process; supervisor=$value
}
before=$supervisor
echo fail > /run/ghostswap/resume
if ghostswap-crash upgrade 0 2> /tmp/said; then fail "upgraded to a program that fails"; fi
cat /tmp/said
grep -q 'gave up: told to fail' /tmp/said || fail "it is not said why"
unchanged "after one that fails"
[ "$supervisor" = "$before" ] || fail "the old program did not come back in its process"
[ "$(cat /proc/$supervisor/comm)" = ghostswap-ublk ] || fail "it goes by the name of $(cat /proc/$supervisor/comm)"
sleep 3
echo die > /run/ghostswap/resume
if ghostswap-crash upgrade 0 2> /tmp/said; then fail "upgraded to a program that dies"; fi
cat /tmp/said
grep -q 'died at its beginning' /tmp/said || fail "it is not said why"
unchanged "after one that dies"
[ "$supervisor" != "$before" ] || fail "the supervisor has not changed"
[ ! -e /run/ghostswap/resume ] || fail "the program did not come to where it was to die"
sleep 3
ghostswap-crash upgrade 0 || fail "upgrade"
sleep 3
ghostswap-ublk upgrade 0 || fail "upgrade back"
look
number upgrades; [ "$value" = 2 ] || fail "$value upgrades"
sleep 3
descriptors=$(ls /proc/"$supervisor"/fd | wc -l)
echo "the supervisor has $descriptors descriptors"
kill -USR1 $hogpid 2> /dev/null || fail "the hog died"
wait $hogpid || fail "the hog ended with $?"
cat /tmp/hog.out
grep -q ' 0 errors$' /tmp/hog.out || rc=1
ghostswap-ublk status
swapoff "$dev"
ghostswap-ublk del 0 || fail "del"
sleep 1
! pidof ghostswap-ublk gs-worker gs-agent || fail "processes are left behind"

echo "--- workers that die while the device is removed"
for point in stop-ordered stop-drained; do
    dev=$(GHOSTSWAP_CRASH="1,$point:1" ghostswap-crash add --size 1G)
    sleep 2
    ghostswap-ublk del 0 || fail "del, a death at $point"
    [ ! -e "$dev" ] && [ ! -e /dev/ublkc0 ] || fail "a device is left behind after a death at $point"
    sleep 1
    ! pidof ghostswap-ublk ghostswap-crash gs-worker gs-agent || fail "processes are left behind"
    [ "$(grep -c "dies at $point" /run/ghostswap/ublk0.log)" = 1 ] || fail "nobody died at $point"
done
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|page allocation stall|blocked for more|BUG|WARNING'; then rc=1; fi
[ $rc = 0 ] || cat /run/ghostswap/ublk0.log
exit $rc
