//! `ghostswap-nbd`: serves volumes of one store to NBD clients over Unix sockets, TCP and vsock. Its `connect` is a
//! client, for machines that swap.
//!
//! The server translates the protocol into `Lane` calls and decides nothing else. Exit status: 0 ended by
//! a signal, 1 failure, 2 bad usage or an impossible configuration. SIGUSR1 logs the statistics.
#![forbid(unsafe_code)]

use anyhow::{bail, Context, Result};
use clap::{ArgGroup, Parser, Subcommand, ValueEnum};
use ghostswap::config::{parse_size, TierSettings, MOST_LANES};
use ghostswap::{create_arena, Standby, StoreConfig, TierConfig};
use ghostswap_nbd::export::{check_table, ExportConfig, Exports};
use ghostswap_nbd::handshake::Offer;
use ghostswap_nbd::helpers::{self, Pool};
use ghostswap_nbd::server::{Limits, Server};
use ghostswap_nbd::supervise::{self, Estate, Given, Tables};
use ghostswap_nbd::tiers::{self, Ledger};
use ghostswap_nbd::tls::{Tls, TlsFiles};
use ghostswap_nbd::{connect, control, listen, protect, VERSION};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::time::Duration;
use tracing::{error, info, warn};

/// Connections beyond those that have a lane: clients that negotiate, or only ask what there is.
const NEGOTIATING: usize = 64;

/// Serve sparse compressed volumes to NBD clients.
#[derive(Parser)]
#[command(version = VERSION, group = ArgGroup::new("identity").args(["tls_cert", "tls_certificates"]))]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Listen at this Unix socket
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// Listen at this TCP address; port 0: any that is free
    #[arg(long, value_name = "ADDR:PORT")]
    tcp: Option<String>,
    /// Listen at this vsock port, for guests of this machine or, in a guest, for its host
    #[arg(long, value_name = "PORT")]
    vsock: Option<u32>,
    /// A volume and its name; size 16T unless told; quota: bytes it may hold, compressed; tiers: on which its pages may
    /// lie; ro: not to be written; client: only for clients whose certificate has one of these names; linger: removed
    /// when it was without a client for so long. A star in the name: one for each client that asks for such a name,
    /// linger=1m unless told. May be given several times
    #[arg(
        long,
        value_name = "NAME[,size=SIZE][,quota=SIZE][,tiers=all|ram|below][,client=NAME[:NAME]][,linger=TIME][,ro]",
        required = true
    )]
    export: Vec<ExportConfig>,
    /// Listen at this Unix socket for `ghostswap-nbd exports`
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Where pages are kept: ram[,limit=SIZE|PERCENT%][,codec=lz4|zstd[:LEVEL]][,group=SIZE][,high=PERCENT%]
    /// [,low=PERCENT%]. A second one: how they are compressed again when they have lain still, as in
    /// ram,codec=zstd:3,group=64K,idle=10m. Last, up to four below memory, each of which passes on to the next
    /// what it has no room for: file:PATH,size=SIZE, block:DEVICE, another server's export, nbd:URI, or a bucket,
    /// s3:BUCKET/PREFIX,endpoint=URL
    #[arg(long, value_name = "SPEC")]
    tier: Vec<TierConfig>,
    /// Most clients at once that have gone to an export [default: the store's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    max_lanes: Option<u16>,
    /// Most connections at once [default: 64 more than lanes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_connections: Option<u32>,
    /// Within this time a client must have gone to an export
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    handshake_time: u32,
    /// Hang up on clients that send and take nothing for so long [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    idle_time: Option<u32>,
    /// Most bytes of a connection's requests that wait, half of it for writes that wait for room, half for reads
    /// that wait for a disk tier; 0: none waits, and all replies come in order
    #[arg(long, value_name = "SIZE", default_value = "4M", value_parser = in_flight_bytes)]
    max_in_flight: usize,
    /// Replace a process of the server that shows no sign of life for so long; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=3600))]
    watchdog: u32,
    /// Keep all of the server in memory, and the OOM killer off it: for a machine that swaps to it, or to anything else
    #[arg(long)]
    lock_memory: bool,
    /// The server's certificate, and those between it and its root, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its private key, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Let in only clients with a certificate signed by one of these
    #[arg(long, value_name = "FILE", requires = "identity")]
    tls_client_ca: Option<PathBuf>,
    /// A directory with server-cert.pem and server-key.pem, as nbdkit and QEMU have it
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// Let in only clients with a certificate signed by ca-cert.pem in that directory
    #[arg(long, requires = "tls_certificates", conflicts_with = "tls_client_ca")]
    tls_verify_peer: bool,
    /// Whether TLS may or must be used [default: require if there is a certificate]
    #[arg(long, value_name = "MODE")]
    tls: Option<TlsMode>,
}

