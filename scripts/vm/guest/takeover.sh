#!/bin/sh
# In the guest: a verifying hog larger than memory, and the worker taken away again and again under
# it. Status 1 if a page was wrong, a take-over took a second or more, or anything failed on the way.
# Every page that the hog touches is checked; with ALL, at the end every page that it has.
# Arguments: HOG_MIB, THP (always | never), TIER, ROUNDS, HOW, [ALL]
#   HOW: kill     SIGKILL at a random moment, 0.2 to 2.2 s after the last
#        twice    and again 20 to 520 ms later: during or right after the recovery
#        stop     SIGSTOP, so that the watchdog (5 s here) has to find out; 3 s more after another
#        mixed    one of these at random
#        crash    it kills itself between two steps of a commit, of cleaning, of recovery or anywhere,
#                 in turn; ghostswap-ublk is scripts/build-crash's, and TIER so small that it cleans
set -eu
hog=$1 thp=$2 tier=$3 rounds=$4 how=$5 all=${6:+--check-all}
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
echo "kernel $(uname -r), THP $thp, hog $hog MiB, $rounds rounds of $how"
if [ "$how" = crash ]; then
    export GHOSTSWAP_CRASH="$rounds,commit:${COMMITS:-60000},clean:${CLEANS:-1000},recovery:${RECOVERIES:-400},any:${ANY:-60000}"
    echo "$GHOSTSWAP_CRASH"
fi
dev=$(ghostswap-ublk add --size 64G --tier "$tier" --watchdog 5)
mkswap "$dev" > /dev/null
swapon --discard=pages "$dev"
# One process for each look, and none to take a number out of it: each is slow under pressure.
look() { ghostswap-ublk status --json > /tmp/status 2> /dev/null && read -r status < /tmp/status; }
number() { value=${status#*\"$1\":}; value=${value%%[,\}]*}; }
seed=${SEED:-$(($(cut -d. -f1 /proc/uptime) + $$))}
echo "seed $seed"
random() { seed=$(((seed * 1103515245 + 12345) % 2147483648)); random=$((seed / 65536 % $1)); }
: > /tmp/hog.out
ghostswap-hog --mib "$hog" --threads 2 --seconds 100000 --thp "$thp" $all > /tmp/hog.out 2>&1 &
hogpid=$!
rc=0 done=0 deaths=0 stops=0
: > /tmp/times
look
number pid
pid=$value
while [ $done -lt "$rounds" ]; do
    if [ "$how" = crash ]; then
        waited=0
        until look && number taken_over && [ "$value" -gt $done ]; do
            waited=$((waited + 1))
            [ $waited -lt 600 ] || { echo "nobody dies"; ghostswap-ublk status; rc=1; break 2; }
            kill -0 $hogpid 2> /dev/null || { echo "the hog died"; rc=1; break 2; }
            sleep 0.2
        done
        done=$value
        number last_take_over_us
        echo "$value" >> /tmp/times
        continue
    fi
    random 2; whole=$random
    random 8
    sleep "$whole.$((random + 2))"
    kill -0 $hogpid 2> /dev/null || { echo "the hog died"; rc=1; break; }
    now=$how
    if [ "$how" = mixed ]; then
        random 4
        case $random in 0) now=stop ;; 1) now=twice ;; *) now=kill ;; esac
    fi
    # Ten seconds without a worker but for an instant are a stall, and rightly reported by the kernel as one: between two
    # that are stopped there is time to get a page.
    if [ $now = stop ] && [ "${last:-}" = stop ]; then sleep 3; fi
    last=$now
    if [ $now = stop ]; then
        kill -STOP "$pid" || { echo "worker $pid is gone by itself"; cat /run/ghostswap/ublk0.log; exit 1; }
        stops=$((stops + 1))
    else
        kill -KILL "$pid" || { echo "worker $pid is gone by itself"; cat /run/ghostswap/ublk0.log; exit 1; }
    fi
    deaths=$((deaths + 1))
    if [ $now = twice ]; then
        # The oldest of the workers that are left takes over.
        random 10
        sleep "0.0$random"
        next=$(grep -lE '^Name:.gs-worker' /proc/[0-9]*/status 2> /dev/null | cut -d/ -f3 | grep -vx "$pid" | sort -n | head -n 1)
        if [ -n "$next" ] && kill -KILL "$next" 2> /dev/null; then deaths=$((deaths + 1)); fi
    fi
    waited=0 value=$pid
    until look && number pid && [ "$value" != "$pid" ] && [ "$value" != "${next:-}" ]; do
        waited=$((waited + 1))
        [ $waited -lt 300 ] || { echo "no take-over"; ghostswap-ublk status; exit 1; }
        sleep 0.1
    done
    pid=$value next=''
    done=$((done + 1))
    number last_take_over_us
    echo "$value" >> /tmp/times
done
if [ "$how" = crash ]; then
    deaths=$done
    # The last one has come back.
    sleep 2
    grep -o 'dies at .*' /run/ghostswap/ublk0.log | sort | uniq -c
    grep -q 'dies at clean: ' /run/ghostswap/ublk0.log || { echo "nobody died cleaning"; rc=1; }
fi
# The hog has seen every death.
kill -USR1 $hogpid 2> /dev/null || rc=1
wait $hogpid || rc=1
cat /tmp/hog.out
ghostswap-ublk status
grep "taken over within" /run/ghostswap/ublk0.log | tail -n 3
sort -n /tmp/times | awk -v deaths=$deaths -v stops=$stops '{t[NR] = $1} END {
    printf "%d deaths (%d by SIGSTOP and watchdog); back after: median %.0f ms, longest %.0f ms\n",
        deaths, stops, t[int((NR + 1) / 2)] / 1000, t[NR] / 1000}'
look
number longest_take_over_us
[ "$value" -lt 1000000 ] || { echo "a take-over took a second or more"; rc=1; }
grep -q ' 0 errors$' /tmp/hog.out || rc=1
swapoff "$dev"
blkdiscard --force "$dev" 2> /dev/null
sleep 2
look
number stored_pages
[ "$value" = 0 ] || { echo "pages are still stored"; rc=1; }
ghostswap-ublk del 0
sleep 1 # the supervisor ends behind its worker
! pidof ghostswap-ublk gs-worker gs-agent || { echo "processes are left behind"; rc=1; }
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|page allocation stall|blocked for more'; then rc=1; fi
[ $rc = 0 ] || cat /run/ghostswap/ublk0.log
exit $rc
