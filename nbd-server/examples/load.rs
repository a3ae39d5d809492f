//! A load on an NBD server that costs its client little: requests from whole buffers, replies by the bufferful,
//! as many of both to a system call as there are. For `scripts/bench/nbd`.
//!
//! Prints MiB/s, the client's CPU microseconds for 4 KiB, and the requests done. The content of a page follows
//! from its place, so that what is read is known: of each reply to a read the first bytes are compared.

use clap::{Parser, ValueEnum};
use std::io::{IoSlice, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REQUEST_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;
/// Of a request; a multiple of what else they may be.
const MAX_BYTES: usize = 128 << 10;
const COMPARED_BYTES: usize = 64;

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Command {
    Read,
    Write,
    /// Rude: asks for more than it takes, which is nothing.
    Stall,
    /// Rude: connects and leaves, again and again.
    Knock,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Order {
    Random,
    Sequential,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Content {
    /// The file's.
    Pages,
    Zero,
    /// One pattern of 8 bytes for each page.
    Filled,
    /// Nothing that is known: a server without memory.
    Any,
}

#[derive(Parser)]
struct Args {
    socket: PathBuf,
    command: Command,
    order: Order,
    content: Content,
    /// Pages, one after another
    #[arg(long)]
    pages: PathBuf,
    /// Of a request
    #[arg(long)]
    bytes: usize,
    /// The part of the export that is used, from its beginning
    #[arg(long)]
    mib: usize,
    /// 0: once over all of it
    #[arg(long, default_value_t = 0.0)]
    seconds: f64,
    /// Requests in flight on each connection
    #[arg(long, default_value_t = 16)]
    depth: usize,
    #[arg(long, default_value_t = 1)]
    connections: usize,
}

struct Client<'a> {
    socket: UnixStream,
    args: &'a Args,
    image: &'a [u8],
    state: u64,
    next: usize,
    /// What each request in flight is for.
    places: Vec<usize>,
    free: Vec<usize>,
    heads: Vec<[u8; REQUEST_BYTES]>,
    input: Vec<u8>,
    start: usize,
    end: usize,
}

/// What the export is to hold, over and over.
fn image(args: &Args) -> Result<Vec<u8>> {
    let mut image = std::fs::read(&args.pages)?;
    for (number, page) in image.chunks_mut(PAGE).enumerate() {
        match args.content {
            Content::Pages | Content::Any => {}
            Content::Zero => page.fill(0),
            Content::Filled => {
                page.chunks_mut(8).for_each(|word| word.copy_from_slice(&(number as u64 + 1).to_le_bytes()))
            }
        }
    }
    // The same for all sizes of requests.
    image.truncate(image.len() / MAX_BYTES * MAX_BYTES);
    Ok(image)
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let mut socket = UnixStream::connect(socket)?;
    socket.read_exact(&mut [0; 18])?;
    // Fixed newstyle without zeroes; EXPORT_NAME, the default export; size and flags.
    socket.write_all(&[&3u32.to_be_bytes()[..], b"IHAVEOPT", &1u32.to_be_bytes(), &0u32.to_be_bytes()].concat())?;
    socket.read_exact(&mut [0; 10])?;
    Ok(socket)
}

impl Client<'_> {
    fn place(&mut self) -> usize {
        let count = (self.args.mib << 20) / self.args.bytes;
        let number = match self.args.order {
            Order::Sequential => self.next % count,
            Order::Random => {
                self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (self.state >> 33) as usize % count
            }
        };
        self.next += 1;
        number * self.args.bytes
    }

    /// A request for each that was answered, all of them in one go.
    fn send(&mut self, most: usize) -> Result<usize> {
        let numbers: Vec<usize> = self.free.drain(..most.min(self.free.len())).collect();
        for &number in &numbers {
            let place = self.place();
            self.places[number] = place;
            let head = &mut self.heads[number];
            head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            head[7] = (self.args.command == Command::Write) as u8;
            head[8..16].copy_from_slice(&(number as u64).to_be_bytes());
            head[16..24].copy_from_slice(&(place as u64).to_be_bytes());
            head[24..].copy_from_slice(&(self.args.bytes as u32).to_be_bytes());
        }
        let mut slices = Vec::with_capacity(2 * numbers.len());
        for &number in &numbers {
            slices.push(IoSlice::new(&self.heads[number]));
            if self.args.command == Command::Write {
                let at = self.places[number] % self.image.len();
                slices.push(IoSlice::new(&self.image[at..at + self.args.bytes]));
            }
        }
        let mut slices = &mut slices[..];
        while !slices.is_empty() {
            let sent = self.socket.write_vectored(slices)?;
            IoSlice::advance_slices(&mut slices, sent);
        }
        Ok(numbers.len())
    }

    /// Takes in what has come, and all of the reply that it ends in.
    fn receive(&mut self) -> Result<usize> {
        let reply = REPLY_BYTES + if self.args.command == Command::Read { self.args.bytes } else { 0 };
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.input.len() - self.start < reply {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < reply {
            match self.socket.read(&mut self.input[self.end..])? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => self.end += read,
            }
        }
        let mut replies = 0;
        while self.end - self.start >= reply {
            let bytes = &self.input[self.start..self.start + reply];
            let number = u64::from_be_bytes(bytes[8..16].try_into().expect("8 bytes")) as usize;
            assert_eq!(bytes[4..8], [0; 4], "the server refused a request");
            if self.args.command == Command::Read && self.args.content != Content::Any {
                let at = self.places[number] % self.image.len();
                let (got, want) = (&bytes[REPLY_BYTES..][..COMPARED_BYTES], &self.image[at..at + COMPARED_BYTES]);
                assert!(got == want, "something else at byte {}", self.places[number]);
            }
            self.free.push(number);
            self.start += reply;
            replies += 1;
        }
        Ok(replies)
    }

    /// The requests done.
    fn run(&mut self) -> Result<usize> {
        let begun = Instant::now();
        let (length, all) = (Duration::from_secs_f64(self.args.seconds), (self.args.mib << 20) / self.args.bytes);
        let (mut sent, mut done) = (0, 0);
        loop {
            let passed = begun.elapsed();
            let wanted = if self.args.seconds > 0.0 { usize::MAX * usize::from(passed < length) } else { all };
            sent += self.send(wanted.saturating_sub(sent))?;
            if sent == done {
                return Ok(done);
            }
            done += self.receive()?;
        }
    }
}

/// Of the calling thread, in seconds.
fn thread_cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    stat.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}

