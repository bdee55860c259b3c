#!/bin/bash
# Starts a machine of the cluster in a box: login (slurmctld, sshd) or a compute node (slurmd).
set -euo pipefail
chmod 666 /dev/fuse                       # Docker makes it root's; Apptainer mounts SIFs with it
install -d -m 1777 /scratch
install -d -o student -g student /scratch/student
install -d -o other -g other /scratch/other
[ ! -d /sif ] || install -d -o student -g student /sif
install -d -o munge -g munge -m 755 /run/munge
install -o munge -g munge -m 400 /cluster/munge.key /etc/munge/munge.key
runuser -u munge -- munged
case "$1" in
  login)
    ssh-keygen -qA
    /usr/sbin/sshd
    exec slurmctld -D
    ;;
  compute)
    # Docker's internal networks drop what leaves them; without a route the kernel refuses and
    # counts it (OutNoRoutes), which is what the tests read.
    ip route del default || true
    # With an address on loopback the kernel counts what leaves by IPv6 too, and ::1 is no such thing.
    (echo 0 > /proc/sys/net/ipv6/conf/lo/disable_ipv6) 2> /dev/null || true
    exec slurmd -D
    ;;
esac
