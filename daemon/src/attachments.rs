//! What is attached to a function as a whole, beside its versions: aliases, concurrency, policies that
//! say who may invoke it, and URLs that do.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::function::Version;

/// Most bytes of a policy.
pub const MAX_POLICY: usize = 20_480;

/// All that is attached to one function. It is stored as one sealed JSON document: members may be added,
/// with defaults, never renamed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attachments {
    /// By name.
    pub aliases: BTreeMap<String, Alias>,
    /// Reserved concurrency.
    pub reserved: Option<u32>,
    /// Provisioned concurrency, by version or alias.
    pub provisioned: BTreeMap<String, Provisioned>,
    /// Policies by the qualifier that they hold for: a version, an alias, or nothing for calls without one.
    /// None is empty.
    pub policies: BTreeMap<String, Policy>,
    /// URLs by what they invoke: `$LATEST` or an alias.
    pub urls: BTreeMap<String, Url>,
}

/// A URL of a function, or of an alias.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Url {
    /// First label of its host name, unique for ever.
    pub id: String,
    /// Who may call it.
    pub auth: UrlAuth,
    /// What web pages from elsewhere may do, where Firn answers for the function.
    pub cors: Option<Cors>,
    /// How it answers.
    pub mode: InvokeMode,
    /// Milliseconds since the epoch.
    pub created_ms: i64,
    /// Milliseconds since the epoch.
    pub modified_ms: i64,
}

/// Who may call a URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum UrlAuth {
    /// Everybody.
    #[serde(rename = "NONE")]
    None,
    /// Who signs as somebody with the permission.
    #[serde(rename = "AWS_IAM")]
    AwsIam,
}

/// How a URL answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum InvokeMode {
    /// With the whole response.
    #[default]
    Buffered,
    /// With the response as it is made.
    ResponseStream,
}

/// Cross-origin resource sharing, as in Lambda's API.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Cors {
    /// `Access-Control-Allow-Credentials`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_credentials: Option<bool>,
    /// `Access-Control-Allow-Headers`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_headers: Option<Vec<String>>,
    /// `Access-Control-Allow-Methods`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_methods: Option<Vec<String>>,
    /// `Access-Control-Allow-Origin`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_origins: Option<Vec<String>>,
    /// `Access-Control-Expose-Headers`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expose_headers: Option<Vec<String>>,
    /// `Access-Control-Max-Age` in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age: Option<i64>,
}

/// Provisioned concurrency of a version or an alias.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provisioned {
    /// Instances.
    pub requested: u32,
    /// Milliseconds since the epoch.
    pub modified_ms: i64,
}

impl Attachments {
    /// Drops what belongs to a version or alias that goes.
    pub fn forget(&mut self, qualifier: &str) {
        self.aliases.remove(qualifier);
        self.provisioned.remove(qualifier);
        self.policies.remove(qualifier);
        self.urls.remove(qualifier);
    }

    /// Provisioned concurrency, all in all.
    pub fn provisioned(&self) -> u32 {
        self.provisioned.values().fold(0, |sum, p| sum.saturating_add(p.requested))
    }

    /// What nobody else can have of the account's concurrency.
    pub fn kept(&self) -> u32 {
        self.reserved.unwrap_or_else(|| self.provisioned())
    }

    /// How a qualifier's provisioned concurrency is shared out among versions.
    pub fn shares(&self, qualifier: &str) -> Vec<(Version, u32)> {
        let Some(Provisioned { requested, .. }) = self.provisioned.get(qualifier) else {
            return Vec::new();
        };
        match (qualifier.parse(), self.aliases.get(qualifier)) {
            (Ok(version), _) => vec![(version, *requested)],
            (Err(()), Some(alias)) => alias.shares(*requested),
            (Err(()), None) => Vec::new(),
        }
    }

    /// The same for all qualifiers.
    pub fn all_shares(&self) -> BTreeMap<Version, u32> {
        let mut all = BTreeMap::<Version, u32>::new();
        for (version, share) in self.provisioned.keys().flat_map(|q| self.shares(q)) {
            let sum = all.entry(version).or_default();
            *sum = sum.saturating_add(share);
        }
        all
    }
}

/// A resource policy: who may invoke a function by one of its qualifiers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// Changes with every change of it.
    pub revision: String,
    /// In the order in which they were added.
    pub statements: Vec<Statement>,
}