/// Is rude for as long as it is told to.
fn be_rude(args: &Args) -> Result<()> {
    let (begun, length) = (Instant::now(), Duration::from_secs_f64(args.seconds));
    if args.command == Command::Stall {
        let (mut socket, mut request) = (connect(&args.socket)?, [0; REQUEST_BYTES]);
        request[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request[24..].copy_from_slice(&(32u32 << 20).to_be_bytes());
        (0..64).try_for_each(|_| socket.write_all(&request))?;
        std::thread::sleep(length);
    }
    while begun.elapsed() < length {
        UnixStream::connect(&args.socket)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    if matches!(args.command, Command::Stall | Command::Knock) {
        return be_rude(&args);
    }
    let image = image(&args)?;
    let input = vec![0; (2 << 20).max(2 * (args.bytes + REPLY_BYTES))];
    let clients = (0..args.connections).map(|number| {
        Ok(Client {
            socket: connect(&args.socket)?,
            args: &args,
            image: &image,
            state: 77 + number as u64,
            next: number * 7919,
            places: vec![0; args.depth],
            free: (0..args.depth).collect(),
            heads: vec![[0; REQUEST_BYTES]; args.depth],
            input: input.clone(),
            start: 0,
            end: 0,
        })
    });
    let mut clients = clients.collect::<Result<Vec<_>>>()?;
    let begun = Instant::now();
    let (done, client_cpu) = std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter_mut()
            .map(|client| {
                scope.spawn(|| {
                    let before = thread_cpu();
                    client.run().map(|done| (done, thread_cpu() - before))
                })
            })
            .collect();
        let results = threads.into_iter().map(|thread| thread.join().expect("it says why it panicked"));
        results
            .collect::<Result<Vec<_>>>()
            .map(|all| all.iter().fold((0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1)))
    })?;
    let took = begun.elapsed().as_secs_f64();
    let mib = done as f64 * args.bytes as f64 / (1 << 20) as f64;
    println!("{:.1} {:.3} {done}", mib / took, client_cpu * 1e6 / (mib * 256.0));
    Ok(())
}
