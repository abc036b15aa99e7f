# Sourced. What `experiments run vs-qemu` needs: QEMU, and a kernel for its
# guest. The kernel is unpacked from the distribution's package and not
# installed: this machine goes on booting what it boots.

guest_packages=(
    qemu-system-x86_64=qemu-system-x86
)

# ensure_guest_kernel TARGET-DIR: prints the path of a kernel image.
ensure_guest_kernel() {
    local kernel=$1/guest-kernel/vmlinuz dir meta package
    if [[ ! -s $kernel ]]; then
        case $(os_release ID) in
            debian) meta=linux-image-cloud-amd64 ;;
            ubuntu) meta=linux-image-virtual ;;
            *) fail "no known kernel package for $(os_release ID)." "Put a kernel image at $kernel." ;;
        esac
        apt_update
        package=$(apt-cache depends "$meta" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
        [[ -n $package ]] || fail "apt knows no $meta." "Put a kernel image at $kernel."
        say "fetching $package for the guest of vs-qemu"
        mkdir -p "${kernel%/*}"
        dir=$(mktemp -d -p "${kernel%/*}")
        chmod 755 "$dir"
        (cd "$dir" && quietly apt-get -qq -o APT::Sandbox::User=root download "$package" && dpkg -x ./*.deb root) ||
            fail "could not fetch $package." "Put a kernel image at $kernel."
        mv "$dir"/root/boot/vmlinuz-* "$kernel"
        rm -rf "$dir"
    fi
    echo "$kernel"
}
