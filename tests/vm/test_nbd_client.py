"""Linux's own NBD client against nbdmap: over TCP, over TLS, and with four connections, an ext4 on each."""

from pathlib import Path

from tests.support.certificates import make_certificates
from tests.support.server import serving
from tests.vm.harness import Kernel

CONFIG = """
disks: {{ram0: {{memory: 64MiB}}, ram1: {{memory: 64MiB}}}}
tls: {{certificates: {certificates}, verify_peer: true}}
devices:
  plain: {{table: 0 65536 linear ram0 0}}
  joined: {{table: "0 65536 linear ram0 65536\\n65536 65536 linear ram1 65536"}}
  striped: {{table: 0 131072 striped 2 128 ram1 0 ram0 0}}
"""

# attach SECTION EXPORT PORT nbd-client-options...: a file system is made, filled, checked and left behind
JOB = """
mkdir -p /tmp/tree/many; cp -a /bin/busybox /etc /job.sh /tmp/tree
for i in $(seq 50); do seq $((i * 100)) > /tmp/tree/many/$i; done
sums() { (cd "$1" && find . -type f | sort | xargs sha256sum); }
sums /tmp/tree > /tmp/wanted
modprobe nbd; modprobe ext4
attach() {
  section "$1"; name=$2; port=$3; shift 3
  nbd-client 10.0.2.2 "$port" /dev/nbd0 -N "$name" "$@" > /tmp/said 2>&1 || { cat /tmp/said; return; }
  for i in $(seq 100); do [ "$(blockdev --getsize64 /dev/nbd0)" != 0 ] && break; sleep 0.05; done
  echo "size $(blockdev --getsize64 /dev/nbd0)"
  mkfs.ext4 -q /dev/nbd0 && mount -t ext4 /dev/nbd0 /mnt && cp -a /tmp/tree /mnt && sync && umount /mnt || echo failed
  mount -t ext4 /dev/nbd0 /mnt; sums /mnt/tree | cmp - /tmp/wanted && echo same; umount /mnt
  e2fsck -fn /dev/nbd0 > /tmp/fsck 2>&1; echo "e2fsck $?"
  nbd-client -d /dev/nbd0 > /dev/null 2>&1; echo "detach $?"
}
"""


def test_ext4_over_the_kernels_client(kernel: Kernel, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "tls", "10.0.2.2")
    config = CONFIG.format(certificates=certificates)
    listen = ["nbd://127.0.0.1:0", "nbds://127.0.0.1:0"]
    with serving(config, listen=listen) as server:
        plain, encrypted = (address.rpartition(":")[2] for address in server.addresses())
        files = "".join(
            f"cat > /tmp/{name} <<'PEM'\n{(certificates / name).read_text()}PEM\n"
            for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem")
        )
        tls = "-x -certfile /tmp/client-cert.pem -keyfile /tmp/client-key.pem -cacertfile /tmp/ca-cert.pem -tlshostname 10.0.2.2"
        job = f"""{JOB}{files}
            attach tcp plain {plain}
            attach four striped {plain} -C 4
            attach tls joined {encrypted} {tls}
            section refused; nbd-client 10.0.2.2 {encrypted} /dev/nbd0 -N joined > /dev/null 2>&1 || echo refused
            section list; nbd-client -l 10.0.2.2 {plain} 2>/dev/null | grep -v Negotiation
        """
        result = kernel.run(job, processors=4)
        assert result.status == 0, result
        sections = result.sections()
        for name, size in (("tcp", 32 << 20), ("four", 64 << 20), ("tls", 64 << 20)):
            assert sections[name] == f"size {size}\nsame\ne2fsck 0\ndetach 0\n", sections
        assert sections["refused"] == "refused\n"
        assert sections["list"].split() == ["plain", "joined", "striped"]
        log = server.log()
        assert log.count("connected to 'striped'") == 4, log
