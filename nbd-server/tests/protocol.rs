//! The protocol to the byte: chunks, extended headers, errors, and clients that do not keep to it.

mod common;

use common::{qemu_io, Server};

#[test]
fn structured_replies_are_whole_and_bounded() {
    let server = Server::start("chunks", &["--export", "a,size=64M"]);
    let uri = server.uri("a");
    qemu_io(&uri, &["write -P 7 0 256k", "write -P 8 512k 4k"]);
    let mut client = server.connect();
    client.enter_structured(8, b"a");
    // Data, zeros that nothing is stored of, data: each in its chunk, with its place.
    client.request(0, 0, 0, 768 << 10, b"");
    let chunks = client.chunks();
    assert_eq!(
        chunks.iter().map(|(kind, data)| (*kind, data.len())).collect::<Vec<_>>(),
        [(1, 8 + (256 << 10)), (2, 12), (1, 8 + (256 << 10))]
    );
    assert!(chunks[0].1[8..].iter().all(|byte| *byte == 7));
    assert_eq!(chunks[1].1, [(256u64 << 10).to_be_bytes().as_slice(), &(256u32 << 10).to_be_bytes()].concat());
    assert_eq!(chunks[2].1[..8], (512u64 << 10).to_be_bytes());
    assert!(chunks[2].1[8..8 + 4096].iter().all(|byte| *byte == 8));
    // DF: one chunk, or none at all.
    client.request(4, 0, 0, 256 << 10, b"");
    assert_eq!(client.chunks().len(), 1);
    client.request(4, 0, 0, 512 << 10, b"");
    assert_eq!(client.chunks(), [(0x8001, [75u32.to_be_bytes().as_slice(), &[0; 2]].concat())]);
    // Errors of READ and BLOCK_STATUS come in chunks, those of others do not.
    for (flags, command, offset, len) in
        [(0, 0, 1, 512), (0, 0, 64 << 20, 512), (0, 7, 0, 0), (0, 7, 1, 512), (2, 7, 0, 512)]
    {
        client.request(flags, command, offset, len, b"");
        let chunks = client.chunks();
        assert_eq!((chunks.len(), chunks[0].0 >> 15, &chunks[0].1[..4]), (1, 1, &22u32.to_be_bytes()[..]));
    }
    client.request(0, 4, 64 << 20, 512, b"");
    assert_eq!(client.errno(), 22);
    // One extent where one is asked for, of each context; a bounded number where all could differ.
    client.request(8, 7, 0, 1 << 20, b"");
    let extent = |context: u32, len: u32, status: u32| {
        (5, [context, len, status].into_iter().flat_map(u32::to_be_bytes).collect::<Vec<_>>())
    };
    assert_eq!(client.chunks(), [extent(1, 256 << 10, 0), extent(2, 256 << 10, 2)]);
    for page in (0..8192u64).step_by(2) {
        client.request(0, 1, page * 4096, 4096, &[page as u8 | 1; 4096]);
        assert_eq!(client.errno(), 0);
        client.request(0, 4, (page + 1) * 4096, 4096, b"");
        assert_eq!(client.errno(), 0);
    }
    client.request(0, 7, 0, 64 << 20, b"");
    let chunks = client.chunks();
    assert_eq!(chunks.iter().map(|(kind, data)| (*kind, data.len())).collect::<Vec<_>>(), [(5, 4 + 2048 * 8); 2]);
    assert!(chunks[0].1[4..].chunks(8).all(|extent| extent[..4] == 4096u32.to_be_bytes()));
    server.end();
}

#[test]
fn extended_headers_take_lengths_of_16_tebibytes() {
    let server = Server::start("extended", &["--export", "a"]);
    let all = 16u64 << 40;
    let mut client = server.connect();
    client.enter_structured(11, b"a");
    let done = vec![(0u16, vec![])];
    let failed = |errno: u32| vec![(0x8001u16, [errno.to_be_bytes().as_slice(), &[0; 2]].concat())];
    // Data follows a write, and where the flag says so; only a write takes it.
    assert_eq!(client.extended(32, 1, 1 << 20, 4096, &[7; 4096]), done);
    assert_eq!(client.extended(0, 1, 1 << 20, 4096, &[7; 4096]), done);
    assert_eq!(client.extended(32, 0, 0, 4096, &[7; 4096]), failed(22));
    assert_eq!(client.extended(32, 7, 0, 4096, &[7; 4096]), failed(22));
    assert_eq!(client.extended(0, 0, 0, all, b""), failed(22));
    assert_eq!(client.extended(0, 4, 1, u64::MAX, b""), failed(22));
    let chunks = client.extended(0, 0, 1 << 20, 4096, b"");
    assert_eq!((chunks.len(), chunks[0].0, &chunks[0].1[8..]), (1, 1, &[7; 4096][..]));
    let status = |context: u32, extents: &[(u64, u64)]| {
        let head = [context, extents.len() as u32].into_iter().flat_map(u32::to_be_bytes);
        (6u16, head.chain(extents.iter().flat_map(|(len, what)| [*len, *what]).flat_map(u64::to_be_bytes)).collect())
    };
    let rest = all - (1 << 20) - 4096;
    let told = client.extended(0, 7, 0, all, b"");
    let runs = |hole, data| [(1 << 20, hole), (4096, data), (rest, hole)];
    assert_eq!(told, [status(1, &runs(3, 0)), status(2, &runs(0, 2))]);
    assert_eq!(client.extended(0, 5, 0, all, b""), done);
    assert_eq!(client.extended(0, 6, 0, all - 512, b""), done);
    assert_eq!(client.extended(0, 4, 0, all, b""), done);
    assert_eq!(client.extended(0, 3, 0, 0, b""), done);
    assert_eq!(client.extended(0, 7, 0, all, b""), [status(1, &[(all, 3)]), status(2, &[(all, 0)])]);
    // More data than there can be is not waited for.
    client.send(&[&0x21e4_1c71u32.to_be_bytes(), &[0, 32, 0, 0], &[0; 16], &u64::MAX.to_be_bytes()]);
    assert!(client.is_hung_up_on());
    // The weaker form is refused after the stronger.
    let mut client = server.connect();
    client.take(18);
    client.send(&[&3u32.to_be_bytes()]);
    assert_eq!([client.option(11, b""), client.option(8, b""), client.option(11, b"")], [1, 1 << 31 | 10, 1]);
    client.send(&[b"IHAVEOPT", &1u32.to_be_bytes(), &1u32.to_be_bytes(), b"a"]);
    assert!(client.is_hung_up_on());
    server.end();
}

