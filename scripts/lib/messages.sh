# Sourced. Messages go to standard error: standard output is for results.

say() {
    echo "setup: $*" >&2
}

# fail WHAT REMEDY...: one message, then the end.
fail() {
    echo "setup: $1" >&2
    shift
    printf '       %s\n' "$@" >&2
    exit 1
}

# at_least VERSION MINIMUM: does VERSION (dotted numbers) reach MINIMUM?
at_least() {
    printf '%s\n%s\n' "$2" "$1" | sort --check=quiet --version-sort
}

# quietly COMMAND...: shows what a command printed only if it fails.
quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || status=$?
    ((status == 0)) || cat "$log" >&2
    rm -f "$log"
    return "$status"
}
