#!/bin/sh
# In a guest whose PID 1 is systemd: ghostswap@0, enabled, from boot to power-off. Upgraded by restart
# and reload, restarted with a broken program, its worker killed, its supervisor stopped and killed, a stop
# and a hibernation refused, all under a verifying hog larger than memory; a stop and a hibernation carried
# out; then a shutdown with swap in use.
# `ghostswap-next` is another build. Status 1 if a page was wrong or anything else failed.
# Arguments: HOG_MIB, SHUTDOWN (orderly | refused: every swapoff fails, and systemd-shutdown's own
#   system call is what is left), WITHIN (seconds, for the shutdown), [ALL] (all processes are killed at
#   once, too: that systemd is there then is luck, since its own pages may be on that device)
set -eu
hog=$1 shutdown=$2 within=$3 all=${4:-}
unit=ghostswap@0
own=/usr/local/sbin/ghostswap-ublk
rc=0
fail() { echo "FAILED: $*"; rc=1; }
number() { ghostswap-ublk status --json 2> /dev/null | grep -oE "\"$1\":[0-9]+" | head -n 1 | cut -d: -f2; }
version() { ghostswap-ublk status --json 2> /dev/null | grep -oE '"version":"[^"]+"' | cut -d'"' -f4; }
of_unit() { systemctl show -p "$1" --value $unit; }
swapped() { awk '$1 ~ "^/dev/ublkb0" {n += $4} END {print int(n / 1024)}' /proc/swaps; }
active() { [ "$(of_unit ActiveState)/$(of_unit MainPID)" = "active/$main" ] || fail "$1: unit is $(of_unit ActiveState), main process $(of_unit MainPID), not $main"; }
install_as_own() { cp "$1" $own.new; mv $own.new $own; }
wait_for() { # SECONDS WHAT COMMAND...
    for_s=$1 what=$2; shift 2
    left=$((for_s * 5))
    until "$@"; do
        left=$((left - 1))
        [ $left -gt 0 ] || { fail "no $what within $for_s s"; return; }
        sleep 0.2
    done
}

echo "kernel $(uname -r), $(systemctl --version | head -n 1), hog $hog MiB"
echo "--- booted"
systemctl is-active $unit || fail "not active after boot"
grep -q ublkb0 /proc/swaps || fail "not swapped on after boot"
main=$(of_unit MainPID)
echo "active and swapped on $(($(of_unit ActiveEnterTimestampMonotonic) / 1000)) ms after the kernel's start: $(of_unit StatusText)"
[ "$(cat /proc/$main/oom_score_adj)" = -1000 ] || fail "the main process is not protected from the OOM killer"
[ "$(version)" = "$($own --version | cut -d' ' -f2)" ] || fail "unexpected version $(version)"
# The one thing to be said against the unit is known.
systemd-analyze verify $unit.service > /run/verified 2>&1 || fail "systemd-analyze verify"
if grep -v 'KillMode=none' /run/verified; then fail "systemd-analyze verify"; fi
cp $own /run/first

ghostswap-hog --mib "$hog" --threads 2 --seconds 100000 --check-all > /run/hog.out 2>&1 &
hogpid=$!
full() { [ "$(swapped)" -ge $((hog / 4)) ]; }
wait_for 120 "swapping" full

echo "--- restart with another build, $(swapped) MiB swapped out"
old=$(version)
install_as_own "$(command -v ghostswap-next)"
systemctl restart $unit || fail "restart"
active "after the restart"
[ "$(version)" != "$old" ] || fail "the version is still $old"
[ "$(number upgrades)/$(number taken_over)" = 1/0 ] || fail "not one upgrade and no death"
echo "$old replaced by $(version) while swapped out; requests stood still for $(number last_take_over_us) us"

echo "--- reload with the first build"
install_as_own /run/first
systemctl reload $unit || fail "reload"
active "after the reload"
[ "$(version)/$(number upgrades)" = "$old/2" ] || fail "not upgraded: $(version)"

