# Sourced. Finds a CRIU, or unpacks one from a distribution's archive into a
# private prefix and starts it there through its own dynamic loader, so that
# neither the machine's libraries nor its package list change.
#
#   PREFIX/bin/criu   the wrapper to call; its pid becomes CRIU's own
#   PREFIX/loader/    the loader under the name criu (so ps and pgrep show criu)
#   PREFIX/root/      the unpacked packages

criu_minimum=4.1
criu_next_minimum=4.2

# Where a new enough CRIU is, as SUITES and COMPONENTS of the archive that this
# machine already uses; the first suite that has it is taken.
debian_suites=(trixie)
debian_next_suites=(sid)
ubuntu_suites=(resolute questing)

criu_version() {
    "$1" --version 2>/dev/null | sed -n 's/^Version: *//p'
}

# why_unusable CRIU MINIMUM: prints why, or nothing when it is fine.
why_unusable() {
    local version verdict
    version=$(criu_version "$1") || true
    if [[ ! -e $1 ]]; then
        echo "there is none"
    elif [[ -z $version ]]; then
        echo "it does not start"
    elif ! at_least "$version" "$2"; then
        echo "it is $version, at least $2 is needed"
    elif ! verdict=$("$1" check 2>&1); then
        echo "'criu check' says: $(tail -n 1 <<<"$verdict")"
    fi
}

# find_or_make_criu TARGET-DIR: prints the path of a CRIU that can be used.
find_or_make_criu() {
    local target_dir=$1 found why
    if [[ -n ${CRIU:-} ]]; then
        found=$(type -P "$CRIU") || fail "CRIU=$CRIU is not a program." "Unset it, or set it to a CRIU."
        why=$(why_unusable "$found" "$criu_minimum")
        [[ -z $why ]] || fail "CRIU=$CRIU cannot be used: $why." "Unset it, or set it to another CRIU."
        realpath -s "$found"
        return
    fi
    if found=$(type -P criu) && [[ -z $(why_unusable "$found" "$criu_minimum") ]]; then
        realpath -s "$found"
        return
    fi
    make_prefix "$target_dir/criu-prefix" "$criu_minimum" "${debian_suites[@]}"
}

find_or_make_next_criu() {
    local target_dir=$1
    make_prefix "$target_dir/criu-next-prefix" "$criu_next_minimum" "${debian_next_suites[@]}"
}

# make_prefix PREFIX MINIMUM DEBIAN-SUITE...: prints the path of the wrapper.
make_prefix() {
    local prefix=$1 minimum=$2 suite why
    shift 2
    mkdir -p "${prefix%/*}"
    exec 9>"$prefix.lock"
    flock 9
    if [[ -x $prefix/bin/criu && -z $(why_unusable "$prefix/bin/criu" "$minimum") ]]; then
        echo "$prefix/bin/criu"
        return
    fi
    read_archive "$@"
    for suite in "${archive_suites[@]}"; do
        say "fetching CRIU from ${archive_name^} $suite"
        if fetch_packages "$prefix.fetch" "$suite" && unpack_prefix "$prefix.fetch" "$prefix"; then break; fi
    done
    rm -rf "$prefix.fetch"
    why=$(why_unusable "$prefix/bin/criu" "$minimum")
    [[ -z $why ]] || fail "could not make a CRIU $minimum or newer in $prefix: $why." "$(criu_remedy)"
    echo "$prefix/bin/criu"
}

criu_remedy() {
    echo "Install CRIU $criu_minimum or newer (a newer release's package, or https://criu.org/Installation) and set CRIU to its path."
}

os_release() {
    sed -n "s/^$1=\"\{0,1\}\([^\"]*\).*/\1/p" /etc/os-release
}

