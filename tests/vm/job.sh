# What every job can use; it is read in before the job.

# section NAME: what is printed from here on is Result.sections()[NAME].
section() { printf '\n@@@section %s\n' "$1"; }

# Debian's busybox shell prefers its own applets, which know fewer options.
losetup() { /bin/losetup "$@"; }
blockdev() { /bin/blockdev "$@"; }
blkdiscard() { /bin/blkdiscard "$@"; }

# disk LOOP BYTES [losetup option...]: a sparse file of that size as /dev/LOOP.
disk() {
  truncate -s "$2" "/tmp/$1.img"; _loop=$1; shift 2
  losetup "$@" "/dev/$_loop" "/tmp/$_loop.img"
}
