# Runs in the chroot: the initrd of every kernel whose modules are there, as Debian makes it when a kernel is installed.
set -eu
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
mountpoint -q /proc || mount -t proc none /proc
for directory in /lib/modules/*; do
    release=${directory##*/}
    depmod "$release"
    [ -s "/boot/initrd.img-$release" ] || mkinitramfs -o "/boot/initrd.img-$release" "$release"
done
