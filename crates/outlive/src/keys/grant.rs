//! Which VMs a host may send to others, which it may hold for them, and whether it may be their arbiter; and whether
//! somebody may operate the nodes of hosts.
//!
//! A certificate has each right as a name of kind URI: `outlive:send:any`, `outlive:hold:3f2a...` (a VM's id),
//! `outlive:arbitrate:any`, `outlive:operate:any`. So
//! `openssl x509 -text` shows them, and no library that verifies certificates stumbles over an extension that it
//! does not know.

use std::fmt;

use outlive_epoch::VmId;

/// The scheme of the names.
const SCHEME: &str = "outlive:";
/// The right of an arbiter.
const ARBITRATE: &str = "arbitrate";
/// The right of an operator.
const OPERATE: &str = "operate";

/// What a host may do with a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Run it, and send its checkpoints to a standby.
    Send,
    /// Have a copy of it, and take it over.
    Hold,
}

impl Right {
    const BOTH: [Self; 2] = [Self::Send, Self::Hold];

    fn word(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::Hold => "hold",
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A choice of VMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vms {
    /// All, also those that do not exist yet.
    Any,
    /// These, by their ids. A VM's name is no right: whoever starts a VM chooses it.
    Only(Vec<VmId>),
}

impl Vms {
    /// None.
    pub const NONE: Self = Self::Only(Vec::new());

    fn has(&self, vm: &VmId) -> bool {
        match self {
            Self::Any => true,
            Self::Only(ids) => ids.contains(vm),
        }
    }

    fn add(&mut self, more: Option<VmId>) {
        match (&mut *self, more) {
            (Self::Any, _) => {}
            (_, None) => *self = Self::Any,
            (Self::Only(ids), Some(id)) => ids.push(id),
        }
    }
}

impl fmt::Display for Vms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any VM"),
            Self::Only(ids) if ids.is_empty() => f.write_str("no VM"),
            Self::Only(ids) => {
                let ids: Vec<String> = ids.iter().map(VmId::to_string).collect();
                write!(f, "VM {}", ids.join(", "))
            }
        }
    }
}

/// The rights of a host, of an arbiter or of an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What it may send.
    pub send: Vms,
    /// What it may hold.
    pub hold: Vms,
    /// Whether it may serve an arbiter. Hosts of VMs may not: one of them could win every generation.
    pub arbiter: bool,
    /// Whether it may do everything at the API of every host's node. Hosts may not: what one of them can do to another
    /// one's VMs would otherwise be more than the other rights say.
    pub operate: bool,
}

impl Grant {
    /// Both rights to all VMs: what a host of a pair needs.
    pub const ALL: Self = Self { send: Vms::Any, hold: Vms::Any, arbiter: false, operate: false };
    /// No right at all.
    pub const NONE: Self = Self { send: Vms::NONE, hold: Vms::NONE, arbiter: false, operate: false };
    /// That of a third machine, which has no VMs.
    pub const ARBITER: Self = Self { send: Vms::NONE, hold: Vms::NONE, arbiter: true, operate: false };
    /// That of a person or a program, at no host.
    pub const OPERATOR: Self = Self { send: Vms::NONE, hold: Vms::NONE, arbiter: false, operate: true };

    fn of(&self, right: Right) -> &Vms {
        match right {
            Right::Send => &self.send,
            Right::Hold => &self.hold,
        }
    }

    /// Whether it has this right to this VM.
    pub fn allows(&self, right: Right, vm: &VmId) -> bool {
        self.of(right).has(vm)
    }

    /// Whether it is a host of VMs.
    pub fn has_vms(&self) -> bool {
        Right::BOTH.into_iter().any(|right| *self.of(right) != Vms::NONE)
    }

    /// Whether it is an operator's, and no machine's: nothing answers with it.
    pub fn is_operators(&self) -> bool {
        self.operate && !self.arbiter && !self.has_vms()
    }

    /// Whether it has any right to this VM.
    pub fn concerns(&self, vm: &VmId) -> bool {
        Right::BOTH.into_iter().any(|right| self.allows(right, vm))
    }