echo "--- restart with a program that does nothing but fail"
worker=$(number pid)
install_as_own /bin/false
systemctl restart $unit 2> /dev/null && fail "the restart succeeded"
grep -q ublkb0 /proc/swaps && kill -0 "$worker" 2> /dev/null && kill -0 "$main" || fail "not served on"
echo "unit $(of_unit ActiveState), worker $worker serves on"
install_as_own /run/first
is_active() { [ "$(of_unit ActiveState)" = active ]; }
wait_for 30 "recovery of the unit" is_active
active "with the program back"
[ "$(number taken_over)" = 0 ] || fail "a worker died"

echo "--- the worker is killed"
worker=$(number pid)
kill -KILL "$worker"
replaced() { [ "$(number taken_over)" = 1 ]; }
wait_for 20 "take-over" replaced
active "after the worker's death"

echo "--- the supervisor hangs for longer than systemd waits"
restarts=$(of_unit NRestarts)
kill -STOP "$main"
hangs() { [ "$(of_unit NRestarts)" != "$restarts" ] || [ "$(of_unit ActiveState)" != active ]; }
wait_for 60 "notice of the watchdog" hangs
kill -CONT "$main"
wait_for 90 "recovery of the unit" is_active
active "after the hang"
[ "$(number taken_over)" = 1 ] || fail "a worker died"

echo "--- the supervisor is killed"
restarts=$(of_unit NRestarts) before=$main
kill -KILL "$main"
succeeded() { main=$(number process); [ -n "$main" ] && [ "$main" != "$before" ]; }
wait_for 30 "successor" succeeded
restarted() { [ "$(of_unit NRestarts)" != "$restarts" ]; }
wait_for 60 "restart of the unit" restarted
wait_for 60 "recovery of the unit" is_active
active "after the supervisor's death"
[ "$(number taken_over)/$(number died)" = 1/1 ] || fail "not one worker and one supervisor died"
ghostswap-ublk status | grep '^supervisor' || fail "status does not tell of the supervisor's death"

if [ "$all" ]; then
    echo "--- all processes are killed at once, $(swapped) MiB swapped out"
    restarts=$(of_unit NRestarts)
    # By the kernel in one go: systemd, which kills one by one, may find numbers of the dead among them (EIO).
    echo 1 > "/sys/fs/cgroup$(of_unit ControlGroup)/cgroup.kill"
    wait_for 60 "restart of the unit" restarted
    wait_for 60 "recovery of the unit" is_active
    succeeded() { main=$(number process); [ -n "$main" ] && [ "$main" = "$(of_unit MainPID)" ]; }
    wait_for 30 "successor" succeeded
    active "after the death of all"
    [ "$(number taken_over)/$(number died)" = 2/2 ] || fail "not a second worker and a second supervisor died"
    grep -q ublkb0 /proc/swaps || fail "swapped off"
fi

echo "--- stop while it would not fit, $(swapped) MiB swapped out"
systemctl stop $unit 2> /run/said && fail "the stop succeeded"
cat /run/said
grep -q ublkb0 /proc/swaps || fail "swapped off"
wait_for 60 "return of the unit" is_active
active "after the refused stop"

echo "--- hibernation while it would not fit (a stand-in for the image writer)"
mkdir -p /run/systemd/system/systemd-hibernate.service.d
printf '[Service]\nExecStart=\nExecStart=sh -c "grep -c ublkb0 /proc/swaps > /run/hibernated; true"\n' \
    > /run/systemd/system/systemd-hibernate.service.d/stand-in.conf
systemctl daemon-reload
active "after systemd's own reload"
systemctl start systemd-hibernate.service 2> /run/said && fail "hibernation went on"
cat /run/said
[ ! -e /run/hibernated ] || fail "hibernated with swap on"
wait_for 60 "return of the unit" is_active
active "after the refused hibernation"

echo "--- what the hog saw"
kill -USR1 $hogpid || fail "the hog died"
wait $hogpid || fail "the hog's status"
cat /run/hog.out
grep -q ' 0 errors$' /run/hog.out || fail "wrong pages"

