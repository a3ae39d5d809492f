#!/bin/sh
# In the guest: the kernel's nbd module behind nbd-client's TLS, with a certificate: as a block device only. As
# swap it stands still as soon as memory is short, since nbd-client decrypts in user space.
# Status 1 if data differ, or if the server lets this client where its certificate does not.
# Arguments: EXPORT, OTHER (an export that is not for this client), CONNECTIONS
set -eu
export=$1 other=$2 connections=$3
identity='-enable-tls -cacertfile /etc/ca.pem -certfile /etc/own.pem -keyfile /etc/own-key.pem -tlshostname localhost'
modprobe nbd max_part=0
# shellcheck disable=SC2086
connect() { nbd-client -N "$1" 10.0.2.9 10809 /dev/nbd0 -b 4096 -C "$connections" $2; }
refused() { # WHAT EXPORT OPTIONS
    if connect "$2" "$3" > /tmp/refused 2>&1; then echo "$1 was let in"; exit 1; fi
    echo "$1: $(tail -n 1 /tmp/refused)"
}
refused "without TLS" "$export" ""
refused "with a certificate for another export" "$other" "$identity"
connect "$export" "$identity"
echo "connected: $(cat /sys/block/nbd0/size) sectors, kernel $(uname -r)"
dd if=/dev/urandom of=/tmp/there bs=1M count=32 2> /dev/null
dd if=/tmp/there of=/dev/nbd0 bs=1M oflag=direct conv=fsync 2> /dev/null
dd if=/dev/nbd0 of=/tmp/back bs=1M count=32 iflag=direct 2> /dev/null
cmp /tmp/there /tmp/back
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /mnt
cp /tmp/there /mnt/
umount /mnt
fsck.ext4 -fn /dev/nbd0 > /dev/null
mount /dev/nbd0 /mnt
cmp /tmp/there /mnt/there
umount /mnt
blkdiscard --force /dev/nbd0
nbd-client -d /dev/nbd0
if dmesg | grep -E 'I/O error|Receive control failed|Possible stuck request'; then exit 1; fi