    /// Whether it has any right to this VM; to every VM, if its id is not known.
    pub(crate) fn concerns_all_or(&self, vm: Option<&VmId>) -> bool {
        match vm {
            Some(vm) => self.concerns(vm),
            None => Right::BOTH.into_iter().any(|right| *self.of(right) == Vms::Any),
        }
    }

    /// The options of `outlive keys issue` for a certificate with these rights and one to another VM; without `right`,
    /// the one that it has for other VMs. Both rights are to the same VMs there, so one may become wider.
    pub(crate) fn options_with(&self, right: Option<Right>, vm: &VmId) -> String {
        let has = |right| *self.of(right) != Vms::NONE;
        let has_any = self.has_vms();
        let wants = |it| has(it) || right.map_or(!has_any, |right| right == it || !has_any);
        let mut options = Vec::new();
        if Right::BOTH.into_iter().any(|right| *self.of(right) == Vms::Any) {
            options.push("--vm any".to_owned());
        } else {
            let mut ids = vec![vm];
            for right in Right::BOTH {
                if let Vms::Only(more) = self.of(right) {
                    let new: Vec<_> = more.iter().filter(|id| !ids.contains(id)).collect();
                    ids.extend(new);
                }
            }
            options.extend(ids.into_iter().map(|id| format!("--vm {id}")));
        }
        if !Right::BOTH.into_iter().all(wants) {
            let only = Right::BOTH.into_iter().filter(|right| wants(*right));
            options.extend(only.map(|right| format!("--{right}")));
        }
        if self.arbiter {
            options.push("--arbiter".to_owned());
        }
        options.join(" ")
    }

    /// The names in a certificate.
    pub(super) fn to_names(&self) -> Vec<String> {
        let names = |right: Right| match self.of(right) {
            Vms::Any => vec![format!("{SCHEME}{right}:any")],
            Vms::Only(ids) => ids.iter().map(|id| format!("{SCHEME}{right}:{id}")).collect(),
        };
        let others = [(self.arbiter, ARBITRATE), (self.operate, OPERATE)].into_iter().filter(|(has, _)| *has);
        let others = others.map(|(_, right)| format!("{SCHEME}{right}:any"));
        Right::BOTH.into_iter().flat_map(names).chain(others).collect()
    }