# read_archive DEBIAN-SUITE...: sets archive_{name,uri,keyring,components,suites}
# from the mirror that this machine's apt is configured for.
read_archive() {
    local id codename
    id=$(os_release ID)
    codename=$(os_release VERSION_CODENAME)
    archive_name=$id
    archive_keyring=/usr/share/keyrings/$id-archive-keyring.gpg
    case $id in
        debian) archive_components=main archive_suites=("$@") ;;
        ubuntu) archive_components='main universe' archive_suites=("${ubuntu_suites[@]}") ;;
        *) fail "no CRIU $criu_minimum here, and no known archive for $id." "$(criu_remedy)" ;;
    esac
    archive_uri=$(mirror_of "$codename")
    if [[ -z $archive_uri ]]; then # apt names no source whose lists it never fetched
        apt_update
        archive_uri=$(mirror_of "$codename")
    fi
    [[ -n $archive_uri ]] || fail "no CRIU $criu_minimum here, and apt has no working ${id^} mirror." "$(criu_remedy)"
}

# mirror_of CODENAME: apt itself reads its sources, whatever their format; the
# entry of this release is best, any other that is not the security archive does.
mirror_of() {
    # shellcheck disable=SC2016 # the names are apt's, not the shell's
    apt-get indextargets --format '$(CREATED_BY) $(COMPONENT) $(RELEASE) $(REPO_URI)' |
        awk -v codename="$1" '
            $1 != "Packages" || $2 != "main" || $3 ~ /security/ { next }
            $3 == codename && !exact { exact = $4 }
            !any { any = $4 }
            END { print exact ? exact : any }'
}

# fetch_packages DIR SUITE: downloads CRIU and everything it depends on, for an
# empty system, into DIR/archives. apt checks the signatures.
fetch_packages() {
    local dir=$1 suite=$2
    rm -rf "$dir"
    mkdir -p "$dir"/state/lists/partial "$dir"/archives/partial
    : >"$dir/status"
    echo "deb [target=Packages arch=$(dpkg --print-architecture) signed-by=$archive_keyring]" \
        "$archive_uri $suite $archive_components" >"$dir/sources.list"
    # Read after the machine's own configuration: its proxies still apply.
    cat >"$dir/apt.conf" <<CONF
Dir::State "$dir/state";
Dir::State::status "$dir/status";
Dir::Cache "$dir";
Dir::Cache::archives "archives/";
Dir::Etc::sourcelist "$dir/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Default-Release "";
APT::Sandbox::User "root";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::Languages "none";
#clear APT::Update;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
CONF
    quietly apt-get -c "$dir/apt.conf" -qq -o Acquire::Retries=2 --error-on=any update ||
        { say "could not read ${archive_name^} $suite from $archive_uri (is $archive_keyring up to date?)" && return 1; }
    quietly apt-get -c "$dir/apt.conf" -qq -o Acquire::Retries=2 \
        install --yes --download-only --no-install-recommends criu ||
        { say "${archive_name^} $suite has no CRIU" && return 1; }
}

# unpack_prefix DIR PREFIX: makes PREFIX anew from DIR/archives.
unpack_prefix() {
    local dir=$1 prefix=$2 root=$2/root package loader libraries
    rm -rf "$prefix"
    mkdir -p "$prefix"/{bin,loader,root}
    for package in "$dir"/archives/*.deb; do
        dpkg -x "$package" "$root"
    done
    rm -rf "${root:?}/usr/share"
    loader=$(find "$root" -type f \( -name 'ld-linux*.so.*' -o -name 'ld64.so.*' \) -print -quit)
    libraries=$(find "$root" -name 'lib*.so.*' -printf '%h\n' | sort -u | paste -sd:)
    ln -s "$(realpath --relative-to="$prefix/loader" "$loader")" "$prefix/loader/criu"
    cat >"$prefix/bin/criu" <<WRAPPER
#!/bin/sh
exec '$prefix/loader/criu' --library-path '$libraries' --argv0 criu '$root/usr/sbin/criu' "\$@"
WRAPPER
    chmod 755 "$prefix/bin/criu"
}