#[derive(Subcommand)]
enum Command {
    /// List the exports of a running server, or change them
    #[command(subcommand)]
    Exports(ExportsCommand),
    /// List the tiers of a running server, or change them
    #[command(subcommand)]
    Tier(TierCommand),
    /// Replace a running server by the program that lies at its path now, keeping all it holds
    Upgrade {
        #[command(flatten)]
        at: At,
    },
    /// Connect a device of the kernel's nbd driver to a server, and stay to connect it again
    Connect(connect::Options),
    /// Disconnect such a device, if it is not in use
    Disconnect {
        /// The device, as /dev/nbd0
        device: PathBuf,
    },
}

#[derive(Subcommand)]
enum ExportsCommand {
    /// What there is, and how many connections each has
    List {
        #[command(flatten)]
        at: At,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Add an export, or a template of some
    Add {
        #[command(flatten)]
        at: At,
        /// As for --export
        spec: ExportConfig,
    },
    /// Remove an export that has no client, and all that it holds
    Remove {
        #[command(flatten)]
        at: At,
        /// Its name
        name: String,
    },
}

#[derive(Subcommand)]
enum TierCommand {
    /// What each tier may hold and holds
    List {
        #[command(flatten)]
        at: At,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Add a tier below memory, while exports are served
    Add {
        #[command(flatten)]
        at: At,
        /// As in file:/var/lib/ghostswap/cold,size=64G, block:/dev/nvme1n1p3, nbd:nbd://192.0.2.7/cold or
        /// s3:pages/node1,endpoint=https://s3.example.net
        #[arg(value_parser = below)]
        spec: TierConfig,
        /// Above this one, by its name in `tier list` [default: below all others]
        #[arg(long, value_name = "NAME")]
        before: Option<String>,
    },
    /// Change settings of a tier, while exports are served
    #[command(after_help = SETTABLE)]
    Set {
        #[command(flatten)]
        at: At,
        /// Its name in `tier list` and what to set, in the words of --tier, as in ram limit=4G,high=90%,low=80%
        #[arg(value_name = "NAME KEY=VALUE", required = true)]
        words: Vec<String>,
    },
    /// Empty a tier below memory and do without it from then on; ended halfway, it stays in use
    Remove {
        #[command(flatten)]
        at: At,
        /// Its name in `tier list`, if there are several below memory
        name: Option<String>,
    },
}

/// What `tier set` can set.
const SETTABLE: &str = "\
ram   limit, high, low; codec, group, dict: clients have to connect again
cold  limit, idle, cpu; codec, group, dict: clients have to connect again
disk  timeout, connections, ca, cert, key, credentials, profile: likewise; of several tiers below memory each by its
      name in tier list";

/// What `tier add` can add.
fn below(text: &str) -> std::result::Result<TierConfig, String> {
    match text.parse()? {
        TierConfig::Ram(_) => Err("only a tier below memory can be added: file:, block:, nbd: or s3:".into()),
        tier => Ok(tier),
    }
}

impl TierCommand {
    fn run(self) -> Result<ExitCode> {
        match self {
            TierCommand::List { at, json } => println!("{}", control::list_tiers(&at.control, json)?),
            TierCommand::Add { at, spec, before } => control::add_tier(&at.control, &spec, before)?,
            TierCommand::Set { at, words } => {
                let settings = words.join(",").parse::<TierSettings>().map_err(bad_usage)?;
                control::set_tier(&at.control, &settings)?;
            }
            TierCommand::Remove { at, name } => {
                let ended = Arc::new(AtomicBool::new(false));
                for signal in [SIGINT, SIGTERM] {
                    signal_hook::flag::register(signal, ended.clone()).context("cannot catch signals")?;
                }
                control::remove_tier(&at.control, name, &ended)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(clap::Args)]
struct At {
    /// The server's control socket
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
}

impl ExportsCommand {
    fn run(self) -> Result<ExitCode> {
        match self {
            ExportsCommand::List { at, json } => println!("{}", control::list(&at.control, json)?),
            ExportsCommand::Add { at, spec } => {
                control::change(&at.control, &control::Request::Add { spec: spec.to_string() })?;
            }
            ExportsCommand::Remove { at, name } => {
                control::change(&at.control, &control::Request::Remove { name })?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TlsMode {
    Off,
    On,
    Require,
}

impl Args {
    fn tls_files(&self) -> Option<TlsFiles> {
        if let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) {
            return Some(TlsFiles { cert: cert.clone(), key: key.clone(), client_ca: self.tls_client_ca.clone() });
        }
        let directory = self.tls_certificates.as_ref()?;
        let own_ca = self.tls_verify_peer.then(|| directory.join("ca-cert.pem"));
        Some(TlsFiles {
            cert: directory.join("server-cert.pem"),
            key: directory.join("server-key.pem"),
            client_ca: self.tls_client_ca.clone().or(own_ca),
        })
    }

    fn tls_files_in_use(&self) -> Option<TlsFiles> {
        self.tls_files().filter(|_| self.tls != Some(TlsMode::Off))
    }

    /// Clients show certificates that somebody has signed.
    fn knows_clients(&self) -> bool {
        self.tls_files_in_use().is_some_and(|files| files.client_ca.is_some())
    }

    fn tls(&self) -> Result<Tls> {
        let Some(files) = self.tls_files_in_use() else {
            return match self.tls {
                None | Some(TlsMode::Off) => Ok(Tls::Off),
                Some(_) => Err(bad_usage("--tls needs --tls-cert and --tls-key, or --tls-certificates".into())),
            };
        };
        let config = files.load().map_err(anyhow::Error::msg)?;
        Ok(if self.tls == Some(TlsMode::On) { Tls::Offered(config) } else { Tls::Required(config) })
    }
}

fn bad_usage(why: String) -> anyhow::Error {
    ghostswap::Error::InvalidConfig(why).into()
}

fn in_flight_bytes(text: &str) -> std::result::Result<usize, String> {
    match parse_size(text)? {
        bytes if bytes <= 1 << 30 => Ok(bytes as usize),
        _ => Err(format!("{text}: up to 1G")),
    }
}

fn complain(what: std::fmt::Arguments<'_>) {
    // The exit status tells it too, should nobody read this.
    let _ = writeln!(std::io::stderr(), "ghostswap-nbd: {what}");
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(e) if !e.use_stderr() => e.exit(),
        Err(e) => {
            let text = e.to_string();
            // Which arguments are missing stands below the first line.
            let lines: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
            let line = lines.join(" ");
            let line = line.strip_prefix("error: ").unwrap_or(&line);
            supervise::tell_failure(line);
            complain(format_args!("{line} (see --help)"));
            return ExitCode::from(2);
        }
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // It would tell of a log that cannot be written by a macro that panics where that cannot be
        // written either; but whoever reads our log may go, and the pages must not go with him.
        .log_internal_errors(false)
        .init();
    let done = match args.command {
        Some(Command::Exports(command)) => command.run(),
        Some(Command::Tier(command)) => command.run(),
        Some(Command::Upgrade { at }) => control::upgrade(&at.control).map(|how| {
            println!("{how}");
            ExitCode::SUCCESS
        }),
        Some(Command::Connect(options)) => connect::run(&options),
        Some(Command::Disconnect { device }) => connect::disconnect(&device),
        None => run(&args),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            supervise::tell_failure(&format!("{error:#}"));
            complain(format_args!("{error:#}"));
            match error.downcast_ref() {
                Some(ghostswap::Error::InvalidConfig(_)) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    if args.lock_memory {
        match protect::server() {
            // The pages are not given up for it.
            Err(why) if supervise::is_called() => warn!("{why:#}"),
            done => done?,
        }
    }
    if let Some(given) = supervise::given()? {
        return serve(args, given).map(|()| ExitCode::SUCCESS);
    }
    // First of all, so that no signal finds the socket made and nobody to remove it.
    let signals = supervise::Signals::new()?;
    let watchdog = Duration::from_secs(args.watchdog.into());
    if supervise::is_called() {
        return supervise::resume(signals, watchdog);
    }
    let listen::Passed { mut listeners, kept } = listen::from_systemd()?;
    if listeners.is_empty() && args.unix.is_none() && args.tcp.is_none() && args.vsock.is_none() {
        return Err(bad_usage("nowhere to listen: give --unix, --tcp or --vsock, or have systemd listen".into()));
    }
    // Before the exports: who can connect to one of them can ask for a change as well.
    listeners.extend(args.control.as_deref().map(listen::control).transpose()?);
    listeners.extend(args.tcp.as_deref().map(listen::tcp).transpose()?);
    listeners.extend(args.vsock.map(listen::vsock).transpose()?);
    listeners.extend(args.unix.as_deref().map(listen::unix).transpose()?);
    let found = kept.is_some();
    let (arena, tables) = match kept {
        Some([arena, first, second]) => (arena, Tables::of([first, second])),
        None => (create_arena(false)?, Tables::new()?),
    };
    supervise::run(signals, watchdog, Estate { arena, tables, listeners }, found)
}

/// A worker's life.
fn serve(args: &Args, given: Given) -> Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR1]).context("cannot catch signals")?;
    let tls = args.tls()?;
    let Given { arena, tables, listeners, trial, mut link } = given;
    let ledger = Ledger::read(tables)?;
    let tiers = match &trial {
        Some(trial) => tiers::parse(trial)?,
        None => ledger.tiers(&args.tier)?,
    };
    let mut config = StoreConfig {
        tiers: tiers.clone(),
        tls: Some(ghostswap::Tls::new()),
        #[cfg(feature = "s3")]
        s3: Some(ghostswap::S3::new()),
        ..StoreConfig::default()
    };
    if let Some(lanes) = args.max_lanes {
        config.max_lanes = lanes.into();
    }
    let connections = args.max_connections.map_or(config.max_lanes + NEGOTIATING, |most| most as usize);
    let cpus = helpers::cpus();
    let helpers = helpers::threads(cpus).min(MOST_LANES - config.max_lanes);
    (config.max_lanes, config.helper_lanes) = (config.max_lanes + helpers, helpers);
    // Beforehand, so that it takes nothing of the memory that is kept for opening.
    let pool = Pool::new(helpers, cpus);
    let mut standby = Standby::new(config, arena)?;
    // It may be another program's.
    standby.check()?;
    if trial.is_some() {
        standby.try_tiers(&ledger.tiers(&args.tier)?)?;
    }
    ledger.exports().map_or(Ok(()), |table| check_table(&table))?;
    let Some(order) = link.stand_by(&mut standby)? else { return Ok(()) };
    ledger.read_again()?;
    if trial.is_some() {
        ledger.change(&tiers, &args.tier)?;
    } else if ledger.tiers(&args.tier)? != tiers {
        bail!("the tiers were changed while this worker stood by");
    }
    let store = match standby.open() {
        Err(why) if ledger.is_changing() => {
            ledger.turn_back()?;
            return Err(why.into());
        }
        opened => opened?,
    };
    ledger.settle()?;
    link.desk.set_tiers(tiers);
    let table = ledger.exports();
    let tell = move |table: String| {
        ledger
            .put_exports(&table)
            .unwrap_or_else(|e| error!("a change of exports will not outlive this process: {e:#}"));
    };
    let exports = Exports::open(&store, &args.export, table.as_deref(), tell, args.knows_clients())?;
    if order.anew && table.is_some() {
        exports.merge(&args.export)?;
    }
    let offer =
        Offer { exports: Arc::new(exports), tls, handshake_time: Duration::from_secs(args.handshake_time.into()) };
    let idle_time = args.idle_time.map(|seconds| Duration::from_secs(seconds.into()));
    let limits = Limits { connections, idle_time, in_flight_bytes: args.max_in_flight };
    let server = Server::new(offer, limits, pool);
    server.serve_at(&listeners, &link.desk)?;
    if args.watchdog > 0 {
        let (server, limit) = (server.clone(), Duration::from_secs(args.watchdog.into()));
        link.desk.watch_over(move || server.find_standing(limit));
    }
    link.watch()?;
    for signal in signals.forever() {
        if signal != SIGUSR1 {
            break;
        }
        info!("statistics: {} parked writes refused\n{}", server.refused_writes(), store.stats());
    }
    server.end();
    info!("ended: {} parked writes refused\n{}", server.refused_writes(), store.stats());
    Ok(())
}
