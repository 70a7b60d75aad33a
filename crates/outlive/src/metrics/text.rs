//! The two text formats that Prometheus reads.

use std::sync::Mutex;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{self, Registry};

use super::ask::Scrape;
use super::families::{FAMILIES, Family, Kind, Sample, Unit, Value};

/// A format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Prometheus' own, which everything reads, the textfile collector of node_exporter too.
    Prometheus,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// What an HTTP header calls it.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => prometheus_text::CONTENT_TYPE,
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Everything that was said, as text.
pub(super) fn text(scrape: Scrape, format: Format) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(All(Mutex::new(scrape))));
    let mut out = String::new();
    let written = match format {
        Format::Prometheus => prometheus_text::encode(&mut out, &registry),
        Format::OpenMetrics => text::encode(&mut out, &registry),
    };
    written.expect("writing to a string does not fail");
    out
}

/// The lock is for the trait, which wants what several threads may use; one does.
#[derive(Debug)]
struct All(Mutex<Scrape>);

impl Collector for All {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let scrape = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for family in FAMILIES {
            let samples = (family.read)(&scrape);
            if !samples.is_empty() {
                put(&mut encoder, family, &samples)?;
            }
        }
        Ok(())
    }
}

fn put(encoder: &mut DescriptorEncoder<'_>, family: &Family, samples: &[Sample]) -> std::fmt::Result {
    let kind = match family.kind {
        Kind::Gauge => MetricType::Gauge,
        Kind::Counter => MetricType::Counter,
        Kind::Histogram => MetricType::Histogram,
    };
    let unit = family.unit.map(|unit| match unit {
        Unit::Seconds => registry::Unit::Seconds,
        Unit::Bytes => registry::Unit::Bytes,
    });
    let mut metric = encoder.encode_descriptor(family.name, family.help, unit.as_ref(), kind)?;
    for Sample { labels, value } in samples {
        let mut one: MetricEncoder<'_> = metric.encode_family(labels)?;
        match value {
            Value::Number(number) if family.kind == Kind::Counter => {
                one.encode_counter::<NoLabelSet, f64, f64>(number, None)?;
            }
            Value::Number(number) => one.encode_gauge(number)?,
            Value::Histogram { sum, buckets } => {
                let count = buckets.iter().map(|(_, count)| count).sum();
                one.encode_histogram::<NoLabelSet>(*sum, count, buckets, None)?;
            }
        }
    }
    Ok(())
}
