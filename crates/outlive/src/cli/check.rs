//! `outlive check`.

/// `outlive check`.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct CheckOptions {
    /// Write the findings as JSON
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
Examples:
  outlive check             a table for people
  outlive check --json      the same for programs";
