#!/bin/sh
# systemd and the kubelet write settings of the whole kernel; here they write to copies, and the machine keeps its own.
for name in fs/file-max fs/nr_open vm/overcommit_memory kernel/panic kernel/panic_on_oops \
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    if [ -e "/proc/sys/$name" ]; then
        copy=/kind/kernel/$name
        mkdir -p "${copy%/*}"
        cat "/proc/sys/$name" >"$copy"
        mount --bind "$copy" "/proc/sys/$name" || true
    fi
done