#[test]
fn a_rude_client_hurts_only_itself() {
    let server = Server::start("rude", &["--export", "a,size=1M", "--max-lanes", "8", "--handshake-time", "3"]);
    let huge = [&3u32.to_be_bytes()[..], b"IHAVEOPT", &7u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    let wrong_option = [&3u32.to_be_bytes()[..], b"IHAVEOPZ", &7u32.to_be_bytes(), &0u32.to_be_bytes()].concat();
    for greeting in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], &huge, &wrong_option] {
        let mut client = server.connect();
        client.send(&[greeting]);
        assert!(client.is_hung_up_on(), "{greeting:?}");
    }
    // Options that are malformed get an answer, and the next one is understood.
    let mut client = server.connect();
    client.take(18);
    client.send(&[&3u32.to_be_bytes()]);
    for (option, data, expected) in [
        (7u32, &b"\xff\xff\xff\xff"[..], 3u32),
        (6, b"", 3),
        (6, b"\0\0\0\x04none\0\0", 6),
        (3, b"x", 3),
        (8, b"x", 3),
        (9, b"", 3),
        (10, b"\0\0\0\x01a\0\0\0\0", 3),
        (5, b"", 1),
        (11, b"x", 3),
        (99, &[7; 60000], 1),
        (7, &[0; 60000], 3),
        (7, &[0; (64 << 10) + 1], 9),
        (99, &[7; 1 << 20], 9),
        (3, b"\0", 3),
    ] {
        client.send(&[b"IHAVEOPT", &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data]);
        let reply = client.take(20);
        assert_eq!(reply[12..16], (1 << 31 | expected).to_be_bytes(), "option {option}");
        client.take(u32::from_be_bytes([reply[16], reply[17], reply[18], reply[19]]) as usize);
    }
    // Bad requests get an error, and the next one is served.
    let mut client = server.connect();
    client.enter(b"a");
    let big = vec![1; (32 << 20) + 4096];
    for (flags, command, offset, len, data, expected) in [
        (0, 0, 1 << 20, 512, &b""[..], 22),
        (0, 0, u64::MAX, 4096, b"", 22),
        (0, 0, 1, 512, b"", 22),
        (0, 0, 0, u32::MAX, b"", 22),
        (0, 1, 1 << 20, 512, &[1; 512], 28),
        (0, 1, 0, 100, &[1; 100], 22),
        (0, 1, 0, big.len() as u32, &big, 22),
        (0, 4, 4096, u32::MAX, b"", 22),
        (0, 6, u64::MAX, u32::MAX, b"", 28),
        (0x8000, 3, 0, 0, b"", 22),
        (0, 77, 0, 0, b"", 22),
        (4, 0, 0, 512, b"", 22),
        (0, 7, 0, 4096, b"", 22),
        (0, 5, 1 << 20, 512, b"", 22),
        (0, 5, 0, 1 << 20, b"", 0),
        (16, 6, 0, 512, b"", 0),
        (16, 4, 0, 512, b"", 22),
        (0, 3, 0, 0, b"", 0),
        (1, 1, 4096, 4096, &[9; 4096], 0),
        (0, 1, 0, 0, b"", 0),
        (0, 4, 0, 0, b"", 0),
    ] {
        client.request(flags, command, offset, len, data);
        assert_eq!(client.errno(), expected, "command {command} at {offset}+{len}");
    }
    client.request(0, 0, 4096, 4096, b"");
    assert_eq!(client.errno(), 0);
    assert_eq!(client.take(4096), [9; 4096]);
    // Half a request, then gone; and bytes that are no request.
    client.request(0, 1, 0, 1 << 20, b"too little");
    drop(client);
    let mut client = server.connect();
    client.enter(b"a");
    client.send(&[&[0xee; 28]]);
    assert!(client.is_hung_up_on());
    qemu_io(&server.uri("a"), &["read -P 9 4096 4096"]);
    server.end();
}
