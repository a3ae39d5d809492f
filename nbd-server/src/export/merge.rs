//! Exports of a server that is started again on the pages of the last one: its command line may say other things.
//!
//! What it says of an export counts, but for a size that is less than before; what it does not name any more is kept,
//! since nothing that is stored goes by a restart.

use super::{lock, Export, ExportConfig, Exports};
use ghostswap::config::format_size;
use ghostswap::Error;
use tracing::warn;

impl Exports {
    /// Before any client comes.
    pub fn merge(&self, wanted: &[ExportConfig]) -> Result<(), Error> {
        let mut table = lock(&self.table);
        for export in &table.exports {
            if !export.made && wanted.iter().all(|config| config.name != export.name) {
                warn!(export = export.name, "no option names it, and it is kept: `exports remove` drops it");
            }
        }
        for config in wanted {
            if let Some(template) = table.templates.iter_mut().find(|template| template.name == config.name) {
                *template = config.clone();
                continue;
            }
            let Some(at) = table.exports.iter().position(|export| export.name == config.name) else {
                self.put(&mut table, config)?;
                continue;
            };
            self.check(config)?;
            let before = table.exports[at].clone();
            if config.size > before.volume.bytes() {
                before.volume.grow(config.size)?;
            } else if config.size < before.volume.bytes() {
                let bytes = format_size(before.volume.bytes());
                warn!(export = config.name, "it keeps its size, {bytes}: what it holds is not cut off");
            }
            table.exports[at] = Export::new(config, before.volume.clone(), false, before.identity.clone());
        }
        Ok(())
    }
}
