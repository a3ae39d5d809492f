//! `ghostswap-hog`: fills memory with verifiable pages, touches them at random, checks each byte.
//!
//! A touch reads the page's first word (the fault, timed apart), checks the whole page, and one
//! time in four writes the page's next generation. With `--churn` one touch in four also gives a run of
//! pages back to the system and writes their next generation into fresh memory, so that their swap
//! slots are freed and used again all the time. Exit status: 0 all pages good, 1 an error or
//! a wrong page, 2 bad usage.

use anyhow::{bail, Context, Result};
use clap::{ArgGroup, Parser, ValueEnum};
use ghostswap_hog::area::{keep_in_memory, Area, HugePages, Share};
use ghostswap_hog::latency::{Histogram, Percentiles};
use ghostswap_hog::pages::{Corpus, Pages, Random, PAGE_BYTES};
use serde::Serialize;
use std::hint::black_box;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Wrong pages told one by one, for each thread; the rest are only counted.
const TOLD_ERRORS: u64 = 10;
const PAGES_PER_MIB: usize = (1 << 20) / PAGE_BYTES;

/// Fill memory with verifiable pages, touch them at random and check every byte: a test load for swap.
#[derive(Parser)]
#[command(version, group = ArgGroup::new("length").args(["seconds", "touches"]))]
struct Args {
    /// Memory to fill, in MiB
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    mib: u32,
    /// Threads; each owns every n-th page
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Touch pages for this long, or until SIGUSR1 comes [default: 10]
    #[arg(long)]
    seconds: Option<u64>,
    /// Touch this many pages (0: only fill)
    #[arg(long)]
    touches: Option<u64>,
    /// Decides every page's content and the order of touches
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Pages of real programs, raw or zstd, 8 MiB at most [default: a corpus inside the binary]
    #[arg(long, value_name = "FILE")]
    corpus: Option<PathBuf>,
    /// Huge pages for the hogged memory
    #[arg(long, value_enum, default_value = "default")]
    thp: Thp,
    /// After one touch in four, free a run of up to this many pages and write them anew
    #[arg(long, value_name = "PAGES", default_value_t = 0)]
    churn: u32,
    /// Check every page once more at the end
    #[arg(long)]
    check_all: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Keep the memory until a signal ends the process
    #[arg(long)]
    hold: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Thp {
    Always,
    Never,
    Default,
}

/// How long to touch pages.
#[derive(Clone, Copy)]
enum Length {
    Until(Duration),
    Touches(u64),
}

#[derive(Serialize)]
struct Summary {
    mib: u32,
    threads: u16,
    seed: u64,
    fill_seconds: f64,
    seconds: f64,
    touches: u64,
    touches_per_second: f64,
    rewrites: u64,
    freed: u64,
    checked_at_end: u64,
    touch: Percentiles,
    first_word: Percentiles,
    errors: u64,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ghostswap-hog: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the number of wrong pages.
fn run(args: &Args) -> Result<u64> {
    let pages = Pages::new(corpus(args)?, args.seed);
    keep_in_memory(pages.corpus().bytes());
    let huge = match args.thp {
        Thp::Always => HugePages::Always,
        Thp::Never => HugePages::Never,
        Thp::Default => HugePages::Default,
    };
    let mut area =
        Area::map(args.mib as usize * PAGES_PER_MIB, huge).with_context(|| format!("cannot map {} MiB", args.mib))?;
    area.report_lost_pages().context("cannot catch SIGBUS")?;

    let enough = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, enough.clone()).context("cannot take SIGUSR1")?;

    let began = Instant::now();
    let mut workers: Vec<Worker> = (0u64..)
        .zip(area.split(args.threads.into()))
        .map(|(number, share)| Worker::new(&pages, share, args.seed ^ (number + 1) << 32, args.churn))
        .collect();
    on_threads(&mut workers, |_, worker| worker.fill())?;
    let fill_seconds = began.elapsed().as_secs_f64();
    eprintln!("ghostswap-hog: filled {} MiB in {fill_seconds:.2} s", args.mib);

    let length = match (args.touches, args.seconds) {
        (Some(touches), _) => Length::Touches(touches),
        (None, seconds) => Length::Until(Duration::from_secs(seconds.unwrap_or(10))),
    };
    let began = Instant::now();
    let threads = u64::from(args.threads);
    on_threads(&mut workers, |number, worker| match length {
        Length::Touches(all) => worker.touch_times(all / threads + u64::from(number < all % threads)),
        Length::Until(time) => worker.touch_until(began + time, &enough),
    })?;
    let seconds = began.elapsed().as_secs_f64();
    if args.check_all {
        on_threads(&mut workers, |_, worker| worker.check_all())?;
    }

    let summary = summary(args, &workers, fill_seconds, seconds);
    print(&summary, args.json)?;
    if args.hold && summary.errors == 0 {
        loop {
            std::thread::park();
        }
    }
    Ok(summary.errors)
}

fn corpus(args: &Args) -> Result<Corpus> {
    let Some(path) = &args.corpus else { return Ok(Corpus::embedded()) };
    let file = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Corpus::from_bytes(&file).map_err(|reason| anyhow::anyhow!("{}: {reason}", path.display()))
}

fn on_threads<'a>(workers: &mut [Worker<'a>], task: impl Fn(u64, &mut Worker<'a>) + Sync) -> Result<()> {
    let task = &task;
    std::thread::scope(|scope| {
        let mut running = Vec::with_capacity(workers.len());
        for (number, worker) in (0u64..).zip(workers) {
            let name = format!("hog-{number}");
            running.push(std::thread::Builder::new().name(name).spawn_scoped(scope, move || task(number, worker))?);
        }
        if running.into_iter().any(|thread| thread.join().is_err()) {
            bail!("a thread panicked");
        }
        Ok(())
    })
}

