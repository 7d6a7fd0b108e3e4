# shellcheck shell=bash
# Sourced by the scripts that people run first: one clear line when something is missing.

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

# apt_install PACKAGE...: installs those that are missing, with sudo where that is needed.
apt_install() {
    local package missing=() as_root=()
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' ||
            missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    has apt-get || fail "not Debian or Ubuntu: install what provides ${missing[*]}, then run this again"
    if [[ $(id -u) -ne 0 ]]; then
        has sudo || fail "neither root nor sudo: have ${missing[*]} installed, then run this again"
        as_root=(sudo)
    fi
    echo "installing ${missing[*]}" >&2
    # A source that cannot be reached need not be the one that is wanted: installing decides.
    "${as_root[@]}" apt-get update -qq >/dev/null </dev/null || true
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null </dev/null ||
        fail "could not install ${missing[*]}"
}

# The Rust toolchain, and the C compiler that some crates build with.
need_rust() {
    # rustup puts cargo there; a shell that was open before it ran does not know yet.
    has cargo || PATH=$PATH:$HOME/.cargo/bin
    has cargo || fail "cargo not found: install Rust from https://rustup.rs, then run this again"
    has cc || apt_install gcc libc6-dev
}