impl Policy {
    /// As Lambda shows it.
    pub fn document(&self) -> String {
        let documents: Vec<&str> = self.statements.iter().map(|s| s.document.as_str()).collect();
        let statements = documents.join(",");
        format!(r#"{{"Version":"2012-10-17","Id":"default","Statement":[{statements}]}}"#)
    }
}

/// One permission.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Statement {
    /// What it is known by within its policy.
    pub sid: String,
    /// The whole statement as JSON, its id included.
    pub document: String,
}

/// A name for a version, or for two among which its invocations are shared out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alias {
    /// The version that it means.
    pub version: Version,
    /// Another version, and the share of invocations that it gets, from 0 to 1.
    pub additional: Option<(Version, f64)>,
    /// Description.
    pub description: String,
    /// Changes with every update.
    pub revision: String,
}

impl Alias {
    /// The version for one invocation, by a number that was drawn evenly from [0, 1).
    pub fn choose(&self, draw: f64) -> Version {
        match self.additional {
            Some((version, weight)) if draw < weight => version,
            _ => self.version,
        }
    }

    /// Instances shared out as invocations are.
    fn shares(&self, instances: u32) -> Vec<(Version, u32)> {
        let Some((other, weight)) = self.additional else { return vec![(self.version, instances)] };
        let second = (f64::from(instances) * weight).round() as u32;
        let shares = [(self.version, instances.saturating_sub(second)), (other, second)];
        shares.into_iter().filter(|(_, share)| *share > 0).collect()
    }

    /// Whether invocations may reach `version` through it.
    pub fn uses(&self, version: Version) -> bool {
        self.version == version || self.additional.is_some_and(|(other, _)| other == version)
    }
}

/// A number drawn evenly from [0, 1).
pub fn draw() -> f64 {
    // The last 62 bits of such an id are random; a float holds 53.
    let random = uuid::Uuid::new_v4().as_u128() as u64 & ((1 << 53) - 1);
    random as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn alias(weight: f64) -> Alias {
        Alias {
            version: Version::Published(1),
            additional: Some((Version::Published(2), weight)),
            description: String::new(),
            revision: String::new(),
        }
    }

    #[test]
    fn draws_are_even() {
        let mut tenths = [0_u32; 10];
        for _ in 0..10_000 {
            tenths[(draw() * 10.0) as usize] += 1;
        }
        // Six standard deviations of a binomial distribution are 180.
        assert!(tenths.iter().all(|n| n.abs_diff(1000) < 180), "{tenths:?}");
    }

    #[test]
    fn documents_read_back_and_may_lack_members() {
        let mut attachments = Attachments::default();
        attachments.aliases.insert("prod".into(), alias(0.25));
        let json = serde_json::to_string(&attachments).unwrap();
        assert_eq!(serde_json::from_str::<Attachments>(&json).unwrap(), attachments);
        assert_eq!(serde_json::from_str::<Attachments>("{}").unwrap(), Attachments::default());
    }

    proptest! {
        #[test]
        fn weights_share_out_what_is_drawn(weight in 0.0..=1.0f64, steps in 1_u32..2000) {
            let alias = alias(weight);
            let even = (0..steps).map(|i| f64::from(i) / f64::from(steps));
            let second =
                even.filter(|draw| alias.choose(*draw) == Version::Published(2)).count() as f64;
            prop_assert!((second - weight * f64::from(steps)).abs() <= 1.0);
        }

        #[test]
        fn instances_are_shared_out_whole(weight in 0.0..=1.0f64, instances in 1_u32..1000) {
            let mut attachments = Attachments::default();
            attachments.aliases.insert("prod".into(), alias(weight));
            let provisioned = Provisioned { requested: instances, modified_ms: 0 };
            attachments.provisioned.insert("prod".into(), provisioned.clone());
            let all = attachments.all_shares();
            prop_assert_eq!(all.values().sum::<u32>(), instances);
            let second = all.get(&Version::Published(2)).copied().unwrap_or_default();
            prop_assert!((f64::from(second) - weight * f64::from(instances)).abs() <= 0.5);
            attachments.provisioned.insert("2".into(), provisioned);
            let both = attachments.all_shares()[&Version::Published(2)];
            prop_assert_eq!(both, second + instances);
        }

        #[test]
        fn extreme_weights_are_certain(draw in 0.0..1.0f64) {
            prop_assert_eq!(alias(0.0).choose(draw), Version::Published(1));
            prop_assert_eq!(alias(1.0).choose(draw), Version::Published(2));
        }
    }
}
