//! Real clients (nbdinfo, nbdcopy, nbdsh, qemu-io, qemu-img, fio) against the real server.
//!
//! Needs the Debian packages libnbd-bin, python3-libnbd, qemu-utils and fio.

mod common;

use common::{qemu_io, run, write_image, Server};
use std::process::Command;

#[test]
fn nbdinfo_sees_the_exports() {
    let server = Server::start("info", &["--export", "big", "--export", "small,size=64M"]);
    assert_eq!(run(Command::new("nbdinfo").args(["--size", &server.uri("big")])).trim(), (16u64 << 40).to_string());
    let text = run(Command::new("nbdinfo").arg(server.uri("small")));
    for expected in [
        "export-size: 67108864",
        "is_rotational: false",
        "can_flush: true",
        "can_fua: true",
        "can_trim: true",
        "can_zero: true",
        "can_multi_conn: true",
        "block_size_minimum: 512",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(text.contains(expected), "no '{expected}' in\n{text}");
    }
    let list = run(Command::new("nbdinfo").args(["--list", &server.uri("")]));
    assert!(list.contains("export=\"big\"") && list.contains("export=\"small\""), "{list}");
    assert!(!Command::new("nbdinfo").arg(server.uri("none")).output().unwrap().status.success());
    server.end();
}

#[test]
fn nbdcopy_brings_back_what_it_took() {
    let server = Server::start("copy", &["--export", "a,size=48M", "--tier", "ram,limit=256M"]);
    let (there, back) = (server.directory.join("there"), server.directory.join("back"));
    let image = write_image(&there, 48 << 20);
    run(Command::new("nbdcopy").arg(&there).arg(server.uri("a")));
    run(Command::new("nbdcopy").arg(server.uri("a")).arg(&back));
    assert!(std::fs::read(&back).unwrap() == image, "nbdcopy read back something else");
    // One big request after the other, over one connection.
    let options = ["--connections=1", "--requests=2", "--request-size=33554432"];
    run(Command::new("nbdcopy").args(options).arg(server.uri("a")).arg(&back));
    assert!(std::fs::read(&back).unwrap() == image, "big requests read back something else");
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&there).arg(server.uri("a")));
    server.end();
}

#[test]
fn qemu_io_writes_trims_and_zeroes() {
    let server = Server::start("qemu", &["--export", "a,size=64M"]);
    let uri = server.uri("a");
    qemu_io(&uri, &["read -P 0 0 1M", "write -P 0x5a 0 8M", "write -f -P 0xa5 1536 2560", "flush"]);
    qemu_io(&uri, &["read -P 0x5a 0 1536", "read -P 0xa5 1536 2560", "read -P 0x5a 4096 8384512"]);
    qemu_io(&uri, &["discard 1M 1M", "write -z 4M 1M", "write -z -u 5M 512", "flush"]);
    qemu_io(&uri, &["read -P 0 1M 1M", "read -P 0x5a 2M 2M", "read -P 0 4M 1M", "read -P 0 5M 512"]);
    qemu_io(&uri, &["read -P 0x5a 5243392 1M", "write -P 7 33M 31M", "read -P 7 33M 31M"]);
    server.end();
}

#[test]
fn sixteen_tebibytes_cost_nothing_until_written() {
    let server = Server::start("sparse", &["--export", "a", "--tier", "ram,limit=64M"]);
    let last = (16u64 << 40) - (1 << 20);
    let (write, read) = (format!("write -P 3 {last} 1M"), format!("read -P 3 {last} 1M"));
    qemu_io(&server.uri("a"), &[&write, "write -P 4 8T 64k", "write -P 5 0 4k"]);
    qemu_io(&server.uri("a"), &[&read, "read -P 4 8T 64k", "read -P 5 0 4k", "read -P 0 12T 16M"]);
    qemu_io(&server.uri("a"), &["discard 0 1G", "read -P 0 0 4k"]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.worker())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let resident_kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(resident_kib < 128 << 10, "{line}");
    server.end();
}

