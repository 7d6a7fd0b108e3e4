#!/bin/bash
# The two commands of the README on a fresh machine: a clean clone on the smallest Debian 12, with Rust.
#
#   tests/bare.sh [FOLDER]      the system is made in FOLDER, which must not exist [a temporary one]
#
# Needs root, on Debian or Ubuntu, and Rust by rustup, whose toolchain and downloads are used in there too. Exit status 3
# where such a system cannot be made.
# TANDEM_MIRROR is where Debian comes from [what debootstrap takes by itself].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

cannot() {
    echo "${0##*/}: no fresh system: $*" >&2
    exit 3
}

need_rust
has rustup || cannot "it takes along the toolchain of a Rust by rustup"
[[ $(id -u) -eq 0 ]] || cannot "that needs root"
(apt_install debootstrap) || cannot "debootstrap cannot be installed"
system=${1:-$(mktemp -d)/debian}
[[ ! -e $system ]] || fail "$system is there already"
made=$(mktemp)
home=/home/newcomer # in there
trap leave EXIT

# What is mounted below must be gone before anything is removed.
leave() {
    local places
    places=$(awk -v below="$system/" 'index($2, below) == 1 { print $2 }' /proc/mounts | sort -r)
    # Detached even while something below is still running.
    for place in $places; do umount --lazy "$place" || return; done
    rm -rf --one-file-system "$system" "$made"
}

say() { echo "== $*" >&2; }

say "the smallest Debian 12"
debootstrap --variant=minbase --include=ca-certificates bookworm "$system" \
    ${TANDEM_MIRROR:+"$TANDEM_MIRROR"} >"$made" 2>&1 ||
    { tail -n 5 "$made" >&2 && cannot "debootstrap could not make it"; }

# How this machine's network reaches packages, where it needs to be told.
for file in /etc/hosts /etc/resolv.conf /etc/pip.conf /etc/npmrc /etc/ssl/certs/ca-certificates.crt \
    "$HOME/.npmrc" "$HOME/.config/pip/pip.conf"; do
    [[ -f $file ]] && install -D -m 644 "$file" "$system${file/#$HOME/$home}"
done
grep -ls '^Acquire' /etc/apt/apt.conf.d/* | xargs -r cp -t "$system/etc/apt/apt.conf.d" || true
mapfile -t told < <(env | grep -E '^(SSL_CERT_FILE|PIP_CERT|PIP_INDEX_URL|NODE_EXTRA_CA_CERTS|https?_proxy)=')

{ mount -t proc proc "$system/proc" && mount --bind /dev "$system/dev" &&
    mount -t tmpfs tmpfs "$system/dev/shm" && mount -t devpts devpts "$system/dev/pts"; } ||
    cannot "nothing can be mounted here"
for place in "${CARGO_HOME:-$HOME/.cargo}:.cargo" "${RUSTUP_HOME:-$HOME/.rustup}:.rustup"; do
    mkdir -p "$system$home/${place##*:}"
    mount --bind "${place%:*}" "$system$home/${place##*:}"
done
git clone -q . "$system$home/tandem"

# in_there COMMAND: in the clone, with nothing of this shell's environment.
in_there() {
    say "$1"
    local begin=$SECONDS
    chroot "$system" env -i HOME="$home" TERM="${TERM:-dumb}" "${told[@]}" \
        PATH="$home/.cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
        bash -c "cd $home/tandem && $1" </dev/null || exit 1
    say "$1: done in $((SECONDS - begin)) s"
}
in_there launch/demo.sh
in_there tests/run.sh
