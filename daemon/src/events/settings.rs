//! What a function's owner has set for its events: how often and how long they are tried, and where
//! the outcome goes. Lies in the queue's file, sealed with the function's key; read from memory.

use std::collections::BTreeMap;

use firn::keys::KeyError;
use serde::{Deserialize, Serialize};

use super::queue::Setting;
use crate::function::Function;

/// For one version or alias of a function.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Attempts after the first.
    pub retries: Option<u32>,
    /// How long an event may wait, in seconds.
    pub max_age_s: Option<u32>,
    /// ARN of the function, queue or topic that hears of each success.
    pub on_success: Option<String>,
    /// The same for each event that is given up.
    pub on_failure: Option<String>,
    /// When they were set, in milliseconds since the epoch.
    pub modified_ms: i64,
}

/// All settings by function and qualifier, with the id of the function that they are for.
pub type Known = BTreeMap<(String, String), (String, Settings)>;

impl Settings {
    /// Seals them for `function`.
    ///
    /// # Errors
    /// [`KeyError::Random`] or [`KeyError::TooLong`].
    pub fn seal(&self, function: &Function, qualifier: &str) -> Result<Setting, KeyError> {
        let plain = serde_json::to_vec(self).unwrap_or_default();
        let sealed = function.envelope.events.seal(&context(&function.name, qualifier), &plain)?;
        Ok(Setting {
            function: function.name.clone(),
            owner: function.envelope.id(),
            qualifier: qualifier.to_owned(),
            sealed: Some(sealed),
        })
    }

    /// Opens what [`Settings::seal`] made for the same function.
    ///
    /// # Errors
    /// [`KeyError::Altered`].
    pub fn open(function: &Function, setting: &Setting) -> Result<Self, KeyError> {
        let altered = || KeyError::Altered { what: "a function's settings for events" };
        let sealed = setting.sealed.as_deref().unwrap_or_default();
        let context = context(&setting.function, &setting.qualifier);
        let plain = function.envelope.events.open(&context, sealed).map_err(|_| altered())?;
        serde_json::from_slice(&plain).map_err(|_| altered())
    }
}

fn context<'a>(function: &'a str, qualifier: &'a str) -> [&'a [u8]; 3] {
    [b"firnd settings for events", function.as_bytes(), qualifier.as_bytes()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::function::tests::example;

    #[test]
    fn settings_open_for_their_function_and_qualifier_alone() {
        let settings = Settings { on_failure: Some("planted".into()), ..Settings::default() };
        let function = example("f");
        let mut setting = settings.seal(&function, "$LATEST").unwrap();
        let sealed = setting.sealed.as_ref().unwrap();
        assert!(!sealed.windows(7).any(|w| w == b"planted"));
        assert_eq!(Settings::open(&function, &setting).unwrap(), settings);
        setting.qualifier = "1".into();
        assert!(matches!(Settings::open(&function, &setting), Err(KeyError::Altered { .. })));
    }
}
