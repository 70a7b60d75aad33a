//! The keys of an arbiter in etcd.
//!
//! ```text
//! PREFIX/arbiter                     which arbiter this is: a random id, written by `outlive arbiter init`
//! PREFIX/probe                       written by probes
//! PREFIX/vms/<vm>/claims/<generation> a claim; the generation has 20 digits, so that keys are in its order
//! PREFIX/vms/<vm>/ended/<generation>  the VM ended in order in this generation
//! ```

use outlive_epoch::VmId;

use crate::arbiter::record;

/// Names of keys, and ranges of them: from a key up to and without another.
#[derive(Clone)]
pub(super) struct Keys {
    prefix: String,
}

type Range = (String, String);

impl Keys {
    pub(super) fn below(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// All keys of the arbiter.
    pub(super) fn all(&self) -> Range {
        below(&self.prefix)
    }

    pub(super) fn marker(&self) -> String {
        format!("{}/arbiter", self.prefix)
    }

    pub(super) fn probe(&self) -> String {
        format!("{}/probe", self.prefix)
    }

    /// All keys of all VMs.
    pub(super) fn vms(&self) -> Range {
        below(&self.vms_folder())
    }

    /// All keys of a VM.
    pub(super) fn vm(&self, vm: &VmId) -> Range {
        below(&self.vm_folder(vm))
    }

    pub(super) fn claim(&self, vm: &VmId, generation: u64) -> String {
        format!("{}/{generation:020}", self.claims_folder(vm))
    }

    /// The claims of a VM to this generation and to newer ones.
    pub(super) fn claims_from(&self, vm: &VmId, generation: u64) -> Range {
        (self.claim(vm, generation), below(&self.claims_folder(vm)).1)
    }

    /// The claims of a VM to generations below this one.
    pub(super) fn claims_before(&self, vm: &VmId, generation: u64) -> Range {
        (below(&self.claims_folder(vm)).0, self.claim(vm, generation))
    }

    pub(super) fn ended(&self, vm: &VmId, generation: u64) -> String {
        format!("{}/ended/{generation:020}", self.vm_folder(vm))
    }

    /// The ends of a VM in generations below this one.
    pub(super) fn ended_before(&self, vm: &VmId, generation: u64) -> Range {
        (format!("{}/ended/", self.vm_folder(vm)), self.ended(vm, generation))
    }

    /// The generation of a claim.
    pub(super) fn parse_claim(&self, vm: &VmId, key: &str) -> Option<u64> {
        number(key.strip_prefix(&self.claims_folder(vm))?)
    }

    /// The generation in which a VM ended.
    pub(super) fn parse_ended(&self, vm: &VmId, key: &str) -> Option<u64> {
        number(key.strip_prefix(&self.vm_folder(vm))?.strip_prefix("/ended")?)
    }

    /// The VM that a key is about.
    pub(super) fn parse_vm(&self, key: &str) -> Option<VmId> {
        let name = key.strip_prefix(&self.vms_folder())?.strip_prefix('/')?.split('/').next()?;
        record::parse_vm_name(name)
    }

    fn vms_folder(&self) -> String {
        format!("{}/vms", self.prefix)
    }

    fn vm_folder(&self, vm: &VmId) -> String {
        format!("{}/{}", self.vms_folder(), record::vm_name(vm))
    }

    fn claims_folder(&self, vm: &VmId) -> String {
        format!("{}/claims", self.vm_folder(vm))
    }
}

/// All keys that begin with this name and a slash. A zero follows the slash in ASCII.
fn below(folder: &str) -> Range {
    (format!("{folder}/"), format!("{folder}0"))
}

fn number(text: &str) -> Option<u64> {
    let digits = text.strip_prefix('/')?;
    (digits.len() == 20).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key that changes is a claim that the release before does not find.
    #[test]
    fn keys_are_those_of_the_release_before() {
        let (keys, vm) = (Keys::below("outlive"), VmId(*b"0123456789abcdef"));
        let names = [keys.marker(), keys.probe(), keys.claim(&vm, 7), keys.ended(&vm, 7)];
        crate::golden::keeps("etcd-keys.txt", &format!("{}\n", names.join("\n")));
    }

    #[test]
    fn keys_are_in_the_order_of_generations_and_are_read_back() {
        let (keys, vm) = (Keys::below("a/b"), VmId([0xab; 16]));
        let claims: Vec<String> = [1, 9, 10, 11, u64::MAX].map(|it| keys.claim(&vm, it)).into();
        assert!(claims.is_sorted());
        assert_eq!(keys.parse_claim(&vm, &claims[2]), Some(10));
        assert_eq!(keys.parse_vm(&claims[4]), Some(vm));
        assert_eq!(keys.parse_ended(&vm, &keys.ended(&vm, 7)), Some(7));
        assert_eq!(keys.parse_claim(&vm, &keys.ended(&vm, 7)), None);
        for (begin, end) in [keys.all(), keys.vms(), keys.vm(&vm), keys.claims_from(&vm, 1)] {
            assert!(claims.iter().all(|key| *key >= begin && *key < end), "{begin} {end}");
        }
        let (begin, end) = keys.claims_before(&vm, 10);
        assert_eq!(claims.iter().filter(|key| **key >= begin && **key < end).count(), 2);
        assert!(keys.ended(&vm, 1) >= keys.vm(&vm).0 && keys.ended(&vm, 1) < keys.vm(&vm).1);
    }
}
