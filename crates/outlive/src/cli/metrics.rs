//! `outlive metrics`.

use std::path::PathBuf;

use clap::Args;

/// `outlive metrics`.
#[derive(Clone, Debug, Args)]
#[command(after_help = METRICS_HELP)]
pub struct MetricsOptions {
    /// Ask the process with this --status; may be given several times [default: all in the usual folders]
    #[arg(long = "socket", value_name = "PATH")]
    pub sockets: Vec<PathBuf>,

    /// Serve them at http://ADDR:PORT/metrics, until this process is told to stop [without an address: 127.0.0.1:9753]
    #[arg(long, value_name = "ADDR:PORT", num_args = 0..=1, default_missing_value = "127.0.0.1:9753")]
    pub listen: Option<String>,

    /// Print the format OpenMetrics instead of Prometheus' own
    #[arg(long, conflicts_with = "listen")]
    pub openmetrics: bool,

    /// End when standard input is closed
    #[arg(long, hide = true, requires = "listen")]
    pub exit_with_stdin: bool,
}

const METRICS_HELP: &str = "\
docs/metrics.md explains every metric; monitoring/ has alert rules and a dashboard. This process needs no right over any
VM: run it as a user of its own, as systemd/outlive-metrics.service does. What it serves is neither encrypted nor
authenticated: let Prometheus on this host read it, or a proxy that speaks TLS.

Examples:
  outlive metrics                                  of all VMs and standbys on this host
  outlive metrics --socket /run/outlive/web.sock   of one
  outlive metrics --listen                         for Prometheus on this host
  outlive metrics > /var/lib/prometheus/node-exporter/outlive.prom     for node_exporter's textfile collector";
