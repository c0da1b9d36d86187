//! Where the daemon is: an option of each command that asks it.

// No docstring: clap would take it for what the command does.
#[derive(Debug, clap::Args)]
pub struct Endpoint {
    /// The daemon
    #[arg(
        id = "endpoint",
        long = "endpoint",
        env = "FIRN_ENDPOINT",
        default_value = "http://127.0.0.1:9000",
        value_name = "URL"
    )]
    pub url: String,
}
