//! The record of KMS keys, and of keys of the installation's own: tables in the store's file.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
    path::Path,
    sync::{Arc, PoisonError, RwLockReadGuard},
};

use firn::keys::{Key, KeyError, KeyService};
use rusqlite::{Connection, OptionalExtension, params};
use uuid::Uuid;

use super::{Store, StoreError};
use crate::{
    function::now_ms,
    kms::{Alias, KmsKey},
};

/// All KMS keys.
#[derive(Debug, Default)]
pub struct KmsKeys {
    keys: BTreeMap<Uuid, Arc<KmsKey>>,
    /// Whose each alias is.
    aliases: BTreeMap<String, Uuid>,
}

impl KmsKeys {
    /// A key whose time is not over.
    pub fn get(&self, id: Uuid) -> Option<&Arc<KmsKey>> {
        self.keys.get(&id).filter(|key| !key.is_gone(now_ms()))
    }

    /// The key that an alias leads to.
    pub fn aliased(&self, alias: &str) -> Option<&Arc<KmsKey>> {
        self.get(*self.aliases.get(alias)?)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// All keys in the order of their ids, from after `after` on.
    pub fn after(&self, after: Option<Uuid>) -> impl Iterator<Item = &Arc<KmsKey>> {
        let now = now_ms();
        let rest = self.keys.range((after.map_or(Unbounded, Excluded), Unbounded));
        rest.map(|(_, key)| key).filter(move |key| !key.is_gone(now))
    }

    /// All aliases in the order of their names, from after `after` on, with their keys.
    pub fn aliases(
        &self,
        after: Option<&str>,
    ) -> impl Iterator<Item = (&str, Alias, &Arc<KmsKey>)> {
        let rest = self.aliases.range::<str, _>((after.map_or(Unbounded, Excluded), Unbounded));
        rest.filter_map(|(name, id)| {
            let key = self.get(*id)?;
            Some((name.as_str(), *key.record.aliases.get(name)?, key))
        })
    }

    fn insert(&mut self, key: Arc<KmsKey>) {
        self.forget(key.id);
        self.aliases.extend(key.record.aliases.keys().map(|alias| (alias.clone(), key.id)));
        self.keys.insert(key.id, key);
    }

    fn forget(&mut self, id: Uuid) {
        let Some(old) = self.keys.remove(&id) else { return };
        for alias in old.record.aliases.keys() {
            // It may lead to another key by now.
            if self.aliases.get(alias) == Some(&id) {
                self.aliases.remove(alias);
            }
        }
    }
}

impl Store {
    /// All KMS keys, as they stay while this is held.
    pub fn kms(&self) -> RwLockReadGuard<'_, KmsKeys> {
        self.kms.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new KMS key, which is in the store once a change has given it.
    ///
    /// # Errors
    /// [`StoreError::Key`].
    pub fn new_kms_key(&self, description: String) -> Result<KmsKey, StoreError> {
        Ok(KmsKey::generate(&*self.keys, description, now_ms())?)
    }

    /// Has `change` say from all keys which there are to be anew, or changed; and removes those whose time
    /// is over.
    ///
    /// # Errors
    /// What `change` says, or that it could not be written.
    pub fn change_kms<T, E: From<StoreError>>(
        &self,
        change: impl FnOnce(&KmsKeys) -> Result<(T, Vec<KmsKey>), E>,
    ) -> Result<T, E> {
        let mut connection = self.lock();
        let (result, changed, gone) = {
            let (keys, now) = (self.kms(), now_ms());
            let (result, changed) = change(&keys)?;
            let gone = keys.keys.values().filter(|key| key.is_gone(now)).map(|key| key.id);
            (result, changed, gone.collect::<Vec<_>>())
        };
        write(&mut connection, &changed, &gone)?;
        let mut keys = self.kms.write().unwrap_or_else(PoisonError::into_inner);
        gone.into_iter().for_each(|id| keys.forget(id));
        changed.into_iter().for_each(|key| keys.insert(Arc::new(key)));
        Ok(result)
    }

