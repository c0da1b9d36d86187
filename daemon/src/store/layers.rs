//! The record of layers: a table of its own in the store's file, with each version's record sealed under
//! keys of its own.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
    path::Path,
    sync::{Arc, PoisonError},
};

use firn::keys::{KeyError, KeyService};
use rusqlite::{Connection, params};

use super::{Store, StoreError};
use crate::{
    envelope::Envelope,
    function::Function,
    layers::{LayerVersion, Record},
};

/// All versions of all layers.
pub(super) type Layers = BTreeMap<String, BTreeMap<u32, Arc<LayerVersion>>>;

impl Store {
    /// Adds a version to a layer, under a number that no other has had.
    ///
    /// # Errors
    /// It could not be written.
    pub fn publish_layer(
        &self,
        name: &str,
        record: Record,
        envelope: Envelope,
    ) -> Result<Arc<LayerVersion>, StoreError> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        let version: i64 = transaction.query_row(
            "INSERT INTO layer_numbers VALUES (?1, 1)
             ON CONFLICT DO UPDATE SET last = last + 1 RETURNING last",
            [name],
            |row| row.get(0),
        )?;
        let version =
            u32::try_from(version).map_err(|_| StoreError::Numbers(format!("layer {name}")))?;
        let layer = LayerVersion { name: name.to_owned(), version, record, envelope };
        write(&transaction, &layer)?;
        transaction.commit()?;
        let layer = Arc::new(layer);
        self.remember_layer(&layer);
        Ok(layer)
    }

    /// A version of a layer, also one that was deleted and that functions have.
    pub fn layer(&self, name: &str, version: u32) -> Option<Arc<LayerVersion>> {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        layers.get(name)?.get(&version).cloned()
    }

    /// At most `limit` layers in the order of their names, from after `after` on, each as the newest of its
    /// versions that `fits`; and whether there are more.
    pub fn layers(
        &self,
        after: Option<&str>,
        limit: usize,
        fits: impl Fn(&LayerVersion) -> bool,
    ) -> (Vec<Arc<LayerVersion>>, bool) {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        let rest = layers.range::<str, _>((after.map_or(Unbounded, Excluded), Unbounded));
        let newest = |versions: &BTreeMap<u32, Arc<LayerVersion>>| {
            versions.values().rev().find(|l| !l.record.deleted && fits(l)).cloned()
        };
        page(rest.filter_map(|(_, versions)| newest(versions)), limit)
    }

    /// At most `limit` versions of a layer that `fits`, the newest first, from before `before` on; and whether
    /// there are more.
    pub fn layer_versions(
        &self,
        name: &str,
        before: Option<u32>,
        limit: usize,
        fits: impl Fn(&LayerVersion) -> bool,
    ) -> (Vec<Arc<LayerVersion>>, bool) {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        let Some(versions) = layers.get(name) else { return (Vec::new(), false) };
        let rest = versions.range((Unbounded, before.map_or(Unbounded, Excluded))).rev();
        let rest = rest.map(|(_, layer)| layer).filter(|l| !l.record.deleted && fits(l));
        page(rest.cloned(), limit)
    }

    /// Bytes of all archives of layers.
    pub fn layer_bytes(&self) -> u64 {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        layers.values().flat_map(BTreeMap::values).map(|layer| layer.record.code.size).sum()
    }

    /// Has `change` change what is kept of a version.
    ///
    /// # Errors
    /// [`StoreError::UnknownLayer`], what `change` says, or that it could not be written.
    pub fn change_layer<T, E: From<StoreError>>(
        &self,
        name: &str,
        version: u32,
        change: impl FnOnce(&mut Record) -> Result<T, E>,
    ) -> Result<T, E> {
        let connection = self.lock();
        let found = self.layer(name, version).filter(|layer| !layer.record.deleted);
        let unknown = || StoreError::UnknownLayer { name: name.to_owned(), version };
        let mut layer = LayerVersion::clone(&*found.ok_or_else(unknown)?);
        let result = change(&mut layer.record)?;
        write(&connection, &layer)?;
        self.remember_layer(&Arc::new(layer));
        Ok(result)
    }

    /// Removes the records of versions that were deleted and that no function has any more, and gives them.
    ///
    /// # Errors
    /// It could not be written.
    pub fn sweep_layers(&self) -> Result<Vec<Arc<LayerVersion>>, StoreError> {
        let mut connection = self.lock();
        let mut gone: Vec<_> = {
            let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
            let all = layers.values().flat_map(BTreeMap::values);
            all.filter(|layer| layer.record.deleted).cloned().collect()
        };
        if gone.is_empty() {
            return Ok(gone);
        }
        {
            let functions = self.read();
            let versions = functions.values().flat_map(|entry| entry.versions.values());
            for used in versions.flat_map(|function| &function.config.layers) {
                gone.retain(|layer| (&layer.name, layer.version) != (&used.name, used.version));
            }
        }
        let transaction = connection.transaction()?;
        for layer in &gone {
            let key = params![layer.name, layer.version];
            transaction.execute("DELETE FROM layers WHERE name = ?1 AND version = ?2", key)?;
        }
        transaction.commit()?;
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        for layer in &gone {
            if let Some(versions) = layers.get_mut(&layer.name) {
                versions.remove(&layer.version);
            }
        }
        layers.retain(|_, versions| !versions.is_empty());
        Ok(gone)
    }

    /// Whether the archive in that blob is a layer's.
    pub fn is_layer(&self, blob: &str) -> bool {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        layers.values().flat_map(BTreeMap::values).any(|layer| layer.record.code.blob == blob)
    }

    /// Refuses a record whose layers are not all there.
    pub(super) fn check_layers(&self, function: &Function) -> Result<(), StoreError> {
        for layer in &function.config.layers {
            if self.layer(&layer.name, layer.version).is_none() {
                let (name, version) = (layer.name.clone(), layer.version);
                return Err(StoreError::UnknownLayer { name, version });
            }
        }
        Ok(())
    }

    fn remember_layer(&self, layer: &Arc<LayerVersion>) {
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        layers.entry(layer.name.clone()).or_default().insert(layer.version, layer.clone());
    }
}

