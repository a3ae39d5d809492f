//! Exports: names that clients ask for, each with its volume and who may go to it.

use ghostswap::{Error, Placement, Store, Volume};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

mod config;
mod merge;

use config::{placement, tiers_name};

pub use config::ExportConfig;

/// How long a template's export stays without a client, if it is not told.
const LINGER: Duration = Duration::from_secs(60);

/// A name that clients ask for, its volume, and who may go there.
pub struct Export {
    pub name: String,
    pub volume: Volume,
    quota: Option<u64>,
    placement: Placement,
    pub read_only: bool,
    clients: Vec<String>,
    /// How long it stays when its last client has left; `None`: until it is removed.
    linger: Option<Duration>,
    /// After a template, for whoever named it.
    made: bool,
    /// No other export has had it, one that bore the same name before included: clients that come again can tell
    /// whether what they had stored can still be there.
    pub identity: String,
    /// Writes refused for want of room, after they had waited for it.
    pub refused_writes: AtomicU64,
    visits: Mutex<Visits>,
}

struct Visits {
    open: usize,
    /// When the last one left, or it was made.
    since: Instant,
    /// It is being removed.
    closed: bool,
}

/// Whether a client may go to an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Granted,
    /// Not before TLS has shown who it is.
    NeedsTls,
    Refused,
}

/// `names`: what the client's certificate calls it; `None`: the connection is not in TLS.
fn access(clients: &[String], names: Option<&[String]>) -> Access {
    match names {
        _ if clients.is_empty() => Access::Granted,
        None => Access::NeedsTls,
        Some(names) if names.iter().any(|name| clients.contains(name)) => Access::Granted,
        Some(_) => Access::Refused,
    }
}

impl Export {
    fn new(config: &ExportConfig, volume: Volume, made: bool, identity: String) -> Arc<Export> {
        volume.set_quota(config.quota);
        if let Err(e) = volume.set_placement(config.placement) {
            // The server was started again without the tier that there was.
            warn!(export = config.name, "tiers={}: {e}", tiers_name(config.placement));
        }
        Arc::new(Export {
            name: config.name.clone(),
            volume,
            quota: config.quota,
            placement: config.placement,
            read_only: config.read_only,
            clients: config.clients.clone(),
            linger: config.linger.or(made.then_some(LINGER)),
            made,
            identity,
            refused_writes: AtomicU64::new(0),
            visits: Mutex::new(Visits { open: 0, since: Instant::now(), closed: false }),
        })
    }

    pub fn access(&self, names: Option<&[String]>) -> Access {
        access(&self.clients, names)
    }

    /// A client goes there. None: it is being removed.
    pub fn enter(self: &Arc<Export>) -> Option<Visit> {
        let mut visits = lock(&self.visits);
        visits.open += usize::from(!visits.closed);
        (!visits.closed).then(|| Visit(self.clone()))
    }

    /// Lets nobody in any more, if nobody is in and `so`.
    fn close(&self, so: impl FnOnce(&Visits) -> bool) -> bool {
        let mut visits = lock(&self.visits);
        visits.closed |= visits.open == 0 && so(&visits);
        visits.closed
    }
}

/// A client that is at an export.
pub struct Visit(pub Arc<Export>);

impl Drop for Visit {
    fn drop(&mut self) {
        let mut visits = lock(&self.0.visits);
        visits.open -= 1;
        visits.since = Instant::now();
    }
}

/// Why a client cannot go where it wants.
pub enum Refusal {
    Unknown,
    Access(Access),
    /// A template's export cannot be made.
    Store(ghostswap::Error),
}

/// All exports, and templates of some. They may be added and removed while clients come and go.
pub struct Exports {
    store: Store,
    table: Mutex<Table>,
    /// One at a time.
    sweeping: Mutex<()>,
    /// Hears of every change: the line that the next worker begins with.
    tell: Box<dyn Fn(String) + Send + Sync>,
    /// Clients show certificates that somebody has signed.
    knows_clients: bool,
}