    /// A key of the installation's own that outlives the daemon, by its purpose: made when it is first asked
    /// for.
    ///
    /// # Errors
    /// [`StoreError::Key`], or that it could not be read or written.
    pub fn own_key(&self, purpose: &str) -> Result<Key, StoreError> {
        let connection = self.lock();
        let wrapped = connection
            .query_row("SELECT wrapped_key FROM own_keys WHERE purpose = ?1", [purpose], |row| {
                row.get::<_, Vec<u8>>(0)
            })
            .optional()?;
        match wrapped {
            Some(wrapped) => Ok(self.keys.unwrap(&wrapped)?),
            None => {
                let (key, wrapped) = self.keys.generate_data_key()?;
                connection
                    .execute("INSERT INTO own_keys VALUES (?1, ?2)", params![purpose, wrapped])?;
                Ok(key)
            }
        }
    }
}

fn write(connection: &mut Connection, changed: &[KmsKey], gone: &[Uuid]) -> Result<(), StoreError> {
    let transaction = connection.transaction()?;
    for key in changed {
        let (wrapped, document) = key.sealed()?;
        transaction.execute(
            "INSERT OR REPLACE INTO kms_keys VALUES (?1, ?2, ?3)",
            params![key.id.to_string(), wrapped, document],
        )?;
    }
    for id in gone {
        transaction.execute("DELETE FROM kms_keys WHERE id = ?1", [id.to_string()])?;
    }
    Ok(transaction.commit()?)
}

/// All keys as they are stored.
///
/// # Errors
/// [`StoreError::Open`] or [`StoreError::KmsRecord`].
pub(super) fn read(
    connection: &Connection,
    keys: &dyn KeyService,
    path: &Path,
) -> Result<KmsKeys, StoreError> {
    let rows = || {
        let mut statement = connection.prepare("SELECT id, wrapped_key, document FROM kms_keys")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        rows.collect::<rusqlite::Result<Vec<(String, Vec<u8>, Vec<u8>)>>>()
    };
    let rows = rows().map_err(|source| StoreError::Open { path: path.to_owned(), source })?;
    let mut found = KmsKeys::default();
    for (id, wrapped, document) in rows {
        let opened = match Uuid::parse_str(&id) {
            Ok(id) => KmsKey::open(keys, id, wrapped, &document),
            Err(_) => Err(KeyError::Altered { what: "the record" }),
        };
        let key = opened.map_err(|source| {
            let path = path.to_owned();
            StoreError::KmsRecord { path, id: id.clone(), source }
        })?;
        found.insert(Arc::new(key));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{envelope::tests::TestKeys, kms::State};

    fn open(dir: &tempfile::TempDir) -> Result<Store, StoreError> {
        Store::open(&dir.path().join("store.sqlite"), Arc::new(TestKeys(1)))
    }

    fn add(store: &Store, alias: &str) -> Uuid {
        let mut key = store.new_kms_key("planted".into()).unwrap();
        let id = key.id;
        key.record.aliases.insert(alias.into(), Alias { created_ms: 1, updated_ms: 1 });
        store.change_kms(|_| Ok::<_, StoreError>(((), vec![key]))).unwrap();
        id
    }

    fn set(store: &Store, id: Uuid, change: impl FnOnce(&mut KmsKey)) {
        let changed = |keys: &KmsKeys| {
            let mut key = KmsKey::clone(keys.get(id).unwrap());
            change(&mut key);
            Ok::<_, StoreError>(((), vec![key]))
        };
        store.change_kms(changed).unwrap();
    }

    fn seen(store: &Store) -> (Vec<Uuid>, Vec<(String, Uuid)>) {
        let keys = store.kms();
        let aliases = keys.aliases(None).map(|(name, _, key)| (name.to_owned(), key.id));
        (keys.after(None).map(|key| key.id).collect(), aliases.collect())
    }

    #[test]
    fn keys_and_aliases_outlive_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir).unwrap();
        let (a, b) = (add(&store, "alias/a"), add(&store, "alias/b"));
        let blob = store.kms().get(a).unwrap().encrypt(&BTreeMap::new(), b"x").unwrap();
        let before = seen(&store);
        assert_eq!(before.1, [("alias/a".to_owned(), a), ("alias/b".to_owned(), b)]);
        assert_eq!(store.kms().aliases(Some("alias/a")).count(), 1);
        let own = store.own_key("sessions").unwrap();
        drop(store);
        let file = std::fs::read(dir.path().join("store.sqlite")).unwrap();
        assert!(!file.windows(7).any(|w| w == b"planted" || w == b"alias/a"));
        let store = open(&dir).unwrap();
        assert_eq!(seen(&store), before);
        assert_eq!(store.own_key("sessions").unwrap().as_bytes(), own.as_bytes());
        let key = store.kms().aliased("alias/a").unwrap().clone();
        assert_eq!(key.decrypt(&BTreeMap::new(), &blob).unwrap().as_slice(), b"x");
    }

    #[test]
    fn what_is_due_is_gone_at_once_and_removed_with_the_next_change() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir).unwrap();
        let (a, b) = (add(&store, "alias/a"), add(&store, "alias/b"));
        set(&store, a, |key| key.record.state = State::PendingDeletion { at_ms: now_ms() });
        assert_eq!(seen(&store), (vec![b], vec![("alias/b".into(), b)]));
        assert!(store.kms().aliased("alias/a").is_none());
        assert_eq!(store.kms().len(), 2);
        set(&store, b, |_| {});
        assert_eq!(store.kms().len(), 1);
        drop(store);
        assert_eq!(open(&dir).unwrap().kms().len(), 1);
    }

    #[test]
    fn exchanged_records_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir).unwrap();
        let (a, _) = (add(&store, "alias/a"), add(&store, "alias/b"));
        drop(store);
        let connection = Connection::open(dir.path().join("store.sqlite")).unwrap();
        let swap = "UPDATE kms_keys SET document = (SELECT document FROM kms_keys WHERE id != ?1)
                    WHERE id = ?1";
        connection.execute(swap, [a.to_string()]).unwrap();
        drop(connection);
        let error = open(&dir).unwrap_err().to_string();
        assert!(error.contains(&a.to_string()), "{error}");
    }
}
