#!/bin/sh
# In the guest: workers that die one after another between claiming a device and serving it, which drivers
# up to Linux 6.14 answer with EINVAL from then on; the first that lives must serve, with every page that
# was there. ghostswap-ublk is scripts/build-crash's. Status 1 if not so. Argument: DEATHS
set -eu
deaths=$1 rc=0
echo "kernel $(uname -r), $deaths deaths"
# The first dies while it serves, in the write below; the others within five steps of opening the store.
plan=$deaths,commit:20$(for _ in $(seq 2 "$deaths"); do printf ,recovery:3; done)
dev=$(GHOSTSWAP_CRASH=$plan ghostswap-ublk add --size 1G --watchdog 30)
seq 1 1000000 | head -c 4194304 > /tmp/pages
dd if=/tmp/pages of="$dev" bs=64k oflag=direct 2> /dev/null || { echo "the write failed"; rc=1; }
dd if="$dev" of=/tmp/back bs=64k count=64 iflag=direct 2> /dev/null || { echo "the read failed"; rc=1; }
cmp /tmp/pages /tmp/back || rc=1
ghostswap-ublk status --json | grep -oE '"(taken_over|last_take_over_us)":[0-9]+'
ghostswap-ublk status --json | grep -q "\"taken_over\":$deaths," || { echo "not $deaths deaths"; rc=1; }
ghostswap-ublk del 0 || rc=1
if dmesg | grep -E 'I/O error|BUG|Oops|WARNING|blocked for more'; then rc=1; fi
[ $rc = 0 ] || cat /run/ghostswap/ublk0.log
exit $rc
