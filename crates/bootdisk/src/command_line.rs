//! The kernel's command line: the entry's words, what the machine needs, and the operator's words.

/// The console of a machine that has a serial port and no screen.
const CONSOLE: &str = "console=ttyS0";

/// The entry's command line with the operator's words behind it, so that of a word that counts once the operator's
/// wins. Unless one of them names a console that the machine has, `console=ttyS0` comes before the operator's words.
/// Nothing is removed. What stands behind `--` is for the guest's first process and stays there.
pub fn extend(entry: &str, append: &str) -> String {
    let (kernel, init) = match entry.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (entry, None),
    };
    let has_console = |text: &str| {
        let mut names = text.split_whitespace().filter_map(|word| word.strip_prefix("console="));
        names.any(|name| name.starts_with("ttyS") || name.starts_with("hvc"))
    };
    let console = (!has_console(kernel) && !has_console(append)).then_some(CONSOLE);
    let init = init.map(|init| format!("-- {}", init.trim()));
    let all = [Some(kernel.trim()), console, Some(append.trim()), init.as_deref()];
    all.into_iter().flatten().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operators_words_come_last_and_a_console_is_there() {
        let cases = [
            ("root=/dev/sda1 ro quiet", "", "root=/dev/sda1 ro quiet console=ttyS0"),
            ("ro console=tty0", "root=/dev/vda1", "ro console=tty0 console=ttyS0 root=/dev/vda1"),
            ("ro console=ttyS0,115200n8", "panic=10", "ro console=ttyS0,115200n8 panic=10"),
            ("ro", "console=hvc0", "ro console=hvc0"),
            ("ro -- single", "panic=1", "ro console=ttyS0 panic=1 -- single"),
            ("", "", "console=ttyS0"),
        ];
        for (entry, append, line) in cases {
            assert_eq!(extend(entry, append), line);
        }
    }
}
