//! What a process says to somebody who has typed its command, for somebody who has a node.

/// What the process of a VM says, and what that is where a node has started the process.
const WORDS: [(&str, &str); 4] = [
    ("end this command there, run", "say `outlive vm stop {vm} --only-standby` there, then"),
    ("start this command again", "say `outlive vm start {vm}`"),
    (
        "run this command once without --or-standby",
        "say `outlive vm stop {vm} --only-standby` and run the VM's command once by hand, without --or-standby \
         (docs/node.md)",
    ),
    ("in place of --or-standby", "in place of --or-standby (docs/node.md)"),
];

/// The same in the words of a node that keeps the VM of this name.
pub(crate) fn of_node(said: &str, vm: &str) -> String {
    let mut text = said.to_owned();
    for (of_command, of_node) in WORDS {
        text = text.replace(of_command, &of_node.replace("{vm}", vm));
    }
    // A process looks at its images when it starts.
    if text.contains("outlive image accept") && !text.contains("outlive vm s") {
        text += &format!(
            "; before that, say `outlive vm stop {vm} --only-standby`, and `outlive vm start {vm}` afterwards"
        );
    } else if text.contains(" --accept-") && !text.contains("outlive vm s") {
        text += &format!(
            "; a danger is accepted by hand: `outlive vm stop {vm} --only-standby`, its command once with the option and \
             without --or-standby, then `outlive vm start {vm}` (docs/node.md)"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_name_the_commands_of_the_node() {
        let empty = "the disk image /i is empty, so this host waits for one that has the VM; if there is no VM yet, begin \
                     it on one host: end this command there, run `outlive image accept --yes /i` (with data), and start \
                     this command again";
        let said = of_node(empty, "web");
        assert!(said.ends_with(
            "begin it on one host: say `outlive vm stop web --only-standby` there, then `outlive image accept --yes /i` \
             (with data), and say `outlive vm start web`"
        ), "{said}");
        for other in [
            "run `outlive image accept --yes /i` once",
            "start with --accept-replica",
            "run this command once \
                      without --or-standby, here",
        ] {
            assert!(of_node(other, "web").contains("`outlive vm stop web --only-standby`"), "{other}");
        }
        assert_eq!(of_node("no primary has come yet", "web"), "no primary has come yet");
    }
}