/// One thread's pages, and what it has seen of them.
struct Worker<'a> {
    pages: &'a Pages,
    share: Share<'a>,
    /// The generation that each page of the share holds. A byte is enough: it wraps, and nobody
    /// takes a page of 256 generations ago for today's.
    generations: Vec<u8>,
    random: Random,
    churn: u32,
    touch: Histogram,
    first_word: Histogram,
    touches: u64,
    rewrites: u64,
    freed: u64,
    checked_at_end: u64,
    errors: u64,
}

impl<'a> Worker<'a> {
    fn new(pages: &'a Pages, share: Share<'a>, seed: u64, churn: u32) -> Worker<'a> {
        Worker {
            pages,
            generations: vec![0; share.pages()],
            share,
            random: Random(seed),
            churn,
            touch: Histogram::default(),
            first_word: Histogram::default(),
            touches: 0,
            rewrites: 0,
            freed: 0,
            checked_at_end: 0,
            errors: 0,
        }
    }

    fn fill(&mut self) {
        for nth in 0..self.share.pages() {
            self.pages.fill(self.share.index(nth) as u64, 0, self.share.page(nth));
        }
    }

    fn touch_until(&mut self, end: Instant, enough: &AtomicBool) {
        while self.share.pages() > 0 && Instant::now() < end && !enough.load(Ordering::Relaxed) {
            self.touch_one();
        }
    }

    fn touch_times(&mut self, times: u64) {
        if self.share.pages() > 0 {
            (0..times).for_each(|_| self.touch_one());
        }
    }

    fn touch_one(&mut self) {
        let draw = self.random.draw();
        let nth = ((draw >> 8) % self.share.pages() as u64) as usize;
        let began = Instant::now();
        black_box(self.share.page(nth)[0]);
        let first = began.elapsed();
        let good = self.check(nth);
        // A wrong page is written anew, so that it counts once.
        if !good || draw & 3 == 0 {
            self.rewrite(nth);
        }
        self.touch.record(began.elapsed());
        self.first_word.record(first);
        self.touches += 1;
        if self.churn > 0 && draw >> 2 & 3 == 0 {
            self.free_and_write(nth, draw >> 40);
        }
    }

    /// Frees pages from the `nth` on and writes them anew. One time in two they are looked at first:
    /// what is swapped out is freed there otherwise.
    fn free_and_write(&mut self, nth: usize, draw: u64) {
        let run = 1 + (draw % u64::from(self.churn)) as usize;
        let end = self.share.pages().min(nth + run);
        for each in (nth..end).filter(|_| draw >> 23 & 1 == 0) {
            self.check(each);
        }
        self.share.free(nth, end - nth);
        for each in nth..end {
            self.rewrite(each);
        }
        self.freed += (end - nth) as u64;
    }

    fn check(&mut self, nth: usize) -> bool {
        let (index, generation) = (self.share.index(nth), self.generations[nth]);
        let Err(mismatch) = self.pages.check(index as u64, generation.into(), self.share.page(nth)) else {
            return true;
        };
        self.errors += 1;
        if self.errors <= TOLD_ERRORS {
            eprintln!("ghostswap-hog: page {index}, generation {generation}: {mismatch}");
        }
        false
    }

    fn rewrite(&mut self, nth: usize) {
        let next = self.generations[nth].wrapping_add(1);
        self.pages.fill(self.share.index(nth) as u64, next.into(), self.share.page(nth));
        self.generations[nth] = next;
        self.rewrites += 1;
    }

    fn check_all(&mut self) {
        for nth in 0..self.share.pages() {
            self.check(nth);
            self.checked_at_end += 1;
        }
    }
}

fn summary(args: &Args, workers: &[Worker], fill_seconds: f64, seconds: f64) -> Summary {
    let (mut touch, mut first_word) = (Histogram::default(), Histogram::default());
    for worker in workers {
        touch.merge(&worker.touch);
        first_word.merge(&worker.first_word);
    }
    let sum = |count: fn(&Worker) -> u64| workers.iter().map(count).sum::<u64>();
    let touches = sum(|worker| worker.touches);
    Summary {
        mib: args.mib,
        threads: args.threads,
        seed: args.seed,
        fill_seconds,
        seconds,
        touches,
        touches_per_second: if touches == 0 { 0.0 } else { touches as f64 / seconds },
        rewrites: sum(|worker| worker.rewrites),
        freed: sum(|worker| worker.freed),
        checked_at_end: sum(|worker| worker.checked_at_end),
        touch: touch.percentiles(),
        first_word: first_word.percentiles(),
        errors: sum(|worker| worker.errors),
    }
}

fn print(summary: &Summary, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(summary)?);
        return Ok(());
    }
    let us = |p: Percentiles| {
        [p.p50_ns, p.p99_ns, p.p999_ns, p.max_ns].map(|ns| format!("{:.1}", ns as f64 / 1e3)).join("/")
    };
    println!(
        "{} MiB, {} threads: {:.0} touches/s ({} in {:.1} s, {} rewrites), touch p50/p99/p999/max {} us, first word {} us, {} errors",
        summary.mib,
        summary.threads,
        summary.touches_per_second,
        summary.touches,
        summary.seconds,
        summary.rewrites,
        us(summary.touch),
        us(summary.first_word),
        summary.errors
    );
    Ok(())
}