struct Table {
    exports: Vec<Arc<Export>>,
    templates: Vec<ExportConfig>,
    /// Volumes of exports that were removed: empty ones, and those that are still to be emptied.
    free: Vec<Volume>,
    dirty: Vec<Volume>,
}

/// An export or a template as the next worker, and whoever lists them, is told.
#[derive(Serialize, Deserialize)]
struct Entry {
    name: String,
    size_bytes: u64,
    quota_bytes: Option<u64>,
    /// None in tables of before there was such a choice: all.
    #[serde(default)]
    tiers: Option<String>,
    read_only: bool,
    clients: Vec<String>,
    linger_seconds: Option<u64>,
    made_after_template: bool,
    /// None: it is a template.
    volume: Option<u16>,
    /// Of a template, none.
    identity: String,
}

fn new_identity() -> String {
    // Its keys are random.
    format!("{:016x}", RandomState::new().hash_one(()))
}

impl Entry {
    fn of_export(export: &Export) -> Entry {
        Entry {
            name: export.name.clone(),
            size_bytes: export.volume.bytes(),
            quota_bytes: export.quota,
            tiers: Some(tiers_name(export.placement).into()),
            read_only: export.read_only,
            clients: export.clients.clone(),
            linger_seconds: export.linger.map(|linger| linger.as_secs()),
            made_after_template: export.made,
            volume: Some(export.volume.id()),
            identity: export.identity.clone(),
        }
    }

    fn of_template(config: &ExportConfig) -> Entry {
        Entry {
            name: config.name.clone(),
            size_bytes: config.size,
            quota_bytes: config.quota,
            tiers: Some(tiers_name(config.placement).into()),
            read_only: config.read_only,
            clients: config.clients.clone(),
            linger_seconds: config.linger.map(|linger| linger.as_secs()),
            made_after_template: false,
            volume: None,
            identity: String::new(),
        }
    }

    fn config(&self) -> ExportConfig {
        ExportConfig {
            name: self.name.clone(),
            size: self.size_bytes,
            quota: self.quota_bytes,
            placement: self.tiers.as_deref().and_then(placement).unwrap_or_default(),
            read_only: self.read_only,
            clients: self.clients.clone(),
            linger: self.linger_seconds.map(Duration::from_secs),
        }
    }
}

fn damaged(why: String) -> Error {
    Error::InvalidConfig(format!("the table of exports is damaged: {why}"))
}

fn read(table: &str) -> Result<Vec<Entry>, Error> {
    serde_json::from_str(table).map_err(|e| damaged(e.to_string()))
}

/// Whether this program can read a table that another may have written.
pub fn check_table(table: &str) -> Result<(), Error> {
    read(table).map(drop)
}