fn page(
    mut rest: impl Iterator<Item = Arc<LayerVersion>>,
    limit: usize,
) -> (Vec<Arc<LayerVersion>>, bool) {
    let page = rest.by_ref().take(limit).collect();
    (page, rest.next().is_some())
}

fn write(connection: &Connection, layer: &LayerVersion) -> Result<(), StoreError> {
    let LayerVersion { name, version, record, envelope } = layer;
    let document =
        envelope.record.seal(&context(name, &version.to_le_bytes()), &serde_json::to_vec(record)?);
    let document = document?;
    connection.execute(
        "INSERT OR REPLACE INTO layers VALUES (?1, ?2, ?3, ?4)",
        params![name, version, envelope.wrapped(), document],
    )?;
    Ok(())
}

/// All layers as they are stored.
///
/// # Errors
/// [`StoreError::Open`] or [`StoreError::Record`].
pub(super) fn read(
    connection: &Connection,
    keys: &dyn KeyService,
    path: &Path,
) -> Result<Layers, StoreError> {
    let rows = || {
        let mut statement =
            connection.prepare("SELECT name, version, wrapped_key, document FROM layers")?;
        let rows = statement
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
        rows.collect::<rusqlite::Result<Vec<(String, u32, Vec<u8>, Vec<u8>)>>>()
    };
    let rows = rows().map_err(|source| StoreError::Open { path: path.to_owned(), source })?;
    let mut layers = Layers::new();
    for (name, version, wrapped, document) in rows {
        let layer = open(&name, version, wrapped, &document, keys).map_err(|source| {
            StoreError::LayerRecord { path: path.to_owned(), name: name.clone(), version, source }
        })?;
        layers.entry(name).or_default().insert(version, Arc::new(layer));
    }
    Ok(layers)
}

fn open(
    name: &str,
    version: u32,
    wrapped: Vec<u8>,
    document: &[u8],
    keys: &dyn KeyService,
) -> Result<LayerVersion, KeyError> {
    let altered = || KeyError::Altered { what: "the record" };
    let envelope = Envelope::open(keys, wrapped)?;
    let plain = envelope.record.open(&context(name, &version.to_le_bytes()), document);
    let plain = plain.map_err(|_| altered())?;
    let record = serde_json::from_slice(&plain).map_err(|_| altered())?;
    Ok(LayerVersion { name: name.to_owned(), version, record, envelope })
}

