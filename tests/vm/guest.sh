#!/bin/sh
# The first process on the tools image: sets the machine up, runs /run/job, reports its status, powers off.
# What the job prints goes to a virtio port of its own, so that no kernel message gets between.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root DM_DISABLE_UDEV=1
exec >/dev/console 2>&1
mount -t tmpfs tmp /tmp; mount -t tmpfs mnt /mnt; mkdir -p /run/lock /run/lvm /run/cryptsetup /run/mdadm /dev/pts
ln -s /proc/self/fd /dev/fd; mount -t devpts pts /dev/pts
for module in virtio_console virtio_net; do modprobe $module; done
ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
port=$(echo /dev/vport*p1)
sh -c '. /job.sh; . /run/job' </dev/null >"$port" 2>&1
status=$?
printf '\n@@@status %s\n' $status >"$port"
sync; poweroff -f
