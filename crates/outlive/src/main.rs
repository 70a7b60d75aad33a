//! The `outlive` program: reads the command line and hands over to the command.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use outlive::cli::{Cli, Command};
use outlive::{check, demo, primary, standby};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    init_logs();
    let code = match cli.command {
        Command::Run(options) => primary::command(&options),
        Command::Standby(options) => standby::command(&options),
        Command::Demo(options) => demo::command(&options),
        Command::Check(options) => check::command(&options),
    };
    ExitCode::from(code)
}

fn init_logs() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
