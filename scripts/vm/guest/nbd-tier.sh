#!/bin/sh
# In the guest: a little memory above an NBD server at 10.0.2.9 (run --net), a verifying hog of many times that, what
# was stored where, swapoff. The server may die meanwhile, if it is there again before the time-out.
# Status 1 if a page was wrong, anything failed or pages are left behind.
# Arguments: RAM_TIER, HOG_MIB, THP (always | never), SECONDS of touching, DEATHS of the worker
set -eu
ram=$1 hog=$2 thp=$3 seconds=$4 deaths=${5:-0}
echo "$thp" > /sys/kernel/mm/transparent_hugepage/enabled
server=nbd:nbd://10.0.2.9:10809/,timeout=2m
echo "kernel $(uname -r), THP $thp, hog $hog MiB, tiers $ram and $server, $deaths deaths"
dev=$(ghostswap-ublk add --size 16T --tier "$ram" --tier "$server")
number() { ghostswap-ublk status --json 2> /dev/null | grep -oE "\"$1\":[0-9]+" | head -n 1 | cut -d: -f2; }
rc=0
fail() { echo "FAILED: $*"; rc=1; }
ghostswap-ublk swapon 0
: > /tmp/hog.out
ghostswap-hog --mib "$hog" --threads 2 --seconds "$seconds" --thp "$thp" --hold > /tmp/hog.out 2>&1 &
hogpid=$!
died=0 looks=0
while kill -0 $hogpid 2> /dev/null && ! grep -q touches/s /tmp/hog.out; do
    sleep 1
    written=$(number written_segments) || written=0
    looks=$((looks + 1))
    [ $((looks % 15)) != 0 ] || echo "$written segments written, $(number fetches) fetches, $(number writes_refused) refused"
    if [ $died -lt "$deaths" ] && [ "${written:-0}" -gt 20 ]; then
        kill -9 "$(number pid)" 2> /dev/null && died=$((died + 1))
        sleep 2
    fi
done
cat /tmp/hog.out
echo "--- free -m"; free -m
echo "--- status"; ghostswap-ublk status
ghostswap-ublk tier list 0
[ $died = "$deaths" ] || fail "only $died of $deaths deaths"
[ "$(number written_segments)" -gt 0 ] || fail "nothing went to the server"
[ "$(number writes_refused)" = 0 ] || fail "$(number writes_refused) writes were refused"
[ "$(number requests_failed)" = 0 ] || fail "$(number requests_failed) requests failed"
ghostswap-ublk tier list 0 | grep -q 'nbd://10.0.2.9:10809/' || fail "the tier is not told by its URI"
kill $hogpid 2> /dev/null || rc=1
wait $hogpid 2> /dev/null || [ $? -eq 143 ] || rc=1
grep -q ' 0 errors$' /tmp/hog.out || fail "the hog found wrong pages"
sleep 3
ghostswap-ublk swapoff 0
sleep 2
[ "$(number stored_pages)" = 0 ] || fail "pages are still stored: $(number stored_pages)"
for _ in $(seq 30); do [ "$(number used_bytes)" -ge $((8 << 20)) ] || break; sleep 1; done
[ "$(number used_bytes)" -lt $((8 << 20)) ] || fail "the export is not given back: $(number used_bytes)"
ghostswap-ublk del 0
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|page allocation stall|blocked for more'; then rc=1; fi
echo "the device was $dev"
[ $rc = 0 ] || cat /run/ghostswap/ublk0.log
exit $rc
