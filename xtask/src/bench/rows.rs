//! The rows that every bench of the project writes: one JSON object a line.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// A value and that of its peer, both from the same rounds.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Row {
    pub(crate) bench: String,
    /// Properties that distinguish it from other rows of the bench: words, numbers, yes and no.
    pub(crate) case: BTreeMap<String, Value>,
    pub(crate) value: f64,
    pub(crate) unit: String,
    pub(crate) peer: String,
    pub(crate) peer_value: f64,
}

impl Row {
    /// How many times smaller it is than its peer.
    pub(crate) fn ratio(&self) -> f64 {
        self.peer_value / self.value
    }

    pub(crate) fn number(&self, key: &str) -> Option<u64> {
        self.case.get(key)?.as_u64()
    }

    pub(crate) fn word(&self, key: &str) -> Option<&str> {
        self.case.get(key)?.as_str()
    }
}

/// Why a text does not consist of rows.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RowError {
    #[error("row {line} is not a row: {source}")]
    Format { line: usize, source: serde_json::Error },
    #[error("row {line} is not a ratio of times: {value} beside {peer_value}")]
    Ratio { line: usize, value: f64, peer_value: f64 },
    #[error("no rows")]
    None,
}

/// Reads and checks rows.
pub(crate) fn parse(text: &str) -> Result<Vec<Row>, RowError> {
    let mut rows = Vec::new();
    for (index, text) in text.lines().enumerate() {
        let line = index + 1;
        let row: Row = serde_json::from_str(text).map_err(|source| RowError::Format { line, source })?;
        if !(row.value > 0.0 && row.peer_value > 0.0) {
            return Err(RowError::Ratio { line, value: row.value, peer_value: row.peer_value });
        }
        rows.push(row);
    }
    if rows.is_empty() { Err(RowError::None) } else { Ok(rows) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the issue that asked for it has it.
    const LINE: &str = r#"{"bench":"dirty.harvest","case":{"backend":"ring","vm_gib":8,"dirty":300,"pattern":"scattered","hot":0},"value":43.1,"unit":"us","peer":"bitmap","peer_value":165.0}"#;

    #[test]
    fn the_format_of_a_row() {
        let rows = parse(&format!("{LINE}\n{LINE}\n")).unwrap();
        assert_eq!(rows.len(), 2);
        let row = &rows[0];
        assert_eq!(
            (row.bench.as_str(), row.unit.as_str(), row.peer.as_str()),
            ("dirty.harvest", "us", "bitmap")
        );
        assert_eq!(
            (row.number("vm_gib"), row.number("hot"), row.word("backend")),
            (Some(8), Some(0), Some("ring"))
        );
        assert!((row.ratio() - 3.83).abs() < 0.01);
    }

    #[test]
    fn what_is_no_row_is_named() {
        assert_eq!(parse("").unwrap_err().to_string(), "no rows");
        let error = |line: &str| parse(&format!("{LINE}\n{line}\n")).unwrap_err().to_string();
        assert!(error("hello").starts_with("row 2 is not a row"));
        assert!(error(&LINE.replace("peer_value", "other")).contains("other"));
        assert!(error(&LINE.replace("43.1", "0.0")).contains("not a ratio"));
    }
}
