//! The VMs from which a VM descends. They show whether an image is older or newer than another, or of another
//! line.
//!
//! The generations of one VM are one line without forks: each begins with everything the previous one had
//! committed, because only one host can win it. The line forks where an operator starts from an image
//! although its VM may have continued elsewhere. Then a *new* VM begins, whose ancestor is the image's VM up
//! to the image's generation.

use super::limits::MAX_ANCESTORS;
use super::vm::VmId;

/// A VM up to one of its generations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ancestor {
    /// The VM.
    pub vm: VmId,
    /// Its last generation that the descendant includes. Later ones belong to another line.
    pub through: u64,
}

/// The VMs that a VM descends from, at most [`MAX_ANCESTORS`], the nearest first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lineage(Vec<Ancestor>);

impl Lineage {
    /// A line with these ancestors, the nearest first. If there are too many, the farthest are forgotten:
    /// their images then count as strangers' images, which are not overwritten unasked.
    pub fn new(ancestors: impl IntoIterator<Item = Ancestor>) -> Self {
        let mut line: Vec<Ancestor> = Vec::new();
        for Ancestor { vm, through } in ancestors {
            match line.iter_mut().find(|known| known.vm == vm) {
                // If a VM is there twice, only what both entries have is common to all.
                Some(known) => known.through = known.through.min(through),
                None => line.push(Ancestor { vm, through }),
            }
        }
        line.truncate(MAX_ANCESTORS);
        Self(line)
    }

    /// The ancestors, the nearest first.
    pub fn ancestors(&self) -> &[Ancestor] {
        &self.0
    }

    /// Whether a VM of this line includes everything that `vm` had committed in generation `generation`.
    pub fn includes(&self, vm: VmId, generation: u64) -> bool {
        self.0.iter().any(|ancestor| ancestor.vm == vm && generation <= ancestor.through)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ancestor(vm: u8, through: u64) -> Ancestor {
        Ancestor { vm: VmId([vm; 16]), through }
    }

    #[test]
    fn a_line_has_its_ancestors_up_to_where_it_left_them() {
        let line = Lineage::new([ancestor(1, 4), ancestor(2, 9)]);
        assert!(line.includes(VmId([1; 16]), 1) && line.includes(VmId([1; 16]), 4));
        assert!(!line.includes(VmId([1; 16]), 5), "what came after the fork is another line's");
        assert!(line.includes(VmId([2; 16]), 9) && !line.includes(VmId([3; 16]), 1));
        assert!(!Lineage::default().includes(VmId([1; 16]), 0));
    }

    #[test]
    fn what_is_said_twice_counts_as_far_as_both_go_and_the_farthest_are_forgotten() {
        let line = Lineage::new([ancestor(1, 4), ancestor(2, 1), ancestor(1, 3)]);
        assert_eq!(line.ancestors(), [ancestor(1, 3), ancestor(2, 1)]);
        let many = Lineage::new((0..40).map(|vm| ancestor(vm, 1)));
        assert_eq!(many.ancestors().len(), MAX_ANCESTORS);
        assert!(many.includes(VmId([0; 16]), 1) && !many.includes(VmId([39; 16]), 1));
    }
}
