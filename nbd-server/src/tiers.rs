//! The tiers of a server, which may be changed while it runs. What they were changed to stands beside the exports in the
//! table that outlives a worker (`supervise/tables.rs`):
//!
//! ```text
//! {"exports":[…],"tiers":["ram,limit=4G","block:/dev/x"],"before":["ram,limit=4G"],"changing":true}
//! ```
//!
//! A change is a take-over (`supervise.rs`): a worker of the changed tiers gets ready while another serves; ordered to
//! serve, it writes them here before it opens the store. If that does not open, it puts those before back and ends, and
//! whoever follows tries them; and so in turn, since the arena opens with one of the two at any time. One worker writes
//! at a time: who has the arena, or is about to take it from one that ended.

use crate::supervise::Tables;
use anyhow::{anyhow, Context, Result};
use ghostswap::config::TierConfig;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What stands in the table.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Record {
    /// None: nobody has told of any.
    exports: Option<Value>,
    /// None: those of the command line.
    #[serde(default)]
    tiers: Option<Vec<String>>,
    #[serde(default)]
    before: Option<Vec<String>>,
    /// A worker that has these tiers was ordered, and is not known to have opened the store.
    #[serde(default)]
    changing: bool,
}

/// The table, as this worker knows it.
pub struct Ledger {
    tables: Tables,
    record: Mutex<Record>,
}

impl Ledger {
    pub fn read(tables: Tables) -> Result<Ledger> {
        let ledger = Ledger { tables, record: Mutex::default() };
        ledger.read_again()?;
        Ok(ledger)
    }

    /// Who served meanwhile may have written.
    pub fn read_again(&self) -> Result<()> {
        let Some(text) = self.tables.latest()? else { return Ok(()) };
        let value: Value = serde_json::from_str(&text).context("the table of exports is damaged")?;
        *self.record() = match value {
            // Of a program that knew of nothing else.
            exports @ Value::Array(_) => Record { exports: Some(exports), ..Record::default() },
            all => serde_json::from_value(all).context("the table of exports is damaged")?,
        };
        Ok(())
    }

    pub fn exports(&self) -> Option<String> {
        self.record().exports.as_ref().map(Value::to_string)
    }

    /// The tiers that hold, `otherwise` the command line's.
    pub fn tiers(&self, otherwise: &[TierConfig]) -> Result<Vec<TierConfig>> {
        self.record().tiers.as_ref().map_or_else(|| Ok(otherwise.to_vec()), |texts| parse(texts))
    }

    pub fn put_exports(&self, exports: &str) -> Result<()> {
        let exports = serde_json::from_str(exports).context("a table of exports")?;
        self.put(|record| record.exports = Some(exports))
    }

    /// From now on these hold. `by_command_line`: those that did, if none were written.
    pub fn change(&self, tiers: &[TierConfig], by_command_line: &[TierConfig]) -> Result<()> {
        self.put(|record| {
            record.before = Some(record.tiers.take().unwrap_or_else(|| texts(by_command_line)));
            record.tiers = Some(texts(tiers));
            record.changing = true;
        })
    }

    pub fn is_changing(&self) -> bool {
        self.record().changing
    }

    /// The store did not open: those before hold again.
    pub fn turn_back(&self) -> Result<()> {
        self.put(|record| std::mem::swap(&mut record.tiers, &mut record.before))
    }

    /// The store is open.
    pub fn settle(&self) -> Result<()> {
        match self.is_changing() {
            true => self.put(|record| record.changing = false),
            false => Ok(()),
        }
    }

    fn put(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut record = self.record();
        let mut changed = record.clone();
        change(&mut changed);
        let text = serde_json::to_string(&changed).context("a table of exports")?;
        self.tables.put(&text).context("cannot write the table of exports")?;
        *record = changed;
        Ok(())
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        // No step under the lock leaves half a change.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub fn texts(tiers: &[TierConfig]) -> Vec<String> {
    tiers.iter().map(TierConfig::to_string).collect()
}

pub fn parse(texts: &[String]) -> Result<Vec<TierConfig>> {
    texts.iter().map(|text| text.parse().map_err(|why: String| anyhow!(why))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiers(list: &[&str]) -> Vec<TierConfig> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_change_that_comes_to_nothing_is_turned_back() {
        let tables = Tables::new().unwrap();
        let [first, second] = tables.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
        tables.put(r#"[{"name":"a"}]"#).unwrap();
        let ledger = Ledger::read(tables).unwrap();
        let (plain, more) = (tiers(&["ram"]), tiers(&["ram", "block:/dev/x"]));
        assert_eq!(ledger.exports().as_deref(), Some(r#"[{"name":"a"}]"#), "as an older program left it");
        assert_eq!(ledger.tiers(&plain).unwrap(), plain);
        ledger.change(&more, &plain).unwrap();
        assert!(ledger.is_changing());
        // The next worker, should this one be killed now.
        let next = Ledger::read(Tables::of([first, second])).unwrap();
        assert!(next.is_changing() && next.tiers(&plain).unwrap() == more);
        next.turn_back().unwrap();
        assert_eq!(next.tiers(&[]).unwrap(), plain);
        next.turn_back().unwrap();
        assert_eq!(next.tiers(&[]).unwrap(), more);
        next.settle().unwrap();
        next.put_exports("[]").unwrap();
        ledger.read_again().unwrap();
        assert!(!ledger.is_changing() && ledger.tiers(&[]).unwrap() == more);
        assert_eq!(ledger.exports().as_deref(), Some("[]"));
    }
}
