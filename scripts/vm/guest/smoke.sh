# Guest script: is this kernel fit for the tests? ublk's control device must
# appear, and swapping on and off must work (on zram).
set -eu
uname -r
modprobe ublk_drv
[ -c /dev/ublk-control ] || { echo "no /dev/ublk-control"; exit 1; }
modprobe zram num_devices=1
echo 64M >/sys/block/zram0/disksize
mkswap /dev/zram0 >/dev/null
swapon /dev/zram0
grep -q zram0 /proc/swaps || { echo "swap is not on"; exit 1; }
swapoff /dev/zram0
echo ok
