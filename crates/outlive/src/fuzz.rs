//! Entry points for fuzzers: the files that stand beside an image, what is said to a served arbiter, and what a process
//! says to whoever makes metrics. Whatever the bytes are, nothing panics.

pub use crate::arbiter::fuzz::served;
pub use crate::disk::fuzz::{journal, sidecar};
pub use crate::metrics::fuzz::metrics;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    type Target = fn(&[u8]);

    #[test]
    fn what_fuzzers_found_breaks_nothing() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
        let targets: [(&str, Target); 4] = [
            ("sidecar", super::sidecar),
            ("journal", super::journal),
            ("served", super::served),
            ("metrics", super::metrics),
        ];
        for (name, target) in targets {
            let inputs = fs::read_dir(corpora.join(name)).unwrap();
            let count = inputs.map(|input| target(&fs::read(input.unwrap().path()).unwrap())).count();
            assert!(count > 0, "no inputs of {name}");
        }
    }
}
