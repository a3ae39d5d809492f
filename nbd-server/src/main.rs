//! `ghostswap-nbd`: serves volumes of one store to NBD clients over a Unix socket or TCP.
//!
//! It translates the protocol into `Lane` calls and decides nothing else. Exit status: 0 ended by
//! a signal, 1 failure, 2 bad usage or an impossible configuration. SIGUSR1 logs the statistics.
#![forbid(unsafe_code)]

mod export;
mod handshake;
mod proto;
mod server;
mod stream;
mod transmission;
mod wire;

use anyhow::{Context, Result};
use clap::{ArgGroup, Parser};
use export::{ExportConfig, Exports};
use ghostswap::{Store, StoreConfig, TierConfig};
use server::Server;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing::info;

/// Serve sparse compressed volumes to NBD clients.
#[derive(Parser)]
#[command(version, group = ArgGroup::new("listen").args(["unix", "tcp"]).required(true).multiple(true))]
struct Args {
    /// Listen at this Unix socket
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// Listen at this TCP address; there is neither encryption nor a password
    #[arg(long, value_name = "ADDR:PORT")]
    tcp: Option<String>,
    /// A volume and its name; size 16T unless told; ro: not to be written. May be given several times
    #[arg(long, value_name = "NAME[,size=SIZE][,ro]", required = true)]
    export: Vec<ExportConfig>,
    /// Where pages are kept: ram[,limit=SIZE|PERCENT%][,codec=lz4|zstd[:LEVEL]][,group=SIZE]
    #[arg(long, value_name = "SPEC")]
    tier: Vec<TierConfig>,
    /// Most clients at once [default: the store's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    max_lanes: Option<u16>,
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(e) if !e.use_stderr() => e.exit(),
        Err(e) => {
            let text = e.to_string();
            let line = text.lines().next().unwrap_or_default();
            eprintln!("ghostswap-nbd: {} (see --help)", line.strip_prefix("error: ").unwrap_or(line));
            return ExitCode::from(2);
        }
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ghostswap-nbd: {error:#}");
            match error.downcast_ref() {
                Some(ghostswap::Error::InvalidConfig(_)) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(args: &Args) -> Result<()> {
    // First of all, so that no signal finds the socket made and nobody to remove it.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR1]).context("cannot catch signals")?;
    let mut config = StoreConfig { tiers: args.tier.clone(), ..StoreConfig::default() };
    if let Some(lanes) = args.max_lanes {
        config.max_lanes = lanes.into();
    }
    let max_lanes = config.max_lanes;
    let store = Store::open(config)?;
    let server = Server::new(Exports::create(&store, &args.export)?, max_lanes);
    if let Some(address) = &args.tcp {
        server.listen_tcp(address)?;
        info!("serving at tcp {address}");
    }
    let socket = args.unix.as_deref().map(|path| server.listen_unix(path)).transpose()?;
    if let Some(path) = &args.unix {
        info!("serving at unix {}", path.display());
    }
    for signal in signals.forever() {
        if signal != SIGUSR1 {
            break;
        }
        info!("statistics\n{}", store.stats());
    }
    drop(socket);
    server.end();
    info!("ended\n{}", store.stats());
    Ok(())
}
