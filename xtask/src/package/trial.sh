#!/bin/sh
# The life of the package on a clean system: install, use, upgrade, remove, purge. Runs as the root of that system, in
# namespaces of its own, so that nothing of it is left when it ends.
set -eu

step() { echo "--- $1"; }
fail() { echo "the package's trial: $1" >&2; exit 1; }
has() { printf '%s' "$1" | grep -qF -- "$2" || fail "'$2' is missing in: $1"; }
# How a file or directory is: its mode, owner and group.
is() { [ "$(stat -c '%a %U %G' "$1")" = "$2" ] || fail "$1 is $(stat -c '%a %U %G' "$1") and not $2"; }

step "install"
dpkg -i /outlive.deb
is /usr/bin/outlive "755 root root"
for helper in drain-to-stop leave-to-standby; do is "/usr/lib/outlive/$helper" "755 root root"; done
for unit in outlive@ outlive-node outlive-arbiter outlive-metrics; do
    is "/usr/lib/systemd/system/$unit.service" "644 root root"
done
for directory in /etc/outlive /etc/outlive/vms /var/lib/outlive; do is "$directory" "755 root root"; done
conffiles=$(dpkg-query -W -f '${Conffiles}' outlive)
for file in node arbiter metrics; do has "$conffiles" "/etc/outlive/$file.conf"; done
[ "$(printf '%s\n' "$conffiles" | grep -c .)" = 3 ] || fail "other conffiles: $conffiles"
getent passwd outlive >/dev/null || fail "there is no user outlive"
if getent group kvm >/dev/null; then has "$(id -nG outlive)" kvm; fi
[ -e /usr/share/doc/outlive/docs/node.md ] || fail "the documents are missing"
if find / -xdev -newer /trial.sh -user outlive 2>/dev/null | grep -q .; then fail "files belong to the user outlive"; fi
for link in /etc/systemd/system/*.wants/outlive*; do [ ! -e "$link" ] || fail "$link: nobody has asked for it"; done

step "use"
has "$(outlive --version)" "outlive $VERSION"
echo "ip = '10.0.0.5/24'" >/etc/outlive/vms/web.toml
has "$(outlive node check)" "1 definitions can be used"
has "$(man outlive-vm-start | cat)" "EXIT STATUS"
has "$(man -k '^outlive' 2>/dev/null || apropos -r '^outlive')" "outlive-node-drain"
completed=$(bash -c '
    source /usr/share/bash-completion/bash_completion
    _completion_loader outlive || [ $? = 124 ]
    COMP_WORDS=(outlive vm start "") COMP_CWORD=3 COMP_TYPE=9
    _clap_complete_outlive outlive "" start
    printf "%s\n" "${COMPREPLY[@]}"')
has "$completed" web
for file in zsh/vendor-completions/_outlive fish/vendor_completions.d/outlive.fish; do
    [ -s "/usr/share/$file" ] || fail "$file is missing"
done

# A VM of the built-in guest, without a card and unprotected.
vm=
if [ -e /dev/kvm ]; then
    step "a VM runs"
    outlive run --name web --memory 64M >/vm.log 2>&1 &
    vm=$!
    for _ in $(seq 600); do
        if outlive status 2>/dev/null | grep -q "process: *$vm"; then break; fi
        kill -0 "$vm" 2>/dev/null || { cat /vm.log >&2; fail "the VM does not run"; }
        sleep 0.2
    done
    has "$(outlive status || true)" "web: primary, UNPROTECTED"
else
    echo "skipped: a VM during the upgrade and the removal: no /dev/kvm"
fi

step "upgrade over itself, with a service manager that notes down what it is told"
mkdir -p /run/systemd/system /fake
cat >/fake/systemctl <<'END'
#!/bin/sh
echo "$*" >>/fake/told
END
chmod 755 /fake/systemctl
echo "# mine" >>/etc/outlive/node.conf
PATH=/fake:$PATH dpkg -i /outlive.deb
has "$(cat /fake/told)" "try-restart outlive-node.service"
if grep -q 'outlive@' /fake/told; then fail "a VM's unit was touched: $(cat /fake/told)"; fi
if grep -E '(^| )(stop|kill|restart) ' /fake/told; then fail "something was stopped: $(cat /fake/told)"; fi
has "$(cat /etc/outlive/node.conf)" "# mine"
if [ -n "$vm" ]; then
    has "$(outlive status || true)" "$vm"
    step "a removal is refused while the VM runs"
    if said=$(PATH=/fake:$PATH dpkg -r outlive 2>&1); then fail "it was removed under a VM"; fi
    has "$said" "processes $vm"
    has "$said" "outlive node drain"
    has "$(dpkg-query -W -f '${Status}' outlive)" "install ok installed"
    kill -0 "$vm" || fail "the VM was ended"
    kill "$vm"
    kill "$vm" 2>/dev/null || true
    wait "$vm" || fail "the VM ended with $?"
fi

step "remove"
: >/fake/told
PATH=/fake:$PATH dpkg -r outlive
has "$(cat /fake/told)" "stop outlive-node.service"
[ ! -e /usr/bin/outlive ] || fail "the program is still there"
[ -e /etc/outlive/node.conf ] || fail "a removal is no purge"
[ -e /etc/outlive/vms/web.toml ] || fail "the definitions are gone before the purge"

step "purge"
mkdir -p /srv /var/lib/outlive/node /var/log/outlive /etc/outlive/keys /etc/outlive/keys-ca /var/lib/outlive-arbiter
touch /srv/web.img /var/lib/outlive/db.img /var/lib/outlive/node/web.json /etc/outlive/keys-ca/key
# A CA where release 0.2.0 had it, where somebody has put it, and under another name; and certificates, which are no keys.
mkdir -p /etc/outlive/old.keys /etc/outlive/site-ca /etc/outlive/more /etc/outlive/etcd
pem() { printf -- '-----BEGIN %s-----\nAA==\n-----END %s-----\n' "$1" "$1"; }
for key in old.keys/ca.pem site-ca/ca.pem more/our-ca.key; do pem 'PRIVATE KEY' >"/etc/outlive/$key"; done
pem CERTIFICATE >/etc/outlive/etcd/etcd-ca.pem
pem CERTIFICATE >/etc/outlive/keys/ca.crt
pem 'PRIVATE KEY' >/etc/outlive/keys/host.pem
echo 'disk = ["path=/srv/web.img,thin", "path=/srv/missing.img"]' >>/etc/outlive/vms/web.toml
said=$(PATH=/fake:$PATH dpkg -P outlive 2>&1)
echo "$said"
for key in old.keys/ca.pem site-ca/ca.pem more/our-ca.key; do
    [ -s "/etc/outlive/$key" ] || fail "the CA's key /etc/outlive/$key is gone"
done
for kept in /srv/web.img /var/lib/outlive/db.img /etc/outlive/keys-ca /var/lib/outlive-arbiter \
    /etc/outlive/old.keys /etc/outlive/site-ca /etc/outlive/more; do
    [ -e "$kept" ] || fail "$kept is gone"
    has "$said" "$kept"
done
case "$said" in *missing.img*) fail "an image is named that is not there" ;; esac
for gone in /etc/outlive/node.conf /etc/outlive/vms /etc/outlive/keys /etc/outlive/etcd /var/lib/outlive/node \
    /var/log/outlive; do
    [ ! -e "$gone" ] || fail "$gone is still there"
done
echo "the package is good"