echo "--- stop"
ghostswap-ublk status
systemctl stop $unit || fail "stop"
[ "$(of_unit ActiveState)/$(of_unit Result)" = inactive/success ] || fail "unit is $(of_unit ActiveState), $(of_unit Result)"
! grep -q ublkb0 /proc/swaps && [ ! -e /sys/block/ublkb0 ] || fail "the device is still there"
gone() { ! pgrep ghostswap-ublk && ! pgrep gs-worker && ! pgrep gs-agent; }
wait_for 10 "end of all processes" gone
journalctl --no-pager -q -o cat -u $unit | tail -n 12

echo "--- started again, stopped by hibernation, started again, and what is in /dev/shm swapped out"
systemctl start $unit || fail "start"
systemctl start systemd-hibernate.service || fail "hibernation"
[ "$(cat /run/hibernated)" = 0 ] && ! is_active || fail "hibernated with swap on"
systemctl start $unit || fail "start"
# Text that compresses, and that the end of the shutdown can make anew to compare.
seq 1 100000000 2> /dev/null | head -c 250M > /dev/shm/file
ghostswap-hog --mib "$hog" --threads 2 --seconds 15 || fail "hog"
echo "$(swapped) MiB in use on $(grep -c ^/dev/ublkb0 /proc/swaps) windows"
[ "$(swapped)" -ge 100 ] || fail "too little to prove anything"
[ $rc = 0 ] || journalctl --no-pager -b | tail -n 150
if [ "$shutdown" = refused ]; then
    cp /bin/false /usr/sbin/swapoff
    mkdir -p /run/systemd/system/$unit.service.d
    printf '[Service]\nExecStop=false\n' > /run/systemd/system/$unit.service.d/refused.conf
    systemctl daemon-reload
fi

# Writes down what changes, until the very end: the @ has systemd spare it too.
cat > /run/watch <<'W'
exec 9<> <(:)
last=
while :; do
    read -r up _ < /proc/uptime
    swap=off dev=gone
    while read -r name _; do [[ $name != /dev/ublkb0* ]] || swap=on; done < /proc/swaps
    [[ ! -e /sys/block/ublkb0 ]] || dev=there
    now="swap $swap, device $dev"
    [[ $now = "$last" ]] || echo "$up $now" >> /run/timeline
    last=$now
    read -t 0.02 -u 9
done
W
systemd-run -q --unit=watch -p DefaultDependencies=no -p KillMode=none bash -c 'exec -a @watch bash /run/watch'
sleep 1
cut -d' ' -f1 /proc/uptime > /run/began
cat > /run/guest-at-shutdown <<END
within=$within shutdown=$shutdown rc=$rc
END
cat >> /run/guest-at-shutdown <<'END'
echo "--- at the end of the shutdown"
echo "$(cat /run/began) shutdown asked for"
cat /run/timeline
read -r now _ < /proc/uptime
echo "$now all that systemd does is done"
fail() { echo "FAILED: $*"; rc=1; }
took=$(echo "$(cat /run/began) $now" | awk '{print int($2 - $1 + 1)}')
echo "$took s"
[ "$took" -le "$within" ] || fail "more than $within s"
want="swap on, device there;swap off, device there;swap off, device gone;"
[ "$shutdown" = orderly ] || want="swap on, device there;swap off, device there;"
[ "$(cut -d' ' -f2- /run/timeline | tr '\n' ';')" = "$want" ] || fail "not in the order wanted"
[ "$(tail -n +2 /proc/swaps | wc -l)" = 0 ] || fail "swap is on"
seq 1 100000000 2> /dev/null | head -c 250M | cmp - /dev/shm/file && echo "every byte in /dev/shm is right" || fail "/dev/shm"
if dmesg | grep -E 'Write-error|Read-error|I/O error|Out of memory|page allocation stall|blocked for more'; then rc=1; fi
exit $rc
END
exit $rc