/// What the record of a version is bound to.
fn context<'a>(name: &'a str, version: &'a [u8; 4]) -> [&'a [u8]; 3] {
    [b"firnd layer", name.as_bytes(), version]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        envelope::tests::TestKeys,
        function::{Code, tests::example},
    };

    fn open(dir: &tempfile::TempDir, key: u8) -> Result<Store, StoreError> {
        Store::open(&dir.path().join("store.sqlite"), Arc::new(TestKeys(key)))
    }

    fn publish(store: &Store, name: &str) -> Arc<LayerVersion> {
        let record = Record {
            code: Code {
                sha256: "00".repeat(32),
                size: 10,
                blob: uuid::Uuid::new_v4().to_string(),
            },
            description: "planted".into(),
            license: None,
            runtimes: Vec::new(),
            architectures: Vec::new(),
            created_ms: 1,
            deleted: false,
            permissions: BTreeMap::new(),
            revision: "r".into(),
        };
        store.publish_layer(name, record, store.envelope().unwrap()).unwrap()
    }

    fn delete(store: &Store, version: u32) -> usize {
        let done = store.change_layer("l", version, |record| {
            record.deleted = true;
            Ok::<_, StoreError>(())
        });
        done.unwrap();
        store.sweep_layers().unwrap().len()
    }

    #[test]
    fn numbers_are_never_given_twice() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir, 1).unwrap();
        assert_eq!((publish(&store, "l").version, publish(&store, "l").version), (1, 2));
        assert_eq!((delete(&store, 2), delete(&store, 1)), (1, 1));
        assert!(matches!(
            store.change_layer("l", 1, |_| Ok::<_, StoreError>(())),
            Err(StoreError::UnknownLayer { .. })
        ));
        drop(store);
        let store = open(&dir, 1).unwrap();
        assert_eq!((publish(&store, "l").version, publish(&store, "m").version), (3, 1));
    }

    #[test]
    fn versions_come_back_and_stay_for_functions_that_have_them() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir, 1).unwrap();
        let layers = [publish(&store, "l"), publish(&store, "l")];
        let mut function = example("f");
        function.config.layers = layers.iter().map(|layer| layer.reference()).collect();
        store.create(function.clone(), true).unwrap();
        assert_eq!((delete(&store, 1), delete(&store, 2)), (0, 0));
        drop(store);

        let store = open(&dir, 1).unwrap();
        let found = store.get("f", crate::function::Version::Latest).unwrap();
        assert_eq!(found.config.layers, function.config.layers);
        let kept = store.layer("l", 1).unwrap();
        assert_eq!((&kept.record.code, kept.record.deleted), (&layers[0].record.code, true));
        assert_eq!(store.layers(None, 10, |_| true).0.len(), 0, "what is deleted is not listed");
        // Version 1 of the function still has them.
        let without = |f: &Function| {
            let mut new = f.clone();
            new.config.layers.clear();
            Ok::<_, StoreError>(new)
        };
        store.update("f", None, false, without).unwrap();
        assert_eq!(store.sweep_layers().unwrap().len(), 0);
        store.delete_version("f", 1).unwrap();
        assert_eq!(store.sweep_layers().unwrap().len(), 2);
        // And what is gone can't be taken up.
        let with = |_: &Function| Ok::<_, StoreError>(function.clone());
        let error = store.update("f", None, false, with).unwrap_err();
        assert!(matches!(error, StoreError::UnknownLayer { .. }), "{error}");
    }

    #[test]
    fn lists_are_paged_and_filtered() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir, 1).unwrap();
        for name in ["a", "b", "b", "c"] {
            publish(&store, name);
        }
        let shown = |(layers, more): (Vec<Arc<LayerVersion>>, bool)| {
            let layers: Vec<_> =
                layers.iter().map(|l| format!("{}:{}", l.name, l.version)).collect();
            (layers.join(" "), more)
        };
        assert_eq!(shown(store.layers(None, 2, |_| true)), ("a:1 b:2".into(), true));
        assert_eq!(shown(store.layers(Some("b"), 2, |_| true)), ("c:1".into(), false));
        assert_eq!(shown(store.layers(None, 9, |l| l.version == 1)), ("a:1 b:1 c:1".into(), false));
        assert_eq!(shown(store.layer_versions("b", None, 1, |_| true)), ("b:2".into(), true));
        assert_eq!(shown(store.layer_versions("b", Some(2), 1, |_| true)), ("b:1".into(), false));
    }

    #[test]
    fn altered_and_exchanged_records_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir, 1).unwrap();
        publish(&store, "l");
        publish(&store, "l");
        drop(store);
        let file = std::fs::read(dir.path().join("store.sqlite")).unwrap();
        assert!(!file.windows(7).any(|w| w == b"planted"));
        let connection = Connection::open(dir.path().join("store.sqlite")).unwrap();
        let swap = "UPDATE layers SET document = (SELECT document FROM layers WHERE version = 2)
                    WHERE version = 1";
        connection.execute(swap, []).unwrap();
        drop(connection);
        let error = open(&dir, 1).unwrap_err().to_string();
        assert!(error.contains("layer \"l\"") && error.contains("version 1"), "{error}");
    }
}
