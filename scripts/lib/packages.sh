# Sourced. Distribution packages and Rust.

# Each entry is PROBE=PACKAGE. The package is missing when its probe is: a
# command, or (with a slash) a file, which may be a pattern.
base_packages=(
    gcc=gcc
    /usr/include/stdio.h=libc6-dev
    /etc/ssl/certs/ca-certificates.crt=ca-certificates
    ip=iproute2
    iptables=iptables
    nft=nftables
    nsenter=util-linux
    sysctl=procps
    modprobe=kmod
    /usr/bin/python3=python3
)
# What the tests move from host to host.
test_packages=(
    redis-server=redis-server
    runc=runc
    '/usr/lib/postgresql/*/bin/postgres=postgresql'
    node=nodejs
)
rust_minimum=1.85

probe() {
    case $1 in
        /*) compgen -G "$1" >/dev/null ;;
        *) type -P "$1" >/dev/null ;;
    esac
}

# ensure_packages PROBE=PACKAGE...
ensure_packages() {
    local entry missing=()
    for entry in "$@"; do
        probe "${entry%=*}" || missing+=("${entry##*=}")
    done
    ((${#missing[@]})) || return 0
    install_packages "${missing[@]}" || fail "could not install ${missing[*]} with apt-get." \
        "Install them by hand, or repair apt's sources, and run this again."
}

apt_updated=no
apt_update() {
    [[ $apt_updated == no ]] || return 0
    apt_updated=yes
    type -P apt-get >/dev/null || fail "this is not a Debian or Ubuntu machine (no apt-get)." \
        "Install by hand: ${base_packages[*]##*=} ${test_packages[*]##*=}, Rust $rust_minimum, CRIU 4.1."
    # A source that fails may not be the one that matters: the install decides.
    quietly apt-get -qq update || say "apt-get update failed; going on with the lists at hand"
}

install_packages() {
    apt_update
    say "installing $*"
    with_services_held "$@"
}

# Installs packages while a policy keeps their services from starting; what is
# new stays off at the next boot as well.
with_services_held() (
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    quietly apt-get -qq -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 \
        install --yes --no-install-recommends "$@" || exit
    if [[ -d /run/systemd/system ]]; then
        for service in redis-server postgresql; do
            [[ " $* " != *" $service "* ]] || systemctl --quiet disable --now "$service" >&2 || true
        done
    fi
)

rust_version() {
    local version
    version=$(cargo --version 2>/dev/null) || version=
    version=${version#cargo }
    echo "${version%% *}"
}

ensure_rust() {
    local version candidate
    version=$(rust_version)
    if [[ -n $version ]] && at_least "$version" "$rust_minimum"; then return; fi
    if [[ -z $version ]]; then
        apt_update
        candidate=$(LC_ALL=C apt-cache policy cargo | sed -n 's/^ *Candidate: *\([0-9.]*\).*/\1/p')
        if [[ -n $candidate ]] && at_least "$candidate" "$rust_minimum"; then
            install_packages cargo rustc rustfmt rust-clippy && return
        fi
    fi
    fail "Rust $rust_minimum or newer is needed, here is ${version:-none}." \
        "Get rustup (apt-get install rustup on Debian 13 and Ubuntu 24.04, else https://rustup.rs)," \
        "then: rustup default stable."
}
