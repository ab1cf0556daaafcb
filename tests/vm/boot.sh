#!/bin/sh
# The initramfs: loads what it takes to reach the tools image on /dev/vda, and makes that the root.
# dm_mod comes first in /boot.modules, so that the device mapper has major 254, as on most machines.
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
while read -r module; do insmod "$module" || echo "boot: $module was not loaded" >/dev/console; done </boot.modules
mount -t ext4 -o ro /dev/vda /root || { echo "boot: no tools image" >/dev/console; poweroff -f; }
mount -t tmpfs -o mode=755 run /root/run; cp /job /root/run/job
for folder in proc sys dev; do mount --move /$folder /root/$folder; done
exec switch_root /root /guest.sh