    /// Reads the names of a certificate. What it does not know gives no right.
    pub(super) fn from_names<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut grant = Self::NONE;
        for name in names {
            let Some((right, vm)) = name.strip_prefix(SCHEME).and_then(|rest| rest.split_once(':')) else {
                continue;
            };
            let vms = match right {
                "send" => &mut grant.send,
                "hold" => &mut grant.hold,
                ARBITRATE => {
                    grant.arbiter |= vm == "any";
                    continue;
                }
                OPERATE => {
                    grant.operate |= vm == "any";
                    continue;
                }
                _ => continue,
            };
            match (vm, vm.parse()) {
                ("any", _) => vms.add(None),
                (_, Ok(id)) => vms.add(Some(id)),
                _ => {}
            }
        }
        grant
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others =
            [(self.arbiter, "may be the arbiter"), (self.operate, "may operate the nodes of all hosts")];
        let others: Vec<_> = others.into_iter().filter(|(has, _)| *has).map(|(_, what)| what).collect();
        f.write_str(&others.join(", "))?;
        if !others.is_empty() {
            if !self.has_vms() {
                return Ok(());
            }
            f.write_str(", ")?;
        }
        if self.send == self.hold {
            write!(f, "may send and hold {}", self.send)
        } else {
            write!(f, "may send {}, may hold {}", self.send, self.hold)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_come_back_from_their_names_and_strange_names_give_none() {
        let (one, two) = (VmId([1; 16]), VmId([2; 16]));
        let grant = Grant { send: Vms::Only(vec![one, two]), hold: Vms::Any, ..Grant::NONE };
        let names = grant.to_names();
        assert_eq!(names.last().unwrap(), "outlive:hold:any");
        assert_eq!(Grant::from_names(names.iter().map(String::as_str)), grant);
        assert!(grant.allows(Right::Send, &two) && !grant.allows(Right::Send, &VmId([3; 16])));
        let strange = [
            "outlive:send",
            "outlive:send:",
            "outlive:send:ANY",
            "outlive:run:any",
            "https:send:any",
            "",
            "outlive:arbitrate:",
            "outlive:operate:",
            "outlive:operate:03030303030303030303030303030303",
        ];
        assert_eq!(Grant::from_names(strange.into_iter()), Grant::NONE);
    }

    /// A new certificate replaces the old one, so the advice has what that allowed.
    #[test]
    fn the_advice_to_allow_one_more_vm_keeps_what_is_allowed() {
        let (one, two, new) = (VmId([1; 16]), VmId([2; 16]), VmId([3; 16]));
        let only = |ids: &[VmId]| Vms::Only(ids.to_vec());
        let (send, hold) = (Some(Right::Send), Some(Right::Hold));
        let none = Grant::NONE;
        for (grant, right, options) in [
            (none.clone(), hold, format!("--vm {new}")),
            (Grant::ARBITER, None, format!("--vm {new} --arbiter")),
            (
                Grant { send: only(&[one, two]), hold: only(&[one, two]), ..Grant::NONE },
                send,
                format!("--vm {new} --vm {one} --vm {two}"),
            ),
            (Grant { hold: only(&[one]), ..none.clone() }, hold, format!("--vm {new} --vm {one} --hold")),
            (Grant { hold: only(&[one]), ..none.clone() }, None, format!("--vm {new} --vm {one} --hold")),
            (Grant { hold: only(&[one]), ..none.clone() }, send, format!("--vm {new} --vm {one}")),
            (
                Grant { send: only(&[two]), hold: only(&[one]), ..Grant::NONE },
                send,
                format!("--vm {new} --vm {two} --vm {one}"),
            ),
            (Grant { send: Vms::Any, ..none }, hold, "--vm any".to_owned()),
        ] {
            assert_eq!(grant.options_with(right, &new), options, "{grant}");
        }
    }

    /// No right to VMs is one to arbitrate, and the other way round.
    #[test]
    fn an_arbiter_is_no_host_of_vms() {
        for grant in [Grant::ARBITER, Grant { arbiter: true, ..Grant::ALL }, Grant::ALL] {
            let names = grant.to_names();
            assert_eq!(Grant::from_names(names.iter().map(String::as_str)), grant, "{names:?}");
        }
        let vm = VmId([1; 16]);
        assert!(!Grant::ARBITER.concerns(&vm) && Grant::ALL.concerns(&vm) && !Grant::ALL.arbiter);
        assert_eq!(Grant::ARBITER.to_string(), "may be the arbiter");
        assert_eq!(
            Grant { arbiter: true, ..Grant::ALL }.to_string(),
            "may be the arbiter, may send and hold any VM"
        );
    }

    /// No host is an operator, and an operator is no host.
    #[test]
    fn an_operator_is_no_host() {
        let both = Grant { operate: true, ..Grant::ALL };
        for grant in [Grant::OPERATOR, both.clone(), Grant { arbiter: true, ..both.clone() }] {
            let names = grant.to_names();
            assert_eq!(Grant::from_names(names.iter().map(String::as_str)), grant, "{names:?}");
        }
        assert_eq!(Grant::OPERATOR.to_names(), ["outlive:operate:any"]);
        assert!(Grant::OPERATOR.is_operators() && !Grant::OPERATOR.has_vms());
        assert!(!both.is_operators() && !Grant::ARBITER.is_operators() && !Grant::ALL.operate);
        assert!(!Grant::OPERATOR.concerns(&VmId([1; 16])));
        assert_eq!(Grant::OPERATOR.to_string(), "may operate the nodes of all hosts");
        assert_eq!(both.to_string(), "may operate the nodes of all hosts, may send and hold any VM");
    }
}