impl Exports {
    /// Those of the command line; or those of the worker before, whose volumes are there.
    pub fn open(
        store: &Store,
        wanted: &[ExportConfig],
        before: Option<&str>,
        tell: impl Fn(String) + Send + Sync + 'static,
        knows_clients: bool,
    ) -> Result<Exports, Error> {
        let mut table = Table { exports: Vec::new(), templates: Vec::new(), free: Vec::new(), dirty: Vec::new() };
        let mut volumes = store.volumes();
        let with = |table| Exports {
            store: store.clone(),
            table: Mutex::new(table),
            sweeping: Mutex::new(()),
            tell: Box::new(tell),
            knows_clients,
        };
        let Some(before) = before else {
            // A worker that died before it could tell may have made some.
            table.dirty = volumes;
            let exports = with(table);
            exports.sweep();
            wanted.iter().try_for_each(|config| exports.put(&mut lock(&exports.table), config))?;
            return Ok(exports);
        };
        for entry in &read(before)? {
            let config = entry.config();
            let Some(number) = entry.volume else {
                table.templates.push(config);
                continue;
            };
            let at = volumes.iter().position(|volume| volume.id() == number);
            let volume = volumes.swap_remove(at.ok_or_else(|| damaged(format!("no volume {number}")))?);
            table.exports.push(Export::new(&config, volume, entry.made_after_template, entry.identity.clone()));
        }
        table.dirty = volumes;
        Ok(with(table))
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The name of an export, or a template, whose pages may lie on a tier below only.
    pub fn one_below(&self) -> Option<String> {
        let table = lock(&self.table);
        let mut templates = table.templates.iter().filter(|template| template.placement == Placement::Below);
        let mut exports = table.exports.iter().filter(|export| export.placement == Placement::Below);
        exports.next().map(|export| export.name.clone()).or_else(|| templates.next().map(|t| t.name.clone()))
    }

    pub fn all(&self) -> Vec<Arc<Export>> {
        lock(&self.table).exports.clone()
    }

    /// The export of a name, for a client: one that there is, or one made now after a template. The empty name is the
    /// protocol's default export: the first that nobody else named.
    pub fn find(&self, name: &[u8], names: Option<&[String]>) -> Result<Arc<Export>, Refusal> {
        match self.find_now(name, names) {
            // Volumes that are just being emptied are as good as free.
            Err(Refusal::Store(Error::TooMany { .. })) => {
                self.sweep();
                self.find_now(name, names)
            }
            found => found,
        }
    }

    fn find_now(&self, name: &[u8], names: Option<&[String]>) -> Result<Arc<Export>, Refusal> {
        let mut table = lock(&self.table);
        let found = match name {
            [] => table.exports.iter().find(|export| !export.made),
            _ => table.exports.iter().find(|export| export.name.as_bytes() == name),
        };
        if let Some(export) = found {
            return match export.access(names) {
                Access::Granted => Ok(export.clone()),
                refused => Err(Refusal::Access(refused)),
            };
        }
        let name = std::str::from_utf8(name).map_err(|_| Refusal::Unknown)?;
        let template = table.templates.iter().find(|template| template.covers(name)).ok_or(Refusal::Unknown)?;
        match access(&template.clients, names) {
            Access::Granted => {}
            refused => return Err(Refusal::Access(refused)),
        }
        let config = ExportConfig { name: name.to_owned(), ..template.clone() };
        let volume = table.volume(&self.store, config.size).map_err(Refusal::Store)?;
        let export = Export::new(&config, volume, true, new_identity());
        table.exports.push(export.clone());
        self.tell_of(&table);
        Ok(export)
    }

    fn tell_of(&self, table: &Table) {
        (self.tell)(table.line());
    }

    fn check(&self, config: &ExportConfig) -> Result<(), Error> {
        if !config.clients.is_empty() && !self.knows_clients {
            let why = format!("export '{}': client= needs --tls-client-ca or --tls-verify-peer", config.name);
            return Err(Error::InvalidConfig(why));
        }
        if config.placement == Placement::Below && self.store.stats().disk.is_none() {
            let why = format!("export '{}': tiers=below needs a tier below memory (--tier)", config.name);
            return Err(Error::InvalidConfig(why));
        }
        Ok(())
    }

    fn put(&self, table: &mut Table, config: &ExportConfig) -> Result<(), Error> {
        self.check(config)?;
        if table.exports.iter().any(|export| export.name == config.name)
            || table.templates.iter().any(|template| template.name == config.name)
        {
            return Err(Error::InvalidConfig(format!("two exports are named '{}'", config.name)));
        }
        if config.is_template() {
            table.templates.push(config.clone());
        } else {
            let volume = table.volume(&self.store, config.size)?;
            table.exports.push(Export::new(config, volume, false, new_identity()));
        }
        Ok(())
    }

    /// Adds an export or a template.
    pub fn add(&self, config: &ExportConfig) -> Result<(), Error> {
        let mut table = lock(&self.table);
        self.put(&mut table, config)?;
        // Before anybody finds it.
        self.tell_of(&table);
        Ok(())
    }

    /// Tells what there is.
    pub fn tell_all(&self) {
        let table = lock(&self.table);
        self.tell_of(&table);
    }

    /// Removes an export that nobody is at, and drops what it holds; or a template, of which exports stay.
    pub fn remove(&self, name: &str) -> Result<(), String> {
        let mut table = lock(&self.table);
        if let Some(at) = table.templates.iter().position(|template| template.name == name) {
            table.templates.remove(at);
        } else {
            let at = table.exports.iter().position(|export| export.name == name);
            let at = at.ok_or_else(|| format!("no export '{name}'"))?;
            if !table.exports[at].close(|_| true) {
                return Err(format!("export '{name}' has clients: let them leave first"));
            }
            let export = table.exports.remove(at);
            self.tell_of(&table);
            drop(table);
            return self
                .empty(export.volume.clone())
                .map_err(|error| format!("export '{name}' is gone, and what it held goes when it can: {error}"));
        }
        self.tell_of(&table);
        Ok(())
    }

    /// Drops what a volume holds, after which it can be another export's.
    fn empty(&self, volume: Volume) -> ghostswap::Result<()> {
        let emptied = volume.reset(volume.bytes());
        let mut table = lock(&self.table);
        match emptied {
            Ok(()) => table.free.push(volume),
            Err(_) => table.dirty.push(volume),
        }
        emptied
    }

    /// Removes exports whose last client left long enough ago, and empties the volumes of all that were removed.
    pub fn sweep(&self) {
        let _alone = lock(&self.sweeping);
        let mut table = lock(&self.table);
        let over = |export: &Arc<Export>| {
            export.linger.is_some_and(|linger| export.close(|visits| visits.since.elapsed() >= linger))
        };
        let (gone, kept): (Vec<_>, Vec<_>) = table.exports.drain(..).partition(over);
        table.exports = kept;
        if !gone.is_empty() {
            gone.iter().for_each(|export| info!(export = export.name, "nobody came again: removed"));
            table.dirty.extend(gone.into_iter().map(|export| export.volume.clone()));
            self.tell_of(&table);
        }
        let dirty = std::mem::take(&mut table.dirty);
        drop(table);
        // It takes its time, and others may come meanwhile. What cannot be emptied now is tried again.
        dirty.into_iter().for_each(|volume| drop(self.empty(volume)));
    }

    /// All of them, as JSON, each with how many clients are there and what it holds.
    pub fn describe(&self) -> Value {
        let (exports, templates) = {
            let table = lock(&self.table);
            (table.exports.clone(), table.templates.iter().map(|t| json!(Entry::of_template(t))).collect::<Vec<_>>())
        };
        let exports = exports.iter().map(|export| {
            let mut value = json!(Entry::of_export(export));
            value["connections"] = lock(&export.visits).open.into();
            value["held_bytes"] = export.volume.held_bytes().into();
            // All lanes may be in use: then it is not known.
            value["held"] = export.volume.held().map_or(Value::Null, |held| {
                json!({
                    "stored_pages": held.stored_pages,
                    "filled_pages": held.filled_pages,
                    "zero_pages": held.zero_pages,
                    "lost_pages": held.lost_pages,
                    "memory_bytes": held.memory_bytes,
                    "disk_bytes": held.disk_bytes,
                })
            });
            value
        });
        exports.chain(templates).collect()
    }
}

impl Table {
    /// An empty volume of that size.
    fn volume(&mut self, store: &Store, bytes: u64) -> ghostswap::Result<Volume> {
        let Some(volume) = self.free.pop() else { return store.create_volume(bytes) };
        match volume.reset(bytes) {
            Ok(()) => Ok(volume),
            Err(error) => {
                self.free.push(volume);
                Err(error)
            }
        }
    }

    fn line(&self) -> String {
        let exports = self.exports.iter().map(|export| Entry::of_export(export));
        let all: Vec<Entry> = exports.chain(self.templates.iter().map(Entry::of_template)).collect();
        // Strings and numbers always serialise.
        serde_json::to_string(&all).unwrap_or_default()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No step under these locks leaves half a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
