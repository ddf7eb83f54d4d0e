#!/bin/sh
# Makes a node of a plain Debian, as images/base/Dockerfile of kind does it; runs in there by chroot.
set -eu
chmod 0755 /kind /kind/bin /kind/bin/* /usr/local/bin/*
rm -f /lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service /lib/systemd/system/multi-user.target.wants/* \
    /etc/systemd/system/*.wants/* /lib/systemd/system/local-fs.target.wants/* /lib/systemd/system/sockets.target.wants/*udev* \
    /lib/systemd/system/sockets.target.wants/*initctl* /lib/systemd/system/basic.target.wants/*
echo ReadKMsg=no >>/etc/systemd/journald.conf
ln -sf /usr/lib/systemd/systemd /sbin/init
systemctl enable kubelet.service containerd.service undo-mount-hacks.service
systemctl mask systemd-binfmt.service
mkdir -p /etc/kubernetes/manifests /etc/cni/net.d /opt/cni/bin
# Debian's own are settings of the whole kernel, so of the machine; kind's are of the node's network.
rm -f /usr/lib/sysctl.d/*.conf /etc/sysctl.d/99-sysctl.conf
sed -i 's|^exec "\$@"$|/kind/bin/keep-kernel-settings.sh\nexec "$@"|' /usr/local/bin/entrypoint
grep -q keep-kernel-settings /usr/local/bin/entrypoint
# Not everybody may lower a score of the out-of-memory killer.
sed -i 's/restrict_oom_score_adj = false/restrict_oom_score_adj = true/' /etc/containerd/config.toml
/usr/local/bin/ctr oci spec |
    jq '.hooks.createContainer[.hooks.createContainer | length] |= . + {"path": "/kind/bin/mount-product-files.sh"}
        | del(.process.rlimits)' >/etc/containerd/cri-base.json