#[test]
fn qemu_img_converts_to_and_from() {
    let server = Server::start("convert", &["--export", "a,size=16M"]);
    let (raw, qcow) = (server.directory.join("raw"), server.directory.join("qcow2"));
    write_image(&raw, 16 << 20);
    run(Command::new("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&raw).arg(server.uri("a")));
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(server.uri("a")).arg(&qcow));
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2"]).arg(&raw).arg(&qcow));
    server.end();
}

#[test]
fn clients_see_what_lies_where() {
    let server = Server::start("map", &["--export", "a", "--export", "old,size=1M,ro"]);
    let uri = server.uri("a");
    let write = ["write -P 7 1M 64k", "write -z 2M 64k", "discard 2M 32k", "write -P 9 15T 4k"];
    qemu_io(&uri, &write);
    let map = |context: &str| run(Command::new("nbdinfo").args([&format!("--map={context}"), &uri]));
    let rows = |text: &str| -> Vec<Vec<String>> {
        text.lines().map(|line| line.split_whitespace().take(3).map(str::to_owned).collect()).collect()
    };
    let (m, t) = (1u64 << 20, 1u64 << 40);
    let expected = |wanted: &[(u64, u64, u32)]| -> Vec<Vec<String>> {
        wanted.iter().map(|(at, len, what)| vec![at.to_string(), len.to_string(), what.to_string()]).collect()
    };
    let tail = (15 * t + 4096, t - 4096);
    let from = m + (64 << 10);
    // A page of one byte is filled; zeros that were written are dropped pages.
    let wanted = [(0, m, 3), (m, 64 << 10, 0), (from, 15 * t - from, 3), (15 * t, 4096, 0), (tail.0, tail.1, 3)];
    assert_eq!(rows(&map("base:allocation")), expected(&wanted));
    let wanted = wanted.map(|(at, len, what)| (at, len, if what == 3 { 0 } else { 2 }));
    assert_eq!(rows(&map("ghostswap:kind")), expected(&wanted));
    let text = run(Command::new("nbdinfo").arg(&uri));
    for expected in ["base:allocation", "ghostswap:kind", "can_df: true", "can_cache: true", "can_fast_zero: true"] {
        assert!(text.contains(expected), "no '{expected}' in\n{text}");
    }
    let text = run(Command::new("qemu-img").args(["map", "--output=json", "-f", "raw", &uri]));
    assert_eq!(text.matches("\"zero\": true").count(), 3, "{text}");
    assert_eq!(text.matches("\"data\": true").count(), 2, "{text}");
    let text = run(Command::new("nbdinfo").arg(server.uri("old")));
    assert!(text.contains("is_read_only: true") && text.contains("can_trim: false"), "{text}");
    let mut client = server.connect();
    client.enter(b"old");
    for (command, data) in [(1, &[1; 4096][..]), (4, b""), (6, b"")] {
        client.request(0, command, 0, 4096, data);
        assert_eq!(client.errno(), 1, "command {command}");
    }
    server.end();
}

#[test]
fn nbdsh_tries_every_option_and_command() {
    let server = Server::start("nbdsh", &["--export", "a,size=16M", "--export", "long-name,size=1M,ro"]);
    for script in ["options.py", "commands.py"] {
        let path = format!("{}/tests/nbdsh/{script}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).unwrap();
        // Debian's nbdsh is a module of Debian's Python, whatever other Python comes first.
        run(Command::new("nbdsh")
            .args(["-n", "-c", &text])
            .env("SOCKET", server.socket())
            .env("PATH", "/usr/bin:/bin"));
    }
    server.end();
}

#[test]
fn fio_verifies_what_it_wrote() {
    let server = Server::start("fio", &["--export", "a,size=32M", "--tier", "ram,limit=128M,codec=zstd:1"]);
    let uri = format!("--uri={}", server.uri("a"));
    for (name, size) in [("random", "--bsrange=512-64k"), ("large", "--bs=1M")] {
        let job =
            ["--ioengine=nbd", "--size=32M", "--rw=randwrite", "--iodepth=16", "--verify=crc32c", "--do_verify=1"];
        let more = ["--verify_fatal=1", "--buffer_compress_percentage=50", "--minimal", "--bs_unaligned=0"];
        run(Command::new("fio").arg(format!("--name={name}")).args(job).args(more).args([size, &uri]));
    }
    server.end();
}
