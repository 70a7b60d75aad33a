# Runs in a fresh Debian system, as root of a chroot: makes a test guest of it. Takes the packages to install as arguments.
set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
mountpoint -q /proc || mount -t proc none /proc
# No service is started in here, and what nobody reads in a test stays out.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
for path in doc man locale info lintian; do
    echo "path-exclude=/usr/share/$path/*"
done >/etc/dpkg/dpkg.cfg.d/outlive
echo force-unsafe-io >>/etc/dpkg/dpkg.cfg.d/outlive
apt-get --quiet update
apt-get --quiet --yes --no-install-recommends install "$@"
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /usr/share/doc/* /usr/share/man/* /usr/share/locale/* /var/cache/debconf/*-old
rm /usr/sbin/policy-rc.d
# Large, and of no use here: the compiler for queries (jit is off), names of hardware, sources of locales.
rm -rf /usr/lib/*/libLLVM* /usr/lib/*/libz3* /usr/lib/*/gconv /usr/lib/postgresql/*/lib/bitcode /usr/lib/udev/hwdb* /usr/share/i18n

echo outlive-guest >/etc/hostname
echo '127.0.0.1 localhost outlive-guest' >/etc/hosts
# root has no password: this image is for tests only.
passwd --quiet --delete root
echo '/dev/vda / ext4 errors=remount-ro 0 1' >/etc/fstab

mkdir -p /etc/systemd/system/serial-getty@.service.d /outlive/acpi/PWRF /etc/systemd/system/redis-server.service.d
printf '[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,57600,38400,9600 %%I $TERM\n' \
    >/etc/systemd/system/serial-getty@.service.d/outlive.conf
cat >/etc/systemd/system/outlive.service <<'UNIT'
[Unit]
Description=What the kernel command line asks of a test guest
After=local-fs.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/outlive/up

[Install]
WantedBy=multi-user.target
UNIT
systemctl enable --quiet outlive.service
systemctl disable --quiet apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer 2>/dev/null || true
# busybox acpid runs every file in the directory of an event.
ln -s /outlive/acpi-power /outlive/acpi/PWRF/00000080

# Servers that clients from outside can use.
sed -i 's/^bind .*/bind 0.0.0.0/; s/^protected-mode .*/protected-mode no/; s/^appendonly .*/appendonly yes/' /etc/redis/redis.conf
cat >/etc/postgresql/15/main/conf.d/outlive.conf <<'CONF'
listen_addresses = '*'
shared_buffers = 32MB
jit = off
autovacuum = off
CONF
echo 'host all all 0.0.0.0/0 trust' >>/etc/postgresql/15/main/pg_hba.conf
sed -i 's/^local\(.*\) peer$/local\1 trust/' /etc/postgresql/15/main/pg_hba.conf

# A database that a load can begin with at once.
mkdir -p /dev/shm /run/postgresql
mount -t tmpfs none /dev/shm
chown postgres:postgres /run/postgresql
pg_ctlcluster 15 main start
su postgres -c 'pgbench --initialize --quiet postgres'
su postgres -c 'vacuumdb --all --analyze --freeze --quiet'
su postgres -c 'psql --quiet --command "CREATE EXTENSION amcheck" --command "CREATE TABLE acknowledged (number bigint PRIMARY KEY, text text)" postgres'
pg_ctlcluster 15 main stop
umount /dev/shm
