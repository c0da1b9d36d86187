//! Versions of layers: archives that functions find unpacked in `/opt`.
//!
//! A version never changes but for its policy. One that is deleted is no longer shown, and stays for as long
//! as functions have it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    code::{CodeStore, LoadError},
    envelope::Envelope,
    function::{Code, Layer},
};

/// A version of a layer.
#[derive(Debug, Clone)]
pub struct LayerVersion {
    /// Name of the layer.
    pub name: String,
    /// Its number, from 1 on.
    pub version: u32,
    /// What is kept of it.
    pub record: Record,
    /// Its keys.
    pub envelope: Envelope,
}

/// What is kept of a version of a layer. It is stored as one sealed JSON document: members may be added,
/// with defaults, never renamed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its archive.
    pub code: Code,
    /// Description.
    pub description: String,
    /// License.
    pub license: Option<String>,
    /// Runtimes that it is said to fit; shown and listed by, without effect otherwise.
    pub runtimes: Vec<String>,
    /// Architectures that it is said to fit.
    pub architectures: Vec<String>,
    /// Milliseconds since the epoch.
    pub created_ms: i64,
    /// It is there for the functions that have it.
    pub deleted: bool,
    /// Who else may use it, by statement id.
    pub permissions: BTreeMap<String, Permission>,
    /// Changes with each permission.
    pub revision: String,
}

/// One statement of a layer version's policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Permission {
    /// An account, its root's ARN, or `*`.
    pub principal: String,
    /// The organization that the principal must be of.
    pub organization: Option<String>,
}

impl LayerVersion {
    /// Whose its archive is, in the directory of code: no function has a name like this.
    pub fn owner(name: &str) -> String {
        format!("layer:{name}")
    }

    /// Its archive. Blocks.
    ///
    /// # Errors
    /// Any [`LoadError`].
    pub fn archive(&self, code: &CodeStore) -> Result<Vec<u8>, LoadError> {
        code.archive(&Self::owner(&self.name), &self.envelope, &self.record.code)
    }

    /// What a function keeps that has it.
    pub fn reference(&self) -> Layer {
        let Code { sha256, size, .. } = &self.record.code;
        Layer {
            name: self.name.clone(),
            version: self.version,
            sha256: sha256.clone(),
            size: *size,
        }
    }
}
